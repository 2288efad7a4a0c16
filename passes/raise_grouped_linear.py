"""raise-grouped-linear: the torch op of projections by experts becomes that of the dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import parameters, torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin

_NAME = "torch.spikingbrain.grouped_linear"


@dataclass(frozen=True)
class RaiseGroupedLinear:
    """Raises ``torch.ops.spikingbrain.grouped_linear`` to ``spikingbrain.grouped_linear``.

    In: ``torch.operator "torch.spikingbrain.grouped_linear"``. Out: the dialect's op between ``torch_c`` casts. Stored weights
    ``[N, K, O]`` are stored the other way round; computed ones are transposed. Not handled: sizes of weights that are not
    known; those keep the op, which no later pass lowers.
    """

    name: ClassVar[str] = "raise-grouped-linear"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "torch.operator"):
            if op.attributes["name"].value != _NAME:
                continue
            reason = _refusal(op)
            context.record(self, "refused" if reason else "raised", op, reason)
            if reason:
                continue
            with ir.InsertionPoint(op), op.location:
                op.results[0].replace_all_uses_with(_raised(op))
            op.erase()


def _refusal(op: ir.Operation) -> str:
    _, weight, expert, transposed = op.operands
    if -1 in (torch_ir.shape(weight) or [-1]):
        return "weights of unknown size"
    if torch_ir.element_type(expert) != "si64":
        return f"experts of {torch_ir.element_type(expert)}; only int64 is raised"
    if not isinstance(torch_ir.constant(transposed), bool):
        return "an argument that is not constant"
    return ""


def _raised(op: ir.Operation) -> ir.Value:
    x, weight, expert, transposed = op.operands
    plain = _plain(weight)
    if torch_ir.constant(transposed):
        plain = _transposed(plain)
    columns = ir.RankedTensorType(plain.type).shape[1]
    made = ir.Operation.create(
        "spikingbrain.grouped_linear",
        [builtin_type(op.results[0].type)],
        [to_builtin(x), plain, to_builtin(expert)],
        {"columns": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), columns)},
    )
    return from_builtin(made.result, op.results[0].type)


def _plain(weight: ir.Value) -> ir.Value:
    """Returns a torch tensor as a builtin one, and what is stored as the ``parameter`` that it is."""
    cast = torch_ir.defining(weight, "torch_c.from_builtin_tensor")
    return cast.operands[0] if cast is not None else to_builtin(weight)


def _transposed(weight: ir.Value) -> ir.Value:
    type_ = ir.RankedTensorType(weight.type)
    experts, channels, columns = type_.shape
    swapped = ir.RankedTensorType.get([experts, columns, channels], type_.element_type)
    stored = parameters.parameter(weight)
    if stored is not None:
        old = parameters.stored(stored)
        return parameters.create(old.sources, [*old.recipe, "transpose"], swapped)
    empty = ir.Operation.create("tensor.empty", [swapped]).result
    order = {"permutation": ir.DenseI64ArrayAttr.get([0, 2, 1])}
    made = ir.Operation.create("linalg.transpose", [swapped], [weight, empty], order, regions=1)
    elements = [type_.element_type] * 2
    block = made.regions[0].blocks.append(*elements)
    with ir.InsertionPoint(block):
        ir.Operation.create("linalg.yield", [], [block.arguments[0]])
    return made.result
