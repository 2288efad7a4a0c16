"""Triton kernels for use inside a PyTorch process on a MetaX GPU, or on an NVIDIA one for testing.

Syntax of Triton 3.0, blocks for waves of 64 lanes and 64 KiB of shared memory, float32 dots in IEEE arithmetic. This package
is the one part of the backend that imports torch. `bridge` decides which op of ours goes to which kernel.
"""
