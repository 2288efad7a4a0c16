"""Reads a beginning once and tells it to different ends, each from a fork of the same state. Needs no torch.

Run it with::

    spikingbrain compile smollm2 -o smollm2.sbrain --window 256 --sinks 1
    python examples/two_endings.py smollm2.sbrain "Once upon a time, a fox found a"
"""

from __future__ import annotations

import sys

import numpy as np

import spikingbrain
from spikingbrain.generate import generate_ids
from spikingbrain.sampling import Sampling
from spikingbrain.tokens import Tokens


def main(path: str, beginning: str) -> None:
    program = spikingbrain.load(path)
    tokens = Tokens(program)
    *read, last = tokens.encode(beginning)
    state = program.new_state()
    program.prefill(np.array([read]), state=state)
    stop = program.manifest["generation"]["stop"]
    for seed in (1, 2):
        print(f"--- {seed}: {beginning}", end="")
        sampling = Sampling(temperature=0.8, top_p=0.95, seed=seed)
        ids = generate_ids(program, [last], 40, sampling, stop, state.fork())
        for piece in tokens.stream(ids):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
