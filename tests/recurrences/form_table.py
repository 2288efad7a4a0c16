"""What became of each form: ``found.toml``, which ``run.py`` writes and ``tools/gen_recurrence_docs.py`` reads."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from forms import FORMS, Form

TABLE = Path(__file__).parent / "found.toml"
HEADER = """\
# What torch.compile makes of each way of writing a recurrence.
# Written by `python tests/recurrences/run.py --update`; review the change.
"""


@dataclass(frozen=True)
class Found:
    """What became of one form: an outcome (see ``written.py``), or "wrong" or "error", which are never expected.

    ``any_length``: whether ``export`` makes a program of any length of it, which ``test_forms_export.py`` tries.
    """

    family: str
    writing: str
    negative: bool
    any_length: bool
    found: str
    reason: str

    @staticmethod
    def of(form: Form, found: str, reason: str) -> Found:
        any_length = form.dynamic and not form.export
        return Found(
            form.family, form.writing, form.negative, any_length, found, " ".join(reason.split())[:300]
        )


def read() -> dict[str, Found]:
    listed = tomllib.loads(TABLE.read_text()) if TABLE.is_file() else {}
    return {name: Found(**values) for name, values in listed.items()}


def write(table: dict[str, Found]) -> None:
    """Writes the table in the order of the forms, without those that are no more."""
    parts = [HEADER]
    for name in (n for n in FORMS if n in table):
        values = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in asdict(table[name]).items()]
        parts.append("\n".join([f"[{name}]", *values]) + "\n")
    TABLE.write_text("\n".join(parts))
