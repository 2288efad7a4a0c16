"""What conversion does to SmolLM2: perplexity on Wikipedia with windows, a sink, and layers of linear attention.

    python benchmarks/conversion.py                    # windows
    python benchmarks/conversion.py --fit 25,20        # then these layers become linear, one after the other, and are fitted

4 chunks of 1024 tokens; a sink is the embedding of `<|endoftext|>` in front of each. A layer is fitted alone to its old output
on the text after these, through `torch.compile(backend="spikingbrain")`, on one thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from spikingbrain.models.llama import Llama, smollm2
from spikingbrain.models.llama.tokenizer import tokenizer
from spikingbrain.models.spiking import spike
from spikingbrain.models.spikingbrain import SpikingBrain
from spikingbrain.models.spikingbrain.convert import convert, style_7b
from spikingbrain.models.spikingbrain.fit import attention_pairs, fit_layer
from spikingbrain.tools.clean_wiki import wiki_text

CHUNKS, LENGTH = 4, 1024
BATCH = 512  # tokens of a text that is fitted on


def perplexity(model: Llama | SpikingBrain, ids: list[int]) -> float:
    loss = 0.0
    with torch.no_grad():
        for chunk in torch.tensor(ids[: CHUNKS * LENGTH]).view(CHUNKS, LENGTH):
            logits, _ = model(chunk[None], model.initial_state(1, capacity=LENGTH + 1))
            loss += F.cross_entropy(logits[0, :-1], chunk[1:], reduction="sum").item()
    return math.exp(loss / (CHUNKS * (LENGTH - 1)))


def windows(source: Llama, ids: list[int]) -> None:
    report("as published", source, ids)
    for window in (128, 256, 512):
        for sinks in (0, 1):
            model, _ = convert(source, style_7b(source.config, window, (), sinks), sink_token=0)
            report(f"window {window}, {sinks} sinks", model, ids)
    model, _ = convert(source, style_7b(source.config, 256, (), 1), sink_token=0)
    spike(model)
    report("window 256, 1 sink, spikes", model, ids)


def fitted(source: Llama, ids: list[int], layers: list[int], steps: int, tokens: int) -> None:
    after = ids[CHUNKS * LENGTH :][: tokens // BATCH * BATCH]
    batches = list(torch.tensor(after).view(-1, 2, BATCH))
    linear: list[int] = []
    learned: dict[int, dict[str, torch.Tensor]] = {}
    for layer in layers:
        linear.append(layer)
        model, _ = convert(source, style_7b(source.config, 256, linear, 1), sink_token=0)
        for done, weights in learned.items():
            model.get_submodule(f"blocks.{done}.attention").load_state_dict(weights, assign=True)
        report(f"layer {layer} linear, not fitted", model, ids)
        pairs = list(attention_pairs(source, layer, batches))
        torch.compiler.reset()
        start = time.perf_counter()
        losses = fit_layer(
            model,
            layer,
            pairs,
            steps,
            wrap=partial(torch.compile, backend="spikingbrain"),
            progress=progress(steps),
        )
        seconds = time.perf_counter() - start
        learned[layer] = model.get_submodule(f"blocks.{layer}.attention").state_dict()
        print(
            f"  fitted on {len(after)} tokens, {steps} steps, {seconds:.0f} s: error {losses[0]:.3f} -> "
            f"{sum(losses[-10:]) / 10:.3f}"
        )
        report(f"layers {', '.join(map(str, linear))} linear, fitted", model, ids)


def progress(steps: int) -> Callable[[int, float], None]:
    def tell(step: int, loss: float) -> None:
        if step % 25 == 0 or step == steps - 1:
            print(f"  step {step}: {loss:.3f}", flush=True)

    return tell


def report(what: str, model: Llama | SpikingBrain, ids: list[int]) -> None:
    start = time.perf_counter()
    found = perplexity(model, ids)
    print(f"{what:40} {found:8.2f}   ({time.perf_counter() - start:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", type=lambda text: [int(n) for n in text.split(",")], help="layers to fit")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=22_528)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = smollm2.load()
    ids = tokenizer(smollm2.locate()).encode(wiki_text()[:200_000]).ids
    if args.fit:
        fitted(source, ids, args.fit, args.steps, args.tokens)
    else:
        windows(source, ids)


if __name__ == "__main__":
    main()
