"""Writes docs/ops.md from what the conformance run expects (tests/conformance).

python -m spikingbrain.tools.gen_conformance_docs          # rewrites the page
python -m spikingbrain.tools.gen_conformance_docs --check  # exits with 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE, SOURCE = ROOT / "docs" / "ops.md", ROOT / "tests" / "conformance"
MODES = ("f32", "bf16", "f16", "f64", "i64", "i32", "i16", "i8", "u8", "bool", "grad")

INTRO = """\
# Which ops are compiled

<!-- written by spikingbrain.tools.gen_conformance_docs; do not edit -->

`torch.compile(model, backend="spikingbrain")` gives right results with every op: what it does not compile, torch runs. This table
says which is which. It comes from torch's own database of ops, each tried with several arguments and compared with eager.

* **●** compiled
* **◐** in part: some of the ops that it consists of, or some arguments, are left to torch
* **○** left to torch
* **✗** not supported by torch itself
* blank: torch does not have it for this type, or it was not tried

*grad* is the backward in f32. The table was made with `library=False`; by default, matrix products, convolutions, attention,
triangular systems, sorting and the like are left to torch's kernels even where they could be compiled. Numbers refer to the
reasons below the table.

Some things hold for all ops. Tensors without elements, complex numbers, sparse and quantised tensors are left to torch, as are
random numbers (so `torch.manual_seed` holds) and shapes that depend on values. Compiled code takes denormal numbers for zero.
The sign of a zero and the conversion to integer types of numbers that do not fit them may differ from eager.
On a CPU, fused ops in bfloat16 round once, at their end, as inductor's do by default (`emulate_precision_casts=False`). A
conversion, `x.bfloat16()` or autocast's, rounds wherever it stands, which inductor's does not; float16 rounds after each op.
`torch._dynamo`'s graph breaks come before all this; `spikingbrain.explain` shows what becomes of a model.
"""
HIGHER_ORDER = """\
## Higher-order ops

Ops that take functions: loops, branches, and regions that are called. They come from torch's database of them, and go through
`torch.compile` with `fullgraph=True`. `invoke_subgraph` (`nested_compile_region`) and checkpointing dissolve in the graph around.
"""
PREFIX = "higher_order."


def page() -> str:
    """Returns the text of docs/ops.md."""
    listed = tomllib.loads((SOURCE / "expected.toml").read_text())
    tried = dict(_split(line) for line in (SOURCE / "tried.txt").read_text().splitlines())
    notes: dict[str, int] = {}
    rows: dict[bool, list[str]] = {False: [], True: []}
    counts = Counter[str]()
    for op, modes in sorted(tried.items(), key=lambda item: (item[0].startswith(PREFIX), item[0].lower())):
        cells, numbers = [], []
        for mode in MODES:
            if mode not in modes:
                cells.append("")
                continue
            status, _, reason = listed.get(op, {}).get(mode, "compiled").partition(": ")
            counts[status] += 1
            cells.append({"compiled": "●", "partly": "◐", "eager": "○", "unsupported": "✗"}[status])
            for text in filter(None, map(_plain, reason.split("; "))):
                number = notes.setdefault(text, len(notes) + 1)
                if number not in numbers:
                    numbers.append(number)
        row = (
            f"| `{op.removeprefix(PREFIX)}` | {' | '.join(cells)} | {', '.join(map(str, sorted(numbers)))} |"
        )
        rows[op.startswith(PREFIX)].append(row)
    total = sum(counts.values())
    summary = (
        f"{len(tried)} ops, {total} combinations of op and type: {counts['compiled']} compiled, {counts['partly']} in part, "
        f"{counts['eager']} left to torch, {counts['unsupported']} not supported by torch."
    )
    reasons = "\n".join(f"{number}. {text}" for text, number in notes.items())
    parts = [INTRO.strip(), summary, _table(rows[False]), HIGHER_ORDER.strip(), _table(rows[True])]
    return "\n\n".join([*parts, "## Reasons", reasons]) + "\n"


def _table(rows: list[str]) -> str:
    head = [f"| op | {' | '.join(MODES)} | why |", "|---|" + ":-:|" * len(MODES) + "---|"]
    return "\n".join([*head, *rows])


def _split(line: str) -> tuple[str, list[str]]:
    op, *modes = line.split()
    return op, modes


def _plain(reason: str) -> str:
    """Returns a reason without the names of the ops it is about, and without what differs from case to case."""
    about = r"^(?!torch does not|torch's|eager: )[\w:, .]+?: (?=\w)"
    text = re.sub(about, "", reason, count=1)
    text = re.sub(r"(failed to legalize operation '[\w.]+').*", r"\1", text)
    return text.replace("|", "\\|").strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/ops.md from the conformance run's expectations.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when out of date")
    args = parser.parse_args(argv)
    text = page()
    if args.check:
        return 0 if PAGE.is_file() and PAGE.read_text() == text else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
