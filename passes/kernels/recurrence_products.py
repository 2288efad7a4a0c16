"""Products of decays inside the chunks of a recurrence, and the triangles of numbers that they weigh.

A step i of a chunk reads what an earlier step j wrote, decayed by ``a_(j+1) * ... * a_i``. No quotient of two longer
products gives that where a decay may be 0. One decay for all channels makes a matrix of these products; where every channel
has its own, pairs are sorted by the highest bit in which i and j differ: for bit l, i lies in the upper and j in the lower
half of a block of ``2^(l+1)`` steps, and the product is the one from the middle up to i times the one from after j to the
middle. Both are built by doubling. Nothing is divided, and no logarithm is taken: 0, negative decays and those above 1 are as
good as others.

Letters: b batch, n chunk, s state, g query of its group, i reading step, j writing step, k key, v value channel, e level.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes.kernels.letters import Array, At, Letters, index, pick, renamed


@dataclass
class Decays:
    """The products that chunks of ``2^levels`` steps need; None stands for 1.

    Attributes:
        factors: the decay of every step, ``bnsi``, and k or v where each channel has its own.
        upto: for each level, the product from the start of i's block of ``2^level`` steps to i.
        before: the same without i's own factor.
        after: the product from after j to the end of its block.
        pairs: with one decay for all channels, the product for each pair of steps up to the reading one, ``bnsij``.
        pairs_before: the same without the reading step's factor.
    """

    build: Letters
    levels: int
    factors: Array | None
    upto: list[Array | None] = field(default_factory=list)
    before: list[Array | None] = field(default_factory=list)
    after: list[Array | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.factors is None:
            self.upto, self.before, self.after = [None], [None], [None]
        elif self.axis:
            self.upto, self.before, self.after = [self.factors], [None], [None]
            for level in range(self.levels):
                self._double(level)
        else:
            self.upto = [self._over_steps("bnsi", lambda at: _compare("ule", at("l"), at("i")))]
            self.before = [self._over_steps("bnsi", lambda at: _compare("ult", at("l"), at("i")))]
            self.after = [self._over_steps("bnsi", lambda at: _compare("ugt", at("l"), at("i")))]

    @property
    def axis(self) -> str:
        """Returns k or v where each of these channels has its own decay, else the empty string."""
        return self.factors[1][4:] if self.factors else ""

    def read(self, level: int, exclusive: bool) -> Array | None:
        return self.before[level] if exclusive else self.upto[level]

    def whole(self) -> Array | None:
        """Returns the product over each chunk, without the letter i."""
        found = self.upto[-1]
        if found is None:
            return None
        last = index((1 << self.levels) - 1)
        axes = found[1].replace("i", "")
        return self.build.map([], axes, lambda at: pick(found, at, {"i": last}))

    @functools.cached_property
    def pairs(self) -> Array:
        return self._over_steps("bnsij", lambda at: _between(at, "ule"))

    @functools.cached_property
    def pairs_before(self) -> Array:
        return self._over_steps("bnsij", lambda at: _between(at, "ult"))

    def _over_steps(self, axes: str, chosen: Callable[[At], ir.Value]) -> Array:
        assert self.factors is not None
        return self.build.product(renamed(self.factors, "i", "l"), axes, "l", chosen)

    def _double(self, level: int) -> None:
        upto, after = self.upto[level], self.after[level]
        assert upto is not None
        one = self.build.number(1.0)

        def double_upto(at: At, value: ir.Value) -> ir.Value:
            block = _block(at("i"), level)
            middle = arith.subi(arith.shli(block, index(level)), index(1))
            lower = pick(upto, at, {"i": arith.maxsi(middle, index(0))})
            return arith.mulf(value, arith.select(_odd(block), lower, one))

        def double_after(at: At, *value: ir.Value) -> ir.Value:
            block = _block(at("i"), level)
            end = arith.subi(arith.shli(arith.addi(block, index(2)), index(level)), index(1))
            end = arith.minsi(end, index((1 << self.levels) - 1))
            upper = arith.select(_odd(block), one, pick(upto, at, {"i": end}))
            return arith.mulf(value[0], upper) if value else upper

        doubled = self.build.map([upto], upto[1], double_upto)

        def shift(at: At) -> ir.Value:
            start = _compare("eq", arith.andi(at("i"), index((2 << level) - 1)), index(0))
            earlier = arith.maxsi(arith.subi(at("i"), index(1)), index(0))
            return arith.select(start, one, pick(doubled, at, {"i": earlier}))

        self.upto.append(doubled)
        self.after.append(self.build.map([after] if after else [], upto[1], double_after))
        self.before.append(self.build.map([], upto[1], shift))


def triangle(decays: Decays, x: Array, y: Array, exclusive: bool) -> Array:
    """Returns ``[i, j]``: the sum over k of x at i, y at j and the decay between them, for j before i.

    With the decay of i itself and for j = i too, unless exclusive. x is ``bnsik``, with or without g; y is ``bnsik``. Decays
    of value channels are left to ``weighed``.
    """
    build, y_j = decays.build, renamed(y, "i", "j")
    axes = x[1].replace("k", "j")
    zero = build.number(0.0)
    if decays.axis != "k":
        scores = build.contract(x, y_j, axes=axes)
        if decays.factors is not None and not decays.axis:
            scores = build.times(scores, decays.pairs_before if exclusive else decays.pairs)
        earlier = "ult" if exclusive else "ule"
        return build.map(
            [scores], axes, lambda at, value: arith.select(_compare(earlier, at("j"), at("i")), value, zero)
        )

    parts = []
    for level in range(decays.levels):
        left = build.times(x, decays.read(level, exclusive))
        right = build.times(y, decays.after[level])
        parts.append(build.contract(left, renamed(right, "i", "j"), axes=axes))
    diagonal = None if exclusive else build.contract(x, y, axes=axes.replace("j", ""))

    def choose(at: At, *values: ir.Value) -> ir.Value:
        own = values[-1] if diagonal else zero
        return _chosen(at, list(values[: len(parts)]), own, zero)

    return build.map([*parts, *([diagonal] if diagonal else [])], axes, choose)


def weighed(decays: Decays, scores: Array, w: Array, exclusive: bool) -> Array:
    """Returns the sum over j of ``scores[i, j]``, from ``triangle``, times w at j: ``bnsiv``, with g where scores have it.

    Decays of value channels are the product of one that i reads with and one that j is written with, which depend on the
    level: the highest bit in which i and j differ. Levels are an axis of the arrays, with the diagonal as the last: an op
    for each, and one that adds them, would read more arrays than the 128 bytes of offsets that Vulkan grants a dispatch.
    """
    build = decays.build
    axes = scores[1].replace("j", "v")
    if decays.axis != "v":
        return build.contract(scores, renamed(w, "i", "j"), axes=axes)
    zero, levels = build.number(0.0), range(decays.levels)

    def of_level(at: At) -> ir.Value:
        differ, level = arith.xori(at("i"), at("j")), at("e")
        highest = _compare("eq", arith.shrui(differ, level), index(1))
        own = arith.andi(_compare("eq", level, index(decays.levels)), _compare("eq", differ, index(0)))
        chosen = highest if exclusive else arith.ori(highest, own)
        return arith.select(chosen, pick(scores, at, {}), zero)

    left = build.map([], scores[1].replace("i", "ei"), of_level)
    late = build.stack("e", [*(build.times(w, decays.after[level]) for level in levels), w])
    one = build.filled(w[1], 1.0)
    reads = build.stack("e", [*(decays.read(level, exclusive) or one for level in levels), one])
    parts = build.contract(left, renamed(late, "i", "j"), axes=axes.replace("i", "ei"))
    return build.contract(parts, reads, axes=axes)


def inverse(build: Letters, levels: int, strict: Array) -> Array:
    """Returns the inverse of 1 - ``strict``, a strictly lower triangle ``bnsij``, by doubling the blocks of the diagonal."""
    one, zero = build.number(1.0), build.number(0.0)
    found = build.map([], "bnsij", lambda at: arith.select(_compare("eq", at("i"), at("j")), one, zero))
    for level in range(levels):

        def corner(at: At, value: ir.Value, level: int = level) -> ir.Value:
            highest = arith.shrui(arith.xori(at("i"), at("j")), index(level))
            lower = _compare("ult", at("j"), at("i"))
            return arith.select(arith.andi(_compare("eq", highest, index(1)), lower), value, zero)

        below = build.map([strict], "bnsij", corner)
        right = build.contract((below[0], "bnslj"), (found[0], "bnsjm"), axes="bnslm")
        right = right[0], "bnslj"
        found = build.contract((found[0], "bnsil"), right, axes="bnsij", start=found[0])
    return found


def _chosen(at: At, of_level: list[ir.Value], diagonal: ir.Value, above: ir.Value) -> ir.Value:
    """Returns the value for the highest bit in which i and j differ, or those of the diagonal and above it."""
    i, j = at("i"), at("j")
    found = diagonal
    for level, value in enumerate(of_level):
        far = _compare("uge", arith.xori(i, j), index(1 << level))
        found = arith.select(far, value, found)
    return arith.select(_compare("ule", j, i), found, above)


def _between(at: At, upper: str) -> ir.Value:
    """Returns whether a step lies after the writing one, and in this relation to the reading one."""
    result: ir.Value = arith.andi(_compare("ugt", at("l"), at("j")), _compare(upper, at("l"), at("i")))
    return result


def _block(i: ir.Value, level: int) -> ir.Value:
    result: ir.Value = arith.shrui(i, index(level))
    return result


def _odd(block: ir.Value) -> ir.Value:
    return _compare("eq", arith.andi(block, index(1)), index(1))


def _compare(relation: str, a: ir.Value, b: ir.Value) -> ir.Value:
    result: ir.Value = arith.cmpi(getattr(arith.CmpIPredicate, relation), a, b)
    return result
