"""The control op of recurrences that compute what is around them: its definition, how it is made and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_mlir import ir

from spikingbrain.passes.dialect_base import shape

NAME = "spikingbrain_control.fused_recurrence"
YIELD = "spikingbrain_control.yield"
FLAGS = ("decay_axis", "log_decay", "exclusive", "reverse")
OPERANDS = ("q", "k", "v", "decay", "erase", "predict", "bonus")
SUM, OUT = "sum", "o"
SPACE = 4  # dimensions of a map: batch, token, head or state, channel


def verify_fused_recurrence(op: ir.Operation) -> str:
    """Runs a ``linear_recurrence`` whose operands are computed as they are read, and whose output as it is written.

    ``q[b,t,h,c] = body(x[map(b,t,h,c)], ...)``, and so k, v, decay, erase, predict and bonus, h being the state there and c
    the channel. ``parts`` names what each region computes: operands of the recurrence first, as many as it has; then row sums
    ``sum[b,t,h] = sum_c body(o[b,t,h,c], sums before, x[map(b,t,h,c)], ...)``; then, unless outputs are written as they are,
    ``o``, which is ``body(o[b,t,h,c], sums, x[map(b,t,h,c)], ...)``. Every region reads elements of its own, each by the next
    operand of the op and the next of ``maps``; the last operand is the state, if there is one more than maps. The other
    attributes are those of ``linear_recurrence``. Channels lie next to each other in memory, or all read one element.

        %y, %last = "spikingbrain_control.fused_recurrence"(%x, %x, %v, %gate, %s0) ({
          ^bb0(%a: f32):
            %scale = arith.constant 0.125 : f32
            %b = arith.mulf %a, %scale : f32
            "spikingbrain_control.yield"(%b) : (f32) -> ()
          }, {
          ^bb0(%a: f32):
            "spikingbrain_control.yield"(%a) : (f32) -> ()
          }, {
          ^bb0(%a: bf16):
            %b = arith.extf %a : bf16 to f32
            "spikingbrain_control.yield"(%b) : (f32) -> ()
          }, {
          ^bb0(%o: f32, %a: f32):
            %b = arith.mulf %o, %a : f32
            "spikingbrain_control.yield"(%b) : (f32) -> ()
          }) {decay_axis = "none", log_decay = false, exclusive = false, reverse = false, parts = ["q", "k", "v", "o"],
              maps = [affine_map<(b, t, h, c) -> (b, t, h * 16 + c)>, affine_map<(b, t, h, c) -> (b, t, h * 16 + c + 32)>,
                      affine_map<(b, t, h, c) -> (b, t, h, c)>, affine_map<(b, t, h, c) -> (b, t, h, c)>]}
               : (tensor<1x?x64xf32>, tensor<1x?x64xf32>, tensor<1x?x2x8xbf16>, tensor<1x?x2x8xf32>,
                  tensor<1x2x16x8xf32>) -> (tensor<1x?x2x8xf32>, tensor<1x2x16x8xf32>)
    """
    if missing := {"parts", "maps", *FLAGS} - set(op.attributes.keys()):
        return f"needs the attribute {min(missing)}"
    fused = FusedRecurrence(op)
    wanted = _operands(op)
    names = fused.names
    if len(names) != len(op.regions):
        return f"needs a region for each part: {len(names)} parts, {len(op.regions)} regions"
    rest = names[len(wanted) :]
    if names[: len(wanted)] != wanted or [n for n in rest if n != SUM] not in ([], [OUT]) or SUM in rest[-1:]:
        return f"has parts {names}; they are {wanted}, then sums and o, if any"
    if len(op.operands) - len(fused.maps) not in (0, 1):
        return f"needs a map for every operand but the state, got {len(fused.maps)} for {len(op.operands)}"
    state = fused.state
    if len(shape(fused.y)) != SPACE or len(shape(fused.final_state)) != SPACE:
        return "has results [B, T, H, V] and [B, S, K, V]"
    if state is not None and shape(state)[1:] != shape(fused.final_state)[1:]:
        return f"state is {shape(state)}, the final one {shape(fused.final_state)}"
    given = sum(len(part.reads) for part in fused.parts)
    if given != len(fused.maps):
        return f"regions read {given} elements, maps are {len(fused.maps)}"
    return next((wrong for part in fused.parts if (wrong := _wrong_part(fused, part))), "")


@dataclass(frozen=True)
class Read:
    """An element that a part reads: of a tensor, by a map from (batch, token, head or state, channel); None: as it lies."""

    value: ir.Value
    map: ir.AffineMap | None = None


@dataclass(frozen=True)
class Part:
    """Something computed from what is read: an operand of the recurrence, a row sum or the output.

    ``body`` takes the elements read, for sums and the output behind the recurrence's own and the sums before; None: the
    one element read.
    """

    name: str
    reads: Sequence[Read]
    body: ir.Block | None = None


@dataclass(frozen=True)
class FusedRecurrence:
    """A ``fused_recurrence`` op, taken apart."""

    op: ir.Operation

    @property
    def names(self) -> list[str]:
        return [attribute.value for attribute in self.op.attributes["parts"]]

    @property
    def maps(self) -> list[ir.AffineMap]:
        return [attribute.value for attribute in self.op.attributes["maps"]]

    @property
    def state(self) -> ir.Value | None:
        operands = list(self.op.operands)
        return operands[-1] if len(operands) > len(self.maps) else None

    @property
    def y(self) -> ir.Value:
        return self.op.results[0]

    @property
    def final_state(self) -> ir.Value:
        return self.op.results[1]

    @property
    def parts(self) -> list[Part]:
        reads = iter([Read(v, m) for v, m in zip(self.op.operands, self.maps, strict=False)])
        found: list[Part] = []
        for name, region in zip(self.names, self.op.regions, strict=True):
            body = region.blocks[0]
            count = len(body.arguments) - given(name, found)
            found.append(Part(name, [r for _, r in zip(range(count), reads, strict=False)], body))
        return found


def given(name: str, before: Sequence[Part]) -> int:
    """Returns how many arguments of a body are no reads: the recurrence's output, and the sums before."""
    return 1 + sum(part.name == SUM for part in before) if name in (SUM, OUT) else 0


def create(
    parts: Sequence[Part],
    state: ir.Value | None,
    flags: Mapping[str, ir.Attribute],
    results: Sequence[ir.Type],
    sums: Sequence[ir.Type],
) -> FusedRecurrence:
    """Emits the op with empty regions, whose blocks have their arguments; ``sums`` are the types of the row sums."""
    reads = [read for part in parts for read in part.reads]
    maps = [read.map or ir.AffineMap.get_identity(SPACE) for read in reads]
    op = ir.Operation.create(
        NAME,
        list(results),
        [*(read.value for read in reads), *([] if state is None else [state])],
        {
            **flags,
            "parts": ir.ArrayAttr.get([ir.StringAttr.get(part.name) for part in parts]),
            "maps": ir.ArrayAttr.get([ir.AffineMapAttr.get(m) for m in maps]),
        },
        regions=len(parts),
    )
    of_output = [ir.RankedTensorType(results[1]).element_type, *sums]
    for i, (part, region) in enumerate(zip(parts, op.regions, strict=True)):
        types = of_output[: given(part.name, parts[:i])]
        types += [ir.RankedTensorType(read.value.type).element_type for read in part.reads]
        region.blocks.append(*types, arg_locs=[op.location] * len(types))
    return FusedRecurrence(op)


def element_of(part: Part) -> ir.Type:
    """Returns the type of what a part yields."""
    assert part.body is not None
    return terminator(part.body).operands[0].type


def close(value: ir.Value) -> None:
    """Emits the end of a body."""
    ir.Operation.create(YIELD, operands=[value])


def terminator(body: ir.Block) -> ir.Operation:
    last: ir.Operation = body.operations[len(body.operations) - 1].operation
    return last


def channels_of(fused: FusedRecurrence, name: str) -> list[int]:
    """Returns the sizes of what a part runs over: batch, token, head or state, channel."""
    batch, time, heads, values = shape(fused.y)
    _, states, keys, _ = shape(fused.final_state)
    if name in ("q", "v", SUM, OUT):
        return [batch, time, states if name == "v" else heads, keys if name == "q" else values]
    axis = fused.op.attributes["decay_axis"].value if name == "decay" else "key"
    return [batch, time, states, {"key": keys, "value": values}.get(axis, 1)]


def _operands(op: ir.Operation) -> list[str]:
    """Returns the operands of the recurrence that parts compute, optional ones if they are there."""
    names = [attribute.value for attribute in op.attributes["parts"]]
    optional = [n for n in ("erase", "bonus") if n in names]
    wanted = {"q", "k", "v", *optional} | ({"predict"} if "erase" in optional else set())
    if op.attributes["decay_axis"].value != "none":
        wanted.add("decay")
    return [name for name in OPERANDS if name in wanted]


def _wrong_part(fused: FusedRecurrence, part: Part) -> str:
    body = part.body
    assert body is not None
    element = ir.RankedTensorType(fused.final_state.type).element_type
    if not len(body.operations) or terminator(body).name != YIELD or len(terminator(body).operands) != 1:
        return f"body of {part.name} must end in {YIELD} of one value"
    made = terminator(body).operands[0].type
    wanted = ir.RankedTensorType(fused.y.type).element_type if part.name == OUT else element
    if part.name != SUM and made != wanted:
        return f"body of {part.name} must yield {wanted}, not {made}"
    sizes = channels_of(fused, part.name)
    elements = list(body.arguments)[len(body.arguments) - len(part.reads) :]
    for argument, read in zip(elements, part.reads, strict=True):
        if argument.type != ir.RankedTensorType(read.value.type).element_type:
            return f"body of {part.name} must take one element of every operand it reads"
        if wrong := _wrong_map(read, sizes):
            return f"{part.name} reads {wrong}"
    for op in list(body.operations)[:-1]:
        if any(True for _ in op.operation.regions) or any(
            isinstance(r.type, ir.ShapedType) for r in op.operation.results
        ):
            return f"body of {part.name} must be of scalars alone, got {op.operation.name}"
    return ""


def _wrong_map(read: Read, sizes: Sequence[int]) -> str:
    map_, of = read.map, shape(read.value)
    assert map_ is not None
    if map_.n_dims != SPACE or len(map_.results) != len(of):
        return f"a tensor of shape {of} by {map_}"
    for axis, (expression, size) in enumerate(zip(map_.results, of, strict=True)):
        factors, constant = linear(expression)
        if factors[-1] not in ([0, 1] if axis == len(of) - 1 else [0]):
            return f"channels that do not lie next to each other, by {map_}"
        used = [n for n, factor in zip(sizes, factors, strict=True) if factor]
        if size < 0 or 0 in sizes or min(used, default=0) < 0:
            continue
        ends = [f * (n - 1) for f, n in zip(factors, sizes, strict=True)]
        if constant + sum(min(e, 0) for e in ends) < 0 or constant + sum(max(e, 0) for e in ends) >= size:
            return f"outside of axis {axis} of {read.value.type}, by {map_}"
    return ""


def linear(expression: ir.AffineExpr) -> tuple[list[int], int]:
    """Returns the factors of a map's dimensions in an expression, and what is added. Raises ValueError for others."""
    if isinstance(expression, ir.AffineConstantExpr):
        return [0] * SPACE, expression.value
    if isinstance(expression, ir.AffineDimExpr):
        return [int(i == expression.position) for i in range(SPACE)], 0
    if isinstance(expression, ir.AffineAddExpr | ir.AffineMulExpr):
        (left, a), (right, b) = linear(expression.lhs), linear(expression.rhs)
        if isinstance(expression, ir.AffineAddExpr):
            return [x + y for x, y in zip(left, right, strict=True)], a + b
        if not any(right):
            return [x * b for x in left], a * b
    raise ValueError(f"{expression} is not linear")
