"""Triton kernels for use inside a PyTorch process on a MetaX GPU, or on an NVIDIA one for testing.

Syntax of Triton 3.0, blocks for waves of 64 lanes and 64 KiB of shared memory, float32 dots in IEEE arithmetic. Whatever
grows with a batch lies on the first axis of a grid: the others end at 65535. This package
is the one part of the backend that imports torch. `bridge` decides which op of ours goes to which kernel.
"""
