"""The targets that scans are tested on, and how lowered modules are run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch_mlir import ir

from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.backend_iree.loop_sizes import bound_sizes
from spikingbrain.passes import dialect, pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.lower_pointwise_scan import LowerPointwiseScan
from spikingbrain.passes.lower_scan import LowerScan
from spikingbrain.passes.lower_time_loop import LowerTimeLoop
from spikingbrain.target import Target
from spikingbrain.tuning import Tuning

V4 = Target("x86-64-v4", "cpu", "iree", "x86-64", "x86-64-v4", frozenset({"fma", "avx512f"}), 512, 32)
V3 = Target("x86-64-v3", "cpu", "iree", "x86-64", "x86-64-v3", frozenset({"fma", "avx2"}), 256, 16)
SMALL_TILES = dataclasses.replace(V3, name="small-tiles", tuning=Tuning(l2_bytes=1 << 11))
PORTABLE = dataclasses.replace(V3, name="portable", vector_bits=0)


def runs_here(target: Target) -> bool:
    """Returns whether this processor has what code for a target needs."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return {"x86-64-v4": "avx512f", "x86-64-v3": "avx2"}[target.cpu] in flags


def load(text: str, target: Target) -> Any:
    """Lowers the scans of a module for a target and returns its functions."""
    from iree import runtime
    from iree.compiler import tools

    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        passes = [LowerScan(), LowerPointwiseScan(), LowerTimeLoop()]
        pipeline.run(passes, module, PassContext(target))
        assert ("spikingbrain_control.launch" in str(module)) == bool(target.vector_bits)
        pipeline.check_lowered(module)
        pipeline.clean(module)
        bound_sizes(module)
        wrap_kernels(module)
        flags = [f"--iree-llvmcpu-target-cpu={target.cpu}", "--iree-input-demote-f64-to-f32=false"]
        code = tools.compile_str(str(module), target_backends=["llvm-cpu"], extra_args=flags)
    config = runtime.Config("local-sync")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))
    return context.modules.module
