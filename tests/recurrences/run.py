"""Runs all forms through ``torch.compile`` and holds what becomes of them to ``forms.py``; keeps it in ``found.toml``.

python tests/recurrences/run.py                          # exits with 1 where a form is wrong or not as expected
python tests/recurrences/run.py --update                 # writes found.toml too, from which docs/recurrences.md is made
python tests/recurrences/run.py --forms 'gla_*,lif_*' --update
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Iterator

import torch
from form_check import check, outcome
from form_table import Found, read, write
from forms import FORMS, Form


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The table of written recurrences.")
    parser.add_argument("--forms", default="*", help="names, with wildcards, separated by commas")
    parser.add_argument("--update", action="store_true", help="write what was found")
    args = parser.parse_args(argv)
    patterns = args.forms.split(",")
    chosen = [f for n, f in FORMS.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    table, bad = read(), 0
    for form in chosen:
        start = time.perf_counter()
        complaints = list(run(form, table))
        bad += bool(complaints)
        print(f"{form.name:<32} {time.perf_counter() - start:6.1f} s  {table[form.name].found}", flush=True)
        print(*(f"    {c}" for c in complaints), sep="\n", end="\n" if complaints else "", flush=True)
        torch._dynamo.reset()
        if args.update:
            write(table)
    print(f"{len(chosen)} forms, {bad} wrong or not as expected")
    return 1 if bad else 0


def run(form: Form, table: dict[str, Found]) -> Iterator[str]:
    """Puts what became of a form into the table; yields what is not as it should be."""
    try:
        recurrences = check(form)
    except AssertionError as error:
        table[form.name] = Found.of(form, "wrong", str(error))
        yield f"wrong: {table[form.name].reason}"
        return
    except Exception as error:
        table[form.name] = Found.of(form, "error", str(error))
        yield f"error: {table[form.name].reason}"
        return
    found = outcome(recurrences)
    table[form.name] = Found.of(form, found, "; ".join(dict.fromkeys(r["reason"] for r in recurrences)))
    if found != form.expected:
        yield f"{found} instead of {form.expected}: {table[form.name].reason}"


if __name__ == "__main__":
    sys.exit(main())
