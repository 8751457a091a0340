"""`python -m pilotlight` is the command `pilotlight`."""

from pilotlight.cli import main

if __name__ == "__main__":
    main()
