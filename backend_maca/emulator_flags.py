"""How the C++ compiler builds the emulated machine and its kernels."""

from __future__ import annotations

COMMON_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",  # each library has a machine of its own
    "-fno-exceptions",
    "-ffp-contract=off",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-w",
)
MACHINE_FLAGS = ("-O2",)
KERNEL_FLAGS = (
    "-O1",  # most time goes into the machine; -O2 takes half as long again to compile
    "-g1",  # lines, for messages
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,alignment,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
)
