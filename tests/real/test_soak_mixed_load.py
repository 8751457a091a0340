"""The soak of the data path with real engines (`make soak`), a fifth as long as the one with the stand-in.

Variables: see tests/e2e/test_soak_mixed_load.py.
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest
from tests.conftest import live_installation
from tests.soak import real
from tests.soak.campaign import Campaign
from tests.soak.site import Site

PERCENT = int(os.environ.get("PILOTLIGHT_SOAK_PERCENT", "100"))
SECONDS = float(os.environ.get("PILOTLIGHT_SOAK_SECONDS", 900 * PERCENT / 100)) / 5
SEED = int(os.environ.get("PILOTLIGHT_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)

pytestmark = [pytest.mark.soak, pytest.mark.engine]


def test_streams_of_real_engines_that_die_all_along():
    with tempfile.TemporaryDirectory() as folder:
        census = Path(folder) / "census.json"
        with live_installation(**real.settings(census)) as installation:
            site = Site(
                port=int(installation.url.rpartition(":")[2]),
                key=installation.key,
                home=installation.home,
                pid=installation.process.pid,
                log=installation.home / "up.log",
            )

            def end() -> None:
                installation.stop()
                assert installation.process.returncode == 0
                assert "Traceback" not in site.log.read_text()

            Campaign(site, real.plan(seconds=SECONDS, seed=SEED, census=census)).run(end)
