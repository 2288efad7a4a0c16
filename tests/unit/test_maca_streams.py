"""Steps on several streams: what depends on each other waits, nothing else does, and no allowed order changes a bit."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from test_maca import compile_text, load, needs_cxx
from test_maca_scheduled import mem, module_text, per_element
from torch_mlir import ir
from torch_mlir.dialects import arith, memref, tensor

from spikingbrain.backend_maca.options import MacaOptions
from spikingbrain.backend_maca.plan import resolve as resolving
from spikingbrain.backend_maca.plan.order import Order
from spikingbrain.backend_maca.plan.plan import FORMAT
from spikingbrain.backend_maca.plan.resolve import resolve
from spikingbrain.backend_maca.plan.streams import use_streams
from spikingbrain.errors import OptionError, SpikingBrainError
from spikingbrain.passes.kernels.builders import add, floor_div, get, index, launch, put
from spikingbrain.passes.wave_kernels.builders import kernel

Accesses = Sequence[tuple[set[int], set[int]]]  # what a step reads, and what it writes
FEW = ["select", ["le", ["dim", 0, 0], 8], 1, 0]  # blocks for up to 8 rows only


def planned(accesses: Accesses, most: int, skipped: Sequence[int] = (), looped: Sequence[int] = ()) -> Any:
    """Returns a plan of a launch for each access; buffer 0 is the input, the others are temporary."""
    count = 1 + max(b for r, w in accesses for b in r | w)
    buffers = [{"role": "input", "dtype": "int8", "shape": [["dim", 0, 0]]}]
    buffers += [{"role": "temporary", "dtype": "int8", "shape": [256 * (b % 3 + 1)]} for b in range(1, count)]
    steps, kernels = [], {}
    for i, (reads, writes) in enumerate(accesses):
        used = [*sorted(reads - writes), *sorted(writes)]
        name, written = f"k{i}", set(range(len(used) - len(writes), len(used)))
        kernels[name] = SimpleNamespace(
            name=name, arguments=[(n, None) for n in range(len(used))], written=written
        )
        grid = [FEW if i in skipped else 1, 1, 1]
        step: Any = {"kernel": name, "grid": grid, "arguments": [{"buffer": b} for b in used]}
        steps.append({"loop": i, "from": 0, "to": 3, "by": 1, "steps": [step]} if i in looped else step)
    entry = {"buffers": buffers, "checks": [], "sizes": [], "launches": steps, "outputs": [], "static": True}
    facts = {name: {"threads": 64, "dynamic_bytes": 0} for name in kernels}
    plan = {"format": FORMAT, "kernels": facts, "entries": {"main": entry}}
    use_streams(plan, kernels, most)  # type: ignore[arg-type]
    return plan


def drawn(seed: int) -> list[tuple[set[int], set[int]]]:
    """Returns steps that read and write some of 12 buffers, often that of a step just before."""
    draw = random.Random(seed)
    steps: list[tuple[set[int], set[int]]] = []
    for _ in range(40):
        recent = [b for _, w in steps[-6:] for b in w]
        reads = {
            draw.choice(recent) if recent and draw.random() < 0.8 else 0 for _ in range(draw.randint(1, 2))
        }
        steps.append((reads, {draw.randint(1, 12)}))
    return steps


def launched(plan: Any, rows: int = 1) -> tuple[Any, list[int]]:
    """Returns what runs for so many rows, and of each launch the number of its access."""
    steps = resolve(plan, "main", {0: (rows,)})
    return steps, [int(step.kernel[1:]) for step in steps.steps]  # type: ignore[union-attr]


def order_of(steps: Any) -> Order:
    count = len(steps.steps)
    return steps.order or Order([0] * count, [()] * count, [(n + 1,) for n in range(count)])


def conflicts(accesses: Accesses, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    for (i, a), (j, b) in itertools.combinations(enumerate(numbers), 2):
        (reads, writes), (other_reads, other_writes) = accesses[a], accesses[b]
        if writes & (other_reads | other_writes) or reads & other_writes:
            yield i, j


def reaches(order: Order, first: int, second: int) -> bool:
    """Returns whether a step waits for another one by streams and waits alone, the obvious way."""
    todo = [second]
    while todo:
        step = todo.pop()
        if step == first:
            return True
        same = [i for i in range(step) if order.streams[i] == order.streams[step]]
        todo += [*same[-1:], *order.waits[step]]
    return False


@pytest.mark.parametrize("seed", range(5))
def test_what_depends_on_each_other_waits(seed: int) -> None:
    accesses, draw = drawn(seed), random.Random(seed)
    skipped, looped = (draw.sample(range(40), n) for n in (8, 1))
    used = set()
    for most, rows in itertools.product((1, 2, 4), (8, 9)):
        plan = planned(accesses, most, skipped, looped)
        steps, numbers = launched(plan, rows)
        assert set(numbers) == {n for n in range(40) if rows <= 8 or n not in skipped}
        order = order_of(steps)
        assert order.count <= most
        used.add(order.count)
        for i, j in conflicts(accesses, numbers):
            assert order.before(i, j)
        for i, j in itertools.combinations(range(len(numbers)), 2):
            assert order.before(i, j) == reaches(order, i, j)
        for step, waits in enumerate(order.waits):
            for wait in waits:  # none is there for nothing
                less = [*order.waits]
                less[step] = tuple(w for w in waits if w != wait)
                assert not reaches(dataclasses.replace(order, waits=less), wait, step)
        in_memory(steps, order)
        for choose in (min, max, draw.choice):
            seen: list[int] = []
            for step in order.run(choose):
                assert set(order.waits[step]) <= set(seen)
                seen.append(step)
            assert sorted(seen) == list(range(len(numbers)))
    assert len(used) > 1


def in_memory(steps: Any, order: Order) -> None:
    """Checks that buffers which overlap are used one surely after the other."""
    uses: dict[int, list[int]] = {}
    for i, step in enumerate(steps.steps):
        for buffer, _ in step.arguments:
            uses.setdefault(buffer, []).append(i)
    places = steps.workspace.offsets
    size = {b: steps.temporaries[b][0] for b in places}
    for a, b in itertools.combinations(places, 2):
        if places[a] < places[b] + size[b] and places[b] < places[a] + size[a]:
            one, other = (
                all(order.before(i, j) for i in uses[x] for j in uses[y]) for x, y in ((a, b), (b, a))
            )
            assert one or other
    assert steps.workspace.least <= steps.workspace.size


TWO_CHAINS = [({0}, {1}), ({1}, {2}), ({0}, {3}), ({2}, {4}), ({3}, {5}), ({4, 5}, {6})]


def test_a_chain_beside_the_longest_has_its_own_stream() -> None:
    steps = planned(TWO_CHAINS, 2)["entries"]["main"]["launches"]
    assert [step.get("stream", 0) for step in steps] == [0, 0, 1, 0, 1, 0]
    assert {n: step["after"] for n, step in enumerate(steps) if "after" in step} == {5: [4]}
    order = launched(planned(TWO_CHAINS, 2))[0].order
    assert (order.forks, order.joins, order.awaited) == ([1], [], {4})


def test_one_stream_is_the_plan_as_it_was() -> None:
    plan = planned(TWO_CHAINS, 1)
    assert not any({"stream", "after"} & step.keys() for step in plan["entries"]["main"]["launches"])
    assert launched(plan)[0].order is None


def test_a_launch_that_saves_nothing_stays() -> None:
    # beside one launch another one hides, but two waits take its time
    fork = [({0}, {1}), ({1}, {2}), ({1}, {3}), ({2, 3}, {4})]
    assert launched(planned(fork, 2))[0].order is None
    # nor is what other sizes run instead a reason
    assert launched(planned(TWO_CHAINS, 2, skipped=(2, 4)))[0].order is None


def test_memory_of_two_streams_is_not_shared() -> None:
    one, two = (launched(planned(TWO_CHAINS, most))[0].workspace for most in (1, 2))
    assert one.least == two.least
    assert one.size <= two.size


def test_plans_that_read_stay_on_one_stream() -> None:
    plan = planned(TWO_CHAINS, 1)
    plan["entries"]["main"]["static"] = False
    use_streams(plan, {}, 2)
    assert not any("stream" in step for step in plan["entries"]["main"]["launches"])


@pytest.mark.parametrize("wrong", [0, 9, True, "2"])
def test_streams_out_of_range(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"streams is .*\n.*a whole number from 1 to 8"):
        MacaOptions(streams=wrong)


def kernels() -> None:
    """Adds ``minus``, y = a - b, and ``update``, a -= b."""
    for name, count in (("minus", 3), ("update", 2)):

        def body(block: list[ir.Value], buffers: list[ir.Value]) -> None:
            a, b, y = buffers[0], buffers[1], buffers[-1] if len(buffers) > 2 else buffers[0]
            size = memref.dim(a, index(0))
            per_element(size, block[0], lambda at: put(arith.subf(get(a, [at]), get(b, [at])), y, [at]))

        kernel(name, [mem("?xf32")] * count, 64, body)


def two_chains(given: list[ir.Value]) -> ir.Value:
    """Two chains that read from each other, and what both read is then updated in place."""
    x, w = given

    def minus(a: ir.Value, b: ir.Value, kind: str = "minus") -> ir.Value:
        size, one = tensor.dim(a, index(0)), index(1)
        grid = [floor_div(add(size, 63), 64), one, one]
        is_tied = kind == "update"
        return launch(kind, a.type, grid, [a, b], [] if is_tied else [size], 0 if is_tied else -1).result

    first, second = minus(x, w), minus(w, x)
    third, side = minus(first, w), minus(second, first)
    updated = minus(first, w, "update")
    main = minus(updated, third)
    for _ in range(3):
        side, second = minus(side, second), side
        main, updated = minus(main, updated), main
    side = minus(side, main)
    main, updated = minus(main, updated), main
    return minus(minus(main, updated), side)


def results(program: Any, order: str) -> list[Any]:
    program.kernels.order = order
    given = [np.random.default_rng(n).standard_normal(100).astype(np.float32) for n in range(2)]
    return [np.array(found) for found in program.call("main", given)]


ORDERS = ("forward", "reverse", *["shuffled"] * 8)


@pytest.fixture(scope="module")
def text() -> str:
    return module_text(["tensor<?xf32>"] * 2, "tensor<?xf32>", two_chains, kernels)


@pytest.fixture(scope="module")
def code(text: str) -> Any:
    return compile_text(text, streams=2)  # type: ignore[arg-type]


@needs_cxx
def test_every_order_gives_the_same_bits(code: Any, text: str) -> None:
    wanted = results(load(compile_text(text)), "forward")
    program = load(code)
    for order in ORDERS:
        for found, right in zip(results(program, order), wanted, strict=True):
            np.testing.assert_array_equal(found, right)


def differs(code: Any, plan: Any, wanted: Sequence[Any]) -> bool:
    """Returns whether some order gives other results, or a kernel reads what it must not."""
    program = load({**code, "plan.json": json.dumps(plan).encode()})
    for order in ORDERS:
        try:
            found = results(program, order)
        except SpikingBrainError:
            return True
        if any(not np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)):
            return True
    return False


@needs_cxx
def test_a_wait_that_is_missing_shows(code: Any) -> None:
    plan = json.loads(code["plan.json"])
    wanted = results(load(code), "forward")
    assert not differs(code, plan, wanted)
    waits = [(n, w) for n, s in enumerate(plan["entries"]["main"]["launches"]) for w in s.get("after", ())]
    assert len(waits) > 1
    for number, wait in waits:
        broken = copy.deepcopy(plan)
        broken["entries"]["main"]["launches"][number]["after"].remove(wait)
        assert differs(code, broken, wanted), (number, wait)


@needs_cxx
def test_memory_that_is_shared_as_on_one_stream_shows(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, wanted = json.loads(code["plan.json"]), results(load(code), "forward")

    def of_one_stream(size: int, places: Sequence[int], order: Order) -> Any:
        return resolving.Lifetime(size, places[0], places[-1])

    monkeypatch.setattr(resolving, "_lifetime", of_one_stream)
    assert differs(code, plan, wanted)


def test_streams_that_others_wait_for_are_joined() -> None:
    # the second stream waits for the third, and the caller's for the second
    order = Order([0, 2, 1, 0], [(), (), (1,), (2,)], [(1, 0, 0), (0, 0, 1), (0, 1, 1), (2, 1, 1)])
    assert order.joins == []
    assert Order([0, 2, 1], [(), (), (1,)], [(1, 0, 0), (0, 0, 1), (0, 1, 1)]).joins == [1, 2]
