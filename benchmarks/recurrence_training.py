"""Forward and backward of gated linear attention or a delta rule, from PyTorch on one thread, and the memory that they take.

    python benchmarks/recurrence_training.py                 # speed: 1024 and 4096 steps
    python benchmarks/recurrence_training.py --delta         # the gated delta rule instead
    python benchmarks/recurrence_training.py --memory        # peak memory above the inputs, a process for each form

Time is that of the thread, which other processes disturb less. Candidates: the op under
``torch.compile(backend="spikingbrain")``, chunks of 64 in plain torch (eager, and compiled by inductor), and the loop over time.
The delta rule in chunks is that of ``spikingbrain.models.recurrences``; there is no loop of it. Every round runs each; a ratio is
the median over rounds of one round's ratio. Allocators keep memory, for all, where time is measured, and give it back where
memory is.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import fastest, interleave, keep_memory, ratio
from torch import Tensor

import spikingbrain.frontend.ops  # noqa: F401  (registers the op)
from spikingbrain.models.recurrences import gated_delta_rule

HEADS, SIZE, CHUNK = 8, 128, 64
RETURNED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what is freed is gone at once
Form = Callable[..., Tensor]


def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    none = None
    made = torch.ops.spikingbrain.linear_recurrence(
        q, k, v, g, none, none, none, none, "key", True, False, False
    )
    return made[0]  # type: ignore[no-any-return]


def chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Everything but the states for all chunks at once."""
    q, k, v, g = (x.transpose(1, 2).unflatten(2, (-1, CHUNK)) for x in (q, k, v, g))
    total = g.cumsum(-2)
    last = total[..., -1:, :]
    query, key = q * total.exp(), k * (-total).exp()
    scores = (query @ key.transpose(-1, -2)).tril()
    update = (k * (last - total).exp()).transpose(-1, -2) @ v
    decay = last.exp().transpose(-1, -2)
    state, states = torch.zeros_like(update[:, :, 0]), []
    for n in range(update.shape[2]):
        states.append(state)
        state = state * decay[:, :, n] + update[:, :, n]
    return (query @ torch.stack(states, 2) + scores @ v).flatten(2, 3).transpose(1, 2)


def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, outputs = q.new_zeros(q.shape[0], HEADS, SIZE, SIZE), []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None] + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state).squeeze(-2))
    return torch.stack(outputs, 1)


def delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """In chunks; the compiler puts the op in its place."""
    return gated_delta_rule(q, k, v, g, beta, scale=1.0)[0]


def forms(names: list[str], of_delta: bool = False) -> dict[str, Form]:
    by_op, by_chunks = (delta, delta) if of_delta else (op, chunks)
    made: dict[str, Callable[[], Form]] = {
        "spikingbrain": lambda: torch.compile(by_op, backend="spikingbrain"),
        "chunks, eager": lambda: by_chunks,
        "chunks, inductor": lambda: torch.compile(by_chunks),
        "loop, eager": lambda: loop,
    }
    return {name: made[name]() for name in names}


def inputs(steps: int, of_delta: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(1, steps, HEADS, SIZE) for _ in range(4))
    tensors = [q / SIZE**0.5, k, v, torch.nn.functional.logsigmoid(g) / 16]
    if of_delta:
        k, g = torch.nn.functional.normalize(k, dim=-1), tensors[3][..., 0].clone()
        tensors = [tensors[0], k, v, g, torch.rand(1, steps, HEADS)]
    return [t.requires_grad_() for t in tensors]


def step(form: Form, tensors: list[Tensor], backward: bool) -> None:
    if backward:
        out = form(*tensors)
        torch.autograd.grad(out, tensors, tensors[2].detach())
    else:
        with torch.no_grad():
            form(*tensors)


def speed(steps: int, backward: bool, rounds: int, of_delta: bool) -> None:
    names = ["spikingbrain", "chunks, eager", "chunks, inductor"]
    if steps <= 1024 and not of_delta:
        names.append("loop, eager")
    candidates, tensors = forms(names, of_delta), inputs(steps, of_delta)
    calls = {n: functools.partial(step, form, tensors, backward) for n, form in candidates.items()}
    times = interleave(calls, rounds, fastest(0.5))
    what = "forward + backward" if backward else "forward"
    print(f"{what}, {steps} steps")
    for name, values in times.items():
        print(f"  {name:18} {values.min() * 1e3:9.1f} ms   x{ratio(values, times['spikingbrain']):6.2f}")


def memory(steps: int) -> None:
    print(f"peak memory of forward + backward, {steps} steps, above inputs and libraries")
    for name in ("spikingbrain", "chunks, eager", "chunks, inductor"):
        command = [sys.executable, __file__, "--peak", name, "--steps", str(steps)]
        settings = {**os.environ, **RETURNED_MEMORY}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
        print(f"  {name:18} {done.stdout.strip()} MB")


def peak(name: str, steps: int) -> None:
    """Prints by how much one step raises the process's peak memory, after a first one, which compiles."""
    form, tensors = forms([name])[name], inputs(steps)
    step(form, tensors, True)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    step(form, tensors, True)
    print(round((_status("VmHWM") - before) / 1024))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--delta", action="store_true")
    parser.add_argument("--peak")
    parser.add_argument("--steps", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        peak(arguments.peak, arguments.steps[-1])
    elif arguments.memory:
        memory(arguments.steps[-1])
    else:
        keep_memory()
        for steps in arguments.steps:
            for backward in (False, True):
                torch._dynamo.reset()
                speed(steps, backward, arguments.rounds, arguments.delta)


if __name__ == "__main__":
    main()
