"""``spikingbrain.explain``: runs a model once, compiled, and tells what became of each of its ops."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.utils import get_compilation_metrics, graph_break_reasons
from torch.utils import _pytree as pytree

from spikingbrain.frontend.attention import AttentionReport
from spikingbrain.frontend.dynamo import report
from spikingbrain.frontend.dynamo.once import differentiate, fresh, kept_buffers
from spikingbrain.frontend.dynamo.options import parse
from spikingbrain.frontend.experts import ExpertReport
from spikingbrain.frontend.recurrences.report import RecurrenceReport
from spikingbrain.frontend.spikes.report import SpikeReport

_STATUSES = ("compiled", "library", "eager")
_Report = SpikeReport | ExpertReport | AttentionReport


@dataclass(frozen=True)
class GraphBreak:
    """A place where Dynamo ends a graph and lets Python go on; ``count`` tells how often it was met."""

    where: str
    reason: str
    remedy: str = ""
    count: int = 1

    def to_dict(self) -> dict[str, Any]:
        return {"where": self.where, "reason": self.reason, "remedy": self.remedy, "count": self.count}


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; ``str()`` is a table, ``to_dict()`` plain data.

    Attributes:
        graphs: each graph in the order it was compiled, with its regions.
        graph_breaks: why there is more than one forward graph, where there is.
        recurrences: each loop over time or written form of a recurrence, and what it was raised into, or why not.
        spikes: each product of spike counts, and whether it is computed in integers, or why not.
        experts: each product of rows with weights of experts, and whether those are read in place, or why not.
        attention: for a target with kernels for it, each softmax attention, and the window that was recognised, or why none.
    """

    graphs: list[report.GraphReport]
    graph_breaks: list[GraphBreak]
    recurrences: list[RecurrenceReport] = field(default_factory=list)
    spikes: list[SpikeReport] = field(default_factory=list)
    experts: list[ExpertReport] = field(default_factory=list)
    attention: list[AttentionReport] = field(default_factory=list)

    @property
    def regions(self) -> list[report.RegionReport]:
        """All regions of all graphs."""
        return [region for graph in self.graphs for region in graph.regions]

    @property
    def counts(self) -> dict[str, int]:
        """How many ops have each status."""
        return {status: sum(g.count(status) for g in self.graphs) for status in _STATUSES}

    @property
    def share(self) -> dict[str, float]:
        """Which part of the ops has each status, of 1."""
        total = sum(self.counts.values())
        return {status: count / total if total else 0.0 for status, count in self.counts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as lists, dictionaries, text and numbers, ready for JSON."""
        return {
            "graphs": [graph.to_dict() for graph in self.graphs],
            "regions": [
                {"graph": graph.name, "kind": graph.kind, **region.to_dict()}
                for graph in self.graphs
                for region in graph.regions
            ],
            "recurrences": [found.to_dict() for found in self.recurrences],
            "spikes": [found.to_dict() for found in self.spikes],
            "experts": [found.to_dict() for found in self.experts],
            "attention": [found.to_dict() for found in self.attention],
            "graph_breaks": [broken.to_dict() for broken in self.graph_breaks],
            "counts": self.counts,
            "share": self.share,
        }

    def __str__(self) -> str:
        return "\n".join(_table(self))


def explain(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
) -> Explanation:
    """See ``spikingbrain.explain``."""
    parse(options)
    from spikingbrain.frontend.dynamo.backend import spikingbrain

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return spikingbrain(module, inputs, options=options)

    compiled = fresh(model, backend)
    breaks_before, frames_before = len(graph_break_reasons), set(map(id, get_compilation_metrics()))
    with (
        torch.random.fork_rng(devices=[]),
        report.collect() as graphs,
        report.collect_found() as raised,
        kept_buffers(model),
    ):
        leaves = pytree.tree_leaves(compiled(*args, **kwargs))
        differentiate([t for t in leaves if isinstance(t, torch.Tensor)], torch.ones_like)
    found = [_from_dynamo(r) for r in graph_break_reasons[breaks_before:]]
    found += [_skipped(m) for m in get_compilation_metrics() if id(m) not in frames_before and m.fail_reason]
    counted = Counter(found)
    breaks = [GraphBreak(b.where, b.reason, b.remedy, count) for b, count in counted.items()]
    return Explanation(
        list(graphs), breaks, raised.recurrences, raised.spikes, raised.experts, raised.attention
    )


def _from_dynamo(reason: Any) -> GraphBreak:
    frames = [f for f in reason.user_stack if "/torch/" not in f.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if reason.reason.startswith("generic_jump"):
        return GraphBreak(
            where, "a branch depends on a tensor's value", "torch.where or torch.cond keeps it in the graph"
        )
    return GraphBreak(where, *_first_lines(reason.reason))


def _skipped(frame: Any) -> GraphBreak:
    """Returns what made Dynamo leave a whole function to Python."""
    reason, remedy = _first_lines(frame.fail_reason)
    line = frame.fail_user_frame_lineno or frame.co_firstlineno
    name = re.sub(r"^torch_dynamo_resume_in_(.*)_at_(\d+)$", r"\1, from line \2 on,", frame.co_name)
    return GraphBreak(
        f"{frame.fail_user_frame_filename or frame.co_filename}:{line}",
        f"all of {name} runs in Python: {reason}",
        remedy,
    )


def _first_lines(text: str) -> tuple[str, str]:
    """Returns the summary and the first hint of one of Dynamo's explanations."""
    hint = re.search(r"^\s*Hint: (.*)$", text, re.M)
    return text.strip().splitlines()[0], hint[1] if hint else ""


def _alike(found: Iterable[_Report]) -> list[tuple[tuple[str, str, str], list[_Report]]]:
    """Returns reports that say the same together: a model has hundreds."""
    groups: dict[tuple[str, str, str], list[_Report]] = {}
    for one in found:
        groups.setdefault((one.status, one.op, one.reason), []).append(one)
    return list(groups.items())


def _table(explanation: Explanation) -> Iterator[str]:
    width = max(80, min(shutil.get_terminal_size().columns, 120))
    counts, share = explanation.counts, explanation.share
    yield ", ".join(f"{counts[s]} ops {t} ({share[s]:.0%})" for s, t in _TOLD.items())
    for graph in explanation.graphs:
        yield ""
        yield f"{graph.name}, {graph.kind}"
        for region in graph.regions:
            yield f"  {region.status:<9} {_line(region.where)}"
            note = "; ".join(filter(None, (region.reason, region.remedy)))
            for text in (_ops(region.ops), note):
                yield from textwrap.wrap(
                    text, width, initial_indent=12 * " ", subsequent_indent=12 * " ", break_on_hyphens=False
                )
    if explanation.recurrences:
        yield ""
        yield "recurrences"
        for found in explanation.recurrences:
            length = f", {found.steps} steps" if found.steps else ""
            yield f"  {found.status:<9} {_line(found.where)}"
            text = f"{found.op or 'left as traced'}{length}: {found.reason}"
            yield from textwrap.wrap(text, width, initial_indent=12 * " ", subsequent_indent=12 * " ")
    for title, reports in (
        ("spiking projections", explanation.spikes),
        ("experts", explanation.experts),
        ("attention", explanation.attention),
    ):
        if not reports:
            continue
        yield ""
        yield title
        for (status, op, reason), group in _alike(reports):
            yield f"  {status:<9} {len(group)} at {', '.join(dict.fromkeys(_line(s.where) for s in group))}"
            yield from textwrap.wrap(
                f"{op or 'left as written'}: {reason}",
                width,
                initial_indent=12 * " ",
                subsequent_indent=12 * " ",
            )
    if explanation.graph_breaks:
        yield ""
        yield "graph breaks, where Python goes on by itself"
        for broken in explanation.graph_breaks:
            yield f"  {_line(broken.where)}"
            for text in (broken.reason, broken.remedy):
                yield from textwrap.wrap(text, width, initial_indent=12 * " ", subsequent_indent=12 * " ")


_TOLD = {"compiled": "compiled", "library": "left to torch's kernels", "eager": "in eager"}


def _line(where: str) -> str:
    """Returns a place with the text of that line."""
    import linecache

    file, _, number = where.rpartition(":")
    text = linecache.getline(file, int(number)).strip() if number.isdigit() else ""
    return f"{where}  {text}".rstrip() or "?"


def _ops(names: Sequence[str]) -> str:
    counted = Counter(names)
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counted.items())
