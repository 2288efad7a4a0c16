"""Searches the settings of kernels (``Tuning``) with which the entry points of one model take the least time.

One setting after the other: code for each value is compiled and compared with the settings kept so far. ``Timing`` times programs
in turn, so that other load on the machine hits all alike. It times the settings kept so far twice, as two programs: what these
differ by is noise. ``Estimating`` takes what a model tells where no device is. A value is kept if it gains more than noise, no
entry point loses more, and results stay the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from spikingbrain.errors import OptionError
from spikingbrain.program import Program
from spikingbrain.tuning import SETTINGS, Setting

LEAST_GAIN = 0.01
LONG_ENOUGH = 0.05  # seconds of one measurement
SAME = 1e-3  # of the length of a vector of results: how far other orders of sums may lead

Calls = Mapping[str, Sequence[Any]]  # entry point -> its arguments, in the order of the calls


@dataclass(frozen=True)
class Built:
    """Code for some settings.

    Attributes:
        code: something that is equal for the same code.
        program: None where it does not run here.
        seconds: entry point -> what a model tells of a call, if there is one.
        refused: why it cannot run, if so; it is compared with nothing.
    """

    code: Any = field(repr=False)
    program: Program | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    refused: str = ""


@dataclass
class Outcome:
    """How code compares with other code.

    Attributes:
        faster: entry point -> how many times faster it is.
        noise: entry point -> by how much of that ratio measurements were uncertain.
        difference: between the results, the largest of all entry points: of their difference, and of the others', the length.
        allowed: how large that may be.
    """

    faster: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    difference: float = 0.0
    allowed: float = SAME

    @property
    def total(self) -> float:
        """Returns how many times faster it is, the geometric mean over entry points."""
        return float(np.exp(np.mean(np.log(list(self.faster.values()))))) if self.faster else 1.0

    @property
    def gains(self) -> bool:
        lost = any(ratio < 1 - max(self.noise[name], LEAST_GAIN) for name, ratio in self.faster.items())
        return not lost and self.right and self.total > 1 + max(LEAST_GAIN, *self.noise.values())

    @property
    def right(self) -> bool:
        return self.difference <= self.allowed  # not so where it is NaN


class Compare(Protocol):
    """Compares code with ``base``; ``again`` is the same code as that, built once more."""

    def __call__(self, base: Built, again: Built, others: Mapping[int, Built]) -> dict[int, Outcome]: ...


@dataclass(frozen=True)
class Trial:
    """What one value of one setting did, and whether the setting has it from then on.

    There is no outcome where the code is the same, or where ``refused`` says why it cannot run.
    """

    setting: str
    value: Any
    outcome: Outcome | None
    kept: bool
    refused: str = ""

    def record(self) -> dict[str, Any]:
        """Returns what an artifact's manifest keeps of it."""
        told = asdict(self.outcome or Outcome())
        del told["allowed"]
        return {"setting": self.setting, "value": self.value, **told, "kept": self.kept}

    def __str__(self) -> str:
        what = f"{self.setting} {self.value}"
        if self.refused:
            return f"{what}: {self.refused}; not kept"
        if self.outcome is None:
            return f"{what}: the same code"
        if not self.outcome.right:
            return f"{what}: other results, by {self.outcome.difference:.1e}; not kept"
        noise = self.outcome.noise
        ratios = (f"{n} {r:.3f}x (noise {noise[n]:.3f})" for n, r in self.outcome.faster.items())
        return f"{what}: {', '.join(ratios)}{', kept' if self.kept else ''}"


@dataclass(frozen=True)
class Found:
    """What a search found: the settings that are not the usual ones, what was tried, and what there was no time for.

    The last trial, ``all``, compares all of it with the usual settings, anew; settings are empty where that shows no gain.
    """

    settings: dict[str, int]
    trials: tuple[Trial, ...]
    left_out: tuple[str, ...] = ()


def relevant(records: Sequence[Mapping[str, str]], kind: str) -> list[str]:
    """Returns the settings that kernels of a compiled model may read, from the report of its export."""
    lowered = {f"{r['op'].rpartition('.')[2]} {r['reason']}" for r in records if r["status"] == "lowered"}
    return [
        name
        for name, setting in SETTINGS.items()
        if setting.kind == kind and any(re.fullmatch(setting.ops, text) for text in lowered)
    ]


def known(settings: Sequence[str], kind: str) -> Sequence[str]:
    """Returns the settings if targets of this kind have them all, else raises OptionError."""
    names = [name for name, setting in SETTINGS.items() if setting.kind == kind]
    if strange := [name for name in settings if name not in names]:
        raise OptionError(f"no setting {strange[0]!r}", hint=f"one of {', '.join(names)}")
    return settings


def search(
    build: Callable[[Mapping[str, int]], Built],
    compare: Compare,
    settings: Sequence[str],
    budget: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
    known: Mapping[str, Setting] = SETTINGS,
) -> Found:
    """Returns the best settings that were found.

    Args:
        build: compiles with the given settings.
        settings: those that are searched, in this order.
        budget: seconds after which no further setting is begun; None: all are searched.
        known: what each setting may be.
    """
    end = time.monotonic() + budget if budget is not None else float("inf")
    best: dict[str, int] = {}
    usual = base = build(best)
    trials: list[Trial] = []
    left_out: tuple[str, ...] = ()
    for at, name in enumerate(settings):
        if time.monotonic() > end:
            left_out = tuple(settings[at:])
            progress(f"no time left for {', '.join(left_out)}")
            break
        tried = {value: build({**best, name: value}) for value in known[name].tried}
        differing = {value: b for value, b in tried.items() if not b.refused and b.code != base.code}
        outcomes = compare(base, build(best), differing) if differing else {}
        good = {value: o.total for value, o in outcomes.items() if o.gains}
        winner = max(good, key=good.__getitem__, default=None)
        for value, built in tried.items():
            trials.append(Trial(name, value, outcomes.get(value), value == winner, built.refused))
            progress(str(trials[-1]))
        if winner is not None:
            best, base = {**best, name: winner}, tried[winner]
    if best:
        outcome = compare(usual, build({}), {0: base})[0]
        trials.append(Trial("all", best, outcome, outcome.gains))
        progress(str(trials[-1]))
    return Found(best if best and trials[-1].kept else {}, tuple(trials), left_out)


@dataclass(frozen=True)
class Timing:
    """Compares programs by the time of their calls.

    Attributes:
        calls: entry points that are timed. Of a program with state each is timed from the state that those before it left.
        rounds: measurements of each program, at least 3.
        clock: seconds; for code that runs in the calling thread those that it worked.
        same: how far results may differ, as a part of their length.
    """

    calls: Calls
    rounds: int = 9
    clock: Callable[[], float] = time.thread_time
    same: float = SAME

    def __post_init__(self) -> None:
        if self.rounds < 3:
            raise OptionError(f"{self.rounds} rounds", why="fewer than 3 tell nothing about noise")

    def __call__(self, base: Built, again: Built, others: Mapping[int, Built]) -> dict[int, Outcome]:
        found = {value: Outcome(allowed=self.same) for value in others}
        programs = [b.program for b in (base, again, *others.values()) if b.program]
        states = [p.new_state() if _stateful(p) else None for p in programs]
        for entry, arguments in self.calls.items():
            pairs = list(zip(programs, states, strict=True))
            runs = [self._timed(program, entry, arguments, state) for program, state in pairs]
            seconds = np.array([[run() for run in runs] for _ in range(self.rounds)])
            logs = np.log(seconds[:, :1] / seconds[:, 1:])
            middle = np.median(logs, axis=0)
            spread = 1.4826 * np.median(
                abs(logs - middle), axis=0
            )  # the standard deviation, were they normal
            errors = 2 * 1.2533 * spread / np.sqrt(self.rounds)  # two standard errors of the median
            uses = programs[0].entries[entry].uses_state
            results = [
                program.call(entry, *arguments, state=state if uses else None) for program, state in pairs
            ]
            for i, outcome in enumerate(found.values(), 1):
                outcome.faster[entry] = float(np.exp(middle[i]))
                outcome.noise[entry] = float(np.expm1(max(abs(middle[0]), errors[0], errors[i])))
                outcome.difference = _larger(outcome.difference, _difference(results[0], results[1 + i]))
        return found

    def _timed(
        self, program: Program, entry: str, arguments: Sequence[Any], state: Any
    ) -> Callable[[], float]:
        """Returns a function that returns the seconds of a call, the mean of some, each from the same state."""
        uses = program.entries[entry].uses_state

        def run() -> float:
            spent, count = 0.0, 0
            while not count or (spent < LONG_ENOUGH and count < 1000):
                own = state.fork() if uses else None
                start = self.clock()
                program.call(entry, *arguments, state=own)
                spent, count = spent + self.clock() - start, count + 1
            return spent / count

        run()
        return run


@dataclass(frozen=True)
class Estimating:
    """Compares code by the seconds that a model tells of each entry point, and the results of programs where they run."""

    calls: Calls

    def __call__(self, base: Built, again: Built, others: Mapping[int, Built]) -> dict[int, Outcome]:
        found, usual = {}, self._results(base)
        for value, built in others.items():
            faster = {entry: base.seconds[entry] / built.seconds[entry] for entry in self.calls}
            off = [_difference(*pair) for pair in zip(usual, self._results(built), strict=True)]
            found[value] = Outcome(faster, dict.fromkeys(faster, 0.0), float(np.max([0.0, *off])))
        return found

    def _results(self, built: Built) -> list[Sequence[Any]]:
        program = built.program
        if program is None:
            return []
        state = program.new_state() if _stateful(program) else None
        uses = {entry: state if program.entries[entry].uses_state else None for entry in self.calls}
        return [program.call(e, *arguments, state=uses[e]) for e, arguments in self.calls.items()]


def _stateful(program: Program) -> bool:
    return any(spec.uses_state for spec in program.entries.values())


def _larger(a: float, b: float) -> float:
    return float(np.maximum(a, b))  # NaN stays


def _difference(usual: Sequence[Any], others: Sequence[Any]) -> float:
    """Returns the length of the difference as a part of that of the usual result, the most of all; NaN where NaN differ."""
    found = 0.0
    for a, b in zip(usual, others, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("nan")
        off, length = (float(np.linalg.norm(x)) for x in (a[finite] - b[finite], a[finite]))
        found = _larger(found, off / length if length else off)
    return found
