"""Casts between torch tensors and builtin tensors, placed where an op of our dialect meets torch-dialect IR."""

from __future__ import annotations

from torch_mlir import ir


def builtin_type(vtensor: ir.Type) -> ir.Type:
    """Returns the builtin tensor type of ``!torch.vtensor<[2,?],f32>`` (integers lose their sign)."""
    text = str(vtensor)
    sizes, element = text[text.index("[") + 1 : text.index("]")], text[text.index("]") + 2 : -1]
    element = {"si64": "i64", "si32": "i32", "si16": "i16", "si8": "i8", "ui8": "i8"}.get(element, element)
    return ir.Type.parse(f"tensor<{'x'.join([*filter(None, sizes.split(',')), element])}>")


def vtensor_type(tensor: ir.Type) -> ir.Type:
    """Returns the torch tensor type of a builtin one (integers become signed)."""
    ranked = ir.RankedTensorType(tensor)
    element = str(ranked.element_type)
    element = f"s{element}" if element in ("i64", "i32", "i16", "i8") else element
    dynamic = ir.ShapedType.get_dynamic_size()
    sizes = ",".join("?" if s == dynamic else str(s) for s in ranked.shape)
    return ir.Type.parse(f"!torch.vtensor<[{sizes}],{element}>")


def to_builtin(value: ir.Value) -> ir.Value:
    """Casts a torch tensor value to a builtin tensor."""
    return ir.Operation.create("torch_c.to_builtin_tensor", [builtin_type(value.type)], [value]).result


def from_builtin(value: ir.Value, wanted: ir.Type | None = None) -> ir.Value:
    """Casts a builtin tensor to a torch tensor value."""
    return ir.Operation.create(
        "torch_c.from_builtin_tensor", [wanted or vtensor_type(value.type)], [value]
    ).result


def to_index(value: ir.Value) -> ir.Value:
    """Converts a torch int to an index."""
    i64 = ir.IntegerType.get_signless(64)
    number = ir.Operation.create("torch_c.to_i64", [i64], [value]).result
    return ir.Operation.create("arith.index_cast", [ir.IndexType.get()], [number]).result
