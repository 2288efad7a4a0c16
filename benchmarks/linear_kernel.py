"""Compares the packed linear kernel with torch, interleaved in one process on one thread.

    python benchmarks/linear_kernel.py [--rows 1 512] [--shapes 576x960 ...] [--rounds 40] [--megabytes 400]

Prints, per shape (input channels x columns), the best time of each, the median over rounds of torch's time divided by
ours, and for one row the share of the read bandwidth measured in the same rounds. Few rows cycle through copies of the
weight that together are larger than any cache.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import iree.compiler.tools as compiler
import iree.runtime as runtime
import numpy as np
import torch
from timing import interleave, mean, ratio
from torch_mlir import ir
from torch_mlir.dialects import func

from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.passes import dialect
from spikingbrain.passes.kernels.linear import emit_linear, packed_block
from spikingbrain.target import Target
from spikingbrain.tuning import Tuning

ROUND_SECONDS = 0.012  # short rounds: other load on the machine then hits all candidates alike
SMOLLM2_135M = ["576x960", "576x576", "576x3072", "1536x576", "576x49152"]
MANY_ROWS_COLUMNS = 8192  # the head is only ever asked for one row


def host_target() -> Target:
    """Returns a target for this x86-64 processor."""
    with open("/proc/cpuinfo") as cpuinfo:
        flags = set(cpuinfo.read().split())
    if "avx512f" in flags:
        return Target(
            "cpu",
            "cpu",
            "iree",
            "x86-64",
            "host",
            frozenset({"fma", "avx512f"}),
            512,
            32,
            tuning=Tuning(l2_bytes=2 << 20),
        )
    features = frozenset({"fma", "avx2"} & flags)
    return Target("cpu", "cpu", "iree", "x86-64", "host", features, 256 if "avx2" in flags else 128, 16)


def packed(weight: torch.Tensor, block: int) -> torch.Tensor:
    """Returns ``[N, K]`` as ``[ceil(N / block), K, block]``."""
    n, k = weight.shape
    blocks = -(-n // block)
    padded = torch.zeros(blocks * block, k)
    padded[:n] = weight
    return padded.reshape(blocks, block, k).transpose(1, 2).contiguous()


def compile_linears(k: int, n: int, rows: int | None, count: int, target: Target) -> Callable[..., Any]:
    """Returns main(x, w0, w1, ...) -> (y0, y1, ...) and keeps it loaded; ``rows`` None compiles for any number."""
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.create()
        block = packed_block(target)
        m = ir.ShapedType.get_dynamic_size() if rows is None else rows
        x_type, w_type, y_type = (
            ir.RankedTensorType.get(shape, ir.F32Type.get())
            for shape in ([m, k], [-(-n // block), k, block], [m, n])
        )
        with ir.InsertionPoint(module.body):
            main = func.FuncOp("main", ([x_type, *[w_type] * count], [y_type] * count)).add_entry_block()
        with ir.InsertionPoint(main):
            x, *weights = main.arguments
            func.ReturnOp([emit_linear(x, weight, n, target) for weight in weights])
    wrap_kernels(module)
    code = compiler.compile_str(
        str(module), target_backends=["llvm-cpu"], extra_args=[f"--iree-llvmcpu-target-cpu={target.cpu}"]
    )
    config = runtime.Config("local-sync")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, code))
    function, device = context.modules.module["main"], config.device

    def call(x: Any, weights: list[Any], keep: Any = context) -> Any:
        return function(x, *weights)

    call.device = device  # type: ignore[attr-defined]
    return call


def compare(k: int, n: int, rows: int, rounds: int, total_bytes: float, target: Target) -> str:
    """Returns one line of the report."""
    copies = max(2, round(total_bytes / (8 * k * n))) if rows < 64 else 1
    linears = compile_linears(k, n, 1 if rows == 1 else None, copies, target)
    device = linears.device  # type: ignore[attr-defined]
    torch.manual_seed(0)
    x = torch.randn(rows, k)
    # Torch's copies and ours alternate in memory, so that both get pages of the same kind.
    theirs, ours = [], []
    for _ in range(copies):
        theirs.append(torch.randn(n, k))
        ours.append(packed(theirs[-1], packed_block(target)))

    def on_device(tensor: torch.Tensor) -> Any:
        return runtime.DeviceArray(device, device.from_dlpack_capsule(torch.utils.dlpack.to_dlpack(tensor)))

    x_device, ours_device = on_device(x), [on_device(w) for w in ours]
    flat = torch.randn(int(total_bytes) // 8)
    candidates: dict[str, Callable[[], Any]] = {
        "torch": lambda: [torch.nn.functional.linear(x, w) for w in theirs],
        "ours": lambda: linears(x_device, ours_device),
        "read": lambda: flat.sum(),
    }
    results = candidates["ours"]()
    first = (results[0] if isinstance(results, list | tuple) else results).to_host()
    if not np.allclose(first, torch.nn.functional.linear(x, theirs[0]).numpy(), rtol=1e-3, atol=1e-3):
        raise RuntimeError(f"wrong result for {k}x{n}, {rows} rows")
    if rows >= 64:
        del candidates["read"]
    times = interleave(candidates, rounds, mean(ROUND_SECONDS))
    best = {name: min(t) / copies for name, t in times.items()}
    line = (
        f"{k:5d} x {n:5d}, {rows:4d} rows: torch {best['torch'] * 1e6:8.1f} us, ours {best['ours'] * 1e6:8.1f} us,"
        f" torch / ours {ratio(times['torch'], times['ours']):.2f}"
    )
    if "read" in best:
        ours_speed, read_speed = 4 * k * n / best["ours"] / 1e9, 4 * len(flat) / min(times["read"]) / 1e9
        return f"{line}, {ours_speed:.1f} GB/s of {read_speed:.1f} GB/s read"
    return f"{line}, {2 * rows * k * n / best['ours'] / 1e9:.0f} Gflop/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512])
    parser.add_argument(
        "--shapes", nargs="+", default=SMOLLM2_135M, help="input channels x columns, as 576x960"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--megabytes", type=float, default=800, help="of weights to cycle through with few rows"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = host_target()
    for rows in arguments.rows:
        for shape in arguments.shapes:
            k, n = map(int, shape.split("x"))
            if rows < 64 or n <= MANY_ROWS_COLUMNS:
                print(compare(k, n, rows, arguments.rounds, arguments.megabytes * 1e6, target), flush=True)


if __name__ == "__main__":
    main()
