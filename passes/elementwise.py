"""What a tensor is at one place: scalar ops of other tensors at theirs, which are found through views and linalg ops.

A place is a linear form, of the dimensions of some space, for each axis. ``Expressions`` looks from a tensor backwards and
makes a tree of what it takes; ``emit`` makes scalar ops of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes import torch_ir
from spikingbrain.passes.scan_axes import (
    BROADCAST,
    CONSTANT,
    GENERIC,
    TRANSPOSE,
    inputs_of,
    iterators,
    maps_of,
    uniform,
)
from spikingbrain.passes.scan_body import inline

VIEWS = (
    "tensor.expand_shape",
    "tensor.collapse_shape",
    "tensor.extract_slice",
    "tensor.cast",
    TRANSPOSE,
    BROADCAST,
)
_DYNAMIC = -1
FLOATS = ("f16", "bf16", "f32")
_ARITH = (
    *("addf", "subf", "mulf", "divf", "negf", "maximumf", "minimumf", "maxnumf", "minnumf", "cmpf", "select"),
    *("extf", "truncf", "andi", "ori", "xori", "constant"),
)
# What IREE 3.13 computes on vectors within a few units in the last place; exp2 and powf are 50 and 25 off.
_MATH = ("exp", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "tanh", "erf", "absf", "roundeven")
POWER, LARGEST_POWER = "math.fpowi", 4  # more multiplications would round too often
SCALARS = {f"arith.{name}" for name in _ARITH} | {f"math.{name}" for name in _MATH}


@dataclass(frozen=True)
class Linear:
    """A linear form: a factor for each dimension of the space, and a number."""

    factors: tuple[int, ...]
    constant: int = 0

    def __add__(self, other: Linear) -> Linear:
        factors = tuple(a + b for a, b in zip(self.factors, other.factors, strict=True))
        return Linear(factors, self.constant + other.constant)

    def times(self, number: int, added: int = 0) -> Linear:
        return Linear(tuple(f * number for f in self.factors), self.constant * number + added)

    def divided(self, by: int, sizes: Sequence[int]) -> tuple[Linear, Linear] | None:
        """Returns quotient and remainder, for dimensions of these sizes, where both are linear."""
        low = [f if f % by else 0 for f in self.factors]
        rest = Linear(tuple(low), self.constant % by)
        if any(f < 0 or (f and n < 0) for f, n in zip(low, sizes, strict=True)):
            return None
        if rest.constant + sum(f * (n - 1) for f, n in zip(low, sizes, strict=True)) >= by:
            return None
        high = tuple((f - r) // by for f, r in zip(self.factors, low, strict=True))
        return Linear(high, self.constant // by), rest

    def expression(self) -> ir.AffineExpr:
        total = ir.AffineConstantExpr.get(self.constant)
        for dim, factor in enumerate(self.factors):
            total = total + ir.AffineDimExpr.get(dim) * factor
        return total


Place = tuple[Linear, ...]


class Node:
    """A number that depends on the place: one of the classes below."""


@dataclass(frozen=True, eq=False)
class Element(Node):
    """A tensor's element."""

    value: ir.Value
    place: Place


@dataclass(frozen=True, eq=False)
class Number(Node):
    """A constant."""

    type: ir.Type
    attribute: ir.Attribute


@dataclass(frozen=True, eq=False)
class Given(Node):
    """The element of the tensor from which the expression is to start; ``sum`` numbers its row sums."""

    type: ir.Type
    sum: int | None = None


@dataclass(frozen=True, eq=False)
class Applied(Node):
    """A linalg op's body, applied to numbers."""

    op: ir.Operation
    inputs: Sequence[Node | None]  # None where the body does not ask

    @property
    def cost(self) -> int:
        return len(self.op.regions[0].blocks[0].operations) - 1


@dataclass
class Expressions:
    """Makes trees for tensors at places of a space.

    Attributes:
        sizes: the sizes of the space, negative for a dynamic one; vectors run along the last dimension.
        inside: the ops that may be computed in place; views may always be looked through.
        given: the tensor that is given at the very place of the space, if any. What depends on it is not read.
        after_given: the ops that depend on it.
        sums: sums along the last dimension of what depends on ``given``, each with its tree.
    """

    sizes: Sequence[int]
    inside: Sequence[ir.Operation] = ()
    given: ir.Value | None = None
    after_given: Sequence[ir.Operation] = ()
    sums: list[tuple[ir.Operation, Applied]] = field(default_factory=list)
    _known: dict[tuple[ir.Value, Place], Node | None] = field(default_factory=dict)

    def here(self) -> Place:
        """Returns the place that is that of the space."""
        dims = range(len(self.sizes))
        return tuple(Linear(tuple(int(i == d) for i in dims)) for d in dims)

    def at(self, value: ir.Value, place: Place) -> Node | None:
        """Returns what a tensor is at a place, or None where that cannot be read on vectors."""
        key = (value, place)
        if key not in self._known:
            self._known[key] = self._at(value, place)
        return self._known[key]

    def _at(self, value: ir.Value, place: Place) -> Node | None:
        element = ir.RankedTensorType(value.type).element_type
        if self.given is not None and value == self.given:
            return Given(element) if place == self.here() else None
        if (constant := uniform(value)) is not None:
            return Number(element, constant)
        op = torch_ir.defining(value)
        node = None
        if op is not None and op.name in VIEWS:
            source = source_place(op, place, self.sizes)
            node = None if source is None else self.at(op.operands[0], source)
        elif op is not None and op.name == GENERIC and op in self.inside:
            node = self._row_sum(op, place) if "reduction" in iterators(op) else self._applied(op, place)
        if node is not None or (op is not None and op in self.after_given):
            return node
        return Element(value, place) if self._is_readable(element, place) else None

    def _is_readable(self, element: ir.Type, place: Place) -> bool:
        """Tells whether channels of a tensor lie next to each other, or are one."""
        along = [form.factors[-1] for form in place]
        return str(element) in FLOATS and not any(along[:-1]) and along[-1:] in ([], [0], [1])

    def _applied(self, op: ir.Operation, place: Place) -> Node | None:
        dims = _iteration(op, place)
        if dims is None or not _is_scalar(op, inputs_only=True):
            return None
        inputs = self._inputs(op, dims)
        return None if inputs is None else Applied(op, inputs)

    def _inputs(self, op: ir.Operation, dims: dict[int, Linear]) -> list[Node | None] | None:
        zero = Linear((0,) * len(self.sizes))
        arguments = op.regions[0].blocks[0].arguments
        found: list[Node | None] = []
        for value, map_, argument in zip(inputs_of(op), maps_of(op), arguments, strict=False):
            if not list(argument.uses):
                found.append(None)
                continue
            place = []
            for expression in map_.results:
                if isinstance(expression, ir.AffineDimExpr) and expression.position in dims:
                    place.append(dims[expression.position])
                elif isinstance(expression, ir.AffineConstantExpr):
                    place.append(zero.times(1, expression.value))
                else:
                    return None
            node = self.at(value, tuple(place))
            if node is None:
                return None
            found.append(node)
        return found

    def _row_sum(self, op: ir.Operation, place: Place) -> Node | None:
        """Returns the sum over the last dimension that a reduction is."""
        element = ir.RankedTensorType(op.results[0].type).element_type
        for number, (other, _) in enumerate(self.sums):
            if other == op:
                return Given(element, number)
        kinds, dims = iterators(op), _iteration(op, place)
        axis = kinds.index("reduction")
        if dims is None or kinds.count("reduction") > 1 or any(form.factors[-1] for form in place):
            return None
        if str(element) not in FLOATS or op not in self.after_given or not is_sum(op):
            return None
        inputs = self._inputs(op, {**dims, axis: self.here()[-1]})
        if inputs is None or _length(op, axis) != self.sizes[-1]:
            return None
        self.sums.append((op, Applied(op, inputs)))
        return Given(element, len(self.sums) - 1)


def elements(node: Node) -> list[Element]:
    """Returns the elements that a tree reads, each once."""
    found: dict[tuple[ir.Value, Place], Element] = {}
    for inner in walk(node):
        if isinstance(inner, Element):
            found.setdefault((inner.value, inner.place), inner)
    return list(found.values())


def cost(node: Node) -> int:
    """Returns how many scalar ops a tree is."""
    return sum(inner.cost for inner in walk(node) if isinstance(inner, Applied))


def walk(node: Node) -> list[Node]:
    """Returns a tree's nodes, each once."""
    seen: dict[int, Node] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen[id(current)] = current
            if isinstance(current, Applied):
                waiting += [child for child in reversed(current.inputs) if child is not None]
    return list(seen.values())


def emit(node: Node, given: Sequence[ir.Value], read: dict[tuple[ir.Value, Place], ir.Value]) -> ir.Value:
    """Emits a tree as scalar ops; ``given`` is the element given, then its row sums. The op of a sum gives its summand."""
    made: dict[int, ir.Value] = {}

    def value(node: Node) -> ir.Value:
        if id(node) not in made:
            made[id(node)] = scalar(node)
        return made[id(node)]

    def scalar(node: Node) -> ir.Value:
        if isinstance(node, Element):
            return read[node.value, node.place]
        if isinstance(node, Number):
            return arith.ConstantOp(node.type, node.attribute).result
        if isinstance(node, Given):
            return given[0 if node.sum is None else 1 + node.sum]
        assert isinstance(node, Applied)
        block = node.op.regions[0].blocks[0]
        arguments = {
            argument: value(child)
            for argument, child in zip(block.arguments, node.inputs, strict=False)
            if child is not None
        }
        if "reduction" in iterators(node.op):
            return _summand(block, arguments)
        return inline(block, arguments)[0]

    result = value(node)
    return _powers_written_out(result)


def node_text(node: Node | None, known: dict[tuple[ir.Value, Place], int]) -> str:
    """Returns a tree as text, the same for trees that compute the same."""
    if isinstance(node, Element):
        return f"read {known[node.value, node.place]}"
    if not isinstance(node, Applied):
        return str(node)
    block = node.op.regions[0].blocks[0]
    names: dict[ir.Value, str] = {a: f"a{i}" for i, a in enumerate(block.arguments)}
    steps = []
    for op in [o.operation for o in block.operations]:
        for value in op.operands:
            if value not in names:  # a constant from outside
                names[value] = str(value.owner.attributes["value"])
        settings = {n: str(op.attributes[n]) for n in op.attributes}
        steps.append(f"{op.name}({', '.join(names[v] for v in op.operands)}) {settings}")
        names.update({result: f"v{len(steps)}" for result in op.results})
    return f"[{'; '.join(steps)}]({', '.join(node_text(child, known) for child in node.inputs)})"


def _powers_written_out(result: ir.Value) -> ir.Value:
    """Makes integer powers in the current block products, as there are none on vectors; returns what ``result`` is then."""
    for op in [o.operation for o in ir.InsertionPoint.current.block.operations]:
        if op.name == POWER:
            x, exponent = op.operands
            with ir.InsertionPoint(op):
                product = x
                for _ in range(_exponent(op) - 1):
                    product = arith.mulf(product, x)
            result = product if result == op.results[0] else result
            op.results[0].replace_all_uses_with(product)
            op.erase()
            if not list(exponent.uses):
                exponent.owner.erase()
    return result


def _exponent(power: ir.Operation) -> int:
    """Returns the constant to which a body raises, 0 for none."""
    constant = torch_ir.defining(power.operands[1], CONSTANT)
    return int(constant.attributes["value"].value) if constant else 0


def _summand(block: ir.Block, arguments: dict[ir.Value, ir.Value]) -> ir.Value:
    """Emits what the body of a sum adds to it."""
    accumulator = block.arguments[len(block.arguments) - 1]
    nothing = arith.ConstantOp(accumulator.type, ir.FloatAttr.get(accumulator.type, 0.0))
    (total,) = inline(block, {**arguments, accumulator: nothing.result})
    addition = total.owner.operation
    (summand,) = [v for v in addition.operands if v != nothing.result]
    for op in (addition, nothing.operation):
        op.erase()
    return summand


def source_place(op: ir.Operation, place: Place, sizes: Sequence[int]) -> Place | None:
    """Returns the place in a view's source of a place in the view."""
    source, result = (ir.RankedTensorType(v.type) for v in (op.operands[0], op.results[0]))
    if op.name == "tensor.cast":
        return place
    if op.name == TRANSPOSE:
        order = list(ir.DenseI64ArrayAttr(op.attributes["permutation"]))
        return tuple(place[order.index(axis)] for axis in range(len(order)))
    if op.name == BROADCAST:
        added = set(ir.DenseI64ArrayAttr(op.attributes["dimensions"]))
        return tuple(form for axis, form in enumerate(place) if axis not in added)
    if op.name == "tensor.extract_slice":
        offsets, strides = (
            list(ir.DenseI64ArrayAttr(op.attributes[name])) for name in ("static_offsets", "static_strides")
        )
        if len(source.shape) != len(result.shape) or min([*offsets, *strides], default=0) < 0:
            return None
        return tuple(f.times(s, o) for f, s, o in zip(place, strides, offsets, strict=True))
    groups = [[a.value for a in group] for group in op.attributes["reassociation"]]
    zero = Linear((0,) * len(sizes))
    if op.name == "tensor.expand_shape":
        joined = []
        for group in groups:
            total = zero
            for axis in (a for a in group if result.shape[a] != 1 or len(group) == 1):
                if total != zero and result.is_dynamic_dim(axis):
                    return None
                total = place[axis] if total == zero else total.times(result.shape[axis]) + place[axis]
            joined.append(total)
        return tuple(joined)
    found = [zero] * len(source.shape)
    for form, group in zip(place, groups, strict=True):
        first, *inner = [a for a in group if source.shape[a] != 1 or len(group) == 1] or [None]
        for axis in reversed(inner):
            split = None if source.is_dynamic_dim(axis) else form.divided(source.shape[axis], sizes)
            if split is None:
                return None
            form, found[axis] = split
        if first is not None:
            found[first] = form
    return tuple(found)


def _iteration(op: ir.Operation, place: Place) -> dict[int, Linear] | None:
    """Returns where the dimensions that a linalg op walks over are, at a place of its result."""
    map_ = maps_of(op)[-1]
    dims: dict[int, Linear] = {}
    for expression, form in zip(map_.results, place, strict=True):
        if isinstance(expression, ir.AffineDimExpr):
            dims[expression.position] = form
        elif not isinstance(expression, ir.AffineConstantExpr):
            return None
    wanted = [i for i, kind in enumerate(iterators(op)) if kind == "parallel"]
    return dims if len(op.results) == 1 and set(dims) == set(wanted) else None


def _is_scalar(op: ir.Operation, inputs_only: bool) -> bool:
    """Tells whether a linalg op's body is of scalar ops that are known here, on its inputs and constants."""
    block = op.regions[0].blocks[0]
    *ops, _ = [o.operation for o in block.operations]
    if inputs_only and any(list(a.uses) for a in list(block.arguments)[len(inputs_of(op)) :]):
        return False
    powers = [o for o in ops if o.name == POWER]
    if any(o.name not in SCALARS | {"cf.assert", POWER} for o in ops):
        return False
    if any(not 0 < _exponent(power) <= LARGEST_POWER for power in powers):
        return False
    outside = [
        v
        for o in block.operations
        for v in o.operation.operands
        if (v.owner != block if isinstance(v.owner, ir.Block) else v.owner.operation.block != block)
    ]
    return all(torch_ir.defining(v, CONSTANT) is not None for v in outside)


def is_sum(op: ir.Operation) -> bool:
    """Tells whether a reduction adds what its body computes to its initial value, 0."""
    block = op.regions[0].blocks[0]
    start = uniform(list(op.operands)[-1])
    if start is None or not isinstance(start, ir.FloatAttr) or start.value != 0 or len(op.results) != 1:
        return False
    accumulator = block.arguments[len(block.arguments) - 1]
    total = torch_ir.defining(block.operations[len(block.operations) - 1].operation.operands[0], "arith.addf")
    used = [use.owner.operation for use in accumulator.uses]
    return total is not None and used == [total] and _is_scalar(op, inputs_only=False)


def _length(op: ir.Operation, dim: int) -> int:
    """Returns the size of a dimension that a linalg op walks over."""
    for value, map_ in zip(op.operands, maps_of(op), strict=True):
        for axis, expression in enumerate(map_.results):
            if isinstance(expression, ir.AffineDimExpr) and expression.position == dim:
                return int(ir.RankedTensorType(value.type).shape[axis])
    return _DYNAMIC
