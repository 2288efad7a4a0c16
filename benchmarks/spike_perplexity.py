"""Perplexity of SmolLM2 on Wikipedia when its layers spike: adaptive and static thresholds, head and embedding, budgets of steps.

    python benchmarks/spike_perplexity.py [NAME ...]

4 chunks of 1024 tokens, `<|endoftext|>` once in front. Static thresholds are calibrated on the 1024 tokens after these, weights
on the 20 chunks after those, each with `<|endoftext|>` in front.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F

from spikingbrain.models.llama import Llama, smollm2
from spikingbrain.models.llama.tokenizer import tokenizer
from spikingbrain.models.spiking import Budget, spike
from spikingbrain.tools.clean_wiki import wiki_text

CHUNKS, LENGTH, CALIBRATION = 4, 1024, 20

VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "adaptive, head int8": {"head": 8},
    "adaptive, head int4": {"head": 4},
    "adaptive, int4": {"bits": 4},
    "adaptive, int4, head int8": {"bits": 4, "head": 8},
    "adaptive, int4, head int4": {"bits": 4, "head": 4},
    "adaptive, calibrated": {"calibrated": True},
    "adaptive, int4, calibrated": {"bits": 4, "calibrated": True},
    "static": {"threshold": "static"},
    **{f"adaptive, {n} steps": {"budget": Budget(n, remainder="drop")} for n in (3, 4, 5, 6, 7, 8, 10)},
    **{
        f"static, {n} steps": {"threshold": "static", "budget": Budget(n, remainder="drop")}
        for n in (10, 12, 15)
    },
}


def perplexity(model: Llama, ids: list[int]) -> float:
    loss = 0.0
    for chunk in torch.tensor(ids).view(CHUNKS, LENGTH):
        logits, _ = model(chunk[None], model.initial_state(1, capacity=LENGTH))
        loss += F.cross_entropy(logits[0, :-1], chunk[1:], reduction="sum").item()
    return math.exp(loss / (CHUNKS * (LENGTH - 1)))


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    ids = [0, *tokenizer(smollm2.locate()).encode(wiki_text()[:160_000]).ids]
    text, after, *rest = ids[: CHUNKS * LENGTH], *torch.tensor(ids[CHUNKS * LENGTH :]).split(LENGTH)
    for name in names or ["original", *VARIANTS]:
        start, model = time.perf_counter(), smollm2.load()
        if name != "original":
            options = dict(VARIANTS[name])
            seen = [after] if options.get("threshold") == "static" else rest[:CALIBRATION]
            if options.pop("calibrated", False) or len(seen) == 1:
                state = model.initial_state(1, capacity=LENGTH)
                options["calibration"] = [(F.pad(chunk[None, 1:], (1, 0)), state) for chunk in seen]
            spike(model, **options)
        with torch.no_grad():
            found = perplexity(model, text)
        print(f"{name:24} {found:10.2f}   ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
