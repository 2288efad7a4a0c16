"""Decomposition of an exported program into ops that torch-mlir lowers.

torch's own ``run_decompositions`` traces the whole program again, which costs more than exporting it did. A program
that is functional and made of ops that need no decomposition is taken as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch_mlir.extras.fx_decomp_util import get_decomposition_table

from spikingbrain.frontend import grouped_mm
from spikingbrain.frontend.dynamo.exact import EXACT
from spikingbrain.frontend.ops.unit_lower_inverse import inverse
from spikingbrain.frontend.solve_triangular import solve_triangular

aten = torch.ops.aten
_INVERSE = torch.ops.spikingbrain.unit_lower_inverse.default  # the one op of ours that is written in others

# Kept whole: `linear` because its decomposition flattens batch and time into one dimension; attention because it is raised.
KEPT = {aten.linear.default, aten.scaled_dot_product_attention.default}

# What torch-mlir lowers right without help; each is run against eager in tests/unit/test_decompose.py.
DIRECT = KEPT | {
    aten.add.Tensor,
    aten.arange.default,
    aten.arange.start_step,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.cat.default,
    aten.chunk.default,
    aten.cos.default,
    aten.div.Tensor,
    aten.embedding.default,
    aten.exp.default,
    aten.expand.default,
    aten.ge.Scalar,
    aten.gt.Tensor,
    aten.le.Tensor,
    aten.lt.Scalar,
    aten.matmul.default,
    aten.mean.dim,
    aten.mul.Tensor,
    aten.neg.default,
    aten.permute.default,
    aten.pow.Scalar,
    aten.relu.default,
    aten.remainder.Scalar,
    aten.reshape.default,
    aten.rsqrt.default,
    aten.scatter.src,
    aten.sigmoid.default,
    aten.silu.default,
    aten.sin.default,
    aten.slice.Tensor,
    aten.square.default,
    aten.sub.Tensor,
    aten.sum.dim_IntList,
    aten.sym_size.int,
    aten.to.dtype,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.where.ScalarOther,
    aten.where.self,
    # normalised away before import
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten._assert_tensor_metadata.default,
    aten.contiguous.default,
    operator.getitem,
    operator.mul,  # of symbolic sizes
}

# What torch-mlir or IREE compute otherwise than torch: a token shift, F.pad(x, (0, 0, 1, -1)), shifted nothing.
_WRONG = (
    aten.constant_pad_nd.default,
    aten.pow.Tensor_Tensor,
    aten.pow.Scalar,
    aten.reciprocal.default,
)


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Returns the program in ops that the importer and torch-mlir take."""
    if all(_is_direct(node) for node in program.graph.nodes if node.op == "call_function"):
        return program
    table = {op: f for op, f in get_decomposition_table().items() if op not in KEPT}
    table[_INVERSE] = inverse
    table |= {op: EXACT[op] for op in _WRONG} | grouped_mm.decompositions()
    table |= {aten.histc.default: histogram, aten.linalg_solve_triangular.default: solve_triangular}
    decomposed: torch.export.ExportedProgram = program.run_decompositions(table)
    return decomposed


def histogram(x: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """Counts as torch.histc does, whose sum over a comparison with each bin is one loop; torch-mlir has no histogram."""
    if min == max:  # the range is that of the values
        return NotImplemented
    x = x.flatten()
    place = ((x - min) * bins / (max - min)).trunc().clamp(max=bins - 1).unsqueeze(1)
    within = ((x >= min) & (x <= max)).unsqueeze(1)
    each = torch.arange(bins, dtype=x.dtype, device=x.device)
    return ((place == each) & within).sum(0).to(x.dtype)


def _is_direct(node: torch.fx.Node) -> bool:
    """Returns whether the importer or one of our passes takes an op as it is."""
    target = node.target
    if target == aten.pow.Scalar and node.args[0] <= 0:
        return False
    return target in DIRECT or (getattr(target, "namespace", "") == "spikingbrain" and target != _INVERSE)
