"""``tm_tensor.sort``: every element finds its place by counting in a run, then runs are merged by bisection.

Along a short axis of known length all is linear algebra (``short_sorts.py``). Along a longer one pairs of runs are merged, again
and again. Along one of unknown length all runs are at once, so that two launches do for any length; longer axes have longer runs.

Both steps are stable, right for any length and in parallel over the elements. NaN is the largest number, as torch has
it, where the order is a plain comparison of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.backend_maca.lower.index import index, less
from spikingbrain.backend_maca.lower.order import comes_before, looked_at, true
from spikingbrain.backend_maca.lower.per_element import launch_per_element
from spikingbrain.backend_maca.lower.short_sorts import lower_short_sort
from spikingbrain.passes.kernels import builders

RUN = 256  # elements sorted by counting, each against all of its run
LONGER_RUNS = ((1 << 14, 1024), (1 << 18, 4096))  # from which length on, how long: powers of two


def lower_sort(op: ir.Operation) -> None:
    """Replaces a sort by linear algebra where the axis is short, else by launches."""
    axis = ir.IntegerAttr(op.attributes["dimension"]).value
    values = list(op.operands)
    length = ir.RankedTensorType(values[0].type).shape[axis]
    static = length != ir.ShapedType.get_dynamic_size()
    if static and length <= RUN:
        lower_short_sort(op, axis)
        return
    with ir.InsertionPoint(op), op.location:
        if static:
            run = RUN
            values = _pass(op, values, axis, lambda i, at: _counted(op, i, axis, at, index(run)))
            while run < length:
                values = _pass(op, values, axis, lambda i, at, run=run: _merged(op, i, axis, at, run))
                run *= 2
        else:
            values = _pass(op, values, axis, lambda i, at: _counted(op, i, axis, at, _run_of(i, axis)))
            values = _pass(op, values, axis, lambda i, at: _spread(op, i, axis, at, _run_of(i, axis)))
    for old, new in zip(op.results, values, strict=True):
        old.replace_all_uses_with(new)
    op.erase()


def _pass(
    op: ir.Operation, values: list[ir.Value], axis: int, place_of: Callable[..., ir.Value]
) -> list[ir.Value]:
    """Emits a launch that moves every element to ``place_of(inputs, at)`` on the sorted axis."""
    count = len(values)

    def body(at: list[ir.Value], buffers: list[ir.Value]) -> None:
        inputs, outputs = buffers[:count], buffers[count:]
        to = list(at)
        to[axis] = place_of(inputs, at)
        for source, target in zip(inputs, outputs, strict=True):
            builders.put(builders.get(source, at), target, to)

    return launch_per_element("sort", values[0], values, [v.type for v in values], body)


def _run_of(inputs: Sequence[ir.Value], axis: int) -> ir.Value:
    """Returns how long runs are along an axis of unknown length."""
    return _by_length(inputs, axis, lambda run: run)


def _by_length(inputs: Sequence[ir.Value], axis: int, of_run: Callable[[int], int]) -> ir.Value:
    """Returns what a function gives for the length of runs."""
    length, found = builders.size(inputs[0], axis), index(of_run(RUN))
    for least, run in LONGER_RUNS:
        found = arith.select(less(length, index(least)), found, index(of_run(run)))
    return found


def _counted(
    op: ir.Operation, inputs: Sequence[ir.Value], axis: int, at: list[ir.Value], run: ir.Value
) -> ir.Value:
    """Returns where in its run of ``run`` elements an element belongs: behind all that come first."""
    length, here = builders.size(inputs[0], axis), at[axis]
    low = arith.muli(arith.divsi(here, run), run)
    high = arith.minsi(arith.addi(low, run), length)
    mine = _element(op, inputs, axis, at, here)

    def count(j: ir.Value, place: ir.Value) -> list[ir.Value]:
        other = _element(op, inputs, axis, at, j)
        ties = arith.andi(less(j, here), arith.xori(comes_before(op, mine, other), true()))
        first = arith.ori(comes_before(op, other, mine), ties)
        return [arith.addi(place, arith.select(first, index(1), index(0)))]

    return builders.loop(low, high, 1, count, [low])[0]


def _merged(
    op: ir.Operation, inputs: Sequence[ir.Value], axis: int, at: list[ir.Value], run: int
) -> ir.Value:
    """Returns where an element of one sorted run belongs in the run made of it and its neighbour, by bisection."""
    length, here = builders.size(inputs[0], axis), at[axis]
    number = arith.divsi(here, index(run))
    second = arith.cmpi(arith.CmpIPredicate.ne, arith.remsi(number, index(2)), index(0))
    start = arith.muli(number, index(run))
    other = arith.select(second, arith.subi(start, index(run)), arith.addi(start, index(run)))
    other = arith.minsi(other, length)
    mine = _element(op, inputs, axis, at, here)
    found = _before_in(op, inputs, axis, at, mine, other, index(run), run.bit_length(), second)
    base = arith.minsi(start, other)
    return arith.addi(base, arith.addi(arith.subi(here, start), found))


def _spread(
    op: ir.Operation, inputs: Sequence[ir.Value], axis: int, at: list[ir.Value], run: ir.Value
) -> ir.Value:
    """Returns where an element of a sorted run belongs among all runs, by bisection in each other one."""
    length, here = builders.size(inputs[0], axis), at[axis]
    number = arith.divsi(here, run)
    mine = _element(op, inputs, axis, at, here)

    def look(k: ir.Value, place: ir.Value) -> list[ir.Value]:
        other, earlier = arith.muli(k, run), less(k, number)
        is_own = arith.cmpi(arith.CmpIPredicate.eq, k, number)
        size = arith.select(is_own, index(0), run)
        return [arith.addi(place, _before_in(op, inputs, axis, at, mine, other, size, steps, earlier))]

    steps = _by_length(inputs, axis, int.bit_length)
    own = arith.subi(here, arith.muli(number, run))
    return builders.loop(0, arith.ceildivsi(length, run), 1, look, [own])[0]


def _before_in(
    op: ir.Operation,
    inputs: Sequence[ir.Value],
    axis: int,
    at: list[ir.Value],
    mine: list[ir.Value | None],
    start: ir.Value,
    run: ir.Value,
    steps: int | ir.Value,
    with_equals: ir.Value,
) -> ir.Value:
    """Returns how many elements of a sorted run come before another one; its equals do where ``with_equals`` holds.

    ``steps`` halvings find a place in it.
    """
    length = builders.size(inputs[0], axis)
    size = arith.subi(arith.minsi(arith.addi(start, run), length), start)

    def halve(_: ir.Value, low: ir.Value, high: ir.Value) -> list[ir.Value]:
        open_ = less(low, high)
        middle = arith.divsi(arith.addi(low, high), index(2))
        place = arith.minsi(arith.addi(start, middle), arith.subi(length, index(1)))
        theirs = _element(op, inputs, axis, at, place)
        first = arith.select(
            with_equals, arith.xori(comes_before(op, mine, theirs), true()), comes_before(op, theirs, mine)
        )
        low_next = arith.select(first, arith.addi(middle, index(1)), low)
        high_next = arith.select(first, high, middle)
        return [arith.select(open_, low_next, low), arith.select(open_, high_next, high)]

    return builders.loop(0, steps, 1, halve, [index(0), size])[0]


def _element(
    op: ir.Operation, inputs: Sequence[ir.Value], axis: int, at: list[ir.Value], place: ir.Value
) -> list[ir.Value | None]:
    """Loads what the order looks at, at a place of the sorted axis."""
    there = [*at[:axis], place, *at[axis + 1 :]]
    return [builders.get(v, there) if used else None for v, used in zip(inputs, looked_at(op), strict=True)]
