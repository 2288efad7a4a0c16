"""linalg on tensors whose axes are letters: what ``einsum`` is to torch, with a body of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import linalg_build as build

Array: TypeAlias = tuple[ir.Value, str]  # a tensor and the letters of its axes
At: TypeAlias = Callable[[str], ir.Value]  # the position on the axis of a letter, inside a body
Body: TypeAlias = Callable[..., ir.Value]


def index(value: int | ir.Value) -> ir.Value:
    return build.constant_index(value) if isinstance(value, int) else value


def renamed(array: Array, old: str, new: str) -> Array:
    """Returns the same tensor with another letter for one axis."""
    return array[0], array[1].replace(old, new)


@dataclass
class Letters:
    """Builds tensors of one float type, given the size of every letter.

    Attributes:
        sizes: of every letter, a number or an index value.
        element: the type of all numbers, f32 or f64.
    """

    sizes: dict[str, int | ir.Value]
    element: Any

    def number(self, value: float) -> ir.Value:
        result: ir.Value = arith.constant(self.element, value)
        return result

    def type(self, axes: str) -> Any:
        known = [self.sizes[a] for a in axes]
        dynamic = ir.ShapedType.get_dynamic_size()
        return ir.RankedTensorType.get([n if isinstance(n, int) else dynamic for n in known], self.element)

    def empty(self, axes: str) -> ir.Value:
        sizes = [n for a in axes if isinstance(n := self.sizes[a], ir.Value)]
        return build.empty(self.type(axes), sizes)

    def filled(self, axes: str, value: float) -> Array:
        result: ir.Value = linalg.fill(self.number(value), outs=[self.empty(axes)])
        return result, axes

    def map(self, inputs: list[Array], axes: str, body: Body, init: ir.Value | None = None) -> Array:
        """Emits ``body(at, *elements)`` for every element of a new tensor; ``at(letter)`` is its position there."""

        def inner(*elements: ir.Value) -> ir.Value:
            at = functools.cache(lambda letter: linalg.IndexOp(axes.index(letter)).result)
            return body(at, *elements[:-1])

        return self._generic(inputs, (init or self.empty(axes), axes), axes, "", inner)

    def product(self, array: Array, axes: str, over: str, chosen: Callable[[At], ir.Value]) -> Array:
        """Emits the product over one letter of the elements that ``chosen(at)`` picks; ``at`` knows that letter too."""

        def inner(value: ir.Value, total: ir.Value) -> ir.Value:
            at = functools.cache(lambda letter: linalg.IndexOp((axes + over).index(letter)).result)
            result: ir.Value = arith.mulf(total, arith.select(chosen(at), value, self.number(1.0)))
            return result

        return self._generic([array], self.filled(axes, 1.0), axes, over, inner)

    def contract(self, *inputs: Array, axes: str, start: ir.Value | None = None) -> Array:
        """Emits the sum of the inputs' products over the letters that ``axes`` lacks, added to ``start`` (or 0)."""
        over = "".join(dict.fromkeys(a for _, letters in inputs for a in letters if a not in axes))

        def inner(*elements: ir.Value) -> ir.Value:
            *factors, total = elements
            product = factors[0]
            for factor in factors[1:]:
                product = arith.mulf(product, factor)
            result: ir.Value = arith.addf(total, product)
            return result

        init = start or self.filled(axes, 0.0)[0]
        return self._generic(list(inputs), (init, axes), axes, over, inner)

    def times(self, array: Array, *factors: Array | None) -> Array:
        """Returns the array times factors with letters among its own; None is a factor of 1."""
        present = [f for f in factors if f is not None]
        if not present:
            return array

        def body(_: At, value: ir.Value, *others: ir.Value) -> ir.Value:
            for other in others:
                value = arith.mulf(value, other)
            return value

        return self.map([array, *present], array[1], body)

    def sum(self, *arrays: Array | None) -> Array:
        """Returns the sum of arrays that have the letters of the first; None is 0."""
        first, *rest = [a for a in arrays if a is not None]

        def body(_: At, value: ir.Value, *others: ir.Value) -> ir.Value:
            for other in others:
                value = arith.addf(value, other)
            return value

        return self.map([first, *rest], first[1], body) if rest else first

    def stack(self, letter: str, arrays: Sequence[Array]) -> Array:
        """Returns arrays of the same letters along a new axis before ``i``."""

        def body(at: At) -> ir.Value:
            *others, value = (pick(array, at, {}) for array in arrays)
            for position, other in enumerate(others):
                here = arith.cmpi(arith.CmpIPredicate.eq, at(letter), index(position))
                value = arith.select(here, other, value)
            return value

        return self.map([], arrays[0][1].replace("i", f"{letter}i"), body)

    def row(self, array: Array, at: ir.Value) -> Array:
        """Returns the part of an array at one position of its first axis."""
        value, axes = array
        if self.sizes[axes[0]] == 1:  # a copy joins the op that reads it, on every target
            return self.map([], axes[1:], lambda place: pick(array, place, {axes[0]: at}))
        sizes, given = self._one(axes)
        offsets = [ir.ShapedType.get_dynamic_size()] + [0] * (len(sizes) - 1)
        steps = [1] * len(sizes)
        piece = tensor.ExtractSliceOp(self.type(axes[1:]), value, [at], given, [], offsets, sizes, steps)
        return piece.result, axes[1:]

    def with_row(self, array: Array, at: ir.Value, piece: ir.Value) -> ir.Value:
        """Returns the array with ``piece`` at one position of its first axis."""
        value, axes = array
        sizes, given = self._one(axes)
        offsets = [ir.ShapedType.get_dynamic_size()] + [0] * (len(sizes) - 1)
        steps = [1] * len(sizes)
        return tensor.InsertSliceOp(piece, value, [at], given, [], offsets, sizes, steps).result

    def _one(self, axes: str) -> tuple[list[int], list[ir.Value]]:
        """Returns the sizes of one row, and those of them that are dynamic; IREE wants no tensor asked inside loops."""
        sizes = list(self.type(axes).shape)
        return [1, *sizes[1:]], [n for a in axes[1:] if isinstance(n := self.sizes[a], ir.Value)]

    def _generic(self, inputs: list[Array], out: Array, parallel: str, over: str, body: Body) -> Array:
        loops = parallel + over
        maps = [
            ir.AffineMap.get(len(loops), 0, [ir.AffineDimExpr.get(loops.index(a)) for a in letters])
            for _, letters in [*inputs, out]
        ]
        kinds = ["parallel"] * len(parallel) + ["reduction"] * len(over)
        return build.generic([value for value, _ in inputs], out[0], maps, kinds, body), out[1]


def pick(array: Array, at: At, other: Mapping[str, ir.Value]) -> ir.Value:
    """Returns one element inside a body: at the body's own position, but for the letters in ``other``."""
    value, letters = array
    return tensor.ExtractOp(value, [other[a] if a in other else at(a) for a in letters]).result
