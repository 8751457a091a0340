"""What observation costs an installation that nobody watches."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import pilotlight.bootstrap
print(*{"prometheus_client", "opentelemetry.sdk", "google.protobuf", "requests"} & sys.modules.keys())
"""


def test_a_start_imports_neither_prometheus_nor_opentelemetry():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
