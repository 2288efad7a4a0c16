"""Launches whose results nothing reads for some sizes have no blocks there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch_mlir")

from spikingbrain.backend_maca.plan.plan import evaluate
from spikingbrain.backend_maca.plan.unread import skip_unread

ROWS = ["dim", 0, 0]
FEW = ["le", ROWS, 8]


def step(kernel: str, *buffers: int, blocks: Any = 3) -> dict[str, Any]:
    return {"kernel": kernel, "grid": [blocks, 1, 1], "arguments": [{"buffer": b} for b in buffers]}


def product(*buffers: int, rows: Any) -> dict[str, Any]:
    arguments = [{"buffer": b} for b in buffers]
    return {"library": "mcblasGemmEx", "arguments": arguments, "sizes": [7, rows, 5]}


def blocks(steps: list[dict[str, Any]], rows: int) -> int:
    """Returns the blocks of the first launch, after the pass; buffer 0 is the input, 4 the result, the others temporary."""
    roles = ["input", "temporary", "temporary", "temporary", "temporary"]
    entry = {"buffers": [{"role": r} for r in roles], "launches": steps, "outputs": [{"buffer": 4}]}
    names = {s["kernel"] for s in steps if "kernel" in s}
    count = {s["kernel"]: len(s["arguments"]) for s in steps if "kernel" in s}
    kernels: Any = {  # the last argument is written
        n: SimpleNamespace(name=n, arguments=[(i, None) for i in range(count[n])], written={count[n] - 1})
        for n in names
    }
    skip_unread({"entries": {"main": entry}}, kernels)
    return evaluate(steps[0]["grid"][0], {0: (rows, 5)})


NORM = ("norm", 0, 1)
MANY = ["select", FEW, 0, 2]
CASES = {
    "a kernel for many": [step("many", 1, 4, blocks=MANY)],
    "a call of the library": [product(1, 0, 4, rows=["select", FEW, 0, ROWS])],
    "both": [
        product(1, 0, 4, rows=["select", ["gt", ROWS, 16], ROWS, 0]),
        step("many", 1, 4, blocks=["select", ["gt", ROWS, 16], 0, MANY]),
    ],
    "through another launch": [step("copy", 1, 2), step("many", 2, 4, blocks=["ceildiv", MANY, 1])],
}


@pytest.mark.parametrize("readers", CASES.values(), ids=CASES)
def test_what_only_many_rows_read_is_not_computed_for_few(readers: list[dict[str, Any]]) -> None:
    for rows, expected in ((1, 0), (8, 0), (9, 3), (17, 3)):
        copies = [{**r} for r in readers]
        assert blocks([step(*NORM), *copies], rows) == expected


@pytest.mark.parametrize(
    "others",
    [
        [step("few", 1, 4)],  # always read
        [{"loop": 0, "from": 0, "to": 3, "by": 1, "steps": [step("inner", 1, 2)]}],
        [{"read": 5, "buffer": 1, "shape": [1], "at": [0]}],
        [step("many", 1, 3, blocks=["select", ["eq", ["value", 5], 0], 2, 0])],  # depends on data
    ],
    ids=["launch", "loop", "host", "data"],
)
def test_what_may_be_read_is_computed(others: list[dict[str, Any]]) -> None:
    assert blocks([step(*NORM), *others, step("last", 2, 4, blocks=MANY)], 1) == 3


def test_results_and_state_are_computed() -> None:
    assert blocks([step("norm", 1, 4), step("many", 4, 3, blocks=MANY)], 1) == 3
    assert blocks([step("norm", 1, 0), step("many", 0, 3, blocks=MANY)], 1) == 3
