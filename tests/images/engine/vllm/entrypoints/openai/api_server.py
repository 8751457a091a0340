"""The server: the project's fake engine."""

import sys

sys.path.insert(0, "/opt/pilotlight/src")

from pilotlight.testing.fake_engine import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
