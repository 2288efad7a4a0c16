"""The wave kernel of the selective scan: a thread goes through time for one channel, whose state is in its registers.

Decays are computed where they are used. Neighbouring threads have neighbouring channels; what a step writes to the state and
reads from it is the same for all of them. The entries of a state are added in their order.
"""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith, math

from spikingbrain.passes.kernels.builders import (
    add,
    ceil_div,
    compare,
    get,
    index,
    launch,
    loop,
    mul,
    put,
    size,
    sub,
    when,
)
from spikingbrain.passes.wave_kernels.builders import WAVE, kernel, memref_of, registers, thread, zero

MOST_WORDS = 64  # of 32 bits, for the state of a thread; its decays take as many


def has_selective_kernel(op: ir.OpView) -> bool:
    """Returns whether the state of a channel is of known size and fits in registers."""
    kind = ir.RankedTensorType(op.a.type)
    return bool(0 < kind.shape[1] * kind.element_type.width <= MOST_WORDS * 32)


def emit_selective_scan(op: ir.OpView) -> list[ir.Value]:
    """Emits the launch of the kernel for ``spikingbrain.selective_scan``, made on first use: y and the final state.

    Any number of sequences, steps and channels, also dynamic ones and 0; ``has_selective_kernel`` must hold.
    """
    inputs = [op.x, op.dt, op.a, op.b, op.c, *([op.state] if op.state is not None else [])]
    results = [op.y.type, op.final_state.type]
    types = [ir.RankedTensorType(t) for t in [*(v.type for v in inputs), *results]]
    has_state, reverse = op.state is not None, bool(op.reverse.value)
    shapes = ["x".join("d" if n < 0 else str(n) for n in t.shape) for t in types]
    flags = f"{types[0].element_type}{'s' * has_state}{'r' * reverse}"
    name = "_".join(["selective_scan", *shapes, flags])

    def body(block: list[ir.Value], memory: list[ir.Value]) -> None:
        channel = add(mul(block[0], WAVE), thread())
        state = memory[5] if has_state else None
        when(
            compare("ult", channel, size(memory[0], 2)),
            lambda: _channel(block[1], channel, [*memory[:5], *memory[-2:]], state, reverse),
        )

    kernel(name, [memref_of(t) for t in types], WAVE, body)
    given = [(op.x, 0), (op.x, 1), (op.x, 2), (op.x, 0), (op.x, 2), (op.a, 1)]  # axes of y, then of the state
    shape = [n for t in types[-2:] for n in t.shape]
    sizes = [size(v, axis) for (v, axis), n in zip(given, shape, strict=True) if n < 0]
    grid = [ceil_div(size(op.x, 2), WAVE), size(op.x, 0), index(1)]
    return list(launch(name, results, grid, inputs, sizes, [-1, -1]).results)


def _channel(
    batch: ir.Value, channel: ir.Value, memory: list[ir.Value], state: ir.Value | None, reverse: bool
) -> None:
    """Builds the scan of one channel, given x, dt, a, b, c, y and the final state; ``state`` is the one before."""
    x, dt, a, b, c, y, final = memory
    kind = ir.MemRefType(a.type)
    element, states = kind.element_type, kind.shape[1]
    held, factors = registers(states, element), registers(states, element)

    def enter(n: ir.Value) -> None:
        put(get(a, [channel, n]), factors, [n])
        put(zero(element) if state is None else get(state, [batch, channel, n]), held, [n])

    loop(0, states, 1, enter)
    steps = size(x, 1)

    def step(t: ir.Value) -> None:
        t = sub(sub(steps, 1), t) if reverse else t
        rate = get(dt, [batch, t, channel])
        given = arith.mulf(rate, get(x, [batch, t, channel]))

        def entry(n: ir.Value, total: ir.Value) -> list[ir.Value]:
            decay = math.exp(arith.mulf(rate, get(factors, [n])))
            kept = arith.mulf(decay, get(held, [n]))
            new = arith.addf(kept, arith.mulf(given, get(b, [batch, t, n])))
            put(new, held, [n])
            return [arith.addf(total, arith.mulf(new, get(c, [batch, t, n])))]

        (total,) = loop(0, states, 1, entry, [zero(element)])
        put(total, y, [batch, t, channel])

    loop(0, steps, 1, step)
    loop(0, states, 1, lambda n: put(get(held, [n]), final, [batch, channel, n]))
