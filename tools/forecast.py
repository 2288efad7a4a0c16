"""``spikingbrain forecast``: the memory that an artifact will need, and what this machine has, before it is loaded."""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import spikingbrain
from spikingbrain.artifact import Artifact
from spikingbrain.errors import OptionError
from spikingbrain.generate import prefill
from spikingbrain.memory import Forecast, available, gb
from spikingbrain.program import Program
from spikingbrain.tools import named_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="an artifact file, or a model known by name that was compiled before")
    parser.add_argument(
        "--tokens", type=int, help="load it, read so many tokens of each text, and measure what that took"
    )
    parser.add_argument("--json", action="store_true", help="bytes, for programs")
    named_models.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    for name in ("batch", "tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise OptionError(f"--{name} {value}", hint="1 or more")
    artifact = Artifact(_place(args))
    found, there = Forecast.of(artifact, args.batch), available()
    needs: dict[str, Any] = {
        "weights": found.weights,
        "code": found.code,
        "state": dict(found.state),
        "total": found.total,
        "available": there,
    }
    if args.tokens:
        found.check(str(artifact.path))
        needs["workspace"] = measured(spikingbrain.load(artifact), args.batch, args.tokens)
    if args.json:
        print(json.dumps(needs, indent=1))
        return 0
    print(f"{artifact.path}\n{gb(found.weights):>12}  weights, mapped from the file")
    print(f"{gb(found.code):>12}  code")
    texts = f"{args.batch} texts" if args.batch > 1 else "one text"
    print(f"{gb(sum(found.state.values())):>12}  state of {texts}")
    for kind, sizes in _kinds(found).items():
        tensors = f" ({len(sizes)} tensors)" if len(sizes) > 1 else ""
        print(f"{'':14}{gb(sum(sizes)):>10}  {kind}{tensors}")
    if args.tokens:
        workspace = needs["workspace"]
        took = "not known on this target" if workspace is None else gb(workspace)
        print(f"{took:>12}  workspace of reading {args.tokens} tokens of {texts}, measured")
    print(f"{gb(found.total + (needs.get('workspace') or 0)):>12}  in all; available here: ", end="")
    print("not known" if there is None else gb(there))
    return 0


def measured(program: Program, batch: int, tokens: int) -> int | None:
    """Returns the bytes that reading texts of ``tokens`` tokens takes besides weights and state; None where not known."""
    ask = getattr(program.executable, "buffers", None)
    if ask is None:
        return None
    state = program.new_state(batch=batch)
    before, highest_before = ask()
    prefill(program, [[0] * tokens] * batch, state)
    _, highest = ask()
    return int(highest - before) if highest > highest_before else None


def _kinds(found: Forecast) -> dict[str, list[int]]:
    """Returns the sizes of the state's tensors by their names without the numbers of layers."""
    kinds = defaultdict(list)
    for name, size in found.state.items():
        kinds[re.sub(r"\.\d+\b", "", name)].append(size)
    return kinds


def _place(args: argparse.Namespace) -> Path:
    path = Path(args.model)
    if path.is_file():
        named_models.no_shaping(args, "--batch")
        return path
    kept = named_models.cached_artifact(args.model, args.target, named_models.model_options(args))
    if not kept.is_file():
        raise OptionError(
            f"{args.model} was not compiled with these options yet",
            why="what it needs is known of an artifact",
            hint=f"spikingbrain compile {args.model} -o FILE",
        )
    return kept
