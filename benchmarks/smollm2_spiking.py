"""SmolLM2 in integers: decode and prefill of the spiking model against its float32 form and llama.cpp, one thread, interleaved.

    python benchmarks/smollm2_spiking.py
    python benchmarks/smollm2_spiking.py --llama PYTHON   # a Python that has llama-cpp-python, built for this machine

Full attention over a cache of 1024 tokens in all of them. llama.cpp runs the same weights, quantised by itself to Q8_0 and Q4_0
from the package's file (Q4_1). *exactness* compares with the same model of random weights, none of whose counts leaves int8.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from timing import once, ratio

import spikingbrain
from spikingbrain.frontend.capture import Entry
from spikingbrain.models.llama import Llama, smollm2
from spikingbrain.models.spiking import spike

CAPACITY, PROMPT, DEPTH = 1024, 512, 64
_LLAMA = """
import ctypes, json, os, sys, time
import llama_cpp
source, folder, capacity = sys.argv[1:]
for name, kind in (("Q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0), ("Q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = kind, True, 1
    assert llama_cpp.llama_model_quantize(source.encode(), f"{folder}/{name}.gguf".encode(), ctypes.byref(params)) == 0
models = {
    name: llama_cpp.Llama(
        f"{folder}/{name}.gguf", n_ctx=int(capacity), n_threads=1, n_threads_batch=1, n_batch=512, verbose=False
    )
    for name in ("Q8_0", "Q4_0")
}
sizes = {name: os.path.getsize(f"{folder}/{name}.gguf") for name in models}
print(json.dumps(sizes), flush=True)
for line in sys.stdin:
    name, what, tokens = json.loads(line)
    model = models[name]
    model.reset()
    model.eval(tokens)
    if what == "decode":
        start = time.perf_counter()
        for token in tokens[:16]:
            model.eval([token])
    else:
        model.reset()
        start = time.perf_counter()
        model.eval(tokens)
    print(time.perf_counter() - start, flush=True)
"""


class LlamaCpp:
    """llama.cpp in a process of its own, told what to time."""

    def __init__(self, python: str, folder: Path):
        command = [python, "-c", _LLAMA, str(smollm2.locate()), str(folder), str(CAPACITY)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdin and self.process.stdout
        self.sizes: dict[str, int] = json.loads(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line[:1] in "{0123456789":
                return line
        raise SystemExit("llama.cpp ended; does that Python have llama-cpp-python?")

    def seconds(self, name: str, what: str, tokens: list[int]) -> float:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([name, what, tokens]) + "\n")
        self.process.stdin.flush()
        return float(self._answer())


def export(model: Llama, path: Path) -> spikingbrain.Program:
    state, length = model.initial_state(1, CAPACITY), torch.export.Dim("T", min=1, max=CAPACITY)
    some, one = torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    entries = {
        "prefill": Entry((some, state), {"last_only": True}, {"tokens_BT": {1: length}}),
        "decode": Entry((one, state), {"last_only": True}),
    }
    spikingbrain.export(model, entries, path, state="state")
    return spikingbrain.load(path)


def programs(folder: Path) -> dict[str, tuple[spikingbrain.Program, int]]:
    """Returns each form of the model with the bytes of its file."""
    torch.manual_seed(0)
    made = {}
    for name, bits, head in (
        ("float32", 0, 0),
        ("spikes, int8", 8, 0),
        ("spikes, int8, head too", 8, 8),
        ("spikes, int4", 4, 0),
        ("spikes, int4, head int8", 4, 8),
        ("spikes, int4, head too", 4, 4),
        ("random weights, int8", 8, 0),
    ):
        model = smollm2.load()
        if name.startswith("random"):
            model = Llama(model.config)
        if bits:
            spike(model, bits=bits, head=head)
        print(f"compile {name}", flush=True)
        path = folder / f"{len(made)}.sbrain"
        made[name] = export(model.eval(), path), path.stat().st_size
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--llama", metavar="PYTHON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SPIKINGBRAIN_CACHE"] = str(folder / "cache")
        ours = programs(folder)
        peer = LlamaCpp(args.llama, folder) if args.llama else None
        tokens = np.random.default_rng(0).integers(1000, 40_000, PROMPT)
        size = {n: bytes_ for n, (_, bytes_) in ours.items()} | (peer.sizes if peer else {})
        for what, count in (("decode", 16), ("prefill", PROMPT)):
            seconds: dict[str, list[float]] = {n: [] for n in size}
            for round_ in range(args.rounds + 1):
                for n in size:
                    if n in ours:
                        program = ours[n][0]
                        state = program.new_state()
                        if what == "decode":
                            program.prefill(tokens[None, :DEPTH], state=state)
                            found = once(
                                lambda p=program, s=state: [
                                    p.decode(t[None, None], state=s) for t in tokens[:16]
                                ]
                            )
                        else:
                            found = once(lambda p=program, s=state: p.prefill(tokens[None], state=s))
                    else:
                        assert peer
                        given = tokens[:DEPTH] if what == "decode" else tokens
                        found = peer.seconds(n, what, given.tolist())
                    if round_:
                        seconds[n].append(found)
            print(f"\n{what}")
            base = seconds["spikes, int8"]
            for n, found in seconds.items():
                over = ratio(found, base)
                speed = count / np.median(found)
                print(
                    f"  {n:24} {speed:8.1f} tokens/s   int8 spikes are {over:5.2f}x   file {size[n] / 1e6:.0f} MB"
                )
            exact = ratio(base, seconds["random weights, int8"]) - 1
            print(f"  exactness costs {exact:.1%}")


if __name__ == "__main__":
    main()
