"""The control op of pointwise scans: its definition, how it is made and read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch_mlir import ir

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.dialect_base import shape

NAME = "spikingbrain_control.pointwise_scan"
YIELD = "spikingbrain_control.yield"


def verify_pointwise_scan(op: ir.Operation) -> str:
    """Runs a scalar region over time at every point of a space: neurons, and other loops of elementwise ops.

    ``carried_(t+1)[p], y_t[p] = body(carried_t[p], x_t[p], w[p])`` for t = 0 .. T-1, each point p on its own. Operands are
    the ``carried`` initial values, the ``scanned`` tensors, then what stays the same over time; results are the final
    values, then the stacked ones. ``maps`` say for each operand, then for each stacked result, where a point lies in
    it: from (t, the axes of the space) to its own axes, in any order, an axis left out where it is broadcast, 0
    for an axis of size 1. ``backwards`` says for each scanned operand, then for each stacked result, whether it runs from
    T-1 to 0. At T = 0 the carried values return unchanged.

        %last, %ys = "spikingbrain_control.pointwise_scan"(%s0, %xs, %w) ({
          ^bb0(%s: f32, %x: f32, %decay: f32):
            %kept = arith.mulf %s, %decay : f32
            %s1 = arith.addf %kept, %x : f32
            "spikingbrain_control.yield"(%s1, %s1) : (f32, f32) -> ()
          }) {carried = 1 : i64, scanned = 1 : i64, backwards = [false, false],
              maps = [affine_map<(t, n) -> (n)>, affine_map<(t, n) -> (t, n)>, affine_map<(t, n) -> (n)>,
                      affine_map<(t, n) -> (t, n)>]}
               : (tensor<4xf32>, tensor<?x4xf32>, tensor<4xf32>) -> (tensor<4xf32>, tensor<?x4xf32>)
    """
    if missing := {"carried", "scanned", "maps", "backwards"} - set(op.attributes.keys()):
        return f"needs the attribute {min(missing)}"
    scan = PointwiseScan(op)
    tensors = [*op.operands, *scan.stacked]
    if not scan.scanned:
        return "needs a scanned tensor: it says how long the scan is"
    if len(scan.maps) != len(tensors):
        return f"needs {len(tensors)} maps, got {len(scan.maps)}"
    if len(scan.backwards) != len(scan.scanned) + len(scan.stacked):
        return "needs one entry of backwards for each scanned and each stacked tensor"
    if [v.type for v in scan.initial] != [v.type for v in scan.final]:
        return "final values must have the types of the carried ones"
    return _wrong_maps(scan, tensors) or _wrong_body(scan)


@dataclass(frozen=True)
class PointwiseScan:
    """A ``pointwise_scan`` op, taken apart."""

    op: ir.Operation

    @property
    def initial(self) -> list[ir.Value]:
        return list(self.op.operands)[: self._carried]

    @property
    def scanned(self) -> list[ir.Value]:
        return list(self.op.operands)[self._carried : self._carried + self._scanned]

    @property
    def invariants(self) -> list[ir.Value]:
        return list(self.op.operands)[self._carried + self._scanned :]

    @property
    def final(self) -> list[ir.Value]:
        return list(self.op.results)[: self._carried]

    @property
    def stacked(self) -> list[ir.Value]:
        return list(self.op.results)[self._carried :]

    @property
    def maps(self) -> list[ir.AffineMap]:
        return [attribute.value for attribute in self.op.attributes["maps"]]

    @property
    def backwards(self) -> list[bool]:
        return [attribute.value for attribute in self.op.attributes["backwards"]]

    @property
    def body(self) -> ir.Block:
        return self.op.regions[0].blocks[0]

    @property
    def rank(self) -> int:
        """Returns how many axes the space has, time not counted."""
        return int(self.maps[0].n_dims) - 1

    @property
    def _carried(self) -> int:
        return int(self.op.attributes["carried"].value)

    @property
    def _scanned(self) -> int:
        return int(self.op.attributes["scanned"].value)

    def sizes(self) -> list[ir.Value]:
        """Emits the sizes of time and of the axes of the space, as indices."""
        found: dict[int, ir.Value] = {}
        for value, map_ in zip(self.op.operands, self.maps, strict=False):
            for axis, dim in enumerate(dims(map_)):
                if dim is not None and dim not in found:
                    found[dim] = build.size(value, axis)
        return [found[dim] for dim in range(self.rank + 1)]


def create(
    initial: Sequence[ir.Value],
    scanned: Sequence[ir.Value],
    invariants: Sequence[ir.Value],
    stacked: Sequence[ir.Type],
    maps: Sequence[ir.AffineMap],
    backwards: Sequence[bool],
) -> PointwiseScan:
    """Emits the op with an empty body, whose block has its arguments."""
    operands = [*initial, *scanned, *invariants]
    i64 = ir.IntegerType.get_signless(64)
    op = ir.Operation.create(
        NAME,
        [*(v.type for v in initial), *stacked],
        operands,
        {
            "carried": ir.IntegerAttr.get(i64, len(initial)),
            "scanned": ir.IntegerAttr.get(i64, len(scanned)),
            "maps": ir.ArrayAttr.get([ir.AffineMapAttr.get(m) for m in maps]),
            "backwards": ir.ArrayAttr.get([ir.BoolAttr.get(b) for b in backwards]),
        },
        regions=1,
    )
    elements = [ir.RankedTensorType(v.type).element_type for v in operands]
    op.regions[0].blocks.append(*elements, arg_locs=[op.location] * len(elements))
    return PointwiseScan(op)


def close(values: Sequence[ir.Value]) -> None:
    """Emits the end of a body."""
    ir.Operation.create(YIELD, operands=list(values))


def dims(map_: ir.AffineMap) -> list[int | None]:
    """Returns for each axis of a tensor which dimension of (t, space) it is, None for an axis of size 1."""
    return [e.position if isinstance(e, ir.AffineDimExpr) else None for e in map_.results]


def affine_map(count: int, places: Sequence[int | None]) -> ir.AffineMap:
    """Returns the map of a tensor from (t, space), ``count`` dimensions in all; the reverse of ``dims``."""
    results = [ir.AffineConstantExpr.get(0) if p is None else ir.AffineDimExpr.get(p) for p in places]
    return ir.AffineMap.get(count, 0, results)


def _wrong_maps(scan: PointwiseScan, tensors: Sequence[ir.Value]) -> str:
    count = scan.rank + 1
    known: dict[int, int] = {}
    space = list(range(1, count))
    kinds = ["carried"] * len(scan.initial) + ["scanned"] * len(scan.scanned)
    kinds += ["invariant"] * len(scan.invariants) + ["stacked"] * len(scan.stacked)
    for kind, value, map_ in zip(kinds, tensors, scan.maps, strict=True):
        places, sizes = dims(map_), shape(value)
        used = [p for p in places if p is not None]
        if map_.n_dims != count or len(places) != len(sizes) or len(set(used)) != len(used):
            return f"map {map_} does not fit a tensor of shape {sizes}"
        if kind == "carried" and used != space:
            return "the maps of carried values name every axis of the space, in order"
        if (0 in used) != (kind in ("scanned", "stacked")):
            return "time is an axis of scanned and stacked tensors, and of no other"
        if kind == "stacked" and len(used) != count:
            return "the maps of stacked results name every axis"
        for place, size in zip(places, sizes, strict=True):
            if place is None and size != 1:
                return f"an axis of size {size} cannot be read at 0 alone"
            if place is None or size == ir.ShapedType.get_dynamic_size():
                continue
            if size != known.setdefault(place, size):
                axis = "time" if place == 0 else f"axis {place - 1} of the space"
                return f"sizes differ along {axis}: {known[place]} and {size}"
    return ""


def _wrong_body(scan: PointwiseScan) -> str:
    *ops, terminator = [op.operation for op in scan.body.operations] or [None]
    if terminator is None or terminator.name != YIELD:
        return f"body must end in {YIELD}"
    if [a.type for a in scan.body.arguments] != _elements(scan.op.operands):
        return "body must take one element of every operand"
    if [v.type for v in terminator.operands] != _elements(scan.op.results):
        return "body must yield one element of every result"
    for op in ops:
        if any(True for _ in op.regions) or any(isinstance(r.type, ir.ShapedType) for r in op.results):
            return f"body must be of scalars alone, got {op.name}"
    return ""


def _elements(values: Iterable[ir.Value]) -> list[ir.Type]:
    return [ir.RankedTensorType(v.type).element_type for v in values]
