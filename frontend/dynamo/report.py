"""What was compiled and what was not, and why: one record that the log, ``explain`` and strict mode read."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from spikingbrain.errors import UnsupportedOp
from spikingbrain.frontend.before_autograd import Found
from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.dynamo.ops import packet_name

log = logging.getLogger("spikingbrain.compile")


@dataclass(frozen=True)
class RegionReport:
    """A stretch of a graph and what became of it.

    Attributes:
        status: "compiled"; "library" where torch's kernel was chosen; "eager" where there was no other way.
        ops: names of its ops, in order.
        where: the user's line of the first of them.
        reason, remedy: why it is not compiled, and what could be done.
        failed: whether the compiler itself stopped on it.
    """

    status: str
    ops: tuple[str, ...]
    where: str = ""
    reason: str = ""
    remedy: str = ""
    failed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "ops": list(self.ops),
            "where": self.where,
            "reason": self.reason,
            "remedy": self.remedy,
        }


@dataclass
class GraphReport:
    """One graph: forward, backward or inference."""

    name: str
    kind: str
    regions: list[RegionReport] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Returns how many ops have a status."""
        return sum(len(r.ops) for r in self.regions if r.status == status)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "regions": [r.to_dict() for r in self.regions]}


_collectors: list[list[GraphReport]] = []
_lock = threading.Lock()


@contextlib.contextmanager
def collect() -> Iterator[list[GraphReport]]:
    """Collects the reports of all graphs compiled inside, by any thread (the backward is compiled by autograd's)."""
    found: list[GraphReport] = []
    with _lock:
        _collectors.append(found)
    try:
        yield found
    finally:
        with _lock:
            _collectors[:] = [c for c in _collectors if c is not found]


_found_collectors: list[Found] = []


@contextlib.contextmanager
def collect_found() -> Iterator[Found]:
    """Collects what is found of recurrences, spikes, experts and attention in all graphs compiled inside."""
    found = Found()
    with _lock:
        _found_collectors.append(found)
    try:
        yield found
    finally:
        with _lock:
            _found_collectors[:] = [c for c in _found_collectors if c is not found]


def publish_found(found: Found) -> None:
    """Logs what was found of recurrences, spikes, experts and attention in one graph and hands it to whoever collects."""
    for r in found.recurrences:
        became = f"{r.status} to {r.op}" if r.op else r.status
        log.info("recurrence at %s: %s, %d steps (%s)", r.where or "?", became, r.steps, r.reason)
    for s in found.spikes:
        log.info("spikes at %s: %s (%s)", s.where or "?", s.op or "left as written", s.reason)
    for e in found.experts:
        log.info("experts at %s: %s (%s)", e.where or "?", e.op or "left as written", e.reason)
    for a in found.attention:
        log.info("attention at %s: %s (%s)", a.where or "?", a.op or "left to torch's kernels", a.reason)
    with _lock:
        for collector in _found_collectors:
            collector.recurrences += found.recurrences
            collector.spikes += found.spikes
            collector.experts += found.experts
            collector.attention += found.attention


def describe(
    status: str, nodes: Sequence[fx.Node], reason: str = "", remedy: str = "", failed: bool = False
) -> RegionReport:
    """Returns the report of consecutive nodes."""
    line = next(filter(None, map(user_line, nodes)), None)
    names = tuple(packet_name(n.target) for n in nodes)
    ops = tuple(n for n in names if n != "getitem")
    return RegionReport(status, ops, str(line or ""), reason, remedy, failed)


def publish(report: GraphReport) -> None:
    """Logs a graph's report and hands it to whoever collects."""
    counts = {s: report.count(s) for s in ("compiled", "library", "eager")}
    log.info(
        "%s (%s): %d ops compiled in %d regions, %d left to torch's kernels, %d in eager",
        report.name,
        report.kind,
        counts["compiled"],
        sum(r.status == "compiled" for r in report.regions),
        counts["library"],
        counts["eager"],
    )
    for region in report.regions:
        if region.status == "eager":
            where, ops = region.where or "?", ", ".join(region.ops)
            if region.failed:
                text = "the compiler failed, so %s at %s runs in eager, with the right numbers: %s; %s"
                log.warning(text, ops, where, region.reason, region.remedy)
            else:
                log.info("  eager: %s at %s because %s", ops, where, region.reason)
    with _lock:
        for collector in _collectors:
            collector.append(report)


def refuse(report: GraphReport) -> None:
    """Raises one UnsupportedOp that lists every region in eager, if there is one (strict mode)."""
    eager = [r for r in report.regions if r.status == "eager"]
    if not eager:
        return
    lines = [f"{', '.join(r.ops)} at {r.where or '?'}: {r.reason}" for r in eager]
    raise UnsupportedOp(
        f"{sum(len(r.ops) for r in eager)} ops of {report.name} cannot be compiled, and strict mode allows no eager ones",
        why="\n    ".join(lines),
        hint=next((r.remedy for r in eager if r.remedy), "options={'strict': False} runs them in eager"),
    )
