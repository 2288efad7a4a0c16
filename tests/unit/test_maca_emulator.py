"""The emulated machine: matrix instructions by their documented layout, and what it catches.

Each test of the second part breaks one rule in a kernel that is right.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikingbrain.backend_maca.run.emulate import ORDERS, KernelFault, Kernels, build, compiler, poison

pytestmark = pytest.mark.skipif(shutil.which(compiler()) is None, reason="no C++ compiler")
Array = np.ndarray[Any, Any]

# One wave multiplies 16 x K by (16 x K)^T: each lane loads what it holds of both, each stores its four sums.
MMA = """
#include <mc_runtime.h>
#include <stdint.h>
typedef __NATIVE_VECTOR__(4, SUM) sums_t;
typedef HELD held_t;
extern "C" __global__ void __launch_bounds__(64)
multiply(const char* __restrict__ x, const char* __restrict__ y, SUM* __restrict__ d) {
  const int lane = threadIdx.x, row = lane % 16, quarter = lane / 16;
  const held_t a = *reinterpret_cast<const held_t*>(x + (row * 4 + quarter) * sizeof(held_t));
  const held_t b = *reinterpret_cast<const held_t*>(y + (row * 4 + quarter) * sizeof(held_t));
  sums_t c;
  for (int v = 0; v < 4; ++v) c[v] = d[(4 * quarter + v) * 16 + row];
  c = __builtin_mxc_mma_NAME(a, b, c);
  for (int v = 0; v < 4; ++v) d[(4 * quarter + v) * 16 + row] = c[v];
}
"""
INSTRUCTIONS = {
    "16x16x16i8": ("int", "int", np.int8, np.int32),
    "16x16x16f16": ("__NATIVE_VECTOR__(2, uint32_t)", "float", np.float16, np.float32),
    "16x16x16bf16": ("__NATIVE_VECTOR__(4, uint16_t)", "float", "bf16", np.float32),
    "16x16x8tf32": ("__NATIVE_VECTOR__(2, float)", "float", "tf32", np.float32),
    "16x16x4f32": ("float", "float", np.float32, np.float32),
    "16x16x4f64": ("double", "double", np.float64, np.float64),
}


def operand(kind: Any, k: int, seed: int) -> tuple[Array, Array]:
    """Returns a 16 x k matrix, as memory and as the numbers that the instruction sees."""
    random = np.random.default_rng(seed)
    if kind is np.int8:
        memory = random.integers(-128, 128, (16, k)).astype(np.int8)
        return memory, memory.astype(np.int32)
    numbers = random.standard_normal((16, k)).astype(np.float32)
    if kind in ("bf16", "tf32"):
        kept = numbers.view(np.uint32) & np.uint32(0xFFFF0000 if kind == "bf16" else 0xFFFFE000)
        memory = (kept >> 16).astype(np.uint16) if kind == "bf16" else numbers
        return memory, kept.view(np.float32)
    memory = numbers.astype(kind)
    return memory, memory.astype(np.float64 if kind is np.float64 else np.float32)


def multiply(name: str, x: Array, y: Array, d: Array, source: str = MMA, order: str = "forward") -> None:
    held, sums, _, _ = INSTRUCTIONS[name]
    text = source.replace("HELD", held).replace("SUM", sums).replace("NAME", name)
    Kernels(build(text, ["multiply"]), order).launch("multiply", (1, 1, 1), (64, 1, 1), 0, [x, y, d])


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_matrix_instructions_follow_the_documented_layout(name: str) -> None:
    kind, sums = INSTRUCTIONS[name][2:]
    k = int("".join(c if c.isdigit() else " " for c in name.split("x")[2]).split()[0])
    (x, left), (y, right) = operand(kind, k, 1), operand(kind, k, 2)
    start = np.random.default_rng(3).integers(-9, 9, (16, 16)).astype(sums)
    expected = start.copy()
    for i in range(k):  # in order of k, one rounding for each product and each sum
        expected = expected + left[:, i, None] * right[None, :, i]
    for order in ORDERS:
        d = start.copy()
        multiply(name, x, y, d, order=order)
        np.testing.assert_array_equal(d, expected)


def test_swapped_operands_of_a_matrix_instruction_show() -> None:
    x, y = operand(np.int8, 16, 1)[0], operand(np.int8, 16, 2)[0]
    d, swapped = np.zeros((16, 16), np.int32), np.zeros((16, 16), np.int32)
    multiply("16x16x16i8", x, y, d)
    multiply("16x16x16i8", x, y, swapped, MMA.replace("(a, b, c)", "(b, a, c)"))
    np.testing.assert_array_equal(d, x.astype(np.int32) @ y.T.astype(np.int32))
    np.testing.assert_array_equal(swapped, d.T)
    assert (swapped != d).any()


# Sums of blocks of 128: a butterfly in each wave, then shared memory.
TOTAL = """
#include <mc_runtime.h>
extern "C" __global__ void __launch_bounds__(128) total(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float waves[2];
  const int thread = threadIdx.x;
  float sum = x[blockIdx.x * 128 + thread];
  // EARLY
  for (int d = 32; d > 0; d >>= 1) sum = sum + __shfl_xor_sync(0xffffffffffffffffULL, sum, d, 64);
  if (thread % 64 == 0) waves[thread / 64] = sum;
  // LATE
  __syncthreads();
  if (thread == 0) y[blockIdx.x] = waves[0] + waves[1];
}
"""


def launch(library: Path, kernel: str, order: str) -> Array:
    """Returns by how much the sums of three blocks are wrong."""
    x, y = np.arange(3 * 128, dtype=np.float32), np.zeros(3, np.float32)
    Kernels(library, order).launch(kernel, (3, 1, 1), (128, 1, 1), 0, [x, y])
    return y - x.reshape(3, 128).sum(1)


@pytest.mark.parametrize("flags", [(), ("-DSB_UCONTEXT",)])
def test_the_right_kernel_passes_in_every_order(flags: tuple[str, ...]) -> None:
    for order in ORDERS:
        assert not launch(build(TOTAL, ["total"], flags), "total", order).any()


# What is broken: text and replacement, the message. The numbers of lines are those of TOTAL, after the replacement.
FAULTS = {
    "early return before a shuffle": (
        "// EARLY", "if (thread >= 100) return;",
        "__shfl_xor_sync in line 8 is reached by only 36 of 64 threads, 28 have left the kernel",
    ),
    "a barrier that exiting threads skip": (
        "// LATE", "if (thread >= 64) return;",
        "__syncthreads in line 11 is reached by only 64 of 128 threads, 64 have left the kernel",
    ),
    "two barriers in two branches": (
        "__syncthreads();", "if (thread < 64) {\n __syncthreads();\n } else {\n __syncthreads();\n }",
        "__syncthreads in line 14 meets one in line 12",
    ),
    "a ballot that half a wave takes part in": (
        "// EARLY", "if (thread % 64 < 32) sum += __ballot_sync(0xffffffffffffffffULL, 0);",
        "__shfl_xor_sync in line 8 meets one in line 7",
    ),
    "a matrix instruction under a condition": (
        "// LATE", "__NATIVE_VECTOR__(4, int) c = {};\nif (thread < 32) c = __builtin_mxc_mma_16x16x16i8(1, 1, c);",
        "__builtin_mxc_mma in line 11 is reached by only 32 of 64 threads",
    ),
    "a mask of 32 lanes": (
        "0xffffffffffffffffULL", "0xffffffff", "__shfl_xor_sync in line 8 without the full 64-bit mask",
    ),
    "no barrier": (
        "__syncthreads();", "",
        r"line \d+ (reads|writes) shared memory that thread \d+ of the block has (read|written), without a barrier",
    ),
    "lanes counted to 32": (
        "thread % 64 == 0", "thread % 32 == 0",
        "line 9 writes shared memory that thread (0|32|64|96) of the block has written, without a barrier",
    ),
    "shared memory written again before all have read it": (
        "y[blockIdx.x] = waves[0] + waves[1];", "y[blockIdx.x] = waves[0] + waves[1];\n if (thread == 64) waves[1] = 0;",
        "line 13 writes shared memory that thread 0 of the block has read, without a barrier",
    ),
    "an element written while other threads read it": (
        "// EARLY", "if (thread == 5) y[blockIdx.x] = 1;\n sum += y[blockIdx.x];",
        r"line [78] (reads|writes) global memory that thread \d+ of the block has (read|written), without a barrier",
    ),
    "two threads write an element": (
        "thread == 0", "thread < 2", "line 12 writes global memory that thread [01] of the block has written",
    ),
    "two blocks write an element": (
        "y[blockIdx.x]", "y[blockIdx.x / 2]", "line 12 writes global memory that thread 0 of another block has written",
    ),
    "a read past the end": (
        "// EARLY", "sum += x[blockIdx.x * 128 + thread + 256];",
        "line 7 reads 4 bytes outside all buffers; the nearest is pointer argument 0: its byte 1[0-9]* of 1536",
    ),
    "a read before the start": (
        "// EARLY", "sum += x[thread - 128 * int(blockIdx.x)];", "line 7 reads 4 bytes outside all buffers",
    ),
    "a write past the end": (
        "y[blockIdx.x]", "y[blockIdx.x + 1]", "line 12 writes 4 bytes outside all buffers",
    ),
    "shared memory past its end": (
        "waves[thread / 64]", "waves[thread / 64 + 1]", "line 9 reads or writes element 2 outside an array",
    ),
    "a vector that is not aligned": (
        "// EARLY", "if (thread == 3) sum += (*reinterpret_cast<const __NATIVE_VECTOR__(4, float)*>(x + 3))[0];",
        "line 7 reads or writes a vector that is not aligned",
    ),
    "a division by zero": (
        "// EARLY", "sum += thread / int(blockIdx.x);", "line 7 divides by zero",
    ),
}  # fmt: skip


# What no rule forbids and gives wrong numbers: text and replacement.
WRONG = {
    "a butterfly over 32 lanes": ("int d = 32", "int d = 16"),
    "registers that nobody has written": (
        "// EARLY",
        "float own[4];\n own[thread % 4] = sum;\n sum = own[thread / 64];",
    ),
    "shared memory that nobody has written": ("if (thread % 64 == 0)", "if (thread == 0)"),
}


@pytest.fixture(scope="module")
def broken() -> Path:
    """All broken kernels, in one library: total_0 and so on."""
    changes = [(old, new) for old, new, *_ in [*FAULTS.values(), *WRONG.values()]]
    variants = [
        TOTAL.replace(old, new).replace(" total(", f" total_{i}(") for i, (old, new) in enumerate(changes)
    ]
    assert len(set(variants)) == len(changes)
    source = "".join(f"#line 1\n{text}" for text in [*variants, TOTAL.replace(" total(", " right(")])
    return build(source, ["right", *(f"total_{i}" for i in range(len(changes)))])


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_rule_is_reported(name: str, broken: Path) -> None:
    messages = []
    for order in ORDERS:
        try:
            launch(broken, f"total_{list(FAULTS).index(name)}", order)
        except KernelFault as fault:
            messages.append(str(fault))
    assert not launch(broken, "right", "forward").any()  # the machine goes on
    assert len(messages) == len(ORDERS)  # whichever order threads run in
    assert any(re.search(FAULTS[name][2], text) for text in messages), messages


@pytest.mark.parametrize("name", WRONG)
def test_a_habit_of_other_machines_shows(name: str, broken: Path) -> None:
    wrong = launch(broken, f"total_{len(FAULTS) + list(WRONG).index(name)}", "forward")
    assert wrong.all()  # not-a-number is not zero


def test_a_table_of_constants_may_be_read() -> None:
    table = "const float table[5] = {0.5f, 0.25f, 0.125f, 2.5f, 1.5f};\n sum += table[thread % 5] - table[thread % 5];"
    assert not launch(build(TOTAL.replace("// EARLY", table), ["total"]), "total", "forward").any()


def test_unwritten_memory_is_not_a_number() -> None:
    for kind in (np.float32, np.float16):
        memory = np.ones(7, kind)
        poison(memory)
        assert np.isnan(memory).all()
    memory = np.ones(3, np.int8)
    poison(memory)
    assert list(memory) == [-51, -1, -51]


def test_a_pointer_of_unknown_extent_turns_the_checks_of_bounds_off(broken: Path) -> None:
    x, y = np.arange(3 * 128, dtype=np.float32), np.zeros(4, np.float32)
    arguments = [ctypes.c_void_p(a.ctypes.data) for a in (x, y)]
    past_the_end = f"total_{list(FAULTS).index('a write past the end')}"
    Kernels(broken).launch(past_the_end, (3, 1, 1), (128, 1, 1), 0, arguments)
    np.testing.assert_array_equal(y[1:], x.reshape(3, 128).sum(1))
