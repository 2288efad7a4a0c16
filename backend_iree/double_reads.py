"""A workaround for code that IREE 3.13 computes wrongly: a reduction that one op reads twice, in two ways."""

from __future__ import annotations

from collections import defaultdict

from torch_mlir import ir

from spikingbrain.passes import linalg_build as build
from spikingbrain.passes import torch_ir

_RESHAPES = ("tensor.expand_shape", "tensor.collapse_shape", "tensor.cast", "tensor.extract_slice")
_Reads = dict[ir.Value, set[tuple[str, ...]]]  # a reduction's result -> the index maps by which it is read


def separate_double_reads(module: ir.Module) -> int:
    """Puts a barrier behind each reduction that an op reads by two different index maps; returns how many.

    For ``s = x.sum(0); y = s[:, None] - s[None, :]`` IREE fuses the sum into the difference and gives both operands the values of
    one of them, on every optimisation level (the minimal module is in ``tests/unit/test_double_reads.py``, which fails
    when this can go). Elementwise ops and reshapes in between are looked through, since IREE fuses them first.
    """
    known: dict[ir.Value, _Reads] = {}
    found: dict[ir.Value, None] = {}
    for op in torch_ir.operations(module, "linalg.generic"):
        for root, paths in _read_by(op, known).items():
            if len(paths) > 1:
                found[root] = None
    for root in found:
        owner = root.owner.operation
        users = [use.owner.operation for use in root.uses]
        with ir.InsertionPoint.after(owner), owner.location:
            sizes = build.dynamic_sizes(root)
            kept = ir.Operation.create("util.optimization_barrier", [root.type], [root]).result
            if sizes:  # IREE does not look through a barrier for sizes
                kept = ir.Operation.create("flow.tensor.tie_shape", [root.type], [kept, *sizes]).result
        for user in users:
            if user.name != "tensor.dim":
                for i, v in enumerate(list(user.operands)):
                    if v == root:
                        user.operands[i] = kept
    return len(found)


def _read_by(op: ir.Operation, known: dict[ir.Value, _Reads]) -> _Reads:
    reads: _Reads = defaultdict(set)
    maps = [m.value for m in op.attributes["indexing_maps"]]
    inputs = len(op.operands) - len(op.results)
    for operand, map_ in zip(list(op.operands)[:inputs], maps[:inputs], strict=True):
        identity = map_ == ir.AffineMap.get_identity(map_.n_dims)
        for root, paths in _behind(operand, known).items():
            reads[root] |= {path if identity else (*path, str(map_)) for path in paths}
    return reads


def _behind(value: ir.Value, known: dict[ir.Value, _Reads]) -> _Reads:
    """Returns the reductions that ``value`` is made from by elementwise ops and reshapes."""
    if value in known:
        return known[value]
    reads: _Reads = {}
    if not isinstance(value.owner, ir.Block):
        op = value.owner.operation
        if op.name in _RESHAPES:
            step = str(op.attributes["reassociation"]) if "reassociation" in op.attributes else op.name
            reads = {
                root: {(*p, step) for p in paths} for root, paths in _behind(op.operands[0], known).items()
            }
        elif op.name == "linalg.generic" and "reduction" not in str(op.attributes["iterator_types"]):
            reads = _read_by(op, known)
        elif op.name.startswith("linalg.") and op.name != "linalg.fill":
            reads = {value: {()}}
    known[value] = reads
    return reads
