"""Time to the first token of SpikingBrain-1B against the length of the prompt, beside llama.cpp's Llama of the same sizes.

    python benchmarks/first_token.py --folder DIR                     # keeps the artifacts there, made at the first run
    python benchmarks/first_token.py --folder DIR --llama PYTHON      # see llama_cpp_peer.py
    python benchmarks/first_token.py --folder DIR --draw FILE         # .png or .svg, needs matplotlib

Weights are random integers: speed is that of the real model, the text is not. Prompts are fed in blocks, so that memory does not
grow with them; one pass over the longest prompt gives the time of all. Time is that of the thread.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
from llama_cpp_peer import LlamaCpp, write_llama
from long_context import BLOCK, OURS, program, timed
from random_models import CONFIGS

import spikingbrain

PROMPTS = (512, 1024, 2048, 4096, 8192, 16384)
LLAMA = (512, 2048, 8192)  # llama.cpp's time grows as the square of the prompt

Seconds = dict[int, float]


def first_tokens(made: spikingbrain.Program) -> Seconds:
    """Returns seconds from an empty state to the logits after each length of prompt."""
    tokens = np.random.default_rng(0).integers(0, 100_000, (1, max(PROMPTS)))
    made.prefill(tokens[:, :BLOCK], state=made.new_state())  # pages come from the file
    state, spent, found = made.new_state(), 0.0, {}
    for start in range(0, max(PROMPTS), BLOCK):
        spent += timed(lambda i=start: made.prefill(tokens[:, i : i + BLOCK], state=state))
        if start + BLOCK in PROMPTS:
            found[start + BLOCK] = spent
    return found


def llama_cpp(python: str, folder: Path) -> Seconds:
    file = folder / "1b-Llama-Q4_0.gguf"
    if not file.is_file():
        write_llama(file, CONFIGS["1b"], "Q4_0")
    peer = LlamaCpp(python, {"Q4_0": file}, max(LLAMA) + BLOCK)
    peer.prefill("Q4_0", [17] * BLOCK)
    found = {length: peer.prefill("Q4_0", [17] * length) for length in LLAMA}
    peer.close()
    return found


def draw(file: Path, rows: dict[str, Seconds]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.6), layout="constrained")
    for name, found in rows.items():
        axis.plot(list(found), list(found.values()), "o-", label=name)
    axis.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="seconds")
    axis.set_xticks(PROMPTS, [str(length) for length in PROMPTS])
    axis.minorticks_off()
    axis.set_title(
        f"first token of 1.2 billion random weights, in blocks of {BLOCK}, one thread", fontsize=10
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--llama", metavar="PYTHON")
    args = parser.parse_args()
    if args.draw and importlib.util.find_spec("matplotlib") is None:
        parser.error("--draw needs matplotlib: pip install matplotlib")
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, spec in OURS.items():
        rows[f"SpikingBrain, {name}"] = first_tokens(program(args.folder, *spec))
        _tell(f"SpikingBrain, {name}", rows[f"SpikingBrain, {name}"])
    if args.llama:
        rows["llama.cpp, Llama in Q4_0"] = llama_cpp(args.llama, args.folder)
        _tell("llama.cpp, Llama in Q4_0", rows["llama.cpp, Llama in Q4_0"])
    if args.draw:
        draw(args.draw, rows)
        print(f"drawn: {args.draw}")


def _tell(name: str, found: Seconds) -> None:
    print(f"{name}: " + ", ".join(f"{n:,} tokens {s:.1f} s" for n, s in found.items()), flush=True)


if __name__ == "__main__":
    main()
