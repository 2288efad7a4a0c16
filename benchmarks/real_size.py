"""SpikingBrain models of real size: memory of their export, prefill and decode against what one thread reads from memory.

    python benchmarks/real_size.py 0.55b 1b --bits 8 4
    python benchmarks/real_size.py 7b --bits 4          # 9 GB of memory, a file of 5 GB

Weights are random integers (`random_models`): speed and memory are those of the real model, the text is not. Time is that of the
thread; after each token an array is read, by the same thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from pathlib import Path
from time import process_time, thread_time
from typing import Any

import numpy as np
from random_models import CONFIGS, bytes_per_token, export, random_model

import spikingbrain

PROMPT, TOKENS = 128, 16


def make(name: str, bits: int, path: str, answer: Any) -> None:
    """Exports a model, in a process of its own, and answers with its peak memory and the seconds that it computed."""
    model = random_model(CONFIGS[name], bits)
    start, before = process_time(), _peak()
    export(model, Path(path))
    answer.send((before, _peak(), process_time() - start))


def _peak() -> int:
    """Returns the largest resident size of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def timed(call: Any) -> float:
    start = thread_time()
    call()
    return thread_time() - start


def measure(program: spikingbrain.Program) -> tuple[float, float, float]:
    """Returns tokens/s of prefill, seconds per token of decode, and bytes/s of reading; medians."""
    tokens = np.random.default_rng(0).integers(0, 30_000, (1, PROMPT))
    data, state = np.ones(1 << 26, np.int64), program.new_state()
    program.prefill(tokens, state=program.new_state())  # pages come from the file
    prefill = timed(lambda: program.prefill(tokens, state=state))
    pairs = [
        (timed(lambda i=i: program.decode(tokens[:, i : i + 1], state=state)), timed(data.sum))
        for i in range(TOKENS)
    ]
    decode, read = np.median(pairs, axis=0)
    return PROMPT / prefill, float(decode), data.nbytes / float(read)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=[n for n in CONFIGS if "full" not in n])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    args = parser.parse_args()
    for name in args.names:
        for bits in args.bits:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "model.sbrain")
                mine, its = multiprocessing.Pipe()
                process = multiprocessing.get_context("spawn").Process(
                    target=make, args=(name, bits, path, its)
                )
                process.start()
                its.close()
                held, peak, seconds = mine.recv()
                process.join()
                program = spikingbrain.load(path)
                size = os.path.getsize(path)
                prefill, decode, bandwidth = measure(program)
                weights, _ = bytes_per_token(program, CONFIGS[name])
                print(
                    f"{name} int{bits}: export peaks at {peak / 1e9:.2f} GB (model {held / 1e9:.2f}, file {size / 1e9:.2f}),"
                    f" {seconds:.0f} s of processor time; prefill {prefill:.0f} tokens/s; decode {1 / decode:.1f} tokens/s,"
                    f" {weights / 1e9:.2f} GB of weights in {decode * 1e3:.1f} ms: {weights / decode / 1e9:.1f}"
                    f" of {bandwidth / 1e9:.1f} GB/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
