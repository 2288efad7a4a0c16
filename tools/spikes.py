"""``spikingbrain spikes``: how a model fires on a text; statistics, event files and golden vectors."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikingbrain.errors import OptionError
from spikingbrain.passes.spike_forms import form
from spikingbrain.tools import named_models
from spikingbrain.tools.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spikingbrain.models.spiking.blocks import Skipped
    from spikingbrain.models.spiking.observe import LayerCounts
    from spikingbrain.models.spiking.statistics import Statistics

CODINGS = ("binary", "ternary", "bitwise", "bitwise_ternary", "twos_complement")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model known by name, such as smollm2")
    parser.add_argument("text", help="the text to read, or @FILE")
    parser.add_argument(
        "--k", type=float, default=3.0, help="firing constant: spikes of a channel of mean size"
    )
    parser.add_argument(
        "--group-size", default="auto", help="inputs that share a weight scale: N, none or auto"
    )
    parser.add_argument("--bits", type=int, default=8, choices=[8, 4], help="bits of a weight")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="layers to replace (*, ?)"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="layers to leave as they are"
    )
    parser.add_argument("--tokens", type=int, default=256, help="tokens to read at the most")
    parser.add_argument(
        "--threshold",
        default="adaptive",
        choices=["adaptive", "static"],
        help="static: fixed by --calibration",
    )
    parser.add_argument("--calibration", metavar="TEXT", help="text, or @FILE, that fixes static thresholds")
    parser.add_argument("--steps", type=int, help="virtual steps that there are for a count")
    parser.add_argument(
        "--remainder", default="exact", choices=["exact", "drop"], help="what more steps would hold"
    )
    parser.add_argument(
        "--coding", default="bitwise_ternary", choices=CODINGS, help="of files, and of --steps"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts")
    parser.add_argument("--events", type=Path, metavar="FILE", help="write every spike (.csv or .npz)")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="write test vectors of every layer")
    parser.add_argument("--golden-tokens", type=int, default=4, help="tokens of the test vectors")
    parser.add_argument("--quiet", action="store_true", help="no progress")


@dataclass
class Findings:
    """What a model fired.

    Attributes:
        model: the model's name.
        text: what it read.
        about: how it was made to spike, in one sentence.
        inputs: the counts at each input.
        parts: the statistics of each input, in the same order.
        total: those of all.
        blocks: weight blocks skipped, empty for a single token.
        definitions: name and formula of what is reported.
    """

    model: str
    text: str
    about: str
    inputs: list[LayerCounts]
    parts: list[Statistics]
    total: Statistics
    blocks: list[Skipped]
    definitions: dict[str, str]

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table of all inputs: a head, a row for each, and the total."""
        head = ("input", "spikes", "unary", "silent", "≤7", ">16", ">127", "max", "T", "spars.T", "spars.3")
        named = [(_name(p), p) for p in self.parts]
        rows = [(*_row(name, part), form(part.share(0, 0))) for name, part in named]
        return [(*head, "Mops", "µJ", "form"), *rows, (*_row("total", self.total), "")]


def run(args: argparse.Namespace) -> int:
    from spikingbrain.models.spiking import SpikingError

    _check(args)
    try:
        return _run(args)
    except SpikingError as error:
        raise OptionError(str(error)) from error


def _run(args: argparse.Namespace) -> int:
    from tokenizers import Tokenizer

    from spikingbrain.models.spiking import Budget, spike
    from spikingbrain.models.spiking.events import write_events
    from spikingbrain.models.spiking.files import check_new_folder, new_file
    from spikingbrain.models.spiking.golden import write_golden

    if args.golden:
        check_new_folder(args.golden)
    progress = Progress(args.quiet)
    text, calibration = _text(args.text), None
    budget = None if args.steps is None else Budget(args.steps, args.coding, args.remainder)
    loaded = named_models.load(args.model, named_models.ModelOptions(capacity=args.tokens), progress)
    if loaded.tokenizer is None:
        raise OptionError(
            f"{args.model} holds no tokenizer", hint="a checkpoint with tokenizer.json beside it"
        )
    words = Tokenizer.from_str(loaded.tokenizer)
    tokens = _tokens(words, text, args.tokens)
    model, state = loaded.model, loaded.entries["prefill"].args[1]
    if args.calibration is not None:
        calibration = [(_tokens(words, _text(args.calibration), args.tokens), state)]
    report = spike(
        model,
        args.k,
        _group_size(args.group_size),
        args.bits,
        calibration,
        only=args.only,
        skip=args.skip,
        threshold=args.threshold,
        budget=budget,
    )
    progress(f"read {tokens.shape[1]} tokens")
    shown = words.decode(tokens[0].tolist())
    found = examine(model, [(tokens, state)], args.model, shown, str(report).replace("\n ", ";"))
    print(report)
    print_table(found)
    if args.json:
        with new_file(args.json) as file:
            file.write_text(json.dumps(to_json(found), indent=1) + "\n")
    if args.html:
        from spikingbrain.tools.spike_page import page

        with new_file(args.html) as file:
            file.write_text(page(found), encoding="utf-8")
    if args.events:
        progress(f"write {args.events}")
        print(f"{write_events(args.events, found.inputs, args.coding)} events in {args.events}")
    if args.golden:
        progress(f"write {args.golden}")
        layers = write_golden(model, [(tokens[:, : args.golden_tokens], state)], args.golden, args.coding)
        print(f"test vectors of {layers} layers in {args.golden}")
    return 0


def examine(model: nn.Module, calls: list[Any], name: str, text: str, about: str) -> Findings:
    """Runs a spiking model and returns what it fired."""
    from spikingbrain.models.spiking.blocks import skipped_in_all
    from spikingbrain.models.spiking.observe import observe_counts
    from spikingbrain.models.spiking.statistics import DEFINITIONS, statistics, total

    inputs = observe_counts(model, calls)
    parts = [statistics(seen) for seen in inputs]
    blocks = skipped_in_all(inputs) if len(inputs[0].counts) > 1 else []
    return Findings(name, text, about, inputs, parts, total(parts), blocks, DEFINITIONS)


def print_table(found: Findings) -> None:
    """Prints all inputs and what the columns mean."""
    rows, whole = found.rows(), found.total
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells))
    print("\nspikes: per value in bitwise_ternary; unary: in binary and ternary; Mops, µJ: for one token")
    print(
        "form: in which a CPU computes layers of such a share of silent channels, once it is told (measure_silence)"
    )
    print("spikes per value by coding (without a sign: of |s|)")
    for coding in CODINGS:
        print(f"  {coding:16} {whole.spikes_per_value(coding):8.3f}   up to {whole.steps[coding]} steps")
    print("sparsity")
    for name, value in whole.sparsity.items():
        print(f"  {name:16} {value:8.2%}   {found.definitions[name]}")
    energy = whole.energy
    print(f"energy of a token: {found.definitions['energy']}")
    for name, label in (("spikes", "spikes"), ("int8", "INT8 MACs"), ("fp16", "FP16 MACs")):
        less = "" if name == "spikes" else f"   {1 - energy['spikes'] / energy[name]:.1%} less with spikes"
        print(f"  {label:16} {energy[name] / 1e6:8.2f} µJ{less}")
    if whole.beyond:
        print(f"beyond the budget: {whole.beyond / whole.values:.3%} of values, {whole.beyond_size} in all")
    if found.blocks:
        print(
            "weight blocks that one token need not read (neighbouring one-byte weights of a row, all silent)"
        )
        for b in found.blocks:
            print(
                f"  {b.size:4} bytes {b.as_is / b.blocks:12.3%}   ordered by activity {b.ordered / b.blocks:.3%}"
            )
        print(f"  stored input by input, a channel's weights together: {whole.share(0, 0):.3%}")


def to_json(found: Findings) -> dict[str, Any]:
    """Returns all numbers."""
    return {
        "model": found.model,
        "about": found.about,
        "definitions": found.definitions,
        "total": found.total.to_json(),
        "weight_blocks": [
            {"bytes": b.size, "skipped": b.as_is / b.blocks, "skipped_ordered": b.ordered / b.blocks}
            for b in found.blocks
        ],
        "inputs": [{**part.to_json(), "form": form(part.share(0, 0))} for part in found.parts],
    }


def _row(name: str, p: Statistics) -> tuple[str, ...]:
    return (
        name,
        f"{p.spikes_per_value():.3f}",
        f"{p.spikes_per_value('ternary'):.2f}",
        f"{p.share(0, 0):.1%}",
        f"{p.share(0, 7):.1%}",
        f"{p.share(17):.2%}",
        f"{p.share(128):.3%}",
        f"{p.largest}",
        f"{p.steps['bitwise_ternary']}",
        f"{p.sparsity['needed_steps']:.1%}",
        f"{p.sparsity['window']:.1%}",
        f"{p.operations / p.tokens / 1e6:.2f}",
        f"{p.energy['spikes'] / 1e6:.3f}",
    )


def _name(part: Statistics) -> str:
    first, *others = part.layers
    return " +".join([first, *(name.rpartition(".")[2] for name in others)])


def _tokens(words: Any, text: str, limit: int) -> Tensor:
    import torch

    ids = words.encode(text, add_special_tokens=False).ids[:limit]
    if not ids:
        raise OptionError("a text without tokens", hint="some words")
    return torch.tensor([ids])


def _text(given: str) -> str:
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"no text in {given[1:]!r}", why=str(error)) from error


def _group_size(given: str) -> int | str | None:
    if given in ("auto", "none"):
        return None if given == "none" else "auto"
    if not given.isdecimal():
        raise OptionError(f"--group-size {given}", hint="a number, none or auto")
    return int(given)


def _check(args: argparse.Namespace) -> None:
    """Raises OptionError for what would only fail after the model has run."""
    for name in ("tokens", "golden_tokens"):
        if getattr(args, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} {getattr(args, name)}", hint="1 or more")
    if not math.isfinite(args.k) or args.k <= 0:
        raise OptionError(f"--k {args.k}", hint="a positive number, such as 3")
    if args.events and args.events.suffix not in (".csv", ".npz"):
        raise OptionError(f"--events {args.events}", hint="a file .csv or .npz")
    if (args.threshold == "static") != (args.calibration is not None):
        raise OptionError("--threshold static and --calibration TEXT belong together")
    for file in (args.json, args.html, args.events):
        if file and not file.parent.is_dir():
            raise OptionError(f"no folder {file.parent}", hint="make it first")
