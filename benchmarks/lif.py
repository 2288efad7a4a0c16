"""Neurons and scans against the memory: how much of the streaming bandwidth they reach, and how they compare with torch.

    python benchmarks/lif.py

One thread, candidates interleaved in one process; medians of ratios over rounds. Results are fresh memory in every call, so that
page faults would dominate; the script starts itself anew with settings that make the C library keep memory, which hold for
every candidate alike. "copy" reads and writes as much as the neurons do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from timing import interleave, keep_memory, ratio
from torch import Tensor
from torch._higher_order_ops import scan


def lif_loop(x: Tensor, v: Tensor) -> Tensor:
    """Soft reset, written as people write it."""
    spikes = []
    for now in x:
        v = v * 0.9 + now
        spike = (v >= 1).to(v.dtype)
        v = v - spike
        spikes.append(spike)
    return torch.stack(spikes)


def lif_scan(x: Tensor, v: Tensor) -> Tensor:
    def step(v: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        v = v * 0.9 + now
        spike = (v >= 1).to(v.dtype)
        return v - spike, spike

    return scan(step, v, x)[1]


def selective_loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba's scan, as the papers' reference code writes it."""
    state = torch.zeros(x.shape[0], *a.shape)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * a)
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        outputs.append((state * c[:, t, None]).sum(-1))
    return torch.stack(outputs, 1)


def selective_op(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.ops.spikingbrain.selective_scan(x, dt, a, b, c, None, False)[0]


def check(found: Tensor, wanted: Tensor, bound: float) -> None:
    """Stops where more than a share of ``bound`` of the results differ."""
    wrong = float(((found - wanted).abs() > 1e-3 * (1 + wanted.abs())).float().mean())
    if wrong > bound:
        raise SystemExit(f"{wrong:.2%} of the results differ")


def compare(title: str, calls: dict[str, Callable[[], Tensor]], rounds: int, reference: str) -> None:
    """Prints times of all candidates, each also as a multiple of the reference's."""
    times = interleave(calls, rounds)
    print(title)
    for name, values in times.items():
        least, over = values.min() * 1e3, ratio(values, times[reference])
        print(f"  {name:22} {np.median(values) * 1e3:9.2f} ms, least {least:9.2f}; {over:6.3f} x {reference}")


def neurons(steps: int, count: int, rounds: int, loops: bool) -> None:
    x, v = torch.randn(steps, count), torch.zeros(count)
    out = torch.empty_like(x)
    compiled = torch.compile(lif_scan, backend="spikingbrain")
    calls: dict[str, Callable[[], Tensor]] = {
        "copy": lambda: x * 1.5,
        "copy in place": lambda: out.copy_(x),
        "spikingbrain": lambda: compiled(x, v),
    }
    if loops:
        inductor = torch.compile(lif_loop, backend="inductor")
        calls["eager loop"] = lambda: lif_loop(x, v)
        calls["inductor loop"] = lambda: inductor(x, v)
    # v * 0.9 + x is rounded once or twice: some neurons on the threshold differ
    check(compiled(x, v), lif_loop(x, v), 1e-4)
    compare(f"LIF, soft reset, T={steps}, {count} neurons", calls, rounds, "copy")


def selective(steps: int, channels: int, states: int, rounds: int) -> None:
    shape = (1, steps, channels)
    x, dt = torch.randn(shape), torch.nn.functional.softplus(torch.randn(shape) - 2)
    a = -torch.exp(torch.randn(channels, states) * 0.5)
    b, c = torch.randn(1, steps, states), torch.randn(1, steps, states)
    compiled = torch.compile(selective_op, backend="spikingbrain")
    calls: dict[str, Callable[[], Tensor]] = {
        "spikingbrain": lambda: compiled(x, dt, a, b, c),
        "eager loop": lambda: selective_loop(x, dt, a, b, c),
        "eager op, by blocks": lambda: selective_op(x, dt, a, b, c),
    }
    if steps <= 64:  # inductor takes minutes to compile longer ones
        inductor = torch.compile(selective_loop, backend="inductor")
        calls["inductor loop"] = lambda: inductor(x, dt, a, b, c)
    check(compiled(x, dt, a, b, c), selective_loop(x, dt, a, b, c), 0)
    compare(f"selective scan, T={steps}, {channels} x {states}", calls, rounds, "spikingbrain")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--neurons", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-loops", action="store_true", help="leave torch's loops out")
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    import spikingbrain.frontend.ops  # noqa: F401  (registers the scans)

    with torch.no_grad():
        neurons(args.steps, args.neurons, args.rounds, not args.no_loops)
        for steps in (64, 1024):
            selective(steps, 1536, 16, args.rounds)


if __name__ == "__main__":
    main()
