"""Inference time of the model zoo on one thread: torch eager against the backends of `torch.compile`.

    python benchmarks/zoo.py                                  # all models, inductor and spikingbrain
    python benchmarks/zoo.py --models llama,bert --rounds 40 --backends inductor,spikingbrain

Each model has a process of its own. Every round calls each candidate once; a ratio is the median over rounds of one
round's ratio. `compile` is the first call with empty caches, less the time of eager; before it, each backend compiles
a trivial function, so that imports and the probing of the C++ compiler count against none of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from timing import interleave, once
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # before this folder, whose zoo.py this is
from tolerances import assert_close
from zoo import SIZES, ZOO

Row = dict[str, Any]


def tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def check(result: Row, actual: Any, expected: Any) -> None:
    """Notes the largest difference, and whether it is one that rounding explains."""
    result["difference"] = 0.0
    for got, wanted in zip(tensors(actual), tensors(expected), strict=True):
        result["difference"] = max(result["difference"], (got.double() - wanted.double()).abs().max().item())
        try:
            assert_close(got, wanted, "output")
        except AssertionError as error:
            result["error"] = f"wrong result: {error}"


def measure(name: str, size: str, backends: list[str], rounds: int) -> Row:
    torch.set_num_threads(1)
    model, inputs = ZOO[name].build(size), ZOO[name].inputs(size, 0)
    expected = model(**inputs)
    eager = min(once(lambda: model(**inputs)) for _ in range(3))
    candidates: dict[str, Callable[[], object]] = {"eager": lambda: model(**inputs)}
    results: dict[str, Row] = {"eager": {}}
    for backend in backends:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(4))
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, backend=backend)
        result = results[backend] = {}
        try:
            start = time.perf_counter()
            actual = compiled(**inputs)
            result["compile"] = max(0.0, time.perf_counter() - start - eager)
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
            continue
        result["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
        check(result, actual, expected)
        candidates[backend] = lambda compiled=compiled: compiled(**inputs)

    for candidate, values in interleave(candidates, rounds).items():
        results[candidate]["milliseconds"] = float(np.median(values)) * 1e3
        results[candidate]["rounds"] = values.tolist()
    return {
        "model": name,
        "category": ZOO[name].category,
        "parameters": sum(p.numel() for p in model.parameters()),
        "results": results,
    }


def in_process(name: str, size: str, backends: list[str], rounds: int, limit: float) -> Row:
    """Returns what `measure` finds in a process with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "XDG_CACHE_HOME": f"{folder}/xdg",
            "SPIKINGBRAIN_CACHE": f"{folder}/spikingbrain",
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
            "OMP_NUM_THREADS": "1",
        }
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--models", name, "--size", size, "--rounds", str(rounds)]
        command += ["--backends", ",".join(backends), "--child", str(out)]
        try:
            done = subprocess.run(
                command, env=os.environ | caches, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"model": name, "error": f"not done after {limit:.0f} s"}
        if not out.exists():
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            return {"model": name, "error": last[0]}
        return json.loads(out.read_text())


def ratio(row: Row, slow: str, fast: str) -> float | None:
    """Returns how many times longer ``slow`` takes than ``fast``; None unless both ran and were right."""
    results = [row.get("results", {}).get(which, {"error": "not run"}) for which in (slow, fast)]
    if any("error" in result for result in results):
        return None
    return timing.ratio(results[0]["rounds"], results[1]["rounds"])


def pairs(backends: list[str]) -> list[tuple[str, str]]:
    """Returns (slow, fast): each backend against eager, and the last against the others."""
    return [("eager", b) for b in backends] + [(b, backends[-1]) for b in backends[:-1]]


def header(backends: list[str]) -> str:
    columns = "".join(f"{f'{b} ms':>17}{'compile s':>11}{'max diff':>10}" for b in backends)
    return f"{'model':20.20}{'params':>8}{'eager ms':>10}{columns}  " + "  ".join(
        f"{a}/{b}" for a, b in pairs(backends)
    )


def line(row: Row, backends: list[str]) -> str:
    if "error" in row:
        return f"{row['model']:20.20} {row['error']}"
    results = row["results"]
    text = f"{row['model']:20.20}{row['parameters'] / 1e6:7.1f}M{results['eager']['milliseconds']:10.2f}"
    for backend in backends:
        result = results[backend]
        if "milliseconds" in result:
            text += f"{result['milliseconds']:17.2f}{result['compile']:11.1f}{result['difference']:10.1e}"
        else:
            text += f"{'failed':>17}{'':21}"
    text += "  "
    for slow, fast in pairs(backends):
        value = ratio(row, slow, fast)
        text += f"{'-' if value is None else f'{value:.2f}x':>{len(slow) + len(fast) + 1}}  "
    errors = [
        f"\n  {backend}: {results[backend]['error']}" for backend in backends if "error" in results[backend]
    ]
    return text + "".join(errors)


def summary(rows: list[Row], backends: list[str]) -> str:
    """Geometric mean and worst model of each pair, over the models where both were right."""
    lines = []
    for slow, fast in pairs(backends):
        known = {row["model"]: value for row in rows if (value := ratio(row, slow, fast)) is not None}
        if known:
            mean = math.exp(sum(map(math.log, known.values())) / len(known))
            worst = min(known, key=known.__getitem__)
            won = sum(value >= 1 for value in known.values())
            lines.append(
                f"{slow} over {fast}: geometric mean {mean:.2f}x, worst {known[worst]:.2f}x ({worst}),"
                f" at least as fast on {won} of {len(known)}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(ZOO), help="names with commas between; all without it")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--backends", default="inductor,spikingbrain", help="the last is compared with the others"
    )
    parser.add_argument("--limit", type=float, default=900, help="seconds for one model")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names, backends = args.models.split(","), args.backends.split(",")
    if unknown := set(names) - set(ZOO):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(ZOO)}")
    if unknown := set(backends) - set(torch._dynamo.list_backends(())):
        parser.error(f"torch.compile knows no backend {', '.join(sorted(unknown))}")
    if args.child:
        with torch.no_grad():
            args.child.write_text(json.dumps(measure(names[0], args.size, backends, args.rounds)))
        return
    print(header(backends))
    rows = []
    for name in names:
        rows.append(in_process(name, args.size, backends, args.rounds, args.limit))
        print(line(rows[-1], backends), flush=True)
    print(f"\n{summary(rows, backends)}")
    if args.json:
        setting = {"torch": torch.__version__, "size": args.size, "backends": backends, "models": rows}
        args.json.write_text(json.dumps(setting, indent=1))


if __name__ == "__main__":
    main()
