"""Kernels that schedule blocks of 64-lane waves by hand, in the ``gpu`` dialect: each function is one block's work."""
