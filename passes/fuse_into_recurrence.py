"""fuse-into-recurrence: recurrences compute elementwise ops around them, as they load and store."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import tensor

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes import dialect_fused, torch_ir
from spikingbrain.passes import linalg_build as build
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.dialect_fused import FLAGS, OPERANDS, OUT, SUM, Part, Read
from spikingbrain.passes.elementwise import (
    FLOATS,
    VIEWS,
    Applied,
    Element,
    Expressions,
    Node,
    Place,
    cost,
    elements,
    emit,
)
from spikingbrain.passes.kernels.recurrence import blocks_of
from spikingbrain.passes.kernels.recurrence_base import Problem, problem_of
from spikingbrain.passes.kernels.recurrence_launch import size_of
from spikingbrain.passes.scan_axes import GENERIC
from spikingbrain.target import Target

RECURRENCE = "spikingbrain.linear_recurrence"
MOST_OPS = 64  # in one body: its values are to fit the registers
MOST_CANDIDATES = 64  # ops behind a recurrence among which the last one to fuse is looked for


@dataclass(frozen=True)
class FuseIntoRecurrence:
    """Moves elementwise ops in front of and behind ``linear_recurrence`` into it, where the target has a kernel for it.

    In: our dialect between linalg on tensors. Out: ``fused_recurrence``. In front: feature maps, scales, gates and casts that
    nothing else reads, and views, such as a slice of a joint projection and its heads, whoever reads them. Behind, if
    nothing else reads the outputs: elementwise ops, sums over the value channels (as of RMSNorm) and gates.

    Not handled, as measured or for want of use: decays of heads, which are evaluated once per vector of rows though they are
    small; keys, queries and their decays where several workgroups share a state and each would evaluate them; sums in front,
    as of normalised keys, for which the blocks of rows that the kernel prepares are too short.

    The options ``before`` and ``behind`` choose sides.
    """

    name: ClassVar[str] = "fuse-into-recurrence"
    before: bool = True
    behind: bool = True

    def run(self, module: ir.Module, context: PassContext) -> None:
        if not context.target.vector_bits and not context.target.wave_kernels:
            return
        for op in torch_ir.operations(module, RECURRENCE):
            try:
                problem = problem_of(op.opview)
                blocks_of(problem, context.target)
            except UnsupportedOp:
                continue
            found = _Surroundings(op, problem, context.target).find(self.before, self.behind)
            if found is None:
                continue
            context.record(self, "fused", op, found.summary())
            found.rewrite(op)


@dataclass(frozen=True)
class Output:
    """A tensor computed behind a recurrence: its tree, and those of the row sums in it."""

    value: ir.Value
    node: Node
    sums: list[Applied]

    def trees(self) -> list[tuple[str, Node]]:
        return [*((SUM, node) for node in self.sums), (OUT, self.node)]


@dataclass
class Fusion:
    """What a recurrence is to compute.

    Attributes:
        inputs: the tree of each operand.
        output: what is computed behind it; None for o as it is.
        inside: the ops that are computed in it.
        views: the operands that are read through views.
    """

    inputs: dict[str, Node]
    output: Output | None
    inside: list[ir.Operation]
    views: list[str] = field(default_factory=list)

    def summary(self) -> str:
        names = [name for name, node in self.inputs.items() if isinstance(node, Applied)]
        parts = [f"computes {', '.join(names)}"] if names else []
        parts += [f"reads {', '.join(self.views)} where they are"] if self.views else []
        if self.output:
            sums = len(self.output.sums)
            parts.append("computes the output" + (f" with {sums} row sum{'s' * (sums > 1)}" if sums else ""))
        return "; ".join(parts)

    def rewrite(self, op: ir.Operation) -> None:
        """Replaces the recurrence and what is computed in it."""
        recurrence = op.opview
        last = self.output.value if self.output else recurrence.o
        trees = [*self.inputs.items(), *(self.output.trees() if self.output else [])]
        parts = [Part(name, [Read(e.value, _map(e.place)) for e in elements(node)]) for name, node in trees]
        sums = (
            [ir.RankedTensorType(s.op.results[0].type).element_type for s in self.output.sums]
            if self.output
            else []
        )
        y_type = ir.RankedTensorType.get(
            ir.RankedTensorType(recurrence.o.type).shape, ir.RankedTensorType(last.type).element_type
        )
        with ir.InsertionPoint.after(last.owner), op.location:
            flags = {name: op.attributes[name] for name in FLAGS}
            results = [y_type, recurrence.final_state.type]
            fused = dialect_fused.create(parts, recurrence.state, flags, results, sums)
            for (_, node), region in zip(trees, fused.op.regions, strict=True):
                body, read = region.blocks[0], elements(node)
                arguments = list(body.arguments)
                given = len(arguments) - len(read)
                values = {(e.value, e.place): a for e, a in zip(read, arguments[given:], strict=True)}
                with ir.InsertionPoint(body):
                    dialect_fused.close(emit(node, arguments[:given], values))
            y = fused.y
            if len(ir.RankedTensorType(last.type).shape) == 3:
                groups = build.reassociation([[0], [1], [2, 3]])
                y = tensor.CollapseShapeOp(last.type, y, groups).result
        last.replace_all_uses_with(y)
        recurrence.final_state.replace_all_uses_with(fused.final_state)
        in_front = [(read.value, read.map) for part in parts if part.name in OPERANDS for read in part.reads]
        for dead in self.inside:  # users first, the recurrence among them
            if dead.name == RECURRENCE:
                _ask_others(dead, lambda axis: size_of(in_front, y_type, axis))
            elif dead.name == GENERIC:
                _ask_others(dead, functools.partial(build.size, list(dead.operands)[-1]))
            if all(not list(r.uses) for r in dead.results):
                dead.erase()


def _ask_others(op: ir.Operation, size: Callable[[int], ir.Value]) -> None:
    """Asks others for the sizes of an op's first result, so that it can go."""
    for user in [use.owner.operation for use in op.results[0].uses]:
        axis = torch_ir.defining(user.operands[1], "arith.constant") if user.name == "tensor.dim" else None
        if axis is not None:
            with ir.InsertionPoint(user), user.location:
                user.results[0].replace_all_uses_with(size(axis.attributes["value"].value))
            user.erase()


class _Surroundings:
    """The ops of the block around one recurrence."""

    def __init__(self, op: ir.Operation, problem: Problem, target: Target):
        self.op, self.recurrence, self.problem, self.target = op, op.opview, problem, target
        self.block = [o.operation for o in op.block.operations]
        self.order = {o: i for i, o in enumerate(self.block)}

    def find(self, before: bool, behind: bool) -> Fusion | None:
        """Returns what can be fused on these sides, or None."""
        fusion = self._with_output() if behind else None
        if fusion is None:
            inside = self._inside(self.op)
            fusion = Fusion(self._inputs(inside), None, inside)
        if not before:
            fusion.inputs = {name: self._tree(name, ()) for name in fusion.inputs}
        fusion.views = [
            name
            for name, node in fusion.inputs.items()
            if isinstance(node, Element) and node.value != getattr(self.recurrence, name)
        ]
        return fusion if fusion.summary() and self._has_sizes(fusion) else None

    def _with_output(self) -> Fusion | None:
        """Returns the fusion with as many ops behind the recurrence as possible."""
        o, final_state = self.op.results
        shape, after = list(ir.RankedTensorType(o.type).shape), self._after(o)
        whole_rows = blocks_of(dataclasses.replace(self.problem, computed=(OUT,)), self.target) == 1
        end = min((self.order.get(user, -1) for user in self._users(final_state)), default=len(self.order))
        readers = set(self._users(o))
        for last in reversed(after[:MOST_CANDIDATES]):
            inside = self._inside(last)
            given = Expressions(shape, inside, o, after)
            place = self._place_of_output(last, given.here())
            if place is None or end < self.order[last] or not readers <= set(inside):
                continue
            node = given.at(last.results[0], place)
            sums = [tree for _, tree in given.sums]
            if (
                isinstance(node, Applied)
                and sum(map(cost, [node, *sums])) <= MOST_OPS
                and (whole_rows or not sums)
            ):
                return Fusion(self._inputs(inside), Output(last.results[0], node, sums), inside)
        return None

    def _place_of_output(self, last: ir.Operation, here: Place) -> Place | None:
        """Returns where outputs lie in the result of an op: as they are, or with heads and channels as one axis."""
        if len(last.results) != 1:
            return None
        shape = list(ir.RankedTensorType(self.recurrence.o.type).shape)
        ranked = ir.RankedTensorType(last.results[0].type)
        if str(ranked.element_type) not in FLOATS:
            return None
        if list(ranked.shape) == shape:
            return here
        flat = (*here[:2], here[2].times(shape[3]) + here[3])
        return flat if list(ranked.shape) == [*shape[:2], shape[2] * shape[3]] else None

    def _after(self, value: ir.Value) -> list[ir.Operation]:
        """Returns the ops that depend on a value, along linalg ops and views of its block, in order."""
        found: set[ir.Operation] = set()
        waiting = [value]
        while waiting:
            for op in self._users(waiting.pop()):
                if (op.name == GENERIC or op.name in VIEWS) and op in self.order and op not in found:
                    found.add(op)
                    waiting += op.results
        return sorted(found, key=self.order.__getitem__)

    def _inside(self, last: ir.Operation) -> list[ir.Operation]:
        """Returns the ops whose results end in the recurrence or in ``last``, and nowhere else; the last one first."""
        found = {last: None, self.op: None}
        waiting = {op for user in found for op in self._makers(user)} - set(found)
        while waiting:  # an op's users come behind it, and are decided by then
            op = max(waiting, key=self.order.__getitem__)
            waiting.remove(op)
            if all(user in found for result in op.results for user in self._users(result)):
                found[op] = None
                waiting |= set(self._makers(op))
        return sorted(found, key=lambda op: -self.order[op])

    def _makers(self, op: ir.Operation) -> list[ir.Operation]:
        """Returns the linalg ops and views of the block that make an op's operands."""
        made = [torch_ir.defining(v) for v in op.operands]
        return [m for m in made if m and m in self.order and (m.name == GENERIC or m.name in VIEWS)]

    def _users(self, value: ir.Value) -> list[ir.Operation]:
        """Returns the ops that read a value; to ask for its sizes is not to read it."""
        return [use.owner.operation for use in value.uses if use.owner.operation.name != "tensor.dim"]

    def _inputs(self, inside: Sequence[ir.Operation]) -> dict[str, Node]:
        """Returns the trees of the operands that there are."""
        axis, found = self.problem.decay_axis, {}
        shared = blocks_of(self.problem, self.target) > 1
        for name in OPERANDS:
            of_columns = name == "v" or (name == "decay" and axis == "value")
            small = name == "bonus" or (name == "decay" and axis == "head")
            computed = not small and (of_columns or not shared)
            if getattr(self.recurrence, name) is not None:
                found[name] = self._tree(name, inside if computed else ())
        return found

    def _tree(self, name: str, inside: Sequence[ir.Operation]) -> Node:
        """Returns the tree of an operand, without arithmetic where that is too much, or a constant."""
        value, sizes = getattr(self.recurrence, name), self._sizes(name)
        place = _place(name, self.problem, sizes)
        node = Expressions(sizes, inside).at(value, place)
        if isinstance(node, Applied) and (cost(node) > MOST_OPS or not elements(node)):
            node = Expressions(sizes).at(value, place)
        return node if isinstance(node, Applied | Element) else Element(value, place)

    def _sizes(self, name: str) -> list[int]:
        q, k, v = (list(ir.RankedTensorType(x.type).shape) for x in list(self.op.operands)[:3])
        if name == "q":
            return q
        return v if name == "v" or (name == "decay" and self.problem.decay_axis == "value") else k

    def _has_sizes(self, fusion: Fusion) -> bool:
        """Tells whether dynamic sizes of batch and time can be had of a tensor that is read."""
        shape = ir.RankedTensorType(self.recurrence.o.type).shape
        forms = {form for node in fusion.inputs.values() for e in elements(node) for form in e.place}
        here = Expressions(shape).here()
        return all(here[axis] in forms for axis in (0, 1) if shape[axis] < 0)


def _place(name: str, problem: Problem, sizes: Sequence[int]) -> Place:
    """Returns where an operand lies in the space of batch, token, head or state, and channel."""
    here = Expressions(sizes).here()
    if name == "bonus":
        return here[2:]
    return here[:3] if name == "decay" and problem.decay_axis == "head" else here


def _map(place: Place) -> ir.AffineMap:
    return ir.AffineMap.get(dialect_fused.SPACE, 0, [form.expression() for form in place])
