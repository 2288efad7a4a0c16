"""CPU kernel of the selective scan: the state stays in the first cache, decays are computed where they are used.

A workgroup handles some vectors of channels of one sequence. For each step and vector it walks over the entries of the state,
``s_n = exp(dt * a_n) * s_n + (dt * x) * b_n`` and ``y += s_n * c_n``, with channels as lanes, so that nothing is added up across
lanes. The last vector of channels overlaps the one before it where the channels are no multiple of the lanes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith, func, memref
from torch_mlir.dialects import math as math_dialect

from spikingbrain.passes.kernels.builders import (
    EXP2,
    ROUNDER,
    SMALLEST_EXPONENT,
    add,
    ceil_div,
    compare,
    get,
    has_fma,
    index,
    launch,
    load,
    loop,
    minimum,
    mul,
    multiply_add,
    prefetch,
    put,
    root_module,
    scratch,
    size,
    splat,
    store,
    sub,
    when,
)
from spikingbrain.target import Target

SCRATCH_BYTES = 24 << 10  # IREE's limit for the stack of a dispatch is 32 KiB
MOST_VECTORS = 4  # of channels, which share the loads of b and c
LARGEST_EXPONENT = 128.0  # whose exponent field is that of infinity
UNROLL = 4
AHEAD = 4  # steps whose rows are fetched: they lie pages apart, which the processor does not foresee


def has_selective_kernel(op: ir.OpView) -> bool:
    """Returns whether the state of a channel is small enough, and of known size."""
    states = ir.RankedTensorType(op.a.type).shape[1]
    bits = ir.RankedTensorType(op.a.type).element_type.width
    return bool(states > 0 and 2 * states * bits // 8 <= SCRATCH_BYTES)


def emit_selective_scan(op: ir.OpView, target: Target) -> list[ir.Value]:
    """Emits the launch of the kernel for ``spikingbrain.selective_scan``, made on first use: y and the final state."""
    inputs = [op.x, op.dt, op.a, op.b, op.c, *([op.state] if op.state is not None else [])]
    results = [op.y.type, op.final_state.type]
    kernel = _Kernel(
        target,
        [ir.RankedTensorType(t) for t in [*(v.type for v in inputs), *results]],
        op.state is not None,
        bool(op.reverse.value),
    )
    name = kernel.build_once()
    x, a = op.x, op.a
    given = [(x, 0), (x, 1), (x, 2), (x, 0), (x, 2), (a, 1)]  # the axes of y, then those of the state
    shapes = [n for t in results for n in ir.RankedTensorType(t).shape]
    sizes = [size(v, axis) for (v, axis), n in zip(given, shapes, strict=True) if n < 0]
    grid = [ceil_div(size(x, 2), kernel.lanes * kernel.vectors), size(x, 0), index(1)]
    return list(launch(name, results, grid, inputs, sizes, [-1, -1]).results)


@dataclass
class _Kernel:
    """One kernel; ``types`` are those of its inputs and results."""

    target: Target
    types: list[ir.RankedTensorType]
    has_state: bool
    reverse: bool

    def __post_init__(self) -> None:
        self.element = self.types[0].element_type
        self.states = self.types[2].shape[1]
        channels = self.types[0].shape[2]
        width = self.element.width
        lanes = max(1, self.target.vector_bits // width)
        while lanes > 1 and (0 <= channels < lanes or 2 * self.states * lanes * width // 8 > SCRATCH_BYTES):
            lanes //= 2
        self.lanes = lanes
        self.vectors = max(1, min(MOST_VECTORS, SCRATCH_BYTES // (2 * self.states * lanes * width // 8)))

    def build_once(self) -> str:
        shapes = ["x".join("d" if n < 0 else str(n) for n in t.shape) for t in self.types]
        flags = f"{'s' * self.has_state}{'r' * self.reverse}{self.lanes}"
        name = "_".join(["selective_scan", *shapes, str(self.element), flags])
        module = root_module()
        if name not in ir.SymbolTable(module.operation):
            with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
                self._build(name)
        return name

    def _build(self, name: str) -> None:
        memrefs = [ir.MemRefType.get(t.shape, t.element_type) for t in self.types]
        function = func.FuncOp(name, ([ir.IndexType.get()] * 3 + memrefs, []), visibility="private")
        with ir.InsertionPoint(function.add_entry_block()):
            group, self.batch, _, self.x, self.dt, self.a, self.b, self.c, *rest = function.arguments
            self.state = rest[0] if self.has_state else None
            self.y, self.final = rest[-2:]
            channels = self._size(self.x, 2)
            first = mul(group, self.lanes * self.vectors)
            count = minimum(self.vectors, ceil_div(sub(channels, first), self.lanes))
            if self.types[0].shape[2] >= 0:
                self._channels(first, count, channels, self.lanes)
            else:

                def single() -> None:
                    loop(0, channels, 1, lambda c: self._channels(c, index(1), channels, 1))

                enough = compare("sge", channels, index(self.lanes))
                when(enough, lambda: self._channels(first, count, channels, self.lanes), single)
            func.ReturnOp([])

    def _channels(self, first: ir.Value, count: ir.Value, channels: ir.Value, lanes: int) -> None:
        """Builds the scan of ``count`` vectors of channels from ``first`` on."""
        length = self.states * lanes
        held, factors = self._scratch(length), self._scratch(length)

        def place(u: ir.Value) -> ir.Value:
            return minimum(add(first, mul(u, lanes)), sub(channels, lanes))

        def enter(u: ir.Value) -> None:
            def entry(lane: ir.Value, n: ir.Value) -> None:
                channel, at = add(place(u), lane), add(mul(u, length), add(mul(n, lanes), lane))
                a = get(self.a, [channel, n])
                if self._is_single():
                    a = arith.mulf(a, self._number(math.log2(math.e)))
                put(a, factors, [at])
                zero = self._number(0.0)
                value = get(self.state, [self.batch, channel, n]) if self.state else zero
                put(value, held, [at])

            loop(0, lanes, 1, lambda lane: loop(0, self.states, 1, lambda n: entry(lane, n)) and None)

        def leave(u: ir.Value) -> None:
            def entry(lane: ir.Value, n: ir.Value) -> None:
                at = add(mul(u, length), add(mul(n, lanes), lane))
                put(get(held, [at]), self.final, [self.batch, add(place(u), lane), n])

            loop(0, lanes, 1, lambda lane: loop(0, self.states, 1, lambda n: entry(lane, n)) and None)

        steps = self._size(self.x, 1)

        def step(t: ir.Value) -> None:
            now = sub(sub(steps, 1), t) if self.reverse else t
            later = minimum(add(t, AHEAD), sub(steps, 1))
            later = sub(sub(steps, 1), later) if self.reverse else later
            for tensor, write in ((self.x, False), (self.dt, False), (self.y, True)):
                loop(0, count, 1, lambda u, m=tensor, w=write: prefetch(m, [self.batch, later, place(u)], w))
            loop(0, count, 1, lambda u: self._step(now, place(u), mul(u, length), held, factors, lanes))

        loop(0, count, 1, enter)
        loop(0, steps, 1, step)
        loop(0, count, 1, leave)

    def _step(
        self, t: ir.Value, channel: ir.Value, base: ir.Value, held: ir.Value, factors: ir.Value, lanes: int
    ) -> None:
        """Builds one step of one vector of channels."""
        here = [self.batch, t, channel]
        dt = load(self.dt, here, lanes)
        dt_x = arith.mulf(dt, load(self.x, here, lanes))
        fused = has_fma(self.target)

        def entry(n: ir.Value, y: ir.Value) -> ir.Value:
            at = [add(base, mul(n, lanes))]
            decay = self._exp(arith.mulf(dt, load(factors, at, lanes)), fused)
            b = splat(get(self.b, [self.batch, t, n]), lanes)
            c = splat(get(self.c, [self.batch, t, n]), lanes)
            s = multiply_add(decay, load(held, at, lanes), arith.mulf(dt_x, b), fused)
            store(s, held, at)
            return multiply_add(s, c, y, fused)

        def several(n: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            return [entry(add(n, i), y) for i, y in enumerate(sums)]

        zero = splat(self._number(0.0), lanes)
        whole = self.states // UNROLL * UNROLL
        sums = loop(0, whole, UNROLL, several, [zero] * UNROLL) if whole else [zero]
        while len(sums) > 1:
            sums = [arith.addf(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        for n in range(whole, self.states):
            sums[0] = entry(index(n), sums[0])
        store(sums[0], self.y, here)

    def _exp(self, x: ir.Value, fused: bool) -> ir.Value:
        """Returns exp of a vector, for f32 of one that is scaled to the base 2 already; NaN stays NaN."""
        if not self._is_single():
            return math_dialect.exp(x)
        lanes = ir.VectorType(x.type).shape[0]
        less = arith.CmpFPredicate.OLT
        low, high = splat(SMALLEST_EXPONENT, lanes), splat(LARGEST_EXPONENT, lanes)
        x = arith.select(arith.cmpf(less, x, low), low, x)
        x = arith.select(arith.cmpf(less, high, x), high, x)
        rounded = arith.addf(x, splat(ROUNDER, lanes))
        r = arith.subf(x, arith.subf(rounded, splat(ROUNDER, lanes)))
        power = splat(EXP2[0], lanes)
        for coefficient in EXP2[1:]:
            power = multiply_add(power, r, splat(coefficient, lanes), fused)
        kind = ir.VectorType.get([lanes], ir.IntegerType.get_signless(32))
        bits = arith.addi(
            arith.shli(arith.bitcast(kind, rounded), splat(23, lanes)), splat(0x3F800000, lanes)
        )
        return arith.mulf(power, arith.bitcast(x.type, bits))

    def _scratch(self, length: int) -> ir.Value:
        if self._is_single():
            return scratch([([self.vectors * length], self.element)])[0]
        return memref.alloca(ir.MemRefType.get([self.vectors * length], self.element), [], [])

    def _number(self, value: float) -> ir.Value:
        return arith.constant(self.element, value)

    def _is_single(self) -> bool:
        return isinstance(self.element, ir.F32Type)

    def _size(self, value: ir.Value, axis: int) -> ir.Value:
        n = ir.MemRefType(value.type).shape[axis]
        return memref.dim(value, index(axis)) if n < 0 else index(n)
