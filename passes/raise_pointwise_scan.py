"""raise-pointwise-scan: loops over time whose body works at every point alone become ``pointwise_scan``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import tensor

from spikingbrain.passes import dialect_scans, torch_ir
from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.dialect_scans import affine_map
from spikingbrain.passes.scan_axes import NotPointwise, find_axes, name_of
from spikingbrain.passes.scan_body import emit_body, find_invariants
from spikingbrain.passes.scan_ends import End, erase_passed, follow_result, follow_source
from spikingbrain.passes.scan_invariants import hoist, unstack
from spikingbrain.passes.scan_sums import defer_sums


@dataclass(frozen=True)
class RaisePointwiseScan:
    """Finds ``time_loop``s whose body is elementwise in one space: LIF and its family, gates, running maxima.

    In: time loops over linalg on tensors, that is after lower-torch. Out: ``pointwise_scan`` where the body, after
    what does not change over time has left it, consists of elementwise ops in the space of the largest carried tensor,
    to which smaller tensors are broadcast. Sums over the space that only add up over time, as gradients of what a body
    closes over do, are taken after the loop. Transpositions and reversals of time around the loop go into its maps. Bodies with
    other reductions, products, positions (``arange``) or slices are left alone.
    """

    name: ClassVar[str] = "raise-pointwise-scan"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for loop in reversed(
            torch_ir.operations(module, "spikingbrain_control.time_loop")
        ):  # inner loops first
            with loop.location:
                hoist(loop)
                loop = unstack(loop)
                try:
                    loop = defer_sums(loop)
                    _raise(loop)
                except NotPointwise as reason:
                    context.record(self, "refused", loop, str(reason))
                    continue
                context.record(self, "raised", loop, "pointwise_scan")
                loop.erase()


def _raise(loop: ir.Operation) -> None:
    """Replaces a loop, or raises NotPointwise and leaves it as it was."""
    carried, block = loop.attributes["carried"].value, loop.regions[0].blocks[0]
    terminator = block.operations[len(block.operations) - 1].operation
    axes = find_axes(block, carried)
    invariants = find_invariants(axes, block)
    rank, backwards = len(axes.space), loop.attributes["reverse"].value
    arguments = [_shifted(axes.place(a, a.type)) for a in block.arguments]
    yielded = [
        _shifted(axes.place(name_of(v, block, terminator, i), v.type))
        for i, v in enumerate(terminator.operands)
    ]
    wide = _Wide(loop, arguments, rank)
    wide.check(zip(loop.results, yielded, strict=True))
    sources = [
        follow_source(End(value, [0, *place], backwards), rank)
        for value, place in zip(list(loop.operands)[carried:], arguments[carried:], strict=True)
    ]
    with ir.InsertionPoint(loop):

        def size(dim: int) -> ir.Value:
            return wide.size(dim) if dim else build.size(sources[0].value, sources[0].place.index(0))

        ends = [
            follow_result(end, rank, size) if wide.fits(place) else end
            for result, place in zip(list(loop.results)[carried:], yielded[carried:], strict=True)
            for end in [End(result, [0, *place], backwards)]
        ]
        initial = [
            value if wide.fits(place) else wide.broadcast(value, place)
            for value, place in zip(list(loop.operands)[:carried], arguments[:carried], strict=True)
        ]
        stacks = [
            end.value.type if wide.fits(place) else wide.stack_type(end.value.type)
            for end, place in zip(ends, yielded[carried:], strict=True)
        ]
        places = [place if wide.fits(place) else wide.space for place in arguments[:carried]]
        places += [end.place for end in sources]
        places += [_shifted(place) for _, place in invariants.entries]
        places += [
            end.place if wide.fits(place) else [0, *wide.space]
            for end, place in zip(ends, yielded[carried:], strict=True)
        ]
        scan = dialect_scans.create(
            initial,
            [end.value for end in sources],
            [value for value, _ in invariants.entries],
            stacks,
            [affine_map(rank + 1, place) for place in places],
            [end.backwards for end in [*sources, *ends]],
        )
        with ir.InsertionPoint(scan.body):
            scalars = emit_body(block, list(scan.body.arguments), invariants, len(block.arguments))
            dialect_scans.close(scalars)
        old = [*list(loop.results)[:carried], *(end.value for end in ends)]
        for result, value, place, stacked in zip(
            old, scan.op.results, yielded, [False] * carried + [True] * len(ends), strict=True
        ):
            new = value if wide.fits(place) else wide.narrowed(value, result.type, place, stacked)
            result.replace_all_uses_with(new)
        for end in ends:
            erase_passed(end, loop)


def _shifted(place: Sequence[int | None]) -> list[int | None]:
    """Returns axes of the space as dimensions of (t, space)."""
    return [None if p is None else p + 1 for p in place]


class _Wide:
    """Carried and stacked tensors that lack axes of the space: computed at every point, taken at the first."""

    def __init__(self, loop: ir.Operation, places: Sequence[Sequence[int | None]], rank: int):
        self.space: list[int | None] = list(range(1, rank + 1))
        self._loop = loop
        self._largest, self._place = next(
            (value, place) for value, place in zip(loop.operands, places, strict=True) if self.fits(place)
        )

    def fits(self, place: Sequence[int | None]) -> bool:
        """Returns whether a tensor has every axis."""
        return [p for p in place if p is not None] == self.space

    def check(self, results: Iterable[tuple[ir.Value, Sequence[int | None]]]) -> None:
        """Raises NotPointwise for results that cannot be taken from wider ones."""
        for result, place in results:
            used = [p for p in place if p is not None]
            if used != sorted(used):
                raise NotPointwise("a carried or stacked tensor is mixed with its transpose")
            ones = sum(p is None for p in place)
            if not self.fits(place) and ones > len(self.space) - len(used):
                raise NotPointwise(f"a result of type {result.type} is smaller than the space")

    def broadcast(self, value: ir.Value, place: Sequence[int | None]) -> ir.Value:
        rank = len(self.space)
        shape = self._shape()
        type_ = ir.RankedTensorType.get(shape, ir.RankedTensorType(value.type).element_type)
        out = build.empty(type_, [self.size(d + 1) for d, n in enumerate(shape) if n < 0])
        source = affine_map(rank, [None if p is None else p - 1 for p in place])
        maps = [source, ir.AffineMap.get_identity(rank)]
        return build.generic([value], out, maps, ["parallel"] * rank, lambda x, _: x)

    def stack_type(self, type_: ir.Type) -> ir.RankedTensorType:
        ranked = ir.RankedTensorType(type_)
        return ir.RankedTensorType.get([ranked.shape[0], *self._shape()], ranked.element_type)

    def narrowed(
        self, value: ir.Value, type_: ir.Type, place: Sequence[int | None], stacked: bool
    ) -> ir.Value:
        """Returns the first element along the axes that ``type_`` lacks."""
        dynamic = ir.ShapedType.get_dynamic_size()
        shape = ir.RankedTensorType(value.type).shape
        kept = [True] * stacked + [p in place for p in self.space]
        sizes = [n if keep else 1 for n, keep in zip(shape, kept, strict=True)]
        wanted = [build.size(value, axis) for axis, n in enumerate(sizes) if n == dynamic]
        zeros, ones = [0] * len(sizes), [1] * len(sizes)
        return tensor.ExtractSliceOp(type_, value, [], wanted, [], zeros, sizes, ones).result

    def _shape(self) -> list[int]:
        shape = ir.RankedTensorType(self._largest.type).shape
        return [n for n, p in zip(shape, self._place, strict=True) if p is not None]

    def size(self, dim: int) -> ir.Value:
        """Emits the size of one dimension of the space."""
        return build.size(self._largest, self._place.index(dim))
