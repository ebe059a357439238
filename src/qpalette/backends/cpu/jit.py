"""How every kernel of this backend is compiled."""

from numba import njit

# IEEE arithmetic in the order written (no fast-math): results must not depend on what the compiler fancies.
kernel = njit(error_model="numpy", boundscheck=False)
parallel_kernel = njit(parallel=True, error_model="numpy", boundscheck=False)
