"""How graphs go through AOTAutograd: into which ops it takes them apart, and how it divides forward from backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._functorch.partitioners import min_cut_rematerialization_partition

from spikingbrain.frontend import grouped_mm
from spikingbrain.frontend.dynamo.exact import EXACT
from spikingbrain.frontend.ops.unit_lower_inverse import inverse
from spikingbrain.frontend.solve_triangular import solve_triangular

aten = torch.ops.aten

# Norms and losses fall apart into elementwise ops and reductions, which are fused with their neighbours.
_FURTHER = [
    aten.native_layer_norm,
    aten.native_group_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit_no_training,
    aten.native_batch_norm,
    aten._batch_norm_with_update,
    aten._batch_norm_with_update_functional,
    aten.logsumexp,
    aten.hardswish,
    aten.hardsigmoid,
    aten.log_sigmoid_forward,
]

# Kept whole: torch has a kernel for them, or their decomposition draws other random numbers than eager does.
_KEPT = {
    "alias_copy",  # taken apart together with detach it leaves aliases in bodies of scans, which torch refuses
    "_scaled_dot_product_flash_attention_for_cpu",
    "baddbmm",
    "embedding_dense_backward",
    "bernoulli",
    "rrelu",
    "im2col",
    "col2im",
    "index_add",
    "index_copy",
    "index_fill",
    "roll",
    "upsample_bicubic2d",
    "upsample_bilinear2d",
    "upsample_nearest2d",
    "_upsample_bilinear2d_aa",
    "grid_sampler_2d",
    "clamp_max",
    "clamp_min",
    "silu",
    "cdist",
    "pdist",
    "isin",
    "squeeze",
    "logspace",
}


def table(library: bool = True) -> dict[Any, Callable[..., Any]]:
    """Returns op overload -> decomposition; with ``library`` what torch has a fast kernel for stays whole."""
    found = _of_torch() | grouped_mm.decompositions()
    return found if library else found | {aten.linalg_solve_triangular.default: solve_triangular}


@functools.cache
def _of_torch() -> dict[Any, Callable[..., Any]]:
    found = {**core_aten_decompositions(), **get_decompositions(_FURTHER)}
    kept = {
        op: f
        for op, f in found.items()
        if not (isinstance(op, torch._ops.OpOverload) and op._schema.name.removeprefix("aten::") in _KEPT)
    }
    return kept | EXACT | {torch.ops.spikingbrain.unit_lower_inverse.default: inverse}


def aot_settings(
    compiler: Callable[[str], Callable[..., Any]], apart: bool = True, library: bool = True
) -> dict[str, Any]:
    """Returns AOTAutograd's arguments; ``compiler`` makes the compiler of a kind of graph: forward, backward, inference.

    Ops are taken ``apart`` for compiled code; where torch's kernels run them they stay whole.
    """
    return {
        "fw_compiler": compiler("forward"),
        "bw_compiler": compiler("backward"),
        "inference_compiler": compiler("inference"),
        "decompositions": table(library) if apart else {},
        "partition_fn": min_cut_rematerialization_partition,
    }
