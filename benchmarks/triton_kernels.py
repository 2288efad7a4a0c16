"""Triton kernels of the MetaX backend beside torch eager, inductor and, where installed, flash-linear-attention; needs a GPU.

    python benchmarks/triton_kernels.py                      # on the GPU that torch has
    python benchmarks/triton_kernels.py --check              # small sizes, values only; TRITON_INTERPRET=1 needs no GPU
    python benchmarks/triton_kernels.py --seconds 240 -o triton.json   # begins no problem later; the file is whole at any time

Candidates take turns, round by round; a time is the median over rounds of the mean of some calls, by the device's events, and a
ratio the median over rounds of one round's ratio to eager. A candidate that raises is named and left out. The share of peak is
that of the arithmetic that the problem asks for, by the maker's figure for dense matrix products in the type of the operands, or
of the bytes that it has to read and write by the maker's bandwidth, whichever is larger. (No peak is known of MetaX GPUs: the
rates stand alone there.) Times on an NVIDIA GPU say nothing about a MetaX GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import interleave, ratio
from torch import Tensor

from spikingbrain import files
from spikingbrain.models import spiking
from spikingbrain.models.recurrences.gated import gla, simple_gla

Results = tuple[Tensor, ...]
ROUNDS, ROUND_SECONDS, MOST_CALLS = 15, 0.05, 100  # of a candidate: its calls fill a round

# TFLOP/s of float32, of 16-bit floats, TOP/s of int8, GB/s; the makers' data sheets, without sparsity.
PEAKS = {
    "A100": (19.5, 312.0, 624.0, 2039.0),
    "H100": (67.0, 989.0, 1979.0, 3350.0),
    "H200": (67.0, 989.0, 1979.0, 4800.0),
}
_COLUMN = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 1, torch.int8: 2}


@dataclass(frozen=True)
class Problem:
    """A computation, who does it, and what it costs: ``operations`` on operands of ``dtype``, ``moved`` bytes.

    The first candidate is eager, whose results the others are compared with.
    """

    name: str
    candidates: dict[str, Callable[[], Results]]
    operations: float
    dtype: torch.dtype
    moved: float
    bound: float


def recurrences(device: str, small: bool) -> Iterator[Problem]:
    batch, steps, heads, size = (1, 37, 2, 16) if small else (4, 4096, 16, 128)
    for dtype in (torch.bfloat16, torch.float32):
        for axis in ("key", "head"):
            for training in (False, True):
                yield _recurrence(device, axis, dtype, training, batch, steps, heads, size)


def _recurrence(
    device: str, axis: str, dtype: torch.dtype, training: bool, batch: int, steps: int, heads: int, size: int
) -> Problem:
    from spikingbrain.backend_maca.triton import recurrence

    shape = (batch, steps, heads, size)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    g = F.logsigmoid(torch.randn(shape if axis == "key" else shape[:3], device=device) + 3).to(dtype)
    do, scale = torch.randn(shape, device=device).to(dtype), size**-0.5
    leaves = [x.requires_grad_(training) for x in (q, k, v, g)]
    plain = gla if axis == "key" else simple_gla

    def differentiated(function: Callable[..., Tensor]) -> Callable[[], Results]:
        def call() -> Results:
            o = function(*leaves)
            return (o.detach(), *torch.autograd.grad(o, leaves, do)) if training else (o,)

        return call

    def ours() -> Results:
        scaled = q.detach() * scale
        o, last = recurrence.forward(scaled, k, v, g, None, axis, False)
        if not training:
            return (o,)
        dq, dk, dv, dg, _ = recurrence.backward(
            do, torch.zeros_like(last), scaled, k, v, g, None, axis, False
        )
        assert dg is not None
        return o, dq * scale, dk, dv, dg

    def eager(*given: Tensor) -> Tensor:
        return plain(*given)[0]

    candidates = {"eager": differentiated(eager), "ours": torch.no_grad()(ours)}
    if device == "cuda":
        candidates["inductor"] = differentiated(torch.compile(eager))
        if importlib.util.find_spec("fla") and dtype != torch.float32:
            candidates["fla"] = differentiated(_of_fla(axis))
    passes = (
        3.5 if training else 1.0
    )  # the backward computes the states again, and three gradients of two products each
    # a block of 64 steps: scores and their product with v, the update of the state and the read of it
    products = batch * heads * steps * size * (2 * 64 / 2 * 2 + 2 * 2 * size)
    moved = 4 * q.numel() * q.element_size() * (3 if training else 1)
    name = (
        f"recurrence, gates of {axis}s, {str(dtype)[6:]}, {'forward and backward' if training else 'forward'}"
    )
    return Problem(name, candidates, products * passes, dtype, moved, _bound(dtype))


def _of_fla(axis: str) -> Callable[..., Tensor]:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    chunked = chunk_gla if axis == "key" else chunk_simple_gla
    return lambda q, k, v, g: chunked(q, k, v, g)[0]


class _Windowed(torch.autograd.Function):
    """Attention by our kernels alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
        from spikingbrain.backend_maca.triton import attention

        o, sums = attention.forward(q, k, v, window, sinks, None)
        ctx.save_for_backward(q, k, v, o, sums)
        ctx.options = (window, sinks, None)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        from spikingbrain.backend_maca.triton import attention

        return *attention.backward(do, *ctx.saved_tensors, *ctx.options), None, None


def _windowed(window: int, sinks: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o: Tensor = _Windowed.apply(q, k, v, window, sinks)  # type: ignore[no-untyped-call]
    return o


def attentions(device: str, small: bool) -> Iterator[Problem]:
    batch, steps, heads, sources, size, window, sinks = (
        (1, 37, 4, 2, 16, 9, 2) if small else (2, 8192, 16, 4, 128, 1024, 4)
    )
    position = torch.arange(steps, device=device)
    mask = (position <= position[:, None]) & ((position > position[:, None] - window) | (position < sinks))
    for dtype in (torch.bfloat16,):
        q, k, v = (
            torch.randn(batch, steps, n, size, device=device).to(dtype) for n in (heads, sources, sources)
        )
        do = torch.randn_like(q)

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

        for training in (False, True):
            leaves = [x.detach().requires_grad_(training) for x in (q, k, v)]

            def run(
                function: Callable[..., Tensor], leaves: list[Tensor], training: bool, do: Tensor
            ) -> Results:
                o = function(*leaves)
                return (o.detach(), *torch.autograd.grad(o, leaves, do)) if training else (o,)

            ours = functools.partial(_windowed, window, sinks)
            forms: dict[str, Callable[..., Tensor]] = {"eager": dense, "ours": ours}
            if device == "cuda":
                forms["inductor"] = torch.compile(dense)
                if importlib.util.find_spec("flash_attn"):
                    from flash_attn import flash_attn_func

                    # it has no sinks: a little less to do, other values
                    forms["flash_attn without sinks"] = functools.partial(
                        flash_attn_func, causal=True, window_size=(window - 1, 0)
                    )
            pairs = batch * heads * int(mask.sum())
            yield Problem(
                f"window attention, {str(dtype)[6:]}, {'forward and backward' if training else 'forward'}",
                {name: functools.partial(run, form, leaves, training, do) for name, form in forms.items()},
                4.0 * pairs * size * (3.5 if training else 1.0),
                dtype,
                (2 * q.numel() + 2 * k.numel()) * q.element_size() * (3.0 if training else 1.0),
                _bound(dtype),
            )


def projections(device: str, small: bool) -> Iterator[Problem]:
    from spikingbrain.backend_maca.triton.spikes import spike_linear

    channels, outputs = (96, 40) if small else (4096, 4096)
    layer = torch.randn(outputs, channels, device=device)
    codes, scale = spiking.quantise_weight(layer)
    for rows in (1, 5) if small else (1, 16, 4096):
        counts, v = spiking.spike_counts(torch.randn(rows, channels, device=device))
        threshold, half = v.squeeze(-1), layer.to(torch.bfloat16)

        def exact(counts: Tensor, v: Tensor) -> Results:
            return (spiking.spike_linear(counts, v, codes, scale, None, torch.float32),)

        def ours(counts: Tensor, threshold: Tensor) -> Results:
            return (spike_linear(counts, threshold, codes, scale, None),)

        candidates = {
            "eager": functools.partial(exact, counts, v),
            "ours": functools.partial(ours, counts, threshold),
        }
        if device == "cuda":
            candidates["inductor"] = functools.partial(torch.compile(exact), counts, v)
            x = counts.to(torch.bfloat16)
            candidates["bfloat16 product"] = lambda x=x, half=half: (x @ half.mT,)  # type: ignore[misc]
            if rows > 16:
                narrow = counts.to(torch.int8)
                candidates["torch._int_mm"] = lambda x=narrow: (torch._int_mm(x, codes.mT),)  # type: ignore[misc]
        yield Problem(
            f"spiking projection of {rows} rows",
            candidates,
            2.0 * rows * channels * outputs,
            torch.int8,
            codes.numel() + 4.0 * rows * (channels + outputs),
            2e-6,
        )


def _bound(dtype: torch.dtype) -> float:
    return 5e-6 if dtype == torch.float32 else 3e-2


def error_of(problem: Problem) -> float:
    """Returns how far ours is from eager, over the largest value."""
    wanted, found = problem.candidates["eager"](), problem.candidates["ours"]()
    errors = [
        float((x.double() - y.double()).abs().max() / y.double().abs().max())
        for x, y in zip(found, wanted, strict=True)
    ]
    return max(errors, key=lambda error: error if error == error else float("inf"))


def seconds(call: Callable[[], object], calls: int) -> float:
    """Returns the mean time of some calls by the device's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def measure(problem: Problem, device_name: str) -> dict[str, Any]:
    """Returns of each candidate its time, its ratio to eager, its rates and its share of peak, or why it has none."""
    able: dict[str, Callable[[], Results]] = {}
    calls: dict[Any, int] = {}
    found: dict[str, Any] = {}
    for name, call in problem.candidates.items():
        try:
            call()
            calls[call] = min(MOST_CALLS, max(1, int(ROUND_SECONDS / seconds(call, 1))))
            able[name] = call
        except Exception as error:  # of torch, inductor or another's package: the others are timed
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    times = interleave(able, ROUNDS, lambda call: seconds(call, calls[call]))
    peaks = next((p for name, p in PEAKS.items() if name in device_name), None)
    for name, taken in times.items():
        middle = float(np.median(taken))
        found[name] = {
            "microseconds": middle * 1e6,
            "to_eager": ratio(times["eager"], taken) if "eager" in times else None,
            "tera_operations": problem.operations / middle / 1e12,
            "gigabytes": problem.moved / middle / 1e9,
        }
        if peaks:
            found[name]["share_of_peak"] = max(
                found[name]["tera_operations"] / peaks[_COLUMN[problem.dtype]],
                found[name]["gigabytes"] / peaks[3],
            )
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Returns the rows of one problem's table."""
    for name, row in found.items():
        if "failed" in row:
            yield f"  {name:<26}{row['failed']}\n"
            continue
        line = f"  {name:<26}{row['microseconds']:>10.0f} us"
        line += f"   {row['to_eager']:>6.2f} x eager" if row["to_eager"] else ""
        line += f"   {row['tera_operations']:>7.1f} T/s   {row['gigabytes']:>7.0f} GB/s"
        line += f"   {row['share_of_peak']:>5.0%} of peak" if "share_of_peak" in row else ""
        yield line + "\n"


def problems(device: str, small: bool) -> Iterator[Problem]:
    """Returns one problem of each kind, then the next of each."""
    kinds = [kind(device, small) for kind in (recurrences, attentions, projections)]
    for turn in itertools.zip_longest(*kinds):
        yield from (problem for problem in turn if problem)


def main() -> bool:
    """Returns whether a value was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare values at small sizes, without times")
    parser.add_argument("--seconds", type=float, default=1e9, help="after these no problem is begun")
    parser.add_argument(
        "--without", default="", help="names of problems to leave out, with semicolons between"
    )
    parser.add_argument("-o", "--output", type=Path, help="a file for what was found, in JSON")
    given = parser.parse_args()
    from spikingbrain.backend_maca.triton import device
    from spikingbrain.errors import SpikingBrainError

    until = time.monotonic() + given.seconds
    try:
        found = device.find()
    except SpikingBrainError as error:
        print(f"nothing is measured: this benchmark needs a GPU\n{error}")
        return False
    if found.kind == "interpreter" and not given.check:
        print("nothing is measured: Triton's interpreter has no speed to speak of; --check compares values")
        return False
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {
        "device": found.name,
        "torch": torch.__version__,
        "problems": {},
        "complete": False,
    }
    print(f"{found.name} ({found.kind}), torch {torch.__version__}")
    for problem in problems(found.torch_type, given.check):
        if problem.name in given.without.split(";"):
            continue
        if time.monotonic() > until:
            print("the time is over: further problems are not run")
            break
        try:
            error = error_of(problem)
            wrong = "" if error < problem.bound else f"{error:.1e} from eager, more than {problem.bound:.0e}"
            row = {"error": error, "times": {} if given.check else measure(problem, found.name)}
        except Exception as failure:
            wrong, row = f"{type(failure).__name__}: {failure}"[:500], {"times": {}}
        results["problems"][problem.name] = {**row, "wrong": wrong}
        print(f"{problem.name}: {wrong or f'within {problem.bound:.0e} of eager'}")
        print(*lines(row["times"]), sep="", end="", flush=True)
        if given.output:
            files.write_atomically(given.output, json.dumps(results, indent=1).encode())
    else:
        results["complete"] = True
    if given.output:
        files.write_atomically(given.output, json.dumps(results, indent=1).encode())
    return any(problem["wrong"] for problem in results["problems"].values())


if __name__ == "__main__" and main():
    sys.exit(1)
