"""Times the CPU attention kernels against torch's scaled_dot_product_attention, one thread, interleaved.

Heads are those of a 135 M Llama: 9 query heads, 3 key heads, head size 64. torch gets its own layout
``[B, H, T, D]``, keys and values repeated per query head, and the mask, all prepared outside the timing. Decode
steps run ``CHAIN`` times per call, each on the output of the one before, as the layers of a model do, so that the
cost of entering the compiled module (about 10 us from Python) does not count as attention.

    python benchmarks/attention_kernel.py [--target x86-64-v3|x86-64-v4] [--portable]
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import iree.runtime as rt
import numpy as np
import torch
import torch.nn.functional as F
from timing import interleave, mean, ratio
from torch_mlir import ir

from spikingbrain.backend_iree.dispatch import wrap_kernels
from spikingbrain.passes import dialect
from spikingbrain.passes.kernels.attention import emit_attention_launch
from spikingbrain.passes.kernels.attention_portable import lower_attention_portable
from spikingbrain.target import Target

HEADS, KEY_HEADS, SIZE = 9, 3, 64
CHAIN = 8
ROUNDS, MEASURE = 15, mean(0.03)
TARGETS = {
    "x86-64-v4": (512, 32, {"fma", "avx512f"}),
    "x86-64-v3": (256, 16, {"fma", "avx2"}),
}
# name: queries, new keys, cache slots, tokens before, window, sinks
CASES = {
    "prefill 512, window 256+1, empty cache": (512, 512, 258, 0, 256, 1),
    "prefill 512, causal": (512, 512, 0, 0, 0, 0),
    "prefill 2048, window 256+1, empty cache": (2048, 2048, 258, 0, 256, 1),
    "prefill 2048, causal": (2048, 2048, 0, 0, 0, 0),
    "decode, 257 keys": (1, 1, 256, 256, 256, 1),
    "decode, 4096 keys": (1, 1, 4095, 4095, 0, 0),
}


def compiled(case: tuple[int, ...], target: Target, portable: bool) -> Callable[..., Any]:
    """Returns the compiled attention of a case, ``CHAIN`` times over for decode."""
    queries, _, slots, _, window, sinks = case
    steps, length = (CHAIN, 1) if queries == 1 else (1, "?")
    keys = [f"tensor<1x?x{KEY_HEADS}x{SIZE}xf32>"] * 2 + ["tensor<1x?xi64>"]
    types = [
        f"tensor<1x{length}x{HEADS}x{SIZE}xf32>",
        f"tensor<1x{length}xi64>",
        *keys,
        *(keys if slots else []),
    ]
    names = [f"%a{i}" for i in range(len(types))]
    present = ", ".join("1" if i < len(types) else "0" for i in range(10))
    body = "".join(
        f'%o{i} = "spikingbrain.attention"({", ".join([f"%o{i - 1}" if i else "%a0", *names[1:]])})'
        f" {{scale = {SIZE**-0.5} : f64, window = {window} : i64, sinks = {sinks} : i64,"
        f" operandSegmentSizes = array<i32: {present}>}} : ({', '.join(types)}) -> {types[0]}\n"
        for i in range(steps)
    )
    signature = ", ".join(f"{n}: {t}" for n, t in zip(names, types, strict=True))
    text = f"func.func @main({signature}) -> {types[0]} {{\n{body}return %o{steps - 1} : {types[0]}\n}}"
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        for op in list(module.body.operations[0].body.blocks[0].operations)[:-1]:
            if portable:
                lower_attention_portable(op)
            else:
                emit_attention_launch(op, target)
        wrap_kernels(module)
        text = module.operation.get_asm()
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "m.mlir"), Path(folder, "m.vmfb")
        source.write_text(text)
        flags = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
        flags += [f"--iree-llvmcpu-target-cpu={target.cpu}", "--iree-opt-level=O3"]
        subprocess.run(["iree-compile", str(source), "-o", str(binary), *flags], check=True)
        config = rt.Config(device=rt.get_device("local-sync"))
        return rt.load_vm_module(
            rt.VmModule.copy_buffer(config.vm_instance, binary.read_bytes()), config
        ).main


def inputs(case: tuple[int, ...]) -> list[np.ndarray]:
    queries, count, slots, before, _, _ = case
    rng = np.random.default_rng(0)

    def rows(n: int, heads: int) -> np.ndarray:
        return rng.standard_normal((1, n, heads, SIZE), dtype=np.float32)

    new = np.arange(before, before + count)[None]
    result = [
        rows(queries, HEADS),
        new[:, count - queries :],
        rows(count, KEY_HEADS),
        rows(count, KEY_HEADS),
        new,
    ]
    if slots:
        held = np.full((1, slots), -1)
        held[0, : min(before, slots)] = np.arange(before - min(before, slots), before)
        result += [rows(slots, KEY_HEADS), rows(slots, KEY_HEADS), held]
    return result


def torch_peers(
    case: tuple[int, ...], arrays: list[np.ndarray]
) -> tuple[dict[str, Callable[[], Any]], torch.Tensor]:
    """Returns torch's candidates and the boolean mask."""
    queries, count, slots, _, window, sinks = case
    query, i, keys, values, j = (torch.from_numpy(a) for a in arrays[:5])
    if slots:
        cached = [torch.from_numpy(a) for a in arrays[5:]]
        keys, values, j = (torch.cat(p, 1) for p in zip(cached, (keys, values, j), strict=True))
    group = HEADS // KEY_HEADS
    query = query.transpose(1, 2).contiguous()
    keys, values = (x.transpose(1, 2).repeat_interleave(group, 1).contiguous() for x in (keys, values))
    i, j = i[0][:, None], j[0][None]
    mask = (j >= 0) & (j <= i)
    if window:
        mask &= (j > i - window) | (j < sinks)

    def masked() -> torch.Tensor:
        out = query
        for _ in range(CHAIN if queries == 1 else 1):
            out = F.scaled_dot_product_attention(out, keys, values, attn_mask=mask)
        return out

    peers: dict[str, Callable[[], Any]] = {"torch, mask": masked}
    if queries > 1:
        new_keys, new_values = (x[:, :, -count:].contiguous() for x in (keys, values))
        peers["torch, causal"] = lambda: F.scaled_dot_product_attention(
            query, new_keys, new_values, is_causal=True
        )
    return peers, mask


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, default="x86-64-v4")
    parser.add_argument("--portable", action="store_true", help="add the portable form as a candidate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bits, registers, features = TARGETS[options.target]
    target = Target(
        options.target, "cpu", "iree", "x86-64", options.target, frozenset(features), bits, registers
    )
    square = torch.randn(1024, 1024)
    peak = 2 * 1024**3 / min(interleave({"": lambda: square @ square}, ROUNDS, MEASURE)[""]) / 1e9
    print(f"{options.target}; torch matmul 1024: {peak:.0f} Gflop/s")
    for name, case in CASES.items():
        arrays = inputs(case)
        device_arrays = [rt.asdevicearray(rt.get_device("local-sync"), a) for a in arrays]
        peers, mask = torch_peers(case, arrays)
        candidates: dict[str, Callable[[], Any]] = {}
        for label, portable in [("kernel", False), *([("portable", True)] if options.portable else [])]:
            run = compiled(case, target, portable)
            candidates[label] = functools.partial(run, *device_arrays)
            error = np.abs(run(*arrays).to_host() - peers["torch, mask"]().transpose(1, 2).numpy()).max()
            assert error < 1e-5, error
        times = interleave({**candidates, **peers}, ROUNDS, MEASURE)
        steps = CHAIN if case[0] == 1 else 1
        ours = times["kernel"]
        rate = 4 * SIZE * HEADS * int(mask.sum()) * steps / ours.min() / 1e9
        print(f"{name}: {rate:.0f} Gflop/s of visible scores")
        for label, values in times.items():
            print(
                f"    {label:14} {min(values) / steps * 1e3:8.3f} ms   {ratio(values, ours):.2f}x the kernel's time"
            )


if __name__ == "__main__":
    main()
