"""Times the CPU attention kernels, one thread, interleaved: prefill against torch, one step against reading memory.

Prefill: compiled `flex_attention` with a block mask, or with no window torch's own causal kernel; both get their own
layout ``[B, H, T, D]``. The peak is a loop of multiply-adds between registers. Decode: a ring of 512 tokens and one new
token, keys and values of 32, 16 or 8 bits; "memory" cycles through copies, more than 160 MB of them, and is compared
with a sum over an array of that size; "cache" repeats one of them. The call itself takes some 10 us of each step.
Time is that of the thread, the fastest call of a round; a ratio is the median over rounds.

    python benchmarks/attention_kernel.py [--target cpu|x86-64-v3] [--only WORD] [--portable]
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import iree.runtime as rt
import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from recurrence_kernel import compiled, multiply_adds
from timing import fastest, interleave, keep_memory, ratio
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch_mlir import ir

from spikingbrain.backend_iree.targets import known
from spikingbrain.passes import dialect
from spikingbrain.passes.kernels.attention import emit_attention_launch
from spikingbrain.passes.kernels.attention_portable import lower_attention_portable
from spikingbrain.target import Target

MEMORY = 160 << 20
STORED = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i8": np.int8}


@dataclass(frozen=True)
class Case:
    heads: int
    key_heads: int
    size: int
    time: int  # new tokens
    window: int = 0  # 0: all before
    sinks: int = 0
    slots: int = 0  # of the cache, which is empty before a prefill and full before a step
    element: str = "f32"  # of the cache

    @property
    def types(self) -> list[str]:
        """Returns the types of the op's operands."""
        h, k, d, t, r = self.heads, self.key_heads, self.size, self.time, self.slots
        length = "?" if t > 1 else "1"
        types = [
            f"1x{length}x{h}x{d}xf32",
            f"1x{length}xi64",
            *[f"1x{length}x{k}x{d}xf32"] * 2,
            f"1x{length}xi64",
        ]
        if r:
            types += [*[f"1x{r}x{k}x{d}x{self.element}"] * 2, f"1x{r}xi64"]
        if self.element == "i8":
            types += [f"1x{r}x{k}xf32"] * 2
        return [f"tensor<{t}>" for t in types]

    @property
    def pairs(self) -> int:
        """Returns how many keys all queries of a head see, in an empty cache."""
        reach = min(self.time, self.window or self.time)
        seen = reach * (reach + 1) // 2 + (self.time - reach) * reach
        return seen + sum(max(0, self.time - reach - sink) for sink in range(self.sinks))

    @property
    def cache_bytes(self) -> int:
        return 2 * self.slots * self.key_heads * self.size * np.dtype(STORED[self.element]).itemsize


PREFILL = {
    f"{h}/{k} heads of {d}, window 512, {t} tokens": Case(h, k, d, t, 512)
    for h, k, d in ((8, 8, 128), (28, 4, 128), (9, 3, 64))
    for t in (4096, 16384)
    if h * t <= 9 * 16384
} | {
    "9/3 heads of 64, window 256 and a sink, cache, 512 tokens": Case(9, 3, 64, 512, 256, 1, 258),
    "9/3 heads of 64, causal, 2048 tokens": Case(9, 3, 64, 2048),
    "8/8 heads of 128, causal, 2048 tokens": Case(8, 8, 128, 2048),
}
DECODE = {
    f"{h}/{k} heads of {d}, step, {element}": Case(h, k, d, 1, 512, 0, 513, element)
    for h, k, d in ((8, 8, 128), (28, 4, 128), (9, 3, 64))
    for element in STORED
}


def attention(case: Case, target: Target, portable: bool = False) -> Callable[..., Any]:
    types = case.types
    names = [f"%a{i}" for i in range(len(types))]
    present = [1] * 5 + [int(case.slots > 0)] * 3 + [int(case.element == "i8")] * 2
    text = (
        f"func.func @main({', '.join(map(': '.join, zip(names, types, strict=True)))}) -> {types[0]} {{\n"
        f'%o = "spikingbrain.attention"({", ".join(names)}) {{scale = {case.size**-0.5} : f64,'
        f" window = {case.window} : i64, sinks = {case.sinks} : i64, operandSegmentSizes = array<i32:"
        f" {', '.join(map(str, present))}>}} : ({', '.join(types)}) -> {types[0]}\nreturn %o : {types[0]}\n}}"
    )
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        op = module.body.operations[0].body.blocks[0].operations[0]
        if portable:
            lower_attention_portable(op)
        else:
            emit_attention_launch(op, target)
        return compiled(module, target)


def arrays(case: Case) -> list[np.ndarray]:
    """Returns the operands; before a step, a text of twice as many tokens as there are slots."""
    rng, k, d = np.random.default_rng(0), case.key_heads, case.size
    q, new_k, new_v = (rng.standard_normal((1, case.time, h, d), np.float32) for h in (case.heads, k, k))
    before = 2 * case.slots if case.time == 1 else 0
    positions = before + np.arange(case.time)[None]
    operands = [q, positions, new_k, new_v, positions]
    if case.slots:
        held = np.roll(np.arange(before - case.slots, before), case.slots // 3)[None]
        factor = 30 if case.element == "i8" else 1
        rows = [rng.standard_normal((1, case.slots, k, d), np.float32) * factor for _ in range(2)]
        operands += [
            *(x.astype(STORED[case.element]) for x in rows),
            np.maximum(held, -1) if before else 0 * held - 1,
        ]
    if case.element == "i8":
        operands += [np.full((1, case.slots, k), 1 / 30, np.float32)] * 2
    return operands


def torch_peers(case: Case, operands: list[np.ndarray]) -> dict[str, Callable[[], torch.Tensor]]:
    q, k, v = (torch.from_numpy(operands[i]).transpose(1, 2).contiguous() for i in (0, 2, 3))
    grouped = case.heads != case.key_heads
    if not case.window:
        k, v = (x.repeat_interleave(case.heads // case.key_heads, 1) for x in (k, v))
        return {"torch, causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}

    def seen(_: Any, __: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        near = j > i - case.window
        return (j <= i) & (near | (j < case.sinks) if case.sinks else near)

    mask = create_block_mask(seen, None, None, case.time, case.time, device="cpu")
    flex = torch.compile(flex_attention)
    return {"flex_attention": lambda: flex(q, k, v, block_mask=mask, enable_gqa=grouped)}


def prefill(name: str, case: Case, target: Target, rounds: int, portable: bool) -> None:
    torch._dynamo.reset()
    device, operands = rt.get_device("local-sync"), arrays(case)
    peak, peak_operations = multiply_adds(target)
    candidates: dict[str, Callable[[], Any]] = {}
    for label in ["kernel", *(["portable"] if portable and case.time <= 2048 else [])]:
        run = attention(case, target, label == "portable")
        candidates[label] = functools.partial(run, *(rt.asdevicearray(device, x) for x in operands))
    with torch.no_grad():
        peers = torch_peers(case, operands)
        for peer in peers.values():
            error = np.abs(candidates["kernel"]().to_host() - peer().transpose(1, 2).numpy()).max()
            assert error < 1e-5, error
        times = interleave({"peak": peak, **candidates, **peers}, rounds, fastest(0.1))
    rate = 4 * case.size * case.heads * case.pairs / times["kernel"].min()
    best = peak_operations / times.pop("peak").min()
    print(f"{name}: {rate / best:.0%} of {best / 1e9:.0f} Gflop/s")
    for label, values in times.items():
        print(
            f"    {label:14} {values.min() * 1e3:9.3f} ms   {ratio(values, times['kernel']):5.2f}x",
            flush=True,
        )


def decode(name: str, case: Case, target: Target, rounds: int) -> None:
    device, operands = rt.get_device("local-sync"), arrays(case)
    new, (keys, values, *rest) = operands[:5], operands[5:]
    run = attention(case, target)
    fixed, rest = ([rt.asdevicearray(device, x) for x in part] for part in (new, rest))
    copies = [
        [*(rt.asdevicearray(device, x.copy()) for x in (keys, values)), *rest]
        for _ in range(MEMORY // case.cache_bytes + 1)
    ]
    turn = itertools.cycle(copies)
    block = np.ones(MEMORY // 4, np.float32)
    times = interleave(
        {
            "memory": lambda: run(*fixed, *next(turn)),
            "cache": lambda: run(*fixed, *copies[0]),
            "read": lambda: block.max(),
        },
        rounds,
        fastest(0.1),
    )
    read = block.nbytes / times["read"].min()
    rates = {place: case.cache_bytes / np.median(times[place]) for place in ("memory", "cache")}
    print(
        f"{name}: memory {np.median(times['memory']) * 1e6:6.1f} us, {rates['memory'] / read:4.0%} of {read / 1e9:.0f} GB/s;"
        f" cache {np.median(times['cache']) * 1e6:6.1f} us, {rates['cache'] / 1e9:.0f} GB/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", default="cpu", choices=[n for n, t in known().items() if t.target.vector_bits]
    )
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--portable", action="store_true", help="the form in linalg, too, of short texts")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    target = known()[options.target].target
    for name, case in PREFILL.items():
        if options.only in name:
            prefill(name, case, target, options.rounds, options.portable)
    for name, case in DECODE.items():
        if options.only in name:
            decode(name, case, target, options.rounds)


if __name__ == "__main__":
    main()
