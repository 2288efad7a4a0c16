"""Pointwise scans against loops in numpy: vector kernels of every width and the portable form, at every tail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler.tools")
pytest.importorskip("iree.runtime")

import scan_targets
from scan_targets import PORTABLE, SMALL_TILES, V3, V4

Step = Callable[
    [Sequence[np.ndarray], Sequence[np.ndarray], Sequence[np.ndarray]], tuple[list[Any], list[Any]]
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One scan: ``t`` is time in the axes of its tensors, letters the axes of the space, ``1`` an axis of size 1.

    Tensors are written "axes element", such as "tbc f32"; digits stand for static sizes in ``static``.
    """

    space: str
    carried: Sequence[str]
    scanned: Sequence[str]
    invariants: Sequence[str]
    stacked: Sequence[str]
    backwards: Sequence[bool]
    body: str
    step: Step
    static: dict[str, int] = dataclasses.field(default_factory=dict)


def _lif(s: Any, x: Any, w: Any) -> Any:
    v = s[0] * w[0] + x[0]
    fired = (v >= 1).astype(v.dtype)
    return [v - fired], [fired]


LIF = """
  %kept = arith.mulf %c0, %w0 : f32
  %v = arith.addf %kept, %x0 : f32
  %one = arith.constant 1.0 : f32
  %fires = arith.cmpf oge, %v, %one : f32
  %y = arith.uitofp %fires : i1 to f32
  %s = arith.subf %v, %y : f32
  "spikingbrain_control.yield"(%s, %y) : (f32, f32) -> ()
"""


def _decay(s: Any, x: Any, w: Any) -> Any:
    h = s[0] * np.exp(x[0]) + x[1]
    return [h], [h]


DECAY = """
  %a = math.exp %x0 : {e}
  %m = arith.mulf %c0, %a : {e}
  %h = arith.addf %m, %x1 : {e}
  "spikingbrain_control.yield"(%h, %h) : ({e}, {e}) -> ()
"""


def _counting(s: Any, x: Any, w: Any) -> Any:
    charge, count, armed = s
    charge = charge + x[0].astype(np.int32)
    fires = armed & (charge > 3)
    count = np.where(fires, count + 1, count)
    return [np.where(fires, 0, charge), count, ~fires], [fires, count]


COUNTING = """
  %wide = arith.extsi %x0 : i8 to i32
  %charge = arith.addi %c0, %wide : i32
  %three = arith.constant 3 : i32
  %high = arith.cmpi sgt, %charge, %three : i32
  %fires = arith.andi %high, %c2 : i1
  %one = arith.constant 1 : i64
  %more = arith.addi %c1, %one : i64
  %count = arith.select %fires, %more, %c1 : i64
  %zero = arith.constant 0 : i32
  %left = arith.select %fires, %zero, %charge : i32
  %true = arith.constant true
  %armed = arith.xori %fires, %true : i1
  "spikingbrain_control.yield"(%left, %count, %armed, %fires, %count) : (i32, i64, i1, i1, i64) -> ()
"""


def _maximum(s: Any, x: Any, w: Any) -> Any:
    best = np.maximum(s[0], x[0] + w[0])
    return [best, s[1] + best], [best - s[0], s[1]]


MAXIMUM = """
  %x = arith.addf %x0, %w0 : f32
  %best = arith.maximumf %c0, %x : f32
  %sum = arith.addf %c1, %best : f32
  %rise = arith.subf %best, %c0 : f32
  "spikingbrain_control.yield"(%best, %sum, %rise, %c1) : (f32, f32, f32, f32) -> ()
"""


def _half(s: Any, x: Any, w: Any) -> Any:
    h = s[0] * np.float32(0.5) + x[0].astype(np.float32)
    return [h], [h.astype(np.float16)]


HALF = """
  %half = arith.constant 0.5 : f32
  %m = arith.mulf %c0, %half : f32
  %x = arith.extf %x0 : f16 to f32
  %h = arith.addf %m, %x : f32
  %y = arith.truncf %h : f32 to f16
  "spikingbrain_control.yield"(%h, %y) : (f32, f16) -> ()
"""

CASES = {
    "lif": Case("n", ["n f32"], ["tn f32"], [" f32"], ["tn f32"], [False, False], LIF, _lif),
    "lif_static": Case(
        "n", ["n f32"], ["tn f32"], ["n f32"], ["tn f32"], [True, False], LIF, _lif, {"n": 100, "t": 7}
    ),
    "lif_per_neuron": Case("bn", ["bn f32"], ["btn f32"], ["n f32"], ["tbn f32"], [False, True], LIF, _lif),
    "lif_per_row": Case("bn", ["bn f32"], ["tbn f32"], ["b1 f32"], ["btn f32"], [False] * 2, LIF, _lif),
    "lif_images": Case(
        "bhwc",
        ["b1hwc f32"],
        ["tb1hwc f32"],
        ["h1c f32"],
        ["tb1hwc f32"],
        [False] * 2,
        LIF,
        _lif,
        {"h": 3, "c": 5},
    ),
    "lif_per_step": Case("n", ["n f32"], ["t f32"], ["n f32"], ["tn f32"], [False] * 2, LIF, _lif),
    "one_point": Case("", [" f32"], ["t f32"], [" f32"], ["t f32"], [True, True], LIF, _lif),
    "narrow_rows": Case(
        "bn", ["bn f32"], ["tbn f32"], ["n f32"], ["tbn f32"], [False] * 2, LIF, _lif, {"n": 3}
    ),
    "decay": Case(
        "bn",
        ["bn f32"],
        ["btn f32", "btn f32"],
        [],
        ["btn f32"],
        [True, True, True],
        DECAY.format(e="f32"),
        _decay,
    ),
    "decay_double": Case(
        "n", ["n f64"], ["tn f64", "tn f64"], [], ["tn f64"], [False] * 3, DECAY.format(e="f64"), _decay
    ),
    "counting": Case(
        "n", ["n i32", "n i64", "n i1"], ["tn i8"], [], ["tn i1", "tn i64"], [False] * 3, COUNTING, _counting
    ),
    "maximum": Case(
        "n",
        ["n f32", "n f32"],
        ["tn f32"],
        ["n f32"],
        ["tn f32", "tn f32"],
        [False, True, False],
        MAXIMUM,
        _maximum,
    ),
    "half": Case("n", ["n f32"], ["tn f16"], [], ["tn f16"], [False] * 2, HALF, _half),
}
DTYPES = {
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "i8": np.int8,
    "i32": np.int32,
    "i64": np.int64,
    "i1": np.bool_,
}


def _type(case: Case, tensor: str) -> str:
    axes, element = tensor.split(" ")
    sizes = ["1" if a == "1" else str(case.static.get(a, "?")) for a in axes]
    return f"tensor<{'x'.join([*sizes, element])}>"


def _map(case: Case, tensor: str) -> str:
    axes = tensor.split(" ")[0]
    names = ["0" if a == "1" else a for a in axes]
    return f"affine_map<({', '.join('t' + case.space)}) -> ({', '.join(names)})>"


def function(name: str, case: Case) -> str:
    operands = [*case.carried, *case.scanned, *case.invariants]
    results = [*case.carried, *case.stacked]
    names = [
        f"%{k}{i}"
        for k, v in zip("cxw", (case.carried, case.scanned, case.invariants), strict=True)
        for i in range(len(v))
    ]
    types, made = [_type(case, t) for t in operands], [_type(case, t) for t in results]
    arguments = ", ".join(f"{n}_: {t}" for n, t in zip(names, types, strict=True))
    scalars = ", ".join(f"{n}: {t.split(' ')[1]}" for n, t in zip(names, operands, strict=True))
    maps = ", ".join(_map(case, t) for t in [*operands, *case.stacked])
    backwards = ", ".join(str(b).lower() for b in case.backwards)
    outs = ", ".join(f"%r#{i}" for i in range(len(made)))
    return f"""
func.func @{name}({arguments}) -> ({", ".join(made)}) {{
  %r:{len(made)} = "spikingbrain_control.pointwise_scan"({", ".join(n + "_" for n in names)}) ({{
  ^bb0({scalars}):
  {case.body}
  }}) {{carried = {len(case.carried)} : i64, scanned = {len(case.scanned)} : i64, maps = [{maps}], backwards = [{backwards}]}}
    : ({", ".join(types)}) -> ({", ".join(made)})
  return {outs} : {", ".join(made)}
}}"""


TARGETS = [
    V4,
    pytest.param(V3, marks=pytest.mark.slow),
    SMALL_TILES,
    PORTABLE,
]  # small tiles are V3's code as well


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def program(request: pytest.FixtureRequest) -> Any:
    if not scan_targets.runs_here(request.param):
        pytest.skip(f"this processor is not {request.param.cpu}")
    text = "\n".join(function(name, case) for name, case in CASES.items())
    return scan_targets.load(text, request.param)


def _random(case: Case, tensor: str, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    axes, element = tensor.split(" ")
    shape = tuple(1 if a == "1" else sizes[a] for a in axes)
    if element == "i1":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if element.startswith("i"):
        return rng.integers(-2, 4, shape).astype(DTYPES[element])
    return np.asarray(rng.standard_normal(shape), DTYPES[element])


def _at_points(case: Case, value: np.ndarray, tensor: str, time: int | None) -> np.ndarray:
    """Returns the part of a tensor at one time, its axes those of the space."""
    axes = tensor.split(" ")[0]
    if time is not None:
        value = value.take(time, axis=axes.index("t"))
        axes = axes.replace("t", "")
    value = value.reshape([n for a, n in zip(axes, value.shape, strict=True) if a != "1"])
    axes = axes.replace("1", "")
    return value.reshape([value.shape[axes.index(a)] if a in axes else 1 for a in case.space])


def _expected(case: Case, arrays: Sequence[np.ndarray], sizes: dict[str, int]) -> list[np.ndarray]:
    """The loop, point by point of time."""
    tensors = [*case.carried, *case.scanned, *case.invariants]
    first, last = len(case.carried), len(case.carried) + len(case.scanned)
    space = tuple(sizes[a] for a in case.space)
    states: list[Any] = [
        _at_points(case, a, t, None) for a, t in zip(arrays[:first], case.carried, strict=True)
    ]
    fixed = [_at_points(case, a, t, None) for a, t in zip(arrays[last:], tensors[last:], strict=True)]
    stacks = [np.zeros((sizes["t"], *space), DTYPES[t.split(" ")[1]]) for t in case.stacked]
    for t in range(sizes["t"]):
        times = [sizes["t"] - 1 - t if b else t for b in case.backwards]
        now = [
            _at_points(case, a, name, when)
            for a, name, when in zip(arrays[first:last], case.scanned, times, strict=False)
        ]
        with np.errstate(all="ignore"):
            states, pieces = case.step(states, now, fixed)
        for stack, piece, when in zip(stacks, pieces, times[len(now) :], strict=True):
            stack[when] = piece
    results = [np.broadcast_to(s, space).reshape(a.shape) for s, a in zip(states, arrays, strict=False)]
    for stack, tensor in zip(stacks, case.stacked, strict=True):
        axes = tensor.split(" ")[0]
        order = "t" + case.space
        moved = stack.transpose([order.index(a) for a in axes if a != "1"])
        results.append(moved.reshape([1 if a == "1" else sizes[a] for a in axes]))
    return results


def check(program: Any, name: str, sizes: dict[str, int], seed: int = 0, **given: np.ndarray) -> None:
    case, rng = CASES[name], np.random.default_rng(seed)
    sizes = {**sizes, **case.static}
    tensors = [*case.carried, *case.scanned, *case.invariants]
    arrays = [_random(case, t, sizes, rng) for t in tensors]
    count = len(case.carried) + len(case.scanned)
    arrays[count:] = [1 / (1 + np.exp(-a)) for a in arrays[count:]]  # factors that keep rounding errors small
    if name.startswith("decay"):
        arrays[1] = -np.abs(arrays[1])
    for key, value in given.items():
        arrays[int(key[1:])] = value
    found = [r.to_host() for r in program[name](*arrays)]
    for result, wanted in zip(found, _expected(case, arrays, sizes), strict=True):
        assert result.shape == wanted.shape
        if wanted.dtype in (np.float32, np.float64):
            tolerance = 1e-5 if wanted.dtype == np.float32 else 1e-13
            np.testing.assert_allclose(result, wanted, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [0, 1, 2, 13, 35])
def test_agrees_with_the_loop(program: Any, name: str, steps: int) -> None:
    for n in (1, 2, 15, 16, 67, 130):
        check(program, name, {"t": steps, "n": n, "b": 3, "w": 2}, seed=n)


@pytest.mark.parametrize("name", ["lif", "lif_per_neuron", "lif_per_row", "decay"])
def test_more_than_a_tile(program: Any, name: str) -> None:
    """Several tiles of columns, several blocks of rows."""
    for b, n in ((2, 1001), (70, 37)):
        check(program, name, {"t": 3, "n": n, "b": b})


def test_nothing(program: Any) -> None:
    check(program, "lif", {"t": 3, "n": 0})
    check(program, "lif_per_neuron", {"t": 3, "n": 5, "b": 0})


def test_extreme_gates(program: Any) -> None:
    """A gate of 0 forgets whatever was there; infinities and NaN stay where they are."""
    steps, n = 4, 40
    gate = np.zeros((1, steps, n), np.float32)
    gate[0, 2, ::2] = -np.inf
    update = np.ones((1, steps, n), np.float32)
    update[0, 1, 5], update[0, 1, 6] = np.nan, np.inf
    check(program, "decay", {"t": steps, "n": n, "b": 1}, c1=gate, c2=update)
