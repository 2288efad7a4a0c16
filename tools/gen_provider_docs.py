"""Writes the tables of providers in docs/maca.md from `backend_maca.providers`.

python -m spikingbrain.tools.gen_provider_docs          # rewrites the tables, between their two marks
python -m spikingbrain.tools.gen_provider_docs --check  # exits with 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spikingbrain.backend_maca import providers

PAGE = Path(__file__).resolve().parents[1] / "docs" / "maca.md"
BEGIN = "<!-- the tables below are written by spikingbrain.tools.gen_provider_docs; do not edit -->\n"
END = "<!-- end of the tables -->\n"
_PLACES = {"in a launch plan": providers.PLAN, "inside PyTorch": providers.TORCH}


def tables() -> str:
    """Returns the table of providers, and that of those who are not offered."""
    lines = ["| op | providers, the default first | takes | proof |", "| --- | --- | --- | --- |"]
    for place, table in _PLACES.items():
        for op, row in table.items():
            for provider in row:
                told = f"`{op}` {place}" if provider is row[0] else ""
                package = f" (package `{provider.package}`)" if provider.package else ""
                lines.append(f"| {told} | `{provider.name}`{package} | {provider.takes} | {provider.proof} |")
    lines += ["", "| not offered | why |", "| --- | --- |"]
    lines += [f"| {name} | {why} |" for name, why in providers.NOT_OFFERED.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """Returns the text of the page with fresh tables."""
    before, mark, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{PAGE} has lost the marks around its tables: {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + "\n" + tables() + "\n" + END + after


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of providers in docs/maca.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when out of date")
    args = parser.parse_args(argv)
    text = page()
    if args.check:
        return 0 if PAGE.read_text() == text else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
