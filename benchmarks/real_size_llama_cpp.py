"""SpikingBrain models of real size beside llama.cpp on models of the same sizes: decode and prefill, one thread, taking turns.

    python benchmarks/real_size_llama_cpp.py 0.55b 1b --llama PYTHON --folder DIR   # keeps the models it makes

llama.cpp runs a Llama, which has full attention, and a QRWKV, whose attention is linear and gated like ours (it has some more
weights: a gate of the output and mixes of neighbouring tokens). Weights are random: they prove speed, not text. Both sides hold
theirs in as many bits: int8 with a scale for 128 inputs beside Q8_0 (a scale for 32), int4 beside Q4_0; table and head in 8 bits.
Ours counts spikes exactly, outliers included. Time is that of the thread; each round also reads memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
from llama_cpp_peer import LlamaCpp, write_llama, write_qrwkv
from random_models import CONFIGS, bytes_per_token, export, random_model

import spikingbrain

PAIRS = {"Llama Q8_0": 8, "Llama Q4_0": 4, "QRWKV Q4_0": 4}
WRITERS = {"Llama": write_llama, "QRWKV": write_qrwkv}
PROMPT, DEPTH, TIMES = 512, 64, 4


def ours(folder: Path, size: str, bits: int) -> spikingbrain.Program:
    """Returns the program of a model, compiled if its file is not there."""
    path = folder / f"{size}-int{bits}.sbrain"
    if not path.is_file():
        print(f"compile {path.name}", flush=True)
        export(random_model(CONFIGS[size], bits), path)
    return spikingbrain.load(path)


def theirs(folder: Path, size: str, kind: str) -> Path:
    """Returns the file of a model for llama.cpp, written if it is not there."""
    architecture, bits = kind.split()
    path = folder / f"{size}-{architecture}-{bits}.gguf"
    if not path.is_file():
        print(f"write {path.name}", flush=True)
        partial = path.with_suffix(".partial")
        WRITERS[architecture](partial, CONFIGS[size], bits)
        partial.rename(path)
    return path


def timed(call: Any) -> float:
    start = thread_time()
    call()
    return thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="+", choices=[n for n in CONFIGS if "full" not in n])
    parser.add_argument("--llama", metavar="PYTHON", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tokens, data = np.random.default_rng(0).integers(0, 30_000, (1, PROMPT)), np.ones(1 << 26, np.int64)
    for size in args.sizes:
        programs = {kind: ours(args.folder, size, bits) for kind, bits in PAIRS.items()}
        files = {kind: theirs(args.folder, size, kind) for kind in PAIRS}
        peer = LlamaCpp(args.llama, files, 1024)
        for kind, program in programs.items():
            state = program.new_state()
            program.prefill(tokens[:, :DEPTH], state=state)
            decode, mine, its = lambda p=program, s=state: p.decode(tokens[:, :1], state=s), [], []
            read, mine_512, its_512 = [], [], []
            for round_ in range(args.rounds + 1):
                for _ in range(TIMES):
                    mine.append(timed(decode))
                its += peer.decode(kind, DEPTH, TIMES)
                read.append(timed(data.sum))
                if round_ % 3 == 0:
                    fresh = program.new_state()
                    mine_512.append(timed(lambda p=program, s=fresh: p.prefill(tokens, state=s)))
                    its_512.append(peer.prefill(kind, tokens[0].tolist()))
            ms, other = (float(np.median(times[TIMES:])) * 1e3 for times in (mine, its))
            bandwidth = data.nbytes / float(np.median(read[1:])) / 1e9
            weights, _ = bytes_per_token(program, CONFIGS[size])
            prefill, other_prefill = (float(np.median(t[1:])) for t in (mine_512, its_512))
            print(
                f"{size} int{PAIRS[kind]} / {kind}: decode {ms:.1f} / {other:.1f} ms, {other / ms:.2f}x"
                f" ({weights / 1e6:.0f} / {files[kind].stat().st_size / 1e6:.0f} MB of weights;"
                f" {weights / ms / 1e6:.1f} of {bandwidth:.1f} GB/s read, {weights / ms / 1e6 / bandwidth:.0%});"
                f" prefill of {PROMPT} {prefill:.2f} / {other_prefill:.2f} s, {other_prefill / prefill:.2f}x",
                flush=True,
            )
        peer.close()


if __name__ == "__main__":
    main()
