"""Its version."""

__version__ = version = "0.32.0"
