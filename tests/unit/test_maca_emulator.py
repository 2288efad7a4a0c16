"""The emulated machine: matrix instructions by their documented layout, and what it catches.

Each test of the second part breaks one rule in a kernel that is right.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from spikingbrain.backend_maca.emulate import ORDERS, Kernels, build, compiler

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
