"""The model of a C550: what it counts in kernels, and how launches depend on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("torch_mlir")

from test_maca import compile_text
from test_maca_scheduled import PAIR, add_kernel, mem, module_text, ten, total
from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.backend_maca.plan.cost import UNSEEN, Card, estimate
from spikingbrain.passes.kernels.builders import compare, f32, get, index, launch, loop, put, size, when
from spikingbrain.passes.wave_kernels.builders import (
    barrier,
    kernel,
    matrix_multiply,
    matrix_zero,
    shared,
    thread,
)

FREE = Card(launch=0.0, barrier=0.0, waves=1e-9)  # of memory alone


def built(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the plan of a module and the work of its kernels."""
    report: dict[str, Any] = {}
    code = compile_text(text, report=report, work=True)  # type: ignore[arg-type]
    return json.loads(code["plan.json"]), report["work"]


def counted(body: Any, *shapes: str) -> Mapping[str, Any]:
    """Returns the work of a kernel ``probe`` with these arguments, the last one written."""
    types = [f"tensor<{shape}>" for shape in shapes]

    def kernels() -> None:
        kernel("probe", [mem(shape) for shape in shapes], 64, lambda block, memory: body(memory))

    def build(values: list[ir.Value]) -> ir.Value:
        one, result = index(1), ten(shapes[-1])
        return launch("probe", result, [one, one, one], values, [], len(shapes) - 1).result

    _, work = built(module_text(types, types[-1], build, kernels))
    found: Mapping[str, Any] = work["probe"]["body"]
    return found


def test_a_launch_moves_its_bytes() -> None:
    plan, work = built(module_text(PAIR, PAIR[0], lambda v: total(*v), add_kernel))
    assert work["total"]["body"]["branches"]  # the guard of the last block
    n = 1 << 24
    seconds = estimate(plan, work, {"main": [(n,), (n,)]}, FREE)["main"]
    assert seconds == pytest.approx(3 * 4 * n / FREE.bandwidth)
    launched = estimate(plan, work, {"main": [(64,), (64,)]}, Card(waves=1e-9))["main"]
    assert Card().launch < launched < 1.01 * Card().launch


def test_lanes_count_once_where_they_read_one_place() -> None:
    def body(memory: list[ir.Value]) -> None:
        x, y = memory
        put(arith.addf(get(x, [thread()]), get(x, [index(0)])), y, [thread()])

    found = counted(body, "64xf32", "64xf32")
    assert found["read"] == 4 + 4 / 64 and found["written"] == 4 and found["arithmetic"] == 1


def test_loops_keep_their_bounds() -> None:
    def body(memory: list[ir.Value]) -> None:
        x, y = memory
        tile, rounds = shared([64], ir.F32Type.get()), size(x, 0)

        def step(at: ir.Value) -> None:
            put(f32(1.0), tile, [thread()])
            barrier()

        loop(0, rounds, 1, step)
        put(get(tile, [thread()]), y, [thread()])

    found = counted(body, "?xf32", "64xf32")
    ((low, high, by, inside),) = found["loops"]
    assert (low, high, by) == (0, ["dim", 0, 0], 1) and inside == {"shared": 4, "barriers": 1}


def test_matrix_instructions_count_operations() -> None:
    def body(memory: list[ir.Value]) -> None:
        x, y = memory
        value = get(x, [thread()])
        put(ir_element(matrix_multiply("f32", value, value, matrix_zero("f32"))), y, [thread()])

    assert counted(body, "64xf32", "64xf32")["matrix f32"] == 2 * 16 * 16 * 4


def ir_element(value: ir.Value) -> ir.Value:
    from spikingbrain.passes.wave_kernels.builders import element_at

    return element_at(value, 0)


def test_what_depends_on_data_is_told_apart() -> None:
    def body(memory: list[ir.Value]) -> None:
        counts, y = memory
        many = arith.index_cast(ir.IndexType.get(), get(counts, [index(0)]))
        loop(0, many, 1, lambda at: put(f32(0.0), y, [thread()]))
        when(compare("sgt", many, index(3)), lambda: put(f32(1.0), y, [thread()]))

    found = counted(body, "64xi32", "64xf32")
    assert found["loops"][0][:3] == [0, None, 1] and found["branches"][0][0] is None
    assert UNSEEN > 1


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "registers", "blocks"),
    [(64, 0, 32, 16), (1024, 0, 32, 2), (256, 40 << 10, 32, 1), (256, 8 << 10, 32, 8), (512, 0, 128, 2)],
)
def test_blocks_share_a_processor(threads: int, shared_bytes: int, registers: int, blocks: int) -> None:
    assert Card().resident(threads, shared_bytes, registers) == blocks
