"""NVIDIA devices: kernels in CUDA C++, compiled on first use for the device at hand."""

from qpalette.backends.cuda.backend import CudaBackend

backend = CudaBackend()
