"""Differential fuzzing: random models, compiled against eager.

    python tests/fuzz/run.py --count 500 --seed 0 --backend spikingbrain --out build/fuzz

Every model is run in a process of its own, without and with gradients. Ends with one line of counts, and with status 1 if any
model was wrong, raised an error or ended its process; those are written to the folder ``--out`` as scripts.

What spikingbrain leaves to eager agrees by nature: ``--options '{"strict": true}'`` makes an error of that, and with
``'{"library": false}'`` more is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "TORCHINDUCTOR_COMPILE_THREADS", "1"
)  # no pool of compilers in processes that live for one model

import compare
import generate
import isolate
import script
import torch
import torch._dynamo.aot_compile
from compare import Outcome

FAILURES = ("wrong", "abort", "error")
KINDS = ("passed", "unstable", *FAILURES, "invalid")
MODES = (False, True)  # training?


def prepare(options: argparse.Namespace) -> compare.Compiler:
    """To be called before the first process is forked."""
    torch.set_num_threads(1)
    return compare.compiler(options.backend, options.options)


def main() -> None:
    options = _options()
    prepare(options)

    def one(task: int | Path) -> tuple[Outcome, bool]:
        """Returns the worst outcome, and whether it is that of training."""
        torch.set_num_threads(1)
        try:
            function, inputs, modes, own = _subject(task, options.nodes)
        except generate.Invalid as reason:
            return Outcome("invalid", str(reason)), False
        compiler = compare.compiler(options.backend, options.options or own)
        outcomes = []
        for training in modes:
            torch._dynamo.reset()
            outcomes.append((compare.check(function, inputs, compiler, training), training))
            if outcomes[-1][0].kind in (*FAILURES, "invalid"):
                return outcomes[-1]
        return max(outcomes, key=lambda each: KINDS.index(each[0].kind))

    tasks = options.files or range(options.seed, options.seed + options.count)
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    started = time.monotonic()
    limited = _until(tasks, started + 60 * options.minutes)
    for task, result in isolate.run_all(one, limited, options.workers, options.timeout):
        outcome, training = result if isinstance(result, tuple) else (result, None)
        name = task.stem if isinstance(task, Path) else str(task)
        found[outcome.kind].append(name)
        if outcome.kind != "passed" or options.verbose:
            mode = {None: "", True: "training: ", False: "inference: "}[training]
            print(f"{name}: {outcome.kind}: {mode}{outcome.detail}", flush=True)
        if outcome.kind in FAILURES and options.out and isinstance(task, int):
            _save(options, task, outcome, bool(training))
    print(_summary(found, time.monotonic() - started))
    sys.exit(any(found[kind] for kind in FAILURES))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common(parser)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--count", type=int, default=100, help="models")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="starts no further model after that"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="folder for failing models")
    parser.add_argument(
        "--files",
        type=Path,
        nargs="+",
        help="runs these saved models, with their options, and no random ones",
    )
    parser.add_argument("--verbose", action="store_true", help="a line for models that pass, too")
    return parser.parse_args()


def common(parser: argparse.ArgumentParser) -> None:
    """What the minimiser must be told as well."""
    parser.add_argument(
        "--backend",
        default="spikingbrain",
        help="a registered name, or module:function (default: spikingbrain)",
    )
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        metavar="JSON",
        help="of the backend: '{\"library\": false}'",
    )
    parser.add_argument(
        "--nodes", type=_nodes, default=(5, 15), metavar="LOW..HIGH", help="operators in a model"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one model")


def _nodes(text: str) -> tuple[int, int]:
    low, _, high = text.partition("..")
    return int(low), int(high or low)


def _subject(
    task: int | Path, limits: tuple[int, int]
) -> tuple[compare.Function, list[torch.Tensor], tuple[bool, ...], dict[str, Any]]:
    if isinstance(task, Path):
        module = script.load(task)
        return module.model, module.inputs(), (module.TRAINING,), module.OPTIONS
    model = generate.make(task, limits)
    return model.graph, model.inputs, MODES, {}


def _until(tasks: Iterator[int | Path], end: float) -> Iterator[int | Path]:
    for task in tasks:
        if time.monotonic() > end:
            return
        yield task


def _save(options: argparse.Namespace, seed: int, outcome: Outcome, training: bool) -> None:
    def write(seed: int) -> None:
        model = generate.make(seed, options.nodes)
        title = f"Seed {seed}: {outcome.kind}: {outcome.detail}"
        written = script.text(model.graph, model.inputs, title, options.backend, options.options, training)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"seed_{seed}.py").write_text(written)

    if (outcome := isolate.run_one(write, seed, options.timeout)) is not None:
        print(f"{seed}: not saved: {outcome.detail}")


def _summary(found: dict[str, list[str]], seconds: float) -> str:
    counts = Counter({kind: len(names) for kind, names in found.items()})
    parts = [
        f"{counts[kind]} {kind}" + (f" ({' '.join(found[kind])})" if found[kind] and kind != "passed" else "")
        for kind in KINDS
    ]
    return f"{counts.total()} models in {seconds:.0f} s: " + ", ".join(parts)


if __name__ == "__main__":
    main()
