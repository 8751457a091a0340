"""`python -m pilotlight.worker`."""

from __future__ import annotations

import sys

from pilotlight.worker.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
