"""SpikingBrain-1B over long texts: time per token and memory against the tokens before it.

    python benchmarks/long_context.py --folder DIR             # keeps the artifacts there, made at the first run
    python benchmarks/long_context.py --folder DIR --draw FILE # .png or .svg, needs matplotlib
    python benchmarks/long_context.py --folder DIR --llama PYTHON   # and llama.cpp, see llama_cpp_peer.py

Weights are random integers: speed and memory are those of the real model, the text is not. A position is reached by telling the
state that so many tokens are behind it; the window's cache is then full, as it would be. The twin has full attention in every
layer, the same weights otherwise, and is compiled by the same compiler; beyond the contexts that fit this machine its points are
a line through the measured ones. llama.cpp runs a Llama of the same sizes in Q4_0; the default cache is what was fastest. Time
is that of the thread; all candidates take turns in each round, and so does reading memory.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
from llama_cpp_peer import CACHE_BYTES, LlamaCpp, write_llama
from random_models import CONFIGS, bytes_per_token, export, random_model

import spikingbrain

POSITIONS = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)
TWIN, CAPACITY = (
    (1_000, 4_000, 8_000, 16_000, 32_000),
    32_768,
)  # positions of full attention; tokens its cache holds
BLOCK = 512  # tokens of one call of prefill
OURS = {"int8": ("1b", 8), "int4": ("1b", 4)}
LLAMA = (1_000, 4_000, 16_000, 64_000, 128_000, 256_000)
READ = np.ones(1 << 26, np.int64)

Times = dict[tuple[str, int], list[float]]


def program(folder: Path, name: str, bits: int, capacity: int | None = None) -> spikingbrain.Program:
    """Returns a model's program, compiled if its file is not there."""
    path = folder / f"{name}-int{bits}{f'-{capacity}' if capacity else ''}.sbrain"
    if not path.is_file():
        print(f"compile {path.name}", flush=True)
        export(random_model(CONFIGS[name], bits), path, BLOCK, capacity)
    return spikingbrain.load(path)


def at(made: spikingbrain.Program, position: int) -> Any:
    """Returns a state that has seen ``position`` tokens."""
    state = made.new_state()
    content = state.snapshot()
    content["position"][:] = position
    state.restore(content)
    return state


def timed(call: Any) -> float:
    start = thread_time()
    call()
    return thread_time() - start


def decode_times(candidates: dict[tuple[str, int], tuple[Any, Any]], rounds: int) -> Times:
    """Returns seconds per token of each candidate, and of reading READ under ("read", 0)."""
    token = np.array([[17]])
    times: Times = {key: [] for key in [*candidates, ("read", 0)]}
    for round_ in range(rounds + 1):
        for key, (made, state) in candidates.items():
            seconds = timed(lambda p=made, s=state: p.decode(token, state=s))
            if round_:
                times[key].append(seconds)
        if round_:
            times["read", 0].append(timed(READ.sum))
    return times


def llama_cpp_rows(python: str, folder: Path, cache: str, rounds: int, int4: Any) -> list[dict[str, Any]]:
    """Returns points of llama.cpp, each measured in turns with a token of ours."""
    file = folder / "1b-Llama-Q4_0.gguf"
    if not file.is_file():
        write_llama(file, CONFIGS["1b"], "Q4_0")
    peer, rows = LlamaCpp(python, {"Q4_0": file}, max(LLAMA) + 1024, cache), []
    for position in LLAMA:
        state, theirs, ours = at(int4, position), [], []
        for _ in range(rounds + 1):
            theirs += peer.decode("Q4_0", position)
            ours.append(timed(lambda s=state: int4.decode(np.array([[17]]), state=s)))
        ms, mine = (float(np.median(times[1:])) * 1e3 for times in (theirs, ours))
        per_token = CACHE_BYTES[cache] * 2 * CONFIGS["1b"].key_heads * CONFIGS["1b"].head_size * 16
        held = file.stat().st_size + per_token * position
        rows.append({"name": "llama.cpp", "position": position, "ms": ms, "gb": held / 1e9})
        print(
            f"llama.cpp Q4_0, {cache} cache {position:9,} tokens before: {ms:7.1f} ms, int4 beside it {mine:.1f} ms:"
            f" {ms / mine:.2f}x; {held / 1e9:.2f} GB",
            flush=True,
        )
    peer.close()
    return rows


def draw(file: Path, rows: list[dict[str, Any]], floors: dict[str, float], line: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    longest = np.geomspace(POSITIONS[0], POSITIONS[-1], 50)
    colours = {"int8": "tab:blue", "int4": "tab:green", "twin": "tab:red", "llama.cpp": "tab:gray"}
    labels = {"twin": "full attention, int4", "llama.cpp": "llama.cpp, Llama in Q4_0"}
    for name, colour in colours.items():
        mine = [r for r in rows if r["name"] == name]
        if not mine:
            continue
        label = labels.get(name, f"SpikingBrain, {name}")
        x = [r["position"] for r in mine]
        left.plot(x, [r["ms"] for r in mine], "o", color=colour, label=label)
        right.plot(x, [r["gb"] for r in mine], "o", color=colour, label=label)
        if name != "twin":
            left.plot(x, [r["ms"] for r in mine], color=colour, alpha=0.5)
            if name in floors:
                left.axhline(
                    floors[name], color=colour, ls=":", lw=1, label=f"{name}: bytes read / read bandwidth"
                )
            right.plot(x, [r["gb"] for r in mine], color=colour, alpha=0.5)
    for axis, fit in ((left, line["ms"]), (right, line["gb"])):
        axis.plot(
            longest, np.polyval(fit, longest), "--", color=colours["twin"], label="line through its points"
        )
        axis.set(xscale="log", yscale="log", xlabel="tokens before")
        axis.legend(fontsize=8)
    left.set(ylabel="ms per token", title="decode, one thread")
    right.set(ylabel="GB of weights and state", title="memory")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle("1.2 billion random weights: speed and memory only")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--cache", choices=list(CACHE_BYTES), default="f16", help="of llama.cpp")
    args = parser.parse_args()
    if args.draw and importlib.util.find_spec("matplotlib") is None:
        parser.error("--draw needs matplotlib: pip install matplotlib")
    args.folder.mkdir(parents=True, exist_ok=True)
    ours = {name: program(args.folder, *spec) for name, spec in OURS.items()}
    candidates = {(n, at_): (p, at(p, at_)) for n, p in ours.items() for at_ in POSITIONS}
    times = decode_times(candidates, args.rounds)
    candidates.clear()
    sizes = {name: bytes_per_token(p, CONFIGS["1b"]) for name, p in ours.items()}
    made = program(args.folder, "1b-full", 4, CAPACITY)
    weights, cache = bytes_per_token(made, CONFIGS["1b-full"])
    for position in TWIN:
        found = decode_times({("twin", position): (made, at(made, position))}, args.rounds)
        times["twin", position] = found["twin", position]
        times["read", 0] += found["read", 0]
        sizes[f"twin {position}"] = weights, cache * position // CAPACITY
    bandwidth = READ.nbytes / float(np.median(times.pop(("read", 0))))
    print(f"one thread reads {bandwidth / 1e9:.1f} GB/s")
    rows = []
    for (name, position), seconds in times.items():
        weights, state = sizes[f"twin {position}" if name == "twin" else name]
        ms, floor = float(np.median(seconds)) * 1e3, (weights + state) / bandwidth * 1e3
        rows.append({"name": name, "position": position, "ms": ms, "gb": (weights + state) / 1e9})
        print(
            f"{name:5} {position:9,} tokens before: {ms:7.1f} ms ({1e3 / ms:5.1f} tokens/s), reads {weights / 1e6:.0f} MB"
            f" of weights and {state / 1e6:.0f} of state: {floor:.1f} ms at that speed, {floor / ms:.0%}"
        )
    twin = [r for r in rows if r["name"] == "twin"]
    x = [r["position"] for r in twin]
    line = {key: np.polyfit(x, [r[key] for r in twin], 1) for key in ("ms", "gb")}
    for position in POSITIONS:
        if position not in x:
            ms, gb = (float(np.polyval(line[key], position)) for key in ("ms", "gb"))
            ratio = ms / next(r["ms"] for r in rows if (r["name"], r["position"]) == ("int4", position))
            print(
                f"twin  {position:9,} tokens before: {ms:7.1f} ms by the line, {ratio:.1f}x of int4; {gb:.1f} GB"
            )
    if args.llama:
        rows += llama_cpp_rows(args.llama, args.folder, args.cache, args.rounds, ours["int4"])
    if args.draw:
        floors = {name: sum(sizes[name]) / bandwidth * 1e3 for name in ours}
        draw(args.draw, rows, floors, line)
        print(f"drawn: {args.draw}")


if __name__ == "__main__":
    main()
