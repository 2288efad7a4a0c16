"""Writes docs/dialect.md from the docstrings of passes/dialect.py.

python -m spikingbrain.tools.gen_dialect_docs          # rewrites the page
python -m spikingbrain.tools.gen_dialect_docs --check  # exits with 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain.passes import dialect
from spikingbrain.passes.dialect_base import SpikingBrain

PAGE = Path(__file__).parents[1] / "docs" / "dialect.md"


@dataclass(frozen=True)
class OpDoc:
    """The documentation of one op: its name, fields (name, kind), text and example."""

    name: str
    fields: list[tuple[str, str]]
    text: str
    example: str

    def module(self) -> str:
        """Returns the example as a module: a function whose arguments are the op's operands."""
        (operands,) = re.findall(rf'"{self.name}"\(([^)]*)\)', self.example)
        signature = self.example[self.example.rindex(": (") + 3 : self.example.rindex(") ->")]
        names = [name.strip() for name in operands.split(",") if name.strip()]
        types = [" ".join(t.split()) for t in re.split(r",(?![^<]*>)", signature) if t.strip()]
        arguments = ", ".join(f"{n}: {t}" for n, t in dict(zip(names, types, strict=True)).items())
        return f"func.func @example({arguments}) {{\n{self.example}\n  return\n}}\n"


def op_docs() -> list[OpDoc]:
    """Returns every op of the dialect, in the order of its definition."""
    classes: list[Any] = [v for v in vars(dialect).values() if isinstance(v, type) and v.__doc__]
    ops = [c for c in classes if issubclass(c, SpikingBrain.Operation)]
    docs = [_doc(str(op.OPERATION_NAME), op.__doc__, _fields(op)) for op in ops]
    for name, check in dialect.CONTROL_OPS.items():
        docs.append(_doc(name, check.__doc__ or "", []))
    return docs


def _fields(cls: type[Any]) -> list[tuple[str, str]]:
    fields = []
    for name, annotation in inspect.get_annotations(cls).items():
        text = str(annotation)
        kind = "result" if "OpResult[" in text else "operand" if "Value[" in text else "attribute"
        if kind == "attribute":
            kind = f"{annotation.__name__.removesuffix('Attr').lower()} attribute"
        optional = "optional " if text.endswith("| None") else ""
        fields.append((name.rstrip("_"), optional + kind))
    return fields


def _doc(name: str, docstring: str, fields: list[tuple[str, str]]) -> OpDoc:
    lines = inspect.cleandoc(docstring).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("    %"))
    example = "\n".join(line.removeprefix("    ") for line in lines[first:])
    return OpDoc(name, fields, "\n".join(lines[:first]).strip(), example.rstrip())


def page() -> str:
    """Returns the text of docs/dialect.md."""
    title, _, intro = inspect.cleandoc(dialect.__doc__ or "").partition("\n")
    parts = [
        "# The spikingbrain dialect",
        "<!-- written by spikingbrain.tools.gen_dialect_docs; do not edit -->",
    ]
    parts += [_markdown(title), _markdown(intro.strip())]
    for doc in op_docs():
        parts += [f"## {doc.name}", _markdown(doc.text), f"```mlir\n{doc.example}\n```"]
        if doc.fields:
            parts.append(
                "\n".join(["| field | kind |", "|---|---|", *(f"| {n} | {k} |" for n, k in doc.fields)])
            )
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    return text.replace("``", "`")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/dialect.md from the dialect's docstrings.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when out of date")
    args = parser.parse_args(argv)
    text = page()
    if args.check:
        current = PAGE.read_text() if PAGE.is_file() else ""
        return 0 if current == text else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
