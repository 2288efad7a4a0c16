"""Compares the two forms of the spiking linear: all channels multiplied, and the weights of those added that fire.

    python benchmarks/spike_events.py [--shapes 2048x2048 ...] [--rows 1] [--bits 8] [--group 0] [--silent 0 50 70 90 99]

One thread, the thread's CPU clock, both forms in turn, as in `spike_linear.py`; few rows go through copies of the weight that are
larger than the last cache. For each share of silent channels, in percent, the same of every row: the best times, and how many
times longer the dense form takes, the median over rounds. Both forms' results are compared bit by bit.

    python benchmarks/spike_events.py --model

A stack of feed-forward blocks of squared ReLU, its weights random, compiled by torch.compile before and after `measure_silence`.
With `--experts`, each block is a mixture of 8, of which a token takes 4.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time

import numpy as np
import spike_linear
import torch
from timing import interleave, keep_memory, mean, ratio
from torch import nn

from spikingbrain.backend_iree import targets
from spikingbrain.models import spiking
from spikingbrain.models.spikingbrain.experts import ExpertLinear
from spikingbrain.target import Target


def compare(
    n: int, k: int, m: int, share: float, settings: argparse.Namespace, target: Target
) -> tuple[float, float, float]:
    """Returns the best seconds of the dense form and of events, and the median ratio."""
    bits, group = settings.bits, settings.group or k
    copies = max(2, round(spike_linear.CYCLE_BYTES * 8 / (n * k * bits))) if m < 64 else 1
    copies = min(copies, spike_linear.MOST_COPIES)
    rng = np.random.default_rng(0)
    high = 1 << (min(bits, 8) - 1)
    codes = [rng.integers(-high, high, (n, k), dtype=np.int8) for _ in range(copies)]
    codes = [c.astype(np.int16) for c in codes] if bits == 16 else codes
    scale = torch.from_numpy(rng.uniform(0.001, 0.002, (n, k // group)).astype(np.float32))
    xs = [1 + torch.from_numpy(rng.random((m, k), np.float32)) for _ in range(copies)]
    for x in xs:
        for row in x:
            row[torch.from_numpy(rng.permutation(k)[: round(share * k)])] = 0
    calls = {
        form: spike_linear.ours(xs, codes, scale, bits, target, told)
        for form, told in (("dense", 0.0), ("events", 1.0))
    }
    results = []
    for call in calls.values():
        first = call()[0]
        results.append((first[0] if isinstance(first, list | tuple) else first).to_host())
    np.testing.assert_array_equal(*results)
    times = interleave(calls, settings.rounds, mean(spike_linear.ROUND_SECONDS, time.thread_time))
    dense, events = times["dense"] / copies, times["events"] / copies
    return min(dense), min(events), ratio(dense, events)


class Block(nn.Module):
    """x + down(relu(up(norm(x)))^2), most of whose hidden channels are silent."""

    def __init__(self, size: int = 2048, hidden: int = 8192) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(size), nn.Linear(size, hidden), nn.Linear(hidden, size)
        nn.init.constant_(self.up.bias, -0.7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))).square())


class ExpertBlock(nn.Module):
    """The same of experts, drawn for each token."""

    def __init__(self, size: int = 1024, hidden: int = 4096, experts: int = 8, chosen: int = 4) -> None:
        super().__init__()
        self.size, self.chosen = size, chosen
        self.norm, self.router = nn.RMSNorm(size), nn.Linear(size, experts)
        self.up, self.down = ExpertLinear(experts, size, hidden), ExpertLinear(experts, hidden, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_ME = self.norm(x).repeat_interleave(self.chosen, 0)
        expert_M = self.router(x).topk(self.chosen).indices.flatten()
        y_ME = self.down(torch.relu(self.up(x_ME, expert_M) - 0.7).square(), expert_M)
        return x + y_ME.unflatten(0, (-1, self.chosen)).sum(1)


@torch.no_grad()
def compare_model(settings: argparse.Namespace) -> str:
    """Returns the line of a whole model, whose weights are larger than the last cache."""
    torch.manual_seed(0)
    blocks, kind, size = (4, ExpertBlock, 1024) if settings.experts else (6, Block, 2048)
    model = nn.Sequential(*[kind() for _ in range(blocks)]).eval()
    spiking.spike(model, group_size=None)
    x = torch.randn(1, size)
    calls, results = {}, []
    for form in ("dense", "events"):
        shares = spiking.measure_silence(model, [torch.randn(64, size)]) if form == "events" else {}
        torch._dynamo.reset()
        call = torch.compile(copy.deepcopy(model), backend="spikingbrain")
        results.append(call(x))
        calls[form] = functools.partial(call, x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    times = interleave(calls, settings.rounds, mean(0.2, time.thread_time))
    hidden = np.mean([share for name, share in shares.items() if name.endswith("down")])
    dense, events = (min(times[form]) * 1e3 for form in calls)
    return (
        f"{blocks} blocks {size} - {4 * size} - {size}, 1 row, {hidden:.0%} of hidden channels silent:"
        f" dense {dense:.2f} ms, events {events:.2f} ms, {ratio(times['dense'], times['events']):.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "2048x8192"], help="columns x channels")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--bits", type=int, default=8, choices=[4, 8, 16])
    parser.add_argument("--group", type=int, default=0, help="channels with one scale; 0 for all")
    parser.add_argument("--silent", type=float, nargs="+", default=[0, 25, 50, 60, 70, 80, 90, 95, 99])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--target", default="cpu", help="of another instruction set, e.g. x86-64-v3")
    parser.add_argument("--model", action="store_true", help="the stack of blocks, compiled by torch.compile")
    parser.add_argument("--experts", action="store_true", help="the stack of mixtures")
    settings = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    if settings.model or settings.experts:
        print(compare_model(settings))
        return
    target = targets.known()[settings.target].target
    for rows in settings.rows:
        for shape in settings.shapes:
            n, k = map(int, shape.split("x"))
            for percent in settings.silent:
                dense, events, faster = compare(n, k, rows, percent / 100, settings, target)
                print(
                    f"{n:5d} x {k:5d} {rows:4d} rows {percent:3.0f}% silent: dense {dense * 1e6:8.1f} us,"
                    f" events {events * 1e6:8.1f} us, {faster:.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
