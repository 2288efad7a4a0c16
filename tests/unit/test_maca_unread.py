"""Launches whose results nothing reads for some sizes have no blocks there."""

from __future__ import annotations

import functools
import json
import operator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch_mlir")

from spikingbrain.backend_maca.plan.conditions import ALWAYS, MOST, NEVER, condition
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


COMPARISONS = [FEW, ["gt", ["dim", 0, 1], 3], ["eq", ["mul", ROWS, ["dim", 0, 1]], 12]]


def made_of(random: Random, depth: int) -> Any:
    """Returns a condition of three comparisons, built up at random."""
    if depth == 0:
        return random.choice([*COMPARISONS, 0, 1])
    parts = [made_of(random, depth - 1) for _ in range(3)]
    return random.choice([["and", *parts[:2]], ["or", *parts[:2]], ["eq", parts[0], 0], ["select", *parts]])


def test_conditions_say_the_same_in_few_words() -> None:
    shapes = [{0: (rows, columns)} for rows in (1, 3, 6, 9, 12) for columns in (1, 2, 4)]
    for seed in range(100):
        formula = made_of(Random(seed), 4)
        short = condition(formula)
        assert len(json.dumps(short.formula)) < 250
        assert (short == ALWAYS) == (short.formula == 1)
        assert (short == NEVER) == (short.formula == 0)
        for shape in shapes:
            assert evaluate(short.formula, shape) == evaluate(formula, shape)
            assert evaluate((~short).formula, shape) == 1 - evaluate(formula, shape)


def test_a_condition_of_many_comparisons_counts_as_one_that_holds() -> None:
    rows = [condition(["lt", ROWS, n]) for n in range(MOST + 1)]
    assert functools.reduce(operator.and_, rows[:MOST]) != ALWAYS
    assert functools.reduce(operator.and_, rows) == ALWAYS
    formula = functools.reduce(lambda a, b: ["and", a, ["lt", ROWS, b]], range(1, MOST + 3), ["gt", ROWS, 2])
    for few in range(6):  # the opposite of what is given up would be wrong
        assert evaluate((~condition(formula)).formula, {0: (few,)}) == 1 - evaluate(formula, {0: (few,)})


def test_a_long_chain_of_choices_stays_short() -> None:
    """Each launch reads what the one before wrote, for few rows or for many, by two ways to count them."""
    steps = [step(*NORM)]
    tokens = ["le", ["mul", ROWS, ["dim", 0, 1]], 8]
    for number in range(30):
        few, buffer = (FEW, tokens)[number % 2], 1 + number % 2
        steps += [step(f"few{number}", buffer, 3 - buffer, blocks=["select", few, 2, 0])]
        steps += [step(f"many{number}", buffer, 3 - buffer, blocks=["select", few, 0, 2])]
    assert blocks([*steps, step("last", 1, 4)], 9) == 3
    assert max(len(json.dumps(s["grid"])) for s in steps) < 200
