"""Reading torch-dialect IR: constants, lists, views. No rewriting here."""

from __future__ import annotations

from collections.abc import Iterator

from torch_mlir import ir


def defining(value: ir.Value, name: str | None = None) -> ir.Operation | None:
    """Returns the op that defines ``value``, if any and if it has the given name."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        return None
    op = owner.operation
    return op if name is None or op.name == name else None


def constant(value: ir.Value) -> int | float | bool | None:
    """Returns the number of a torch constant; None if it is none (or not a constant: see ``is_none``)."""
    op = defining(value)
    if op is None or op.name not in ("torch.constant.int", "torch.constant.float", "torch.constant.bool"):
        return None
    attribute = op.attributes["value"]
    return attribute.value  # type: ignore[no-any-return]


def is_none(value: ir.Value) -> bool:
    return defining(value, "torch.constant.none") is not None


def elements(value: ir.Value) -> list[ir.Value] | None:
    """Returns the elements of a list made by prim.ListConstruct."""
    op = defining(value, "torch.prim.ListConstruct")
    return list(op.operands) if op else None


def integers(value: ir.Value) -> list[int] | None:
    """Returns a list of constant integers."""
    items = elements(value)
    if items is None:
        return None
    numbers = [constant(v) for v in items]
    return [int(n) for n in numbers if n is not None] if None not in numbers else None


def shape(value: ir.Value) -> list[int] | None:
    """Returns the sizes of a ``!torch.vtensor`` (-1 for a dynamic one), or None without a shape."""
    text = str(value.type)
    if not text.startswith("!torch.vtensor<["):
        return None
    inside = text[text.index("[") + 1 : text.index("]")]
    return [-1 if s == "?" else int(s) for s in inside.split(",") if s]


def element_type(value: ir.Value) -> str:
    text = str(value.type)
    return text[text.rindex(",") + 1 : -1] if "," in text else ""


def before_cast(value: ir.Value) -> ir.Value | None:
    """Returns the tensor that ``value`` is made from by a change of type."""
    op = defining(value)
    casts = (
        "torch.aten.to.dtype",
        "torch.prims.convert_element_type",
    )  # as written, and as torch decomposes it
    return op.operands[0] if op and op.name in casts else None


def permutation(value: ir.Value) -> tuple[ir.Value, list[int]] | None:
    """Returns (source, dims) when ``value`` is a permute or transpose of another tensor."""
    op = defining(value)
    if op is None:
        return None
    if op.name == "torch.aten.permute":
        dims = integers(op.operands[1])
        sizes = shape(value)
        if dims is None or sizes is None:
            return None
        return op.operands[0], [d % len(sizes) for d in dims]
    if op.name == "torch.aten.transpose.int":
        sizes, a, b = shape(value), constant(op.operands[1]), constant(op.operands[2])
        if sizes is None or a is None or b is None:
            return None
        dims = list(range(len(sizes)))
        i, j = int(a) % len(sizes), int(b) % len(sizes)
        dims[i], dims[j] = dims[j], dims[i]
        return op.operands[0], dims
    return None


def concatenation(value: ir.Value, dim: int) -> list[ir.Value] | None:
    """Returns the parts when ``value`` is a cat along ``dim``."""
    op = defining(value, "torch.aten.cat")
    if op is None:
        return None
    along, sizes = constant(op.operands[1]), shape(value)
    if along is None or sizes is None or int(along) % len(sizes) != dim:
        return None
    return elements(op.operands[0])


def operations(module: ir.Module, name: str) -> list[ir.Operation]:
    """Returns every op of the module called ``name``, in order."""
    return [op for op in walk(module) if op.name == name]


def operations_in(function: ir.Operation, name: str) -> list[ir.Operation]:
    """Returns every op inside ``function`` called ``name``, in order."""
    return [op for op in _walk(function) if op.name == name]


def walk(module: ir.Module) -> Iterator[ir.Operation]:
    """Yields every op of the module in order; the list is taken first, so that rewriting is safe."""
    yield from _walk(module.operation)


def _walk(root: ir.Operation) -> list[ir.Operation]:
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        found.append(op.operation)
        return ir.WalkResult.ADVANCE

    root.walk(visit, ir.WalkOrder.PRE_ORDER)
    return found
