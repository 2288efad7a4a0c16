"""IREE as a backend: CPUs, Vulkan, CUDA, ROCm."""

SCOPE = "model"  # the scope under which weights are named in modules; compiler and runtime must agree
