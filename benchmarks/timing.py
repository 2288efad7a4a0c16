"""How benchmarks measure: every round times each candidate once, so that other load on the machine hits all alike.

Of a round, `once`, `mean` or `fastest` gives a candidate's time; over rounds, `ratio` compares two candidates.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Call = Callable[[], Any]
Times = dict[str, np.ndarray[Any, np.dtype[np.float64]]]

# glibc's allocator gives nothing back to the system.
KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "600000000",
}


def keep_memory() -> None:
    """Starts the script anew, unless that was done, so that freed memory stays mapped and no call pays for page faults."""
    if not KEPT_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT_MEMORY)


def once(call: Call) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def mean(seconds: float, clock: Callable[[], float] = time.perf_counter) -> Callable[[Call], float]:
    """Returns a measure: the mean over as many calls as ``seconds`` hold, one at least."""

    def measure(call: Call) -> float:
        calls, start = 0, clock()
        while True:
            call()
            calls += 1
            elapsed = clock() - start
            if elapsed > seconds:
                return elapsed / calls

    return measure


def fastest(seconds: float, clock: Callable[[], float] = time.thread_time) -> Callable[[Call], float]:
    """Returns a measure: the fastest of as many calls as ``seconds`` hold, one at least, by the thread's processor time."""

    def measure(call: Call) -> float:
        best, begin = float("inf"), clock()
        while best == float("inf") or clock() - begin < seconds:
            start = clock()
            call()
            best = min(best, clock() - start)
        return best

    return measure


def interleave(candidates: Mapping[str, Call], rounds: int, measure: Callable[[Call], float] = once) -> Times:
    """Returns seconds, one value per round; each candidate is called once before, unmeasured."""
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(measure(call))
    return {name: np.array(values) for name, values in times.items()}


def ratio(slow: Any, fast: Any) -> float:
    """Returns how many times longer ``slow`` takes: the median over rounds of one round's ratio."""
    return float(np.median(np.divide(slow, fast)))
