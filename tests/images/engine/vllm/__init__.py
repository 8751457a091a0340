"""A stand-in for vLLM in a test's base image, as far as its parser is asked and its server is started."""

from vllm._version import __version__

__all__ = ["__version__"]
