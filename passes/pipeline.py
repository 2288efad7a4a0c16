"""The passes in the order they run, in phases that can be read aloud."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch_mlir import ir
from torch_mlir.passmanager import PassManager

from spikingbrain.errors import PassFailed, UnsupportedOp
from spikingbrain.passes import dialect, torch_ir
from spikingbrain.passes.base import Pass, PassContext, source_line
from spikingbrain.passes.decompose_attention import DecomposeAttention
from spikingbrain.passes.fuse_into_recurrence import FuseIntoRecurrence
from spikingbrain.passes.fuse_recurrence import FuseRecurrence
from spikingbrain.passes.fuse_shared_input import FuseSharedInput
from spikingbrain.passes.lower_attention import LowerAttention
from spikingbrain.passes.lower_cache_write import LowerCacheWrite
from spikingbrain.passes.lower_embedding import LowerEmbedding
from spikingbrain.passes.lower_grouped_linear import LowerGroupedLinear
from spikingbrain.passes.lower_linear import LowerLinear
from spikingbrain.passes.lower_pointwise_scan import LowerPointwiseScan
from spikingbrain.passes.lower_recurrence import LowerRecurrence
from spikingbrain.passes.lower_scan import LowerScan
from spikingbrain.passes.lower_time_loop import LowerTimeLoop
from spikingbrain.passes.lower_torch import LowerTorch
from spikingbrain.passes.pack_weights import PackWeights
from spikingbrain.passes.raise_attention import RaiseAttention
from spikingbrain.passes.raise_cache_write import RaiseCacheWrite
from spikingbrain.passes.raise_embedding import RaiseEmbedding
from spikingbrain.passes.raise_grouped_linear import RaiseGroupedLinear
from spikingbrain.passes.raise_linear import RaiseLinear
from spikingbrain.passes.raise_pointwise_scan import RaisePointwiseScan
from spikingbrain.passes.raise_recurrence import RaiseRecurrence
from spikingbrain.passes.raise_spikes import RaiseSpikes
from spikingbrain.passes.spike_to_int import SpikeToInt
from spikingbrain.passes.thread_state import ThreadState
from spikingbrain.passes.weights_to_arguments import WeightsToArguments

log = logging.getLogger(__name__)

PHASES: dict[str, list[type[Any]]] = {
    # find the building blocks of a language model in torch's ops
    "raise": [
        RaiseAttention,
        RaiseCacheWrite,
        RaiseEmbedding,
        RaiseGroupedLinear,
        RaiseLinear,
        RaiseRecurrence,
        RaiseSpikes,
        FuseRecurrence,
        DecomposeAttention,
    ],
    # everything else becomes linear algebra on tensors
    "torch": [LowerTorch],
    # do together what reads the same values, steps of a loop, and what is around a recurrence
    "fuse": [RaisePointwiseScan, FuseSharedInput, FuseIntoRecurrence],
    # spiking projections become integer arithmetic
    "spikes": [SpikeToInt],
    # choose layouts for the target and store weights in them
    "schedule": [PackWeights],
    # kernels where the target has them, linalg and loops where not
    "lower": [
        LowerScan,
        LowerPointwiseScan,
        LowerTimeLoop,
        LowerAttention,
        LowerCacheWrite,
        LowerEmbedding,
        LowerGroupedLinear,
        LowerLinear,
        LowerRecurrence,
        WeightsToArguments,
        ThreadState,
    ],
}

PASSES: dict[str, type[Any]] = {cls.name: cls for phase in PHASES.values() for cls in phase}

Observer = Callable[[Pass, ir.Module, float], None]


def default_pipeline() -> list[Pass]:
    """Returns every pass, in order, with default options."""
    return [cls() for phase in PHASES.values() for cls in phase]


def run(
    passes: Iterable[Pass],
    module: ir.Module,
    context: PassContext,
    verify_each: bool = True,
    observe: Observer | None = None,
) -> None:
    """Runs passes over ``module`` in place.

    ``observe`` is called after each pass with the pass, the module and the seconds it took. Raises the error of the
    pass, or PassFailed naming the pass when it leaves invalid IR.
    """
    with module.context, ir.Location.unknown():
        for pass_ in passes:
            start = time.perf_counter()
            pass_.run(module, context)
            seconds = time.perf_counter() - start
            log.debug("%s took %.3f s", pass_.name, seconds)
            if verify_each:
                try:
                    dialect.verify(module)
                except (ir.MLIRError, ValueError) as error:
                    raise PassFailed(f"pass {pass_.name} left invalid IR", why=str(error)) from error
            if observe:
                observe(pass_, module, seconds)


def check_lowered(module: ir.Module) -> None:
    """Raises UnsupportedOp if an op of ours is left that no backend knows (they take parameters and launches)."""
    for op in torch_ir.walk(module):
        if op.name.startswith("spikingbrain") and op.name not in (
            "spikingbrain.parameter",
            "spikingbrain_control.launch",
        ):
            raise UnsupportedOp(f"no lowering for {op.name}", where=source_line(op.location))


def clean(module: ir.Module) -> None:
    """Removes common and dead values and functions that nothing calls."""
    with module.context:
        PassManager.parse("builtin.module(func.func(canonicalize,cse),symbol-dce)").run(module.operation)
