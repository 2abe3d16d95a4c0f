"""Triton kernels, one file a kernel family; installed as `clipfast.kernels`."""
