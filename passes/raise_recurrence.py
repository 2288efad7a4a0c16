"""raise-recurrence: the recurrence ops of torch become those of the dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin, vtensor_type

_WIDE = {"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f64"}
_DTYPES = {"f32": 6, "f64": 7, "f16": 5, "bf16": 15}  # torch's numbers of them


@dataclass(frozen=True)
class Signature:
    """How an op of torch lists its operands: tensors, of which the last ``optional`` may be None, then attributes."""

    tensors: int
    optional: int
    attributes: tuple[str, ...]


_OPS = {
    "linear_recurrence": Signature(8, 5, ("decay_axis", "log_decay", "exclusive", "reverse")),
    "linear_scan": Signature(3, 1, ("log_decay", "reverse")),
    "selective_scan": Signature(6, 1, ("reverse",)),
}


@dataclass(frozen=True)
class RaiseRecurrence:
    """Raises ``torch.ops.spikingbrain`` recurrences to the ops of the dialect that have their names.

    In: ``torch.operator "torch.spikingbrain.*"``. Out: the dialect's op between ``torch_c`` casts, in f32 or f64: half
    floats are widened in front of it, and its first result is narrowed behind it. Not handled: dynamic numbers
    or sizes of heads, and arguments that are not constant; those keep the op, which no later pass lowers.
    """

    name: ClassVar[str] = "raise-recurrence"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in torch_ir.operations(module, "torch.operator"):
            name = op.attributes["name"].value.removeprefix("torch.spikingbrain.")
            signature = _OPS.get(name)
            if signature is None:
                continue
            if reason := _refusal(op, signature):
                context.record(self, "refused", op, reason)
                continue
            _rewrite(op, name, signature)
            context.record(self, "raised", op)
            op.erase()


def _refusal(op: ir.Operation, signature: Signature) -> str:
    tensors = list(op.operands)[: signature.tensors]
    if len(op.operands) != signature.tensors + len(signature.attributes):
        return "it has other operands than this compiler's op"
    present = [v for v in tensors if not torch_ir.is_none(v)]
    if any(torch_ir.shape(v) is None for v in [*present, *op.results]):
        return "a tensor without a rank"
    if any(_WIDE.get(torch_ir.element_type(v)) is None for v in present):
        return "a tensor that is not of floats"
    if any(-1 in (torch_ir.shape(v) or [])[2:] for v in present):
        return "a dynamic number or size of heads or channels"
    if any(_attribute(v) is None for v in list(op.operands)[signature.tensors :]):
        return "an argument that is not constant"
    return ""


def _rewrite(op: ir.Operation, name: str, signature: Signature) -> None:
    tensors = list(op.operands)[: signature.tensors]
    given = [v for v in tensors if not torch_ir.is_none(v)]
    types = {_WIDE[torch_ir.element_type(v)] for v in given}
    wide = "f64" if "f64" in types else "f32"
    attributes = {
        key: _attribute(v)
        for key, v in zip(signature.attributes, list(op.operands)[signature.tensors :], strict=True)
    }
    attributes["operandSegmentSizes"] = ir.DenseI32ArrayAttr.get(
        [int(not torch_ir.is_none(v)) for v in tensors]
    )
    with ir.InsertionPoint(op), op.location:
        element = ir.Type.parse(wide)
        plain = [to_builtin(cast(v, wide)) for v in given]
        results = [
            ir.RankedTensorType.get(ir.RankedTensorType(builtin_type(r.type)).shape, element)
            for r in op.results
        ]
        raised = ir.Operation.create(f"spikingbrain.{name}", results, plain, attributes)
        for old, new in zip(op.results, raised.results, strict=True):
            old.replace_all_uses_with(cast(from_builtin(new), torch_ir.element_type(old)))


def _attribute(value: ir.Value) -> ir.Attribute | None:
    """Returns a constant argument as an attribute."""
    op = torch_ir.defining(value)
    if op is None or op.name not in ("torch.constant.str", "torch.constant.bool"):
        return None
    found = op.attributes["value"]
    return found if op.name == "torch.constant.str" else ir.BoolAttr.get(bool(found.value))


def cast(value: ir.Value, element: str) -> ir.Value:
    """Returns a torch tensor in another element type."""
    if torch_ir.element_type(value) == element:
        return value
    sizes = ir.RankedTensorType(builtin_type(value.type)).shape
    wanted = vtensor_type(ir.RankedTensorType.get(sizes, ir.Type.parse(element)))
    i64 = ir.IntegerType.get_signless(64)
    dtype = ir.Operation.create(
        "torch.constant.int",
        [ir.Type.parse("!torch.int")],
        attributes={"value": ir.IntegerAttr.get(i64, _DTYPES[element])},
    ).result
    no = ir.Operation.create(
        "torch.constant.bool", [ir.Type.parse("!torch.bool")], attributes={"value": ir.BoolAttr.get(False)}
    ).result
    none = ir.Operation.create("torch.constant.none", [ir.Type.parse("!torch.none")]).result
    return ir.Operation.create("torch.aten.to.dtype", [wanted], [value, dtype, no, no, none]).result
