"""Trains a small network with a ReLU on the text of the documentation, and shows what an order of channels lets hardware skip.

    python benchmarks/spike_order.py [--hidden 1024] [--steps 1500]

The next character from the 16 before it. Shares are of weight blocks of the layer behind the ReLU (`models/spiking/blocks.py`),
before and after `order_channels`; beside them the share of silent channels, which weights stored channel by channel skip.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikingbrain.models import spiking

WIDTH = 16  # characters that are read
BATCH = 256


class Reader(nn.Module):
    def __init__(self, characters: int, hidden: int, squared: bool) -> None:
        super().__init__()
        self.squared = squared
        self.table = nn.Embedding(characters, 32)
        self.up, self.down = nn.Linear(32 * WIDTH, hidden), nn.Linear(hidden, 256)
        self.head = nn.Linear(256, characters)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(self.table(x).flatten(-2)))
        return self.head(self.down(hidden.square() if self.squared else hidden))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1500)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    text = "".join(p.read_text() for p in sorted(Path(__file__).parents[1].glob("docs/*.md")))
    known = sorted(set(text))
    ids = torch.tensor([known.index(c) for c in text])
    windows = ids.unfold(0, WIDTH + 1, 1)
    for squared in (False, True):
        torch.manual_seed(0)
        model = Reader(len(known), settings.hidden, squared)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(settings.steps):
            batch = windows[torch.randint(len(windows) * 9 // 10, (BATCH,))]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
            loss.backward()
            optimizer.step()
        held_out = windows[len(windows) * 9 // 10 :][torch.randperm(len(windows) // 10)[:4000], :-1]
        spiking.spike(model, group_size=None)
        silent = spiking.measure_silence(model, [held_out])["down"]
        found = spiking.order_channels(model, [held_out], {"down": "up"})["down"]
        shares = ", ".join(f"{n} bytes {found.before[n]:.2%} -> {found.after[n]:.2%}" for n in found.before)
        name = "squared ReLU" if squared else "ReLU"
        print(f"{name}: loss {loss.item():.2f}, {silent:.1%} silent; blocks skipped: {shares}", flush=True)


if __name__ == "__main__":
    main()
