"""Progress on standard error: one line a step with the seconds since the start, rewritten in place on a terminal."""

from __future__ import annotations

import sys
import time


class Progress:
    """Called with the name of each step."""

    def __init__(self, quiet: bool = False):
        self._start, self._quiet, self._open = time.perf_counter(), quiet, False

    def __call__(self, step: str) -> None:
        if self._quiet:
            return
        line = f"[{time.perf_counter() - self._start:6.1f} s] {step}"
        if sys.stderr.isatty() and step.endswith("%"):
            sys.stderr.write(f"\r{line}")
            self._open = True
        elif not step.endswith("%") or step.endswith("100 %"):
            sys.stderr.write(("\n" if self._open else "") + line + "\n")
            self._open = False
        sys.stderr.flush()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
