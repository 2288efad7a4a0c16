"""Writes the table in docs/recurrences.md from what the run of all written forms found (tests/recurrences).

python -m spikingbrain.tools.gen_recurrence_docs          # rewrites the table, between its two marks
python -m spikingbrain.tools.gen_recurrence_docs --check  # exits with 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE, SOURCE = ROOT / "docs" / "recurrences.md", ROOT / "tests" / "recurrences" / "found.toml"
BEGIN = "<!-- the table below is written by spikingbrain.tools.gen_recurrence_docs; do not edit -->\n"
END = "<!-- end of the table -->\n"


def table() -> str:
    """Returns the table of forms, and below it that of what only resembles a recurrence."""
    listed: dict[str, dict[str, Any]] = tomllib.loads(SOURCE.read_text())
    forms = [f for f in listed.values() if not f["negative"]]
    others = [f for f in listed.values() if f["negative"]]
    counts = Counter(_outcome(f) for f in forms)
    summary = f"{len(forms)} forms: " + ", ".join(f"{n} {name}" for name, n in counts.most_common()) + "."
    lines = [summary, "", "| recurrence | written as | becomes | any length |", "| --- | --- | --- | :-: |"]
    family = ""
    for form in sorted(forms, key=lambda f: [g["family"] for g in forms].index(f["family"])):
        told, family = ("" if form["family"] == family else form["family"]), form["family"]
        note = f": {_plain(form['reason'])}" if form["found"] == "unrolled" and form["reason"] else ""
        lines.append(
            f"| {told} | {_plain(form['writing'])} | {_outcome(form)}{note} | {'●' if form['any_length'] else ''} |"
        )
    lines += ["", f"{len(others)} loops and forms that resemble one and are none:", ""]
    lines += ["| resembles | but | becomes | reason |", "| --- | --- | --- | --- |"]
    for form in others:
        cells = (form["family"], form["writing"], _outcome(form), form["reason"])
        lines.append(f"| {' | '.join(map(_plain, cells))} |")
    return "\n".join(lines) + "\n"


def _outcome(form: dict[str, Any]) -> str:
    words = {"pointwise": "one loop, elementwise", "loop": "one loop", "unrolled": "left as written"}
    return " + ".join(words.get(part, f"`{part}`") for part in form["found"].split(" + "))


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """Returns the text of the page with a fresh table."""
    before, mark, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{PAGE} has lost the marks around its table: {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + "\n" + table() + "\n" + END + after


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the table in docs/recurrences.md from the forms' outcomes."
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when out of date")
    args = parser.parse_args(argv)
    text = page()
    if args.check:
        return 0 if PAGE.read_text() == text else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
