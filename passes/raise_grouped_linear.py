"""raise-grouped-linear: the torch ops of projections by experts become those of the dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import parameters, torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin

_FLOATS, _SPIKES = "torch.spikingbrain.grouped_linear", "torch.spikingbrain.spike_grouped_linear"


@dataclass(frozen=True)
class RaiseGroupedLinear:
    """Raises ``torch.ops.spikingbrain.grouped_linear`` and ``spike_grouped_linear`` to the dialect's ops of these names.

    In: ``torch.operator "torch.spikingbrain.*"``. Out: the dialect's op between ``torch_c`` casts. Stored weights ``[N, K, O]``
    of floats are stored the other way round; computed ones are transposed. Not handled: sizes of weights that are not known;
    those keep the op, which no later pass lowers.
    """

    name: ClassVar[str] = "raise-grouped-linear"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "torch.operator"):
            if op.attributes["name"].value not in (_FLOATS, _SPIKES):
                continue
            reason = _refusal(op)
            context.record(self, "refused" if reason else "raised", op, reason)
            if reason:
                continue
            raised = _floats if op.attributes["name"].value == _FLOATS else _spikes
            with ir.InsertionPoint(op), op.location:
                result = raised(list(op.operands), builtin_type(op.results[0].type))
                op.results[0].replace_all_uses_with(from_builtin(result, op.results[0].type))
            op.erase()


def _refusal(op: ir.Operation) -> str:
    floats = op.attributes["name"].value == _FLOATS
    tensors = op.operands[: 3 if floats else 5]
    settings = op.operands[len(tensors) :]
    expert = tensors[-1]
    weights = tensors[1:2] if floats else tensors[2:4]
    if any(-1 in (torch_ir.shape(weight) or [-1]) for weight in weights):
        return "weights of unknown size"
    if torch_ir.element_type(expert) != "si64":
        return f"experts of {torch_ir.element_type(expert)}; only int64 is raised"
    if any(torch_ir.constant(setting) is None for setting in settings):
        return "an argument that is not constant"
    return ""


def _floats(operands: list[ir.Value], type_: ir.Type) -> ir.Value:
    x, weight, expert, transposed = operands
    weight = _plain(weight)
    if torch_ir.constant(transposed):
        weight = _transposed(weight)
    columns = _number(ir.RankedTensorType(weight.type).shape[1])
    operands = [to_builtin(x), weight, to_builtin(expert)]
    return ir.Operation.create("spikingbrain.grouped_linear", [type_], operands, {"columns": columns}).result


def _spikes(operands: list[ir.Value], type_: ir.Type) -> ir.Value:
    counts, threshold, weight, scale, expert, bits, silent = operands
    operands = [to_builtin(counts), to_builtin(threshold), _plain(weight), _plain(scale), to_builtin(expert)]
    attributes: dict[str, ir.Attribute] = {"bits": _number(torch_ir.constant(bits))}
    if share := torch_ir.constant(silent):
        attributes["silent"] = ir.FloatAttr.get(ir.F64Type.get(), float(share))
    return ir.Operation.create("spikingbrain.spike_grouped_linear", [type_], operands, attributes).result


def _number(value: int | float | None) -> ir.IntegerAttr:
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)


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
