"""Figures of the SmolLM2 road, on one thread, against torch eager and inductor in the same process.

    python benchmarks/smollm2.py            # speed, overhead, memory
    python benchmarks/smollm2.py --compile  # also the cold and the cached compile (clears nothing: uses its own cache)

Speed is interleaved: every round runs each candidate once; ratios are medians over rounds of one round's ratio.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from timing import Times, interleave, mean, once, ratio

import spikingbrain
from spikingbrain.tools.named_models import ModelOptions, compile_named

WINDOW, SINKS, PROMPT = 256, 1, 512
_MEMORY = """
import sys, time
start = time.perf_counter()
import numpy as np, spikingbrain
program = spikingbrain.load(sys.argv[1])
state = program.new_state()
logits = program.prefill(np.arange(100, 106)[None], state=state)
first = time.perf_counter() - start
for _ in range(16):
    logits = program.decode(logits[:, -1].argmax(-1)[:, None].astype(np.int64), state=state)
if len(sys.argv) > 2:
    program.prefill(np.arange(1000, 1512)[None], state=state)
# not ru_maxrss: it counts what the parent had before exec
status = dict(line.split(':') for line in open('/proc/self/status'))
print(first, int(status['VmHWM'].split()[0]) * 1024)
"""


def report(title: str, seconds: Times, tokens: int) -> None:
    print(f"\n{title}")
    for name, values in seconds.items():
        over = ratio(values, seconds["spikingbrain"])
        print(
            f"  {name:14} median {np.median(values) * 1e3:8.2f} ms  best {values.min() * 1e3:8.2f} ms "
            f" {tokens / np.median(values):8.1f} tokens/s   time over ours {over:5.2f}x"
        )


def read_bandwidth() -> float:
    """Returns bytes per second of one thread summing an array far beyond the caches."""
    data = np.ones(1 << 26, np.float64)
    best = min(once(data.sum) for _ in range(5))
    return data.nbytes / best


def speed(path: Path, rounds: int) -> None:
    from spikingbrain.models.llama import smollm2

    model = smollm2.load(window=WINDOW, sinks=SINKS).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    program = spikingbrain.load(path)
    prompt = torch.arange(1000, 1000 + PROMPT)[None]
    token = torch.tensor([[1234]])
    with torch.inference_mode():
        inductor = torch.compile(model, fullgraph=True, dynamic=False)
        _, warm = model(prompt, model.initial_state(1), True)
        ours_state = program.new_state()
        program.prefill(prompt.numpy(), state=ours_state)
        decode = interleave(
            {
                "eager": lambda: model(token, warm, True),
                "inductor": lambda: inductor(token, warm, True),
                "spikingbrain": lambda: program.decode(token.numpy(), state=ours_state),
            },
            rounds,
        )
        report("decode of one token", decode, 1)
        bandwidth = read_bandwidth()
        floor = weights / bandwidth
        print(
            f"  floor: {weights / 1e6:.0f} MB of weights at {bandwidth / 1e9:.1f} GB/s (one thread) = {floor * 1e3:.1f} ms;"
            f" ours is {np.median(decode['spikingbrain']) / floor:.2f}x of it"
        )

        def fresh() -> object:
            return program.prefill(prompt.numpy(), state=program.new_state())

        prefill = interleave(
            {
                "eager": lambda: model(prompt, model.initial_state(1), True),
                "inductor": lambda: inductor(prompt, model.initial_state(1), True),
                "spikingbrain": fresh,
            },
            max(3, rounds // 4),
        )
        report(f"prefill of {PROMPT} tokens", prefill, PROMPT)


def overhead() -> None:
    class Add(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with tempfile.TemporaryDirectory() as folder:
        x = torch.ones(4)
        spikingbrain.export(Add(), {"main": spikingbrain.Entry((x,))}, Path(folder) / "add.sbrain")
        program = spikingbrain.load(Path(folder) / "add.sbrain")
        array = x.numpy()
        program.call("main", array)
        found = interleave({"": lambda: program.call("main", array)}, 20, mean(0.02))[""] * 1e6
    print(f"\ncall of a trivial graph: median {np.median(found):.1f} us, best {found.min():.1f} us")


def memory(path: Path) -> None:
    weights = 134_515_008 * 4
    for title, extra in (("decode", []), ("decode and a prompt of 512", ["long"])):
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(path), *extra], capture_output=True, text=True, check=True
        )
        first, peak = map(float, done.stdout.split())
        print(
            f"\n{title}: start of Python's imports to first token {first:.2f} s;"
            f" peak memory {peak / 1e6:.0f} MB = {peak / weights:.2f}x of the weights"
        )


def compile_time(folder: Path) -> None:
    def seconds(*arguments: str) -> float:
        command = [sys.executable, "-m", "spikingbrain.tools.cli", *arguments]
        return once(lambda: subprocess.run(command, check=True, capture_output=True))

    compile_ = (
        "compile",
        "smollm2",
        "--window",
        str(WINDOW),
        "--sinks",
        str(SINKS),
        "-o",
        str(folder / "timed.sbrain"),
    )
    print("whole processes:")
    print(f"  compile, cold              {seconds(*compile_):6.2f} s")
    print(f"  compile, from the cache    {seconds(*compile_):6.2f} s")
    run = ("run", str(folder / "timed.sbrain"), "Hi", "--tokens", "1", "--quiet")
    print(f"  run to the first token, weights checked for the first time {seconds(*run):6.2f} s")
    print(f"  run to the first token                                     {seconds(*run):6.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPIKINGBRAIN_CACHE"] = str(Path(folder) / "cache")
        if args.compile:
            compile_time(Path(folder))
        path = Path(folder) / "smollm2.sbrain"
        compile_named("smollm2", path, "cpu", ModelOptions(WINDOW, SINKS), lambda _: None)
        overhead()
        memory(path)
        speed(path, args.rounds)


if __name__ == "__main__":
    main()
