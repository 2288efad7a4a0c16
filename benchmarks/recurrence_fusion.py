"""What it is worth that a recurrence computes the elementwise work around it, one thread, interleaved.

The part of a layer of gated linear attention between its projections: relu of queries and keys, the scale, logsigmoid(x) / 16
as gate, RMSNorm over each head and an output gate with silu; 8 heads of 128, all read from one tensor, as a joint projection
leaves it. Each kind of fusion is also left out by itself. Time is that of the thread, which other processes disturb less; a
ratio is the median over rounds, to the program without fusion.

    python benchmarks/recurrence_fusion.py [--target cpu|x86-64-v3] [--rounds 12]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import iree.runtime as rt
import numpy as np
import torch
import torch.nn.functional as F
from timing import fastest, interleave, keep_memory, ratio
from torch import Tensor, nn
from torch_mlir import ir

import spikingbrain
from spikingbrain.backend import StageContext, resolve_target
from spikingbrain.backend_iree.backend import MODULE
from spikingbrain.frontend.capture import capture
from spikingbrain.models.recurrences import gla
from spikingbrain.passes import pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.context import new_context
from spikingbrain.passes.fuse_into_recurrence import FuseIntoRecurrence

HEADS, SIZE = 8, 128
WAYS = {
    "apart": None,
    "in front": FuseIntoRecurrence(behind=False),
    "behind": FuseIntoRecurrence(before=False),
    "both": FuseIntoRecurrence(),
}


class Layer(nn.Module):
    def forward(self, projected: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        parts = projected.chunk(5, -1)
        q, k, v, gate, out_gate = (x.unflatten(-1, (HEADS, SIZE)) for x in parts)
        o, last = gla(
            F.relu(q), F.relu(k), v, F.logsigmoid(gate) / 16, initial_state=state, output_final_state=True
        )
        assert last is not None
        return (F.rms_norm(o, (SIZE,), weight, 1e-5) * F.silu(out_gate)).flatten(2), last


def compiled(inputs: tuple[Tensor, ...], target: str, way: FuseIntoRecurrence | None) -> Callable[..., Any]:
    """Returns the layer's program, with one way of fusing or none."""
    backend, status = resolve_target(target)
    module = capture(Layer(), {"main": spikingbrain.Entry(inputs)}, None, lambda _: None).module
    passes = [way if p.name == FuseIntoRecurrence.name else p for p in pipeline.default_pipeline()]
    with new_context(), ir.Location.unknown():
        parsed = ir.Module.parse(module)
        pipeline.run([p for p in passes if p], parsed, PassContext(status.target))
        pipeline.clean(parsed)
        value: Any = str(parsed)
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext(status.target, backend.options(), Path(folder))
        for stage in backend.stages(status.target).values():
            value = stage(value, context)
    config = rt.Config(device=rt.get_device("local-sync"))
    return rt.load_vm_module(rt.VmModule.copy_buffer(config.vm_instance, value[MODULE]), config).main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    device = rt.get_device("local-sync")
    for steps in (1, 1024, 4096):
        torch.manual_seed(0)
        inputs = (
            torch.randn(1, steps, 5 * HEADS * SIZE),
            torch.rand(SIZE) + 0.5,
            torch.randn(1, HEADS, SIZE, SIZE),
        )
        with torch.no_grad():
            expected = Layer()(*inputs)[0].numpy()
        arrays = [rt.asdevicearray(device, x.numpy()) for x in inputs]
        candidates: dict[str, Callable[[], Any]] = {}
        for name, way in WAYS.items():
            program = compiled(inputs, options.target, way)
            error = np.abs(program(*arrays)[0].to_host() - expected).max() / np.abs(expected).max()
            assert error < 1e-5, (name, error)
            candidates[name] = functools.partial(program, *arrays)
        times = interleave(candidates, options.rounds, fastest(0.1))
        print(f"{steps} steps")
        for name, values in times.items():
            print(
                f"    {name:14} {values.min() * 1e3:9.3f} ms   {ratio(times['apart'], values):5.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
