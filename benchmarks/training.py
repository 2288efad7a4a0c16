"""One training step (forward, backward, AdamW) of a small Transformer on one thread: eager against torch.compile.

    python benchmarks/training.py                  # eager, inductor, spikingbrain
    python benchmarks/training.py --profile        # also where the time goes, op by op

All candidates start from the same weights and see the same tokens; every round takes one step of each. A ratio is the median
over rounds of one round's ratio.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timing import interleave, ratio
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH, BATCH = 4000, 256, 4, 4, 128, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class LanguageModel(nn.Module):
    """Returns the loss of predicting each next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def stepper(model: nn.Module, backend: str, tokens: Tensor) -> Callable[[], float]:
    twin = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    loss_of = twin if backend == "eager" else torch.compile(twin, backend=backend)

    def step() -> float:
        loss = loss_of(tokens)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", default="inductor,spikingbrain")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokens = LanguageModel(), torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    steps: dict[str, Callable[[], float]] = {}
    for backend in ["eager", *args.backends.split(",")]:
        start = time.perf_counter()
        steps[backend] = stepper(model, backend, tokens)
        loss = steps[backend]()
        print(f"{backend}: first step {time.perf_counter() - start:.1f} s, loss {loss:.5f}")
    times = interleave(steps, args.rounds)
    for backend, values in times.items():
        over = ratio(times["eager"], values)
        print(
            f"{backend:14} {1e3 * np.median(values):8.1f} ms a step, {over:.2f}x eager, "
            f"loss in step {args.rounds + 3} {steps[backend]():.5f}"
        )
    for backend in steps if args.profile else []:
        with profile(activities=[ProfilerActivity.CPU]) as measured:
            steps[backend]()
        print(backend, measured.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
