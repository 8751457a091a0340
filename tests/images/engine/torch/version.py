"""No CUDA."""

cuda = None
