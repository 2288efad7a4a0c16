"""What code for GPUs needs beyond flags: the device as an attribute, and slices that SPIR-V can be made of."""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, tensor

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir


def name_device(module: ir.Module, device: str) -> None:
    """Says which device the module is for; ``device`` is an attribute of IREE's hal dialect."""
    module.operation.attributes["hal.device.targets"] = ir.ArrayAttr.get([ir.Attribute.parse(device)])


def gather_slices(module: ir.Module) -> None:
    """Replaces slices at a position known only at run time by gathers.

    IREE 3.13 makes invalid SPIR-V of elementwise ops on such a slice (it copies the slice into the memory of the
    workgroup and then reshapes the copy as if it were still outside).
    """
    for op in torch_ir.operations(module, "tensor.extract_slice"):
        view = op.opview
        dynamic = ir.ShapedType.get_dynamic_size()
        strides, types = (
            list(view.static_strides),
            [ir.RankedTensorType(v.type) for v in (view.source, view.result)],
        )
        if all(s != dynamic for s in view.static_offsets) or any(s != 1 for s in strides):
            continue
        if types[0].rank != types[1].rank:
            continue  # an axis is dropped
        with ir.InsertionPoint(op), op.location:
            gathered = _gather(view, types[1])
        op.results[0].replace_all_uses_with(gathered)
        op.erase()


def _gather(view: tensor.ExtractSliceOp, type_: ir.RankedTensorType) -> ir.Value:
    given = iter(view.offsets)
    dynamic = ir.ShapedType.get_dynamic_size()
    offsets = [next(given) if s == dynamic else build.constant_index(s) for s in view.static_offsets]
    sizes = [
        s for s, n in zip(view.sizes, _dynamic(view.static_sizes), strict=True) if type_.is_dynamic_dim(n)
    ]

    def body(_: ir.Value) -> ir.Value:
        at = [arith.AddIOp(linalg.IndexOp(axis).result, o).result for axis, o in enumerate(offsets)]
        return tensor.ExtractOp(view.source, at).result

    identity = ir.AffineMap.get_identity(type_.rank)
    return build.generic([], build.empty(type_, sizes), [identity], ["parallel"] * type_.rank, body)


def _dynamic(sizes: list[int]) -> list[int]:
    return [axis for axis, n in enumerate(sizes) if n == ir.ShapedType.get_dynamic_size()]
