"""Triton kernels without a GPU: compiled and read, what they move counted, their speed estimated."""
