"""x86 and Arm processors: kernels compiled by numba on first use, for the machine at hand."""

from qpalette.backends.cpu.backend import CpuBackend

backend = CpuBackend()
