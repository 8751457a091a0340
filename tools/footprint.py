"""Measures the base installation: locks and project in a fresh environment, in bytes on disk.

    python tools/footprint.py

Prints one JSON line like every benchmark, and fails above the limit: the gateway must stay small
(docs/decisions/0002-dependencies.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_BYTES = 250_000_000


def disk_bytes(folder: Path) -> int:
    """Bytes that the folder's files take on disk, as `du` counts them."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def main() -> int:
    """Build, measure, print; returns 1 above the limit."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "venv"
        subprocess.run([sys.executable, "-I", "-m", "venv", home], check=True)
        pip = [home / "bin" / "python", "-I", "-m", "pip", "-qq", "install", "--no-deps"]
        for lock in ("base.lock", "build.lock"):
            subprocess.run([*pip, "--require-hashes", "-r", ROOT / "requirements" / lock], check=True)
        subprocess.run([*pip, "--no-build-isolation", "--no-index", ROOT], check=True)
        size = disk_bytes(home)
    print(
        json.dumps({"bench": "footprint", "case": "base", "metric": "disk", "value": size, "unit": "bytes"})
    )
    if size >= LIMIT_BYTES:
        print(f"the base installation takes {size} bytes; the limit is {LIMIT_BYTES}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
