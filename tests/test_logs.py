"""The gateway's log when nobody can read it any more."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, structlog
from pilotlight.logs import configure_logging, say
from pilotlight.settings import LogSettings
configure_logging(LogSettings(json_lines={json}))
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)
log = structlog.get_logger()
log.info("nobody_reads_this")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("nor_this")
say("nor this")
print("alive")
"""


def test_a_reader_that_has_gone_takes_nothing_down():
    for json in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(json=json)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout == "alive\n"
