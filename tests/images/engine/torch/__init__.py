"""A stand-in for torch in a test's base image: a build for CPUs."""

from torch import version

__version__ = "2.13.0+cpu"
__all__ = ["version"]
