"""Compares rows routed to experts with a loop over the experts, with gathered weights under inductor, and with one dense linear.

    python benchmarks/grouped_linear.py [--shapes 64x1024x2048 ...] [--rows 1 8 512 2048] [--rounds 20] [--bits 8]

All on one thread, interleaved in one process, timed by the thread's processor clock. Shapes are experts x outputs x inputs.
Rows are sent to experts at random; up to 8 rows are those of one token, all to different ones, and each call takes other
experts, so that their weights come from memory. The dense linear does the same work on one weight: with few rows, on one as
large as all the weights that are read. Prints the best time of ours, with few rows the bytes of weights that a call reads and the
share of the bandwidth that a plain sum of memory has, and each peer's time divided by ours, the median over rounds. With --bits
ours are spiking experts, integer weights of 8 or 4 bits, the encoder included, and one of the peers is ours in floats.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import iree.compiler.tools as compiler
import iree.runtime as runtime
import torch
from timing import Call, interleave, keep_memory, mean, ratio
from torch_mlir import ir

from spikingbrain.backend_iree import targets
from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.models.spiking import SpikeExpertLinear
from spikingbrain.models.spikingbrain.experts import ExpertLinear
from spikingbrain.passes import dialect, pipeline, recipes
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.lower_grouped_linear import LowerGroupedLinear
from spikingbrain.passes.pack_weights import PackWeights
from spikingbrain.passes.spike_to_int import SpikeToInt
from spikingbrain.passes.weights_to_arguments import WeightsToArguments
from spikingbrain.target import Target

FEW_ROWS = 8
ROUND_SECONDS = 0.03
ROUTES = 16  # different choices of experts that calls take in turn
READ_BYTES = 256 << 20
LARGEST_GATHER = 1 << 30  # bytes of gathered weights that the peer may make


def spiking_program(n: int, o: int, k: int, rows: int, bits: int) -> str:
    m = rows if rows <= FEW_ROWS else "?"
    x, v, e, y = f"tensor<{m}x{k}xf32>", f"tensor<{m}xf32>", f"tensor<{m}xi64>", f"tensor<{m}x{o}xf32>"
    w, s = f"tensor<{n}x{o}x{k}xi8>", f"tensor<{n}x{o}x1xf32>"
    return f"""func.func @main(%x: {x}, %e: {e}) -> {y} attributes {{spikingbrain.weight_arguments}} {{
  %w = "spikingbrain.parameter"() {{sources = ["w"], recipe = []}} : () -> {w}
  %s = "spikingbrain.parameter"() {{sources = ["s"], recipe = []}} : () -> {s}
  %c, %v = "spikingbrain.spike_encode"(%x) {{k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}} : ({x}) -> ({x}, {v})
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {{bits = {bits} : i64}} : ({x}, {v}, {w}, {s}, {e}) -> {y}
  return %y : {y}
}}"""


def program(n: int, o: int, k: int, rows: int) -> str:
    m = rows if rows <= FEW_ROWS else "?"
    x, w, e, y = (
        f"tensor<{m}x{k}xf32>",
        f"tensor<{n}x{o}x{k}xf32>",
        f"tensor<{m}xi64>",
        f"tensor<{m}x{o}xf32>",
    )
    return f"""func.func @main(%x: {x}, %e: {e}) -> {y} attributes {{spikingbrain.weight_arguments}} {{
  %w = "spikingbrain.parameter"() {{sources = ["w"], recipe = []}} : () -> {w}
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {{columns = {o} : i64}} : ({x}, {w}, {e}) -> {y}
  return %y : {y}
}}"""


def on_device(device: Any, tensor: torch.Tensor) -> Any:
    aligned = tensor.clone()  # as IREE wants it
    return runtime.DeviceArray(device, device.from_dlpack_capsule(torch.utils.dlpack.to_dlpack(aligned)))


def ours(
    text: str, x: torch.Tensor, weights: dict[str, torch.Tensor], routes: list[torch.Tensor], target: Target
) -> Any:
    """Returns a function of the number of a route."""
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        context = PassContext(target)
        pipeline.run([SpikeToInt(), PackWeights(), LowerGroupedLinear()], module, context)
        pipeline.clean(module)
        pipeline.run([WeightsToArguments()], module, context)
        wrap_kernels(module)
        flags = [f"--iree-llvmcpu-target-cpu={target.cpu}", "--iree-input-demote-f64-to-f32=false"]
        code = compiler.compile_str(str(module), target_backends=["llvm-cpu"], extra_args=flags)
    config = runtime.Config("local-sync")
    loaded = runtime.SystemContext(config=config)
    loaded.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))
    packed = [
        on_device(config.device, torch.from_numpy(recipes.apply(s.recipe, [weights[s.sources[0]].numpy()])))
        for s in context.weight_arguments["main"]
    ]
    rows = on_device(config.device, x)
    experts = [on_device(config.device, e) for e in routes]
    main = loaded.modules.module["main"]
    return lambda i, keep=loaded: main(rows, experts[i], *packed)


def compare(n: int, o: int, k: int, rows: int, rounds: int, bits: int, target: Target) -> str:
    """Returns one line of the report."""
    torch.manual_seed(0)
    few = rows <= FEW_ROWS
    floats = ExpertLinear(n, k, o).requires_grad_(False)
    layer = SpikeExpertLinear.of(floats, bits=bits) if bits else floats
    x = torch.randn(rows, k)
    routes = [torch.randperm(n)[:rows] if few else torch.randint(0, n, (rows,)) for _ in range(ROUTES)]
    text = program(n, o, k, rows)
    in_floats = ours(text, x, {"w": floats.weight}, routes, target)
    compiled = in_floats
    if bits:
        weights = {"w": layer.codes, "s": layer.scale}
        compiled = ours(spiking_program(n, o, k, rows, bits), x, weights, routes, target)
    torch.testing.assert_close(
        torch.from_numpy(compiled(0).to_host()), layer(x, routes[0]), rtol=1e-3, atol=1e-3
    )
    turn = iter(range(1 << 60))

    def next_route() -> int:
        return next(turn) % ROUTES

    candidates: dict[str, Call] = {
        "ours": lambda: compiled(next_route()),
        "loop": lambda: layer(x, routes[next_route()]),
    }
    if bits:
        candidates["ours in floats"] = lambda: in_floats(next_route())
    if few:
        dense = [torch.randn(rows * o, k) for _ in range(max(2, READ_BYTES // (4 * rows * o * k)))]
        flat = torch.ones(READ_BYTES // 4)
        candidates["dense"] = lambda: torch.nn.functional.linear(x[:1], dense[next_route() % len(dense)])
        candidates["read"] = lambda: flat.sum()
    else:
        one = torch.randn(o, k)
        candidates["dense"] = lambda: torch.nn.functional.linear(x, one)
    if 4 * rows * o * k <= LARGEST_GATHER and not bits:
        gather = torch.compile(lambda x, w, e: torch.bmm(w[e], x.unsqueeze(-1)).squeeze(-1))
        candidates["gather, inductor"] = lambda: gather(x, floats.weight, routes[next_route()])
    times = interleave(candidates, rounds, mean(ROUND_SECONDS, time.thread_time))
    best = {name: min(t) for name, t in times.items()}
    line = f"{n:3d} x {o:4d} x {k:4d}, {rows:4d} rows: {best['ours'] * 1e6:9.1f} us"
    if few:
        bytes_ = rows * o * k * (bits or 32) // 8
        speed, limit = bytes_ / best["ours"] / 1e9, READ_BYTES / best.pop("read") / 1e9
        line += f", {bytes_ / 2**20:.1f} MiB read, {speed:.1f} of {limit:.1f} GB/s"
    else:
        line += f", {2 * rows * o * k / best['ours'] / 1e9:.0f} Gflop/s"
    peers = [f"{name} / ours {ratio(times[name], times['ours']):.2f}" for name in best if name != "ours"]
    return ", ".join([line, *peers])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["64x1024x2048", "16x2048x1024"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--bits", type=int, choices=[0, 4, 8], default=0, help="of spiking experts; 0: floats"
    )
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    target = targets.known()["cpu"].target
    for shape in arguments.shapes:
        for rows in arguments.rows:
            n, o, k = map(int, shape.split("x"))
            print(compare(n, o, k, rows, arguments.rounds, arguments.bits, target), flush=True)


if __name__ == "__main__":
    main()
