"""What is tried, and what is expected of it: ``tried.txt`` and ``expected.toml``.

``tried.txt`` has a line for each op: its name and the modes (dtypes, gradient) that were tried. What is in it and not in
``expected.toml`` is compiled. "wrong" and "error" are never expected; "unsupported" is what torch itself refuses to compile.
"""

from __future__ import annotations

import fnmatch
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
EXPECTED, TRIED = HERE / "expected.toml", HERE / "tried.txt"
MODES = ("f32", "grad", "f64", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool", "f32+dynamic")
ACCEPTABLE = ("eager", "partly", "unsupported")

Outcomes = Mapping[tuple[str, str], tuple[str, str]]  # (op, mode) -> (status, reason)

# Not a function of their arguments: memory that nobody has written.
UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")

HEADER = """\
# What is not compiled, and why: op -> mode -> "eager" (right, by torch), "partly", or "unsupported" (by torch), with the reason.
# Written by `python tests/conformance/run.py --update`; review the change.
"""


def jobs(patterns: list[str], modes: list[str]) -> list[tuple[str, str]]:
    """Returns what to try: the given modes of the given ops, or, without modes, what was tried before."""
    before = tried()
    if not modes:
        return [(op, m) for op, found in before.items() if _matches(op, patterns) for m in found]
    import harness

    return [
        (op, mode)
        for op, info in harness.database().items()
        if _matches(op, patterns) and op not in UNDEFINED
        for mode in modes
        if harness.supports(info, mode.partition("+")[0])
    ]


def _matches(op: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(op, p) for p in patterns)


def tried() -> dict[str, list[str]]:
    if not TRIED.is_file():
        return {}
    lines = [line.split() for line in TRIED.read_text().splitlines()]
    return {op: modes for op, *modes in lines}


def expected() -> dict[tuple[str, str], tuple[str, str]]:
    """Returns the expected status and reason of all that was tried."""
    listed = tomllib.loads(EXPECTED.read_text()) if EXPECTED.is_file() else {}
    found = {}
    for op, modes in tried().items():
        for mode in modes:
            status, _, reason = listed.get(op, {}).get(mode, "compiled").partition(": ")
            found[op, mode] = (status, reason)
    return found


def complaints(done: Outcomes) -> list[str]:
    """Returns a line for each outcome that is not as expected."""
    wanted = expected()
    lines = []
    for (op, mode), (status, reason) in sorted(done.items()):
        want = wanted.get((op, mode), ("compiled", ""))[0]
        if status == "skipped" or status == want:
            continue
        advice = (
            "; if that is meant to be, run run.py --update" if status in ("compiled", *ACCEPTABLE) else ""
        )
        lines.append(f"{op} {mode}: {status} instead of {want}: {reason}{advice}")
    return lines


def update(done: Outcomes) -> int:
    """Writes what was found; returns 1 where something is wrong, which is left as it was."""
    wanted = expected()
    bad = [
        f"{op} {mode}: {s}: {why}" for (op, mode), (s, why) in sorted(done.items()) if s in ("wrong", "error")
    ]
    for job, (status, reason) in done.items():
        if status in ("compiled", *ACCEPTABLE):
            wanted[job] = (status, reason)
        elif status == "skipped":
            wanted.pop(job, None)
    ops = sorted({op for op, _ in wanted})
    lines, parts = [], [HEADER]
    for op in ops:
        modes = [m for m in MODES if (op, m) in wanted]
        lines.append(" ".join([op, *modes]))
        listed = [(m, *wanted[op, m]) for m in modes if wanted[op, m][0] != "compiled"]
        if listed:
            text = [f"{json.dumps(m) if '+' in m else m} = {_string(f'{s}: {why}')}" for m, s, why in listed]
            parts.append("\n".join([f'["{op}"]', *text]) + "\n")
    TRIED.write_text("\n".join(lines) + "\n")
    EXPECTED.write_text("\n".join(parts))
    print(*bad, sep="\n")
    return 1 if bad else 0


def _string(text: str) -> str:
    return json.dumps(" ".join(text.split())[:240], ensure_ascii=False)


def read(logs: list[Path]) -> dict[tuple[str, str], tuple[str, str]]:
    """Returns the outcomes that ``--log`` has written."""
    done = {}
    for log in logs:
        for line in log.read_text().splitlines():
            op, mode, status, reason = line.split("\t", 3)
            done[op, mode] = (status, reason)
    return done
