"""Where a compiled model first differs from torch: which graph, region, op, and which step of the compiler.

Every region is compiled in this process and fed with what torch computed before it, so that errors neither spread nor hide. In
one that differs, the first wrong op is found by bisection, then the fewest ops before it that are needed, then the pass or the
level of the code generator without which the difference goes away.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch.utils.dlpack import from_dlpack
from torch_mlir import ir

from spikingbrain.backend import SharedMemory, StageContext, resolve_target
from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.dynamo import once
from spikingbrain.frontend.dynamo.capture import Captured, Planned, plan_again, recorder
from spikingbrain.frontend.dynamo.ops import Kind, packet_name
from spikingbrain.frontend.dynamo.options import CompileOptions, parse
from spikingbrain.frontend.dynamo.partition import Region
from spikingbrain.frontend.dynamo.region import RegionGraph, build
from spikingbrain.frontend.dynamo.tolerance import as_exact, difference, magnitude
from spikingbrain.frontend.dynamo.weights import FrozenWeights
from spikingbrain.frontend.importer import GraphImporter
from spikingbrain.frontend.normalise import normalise_region
from spikingbrain.frontend.weights import as_numpy
from spikingbrain.passes import pipeline
from spikingbrain.passes.base import Pass, PassContext
from spikingbrain.passes.context import new_context

UPSTREAM = "upstream lowering (torch-mlir's, or iree-compile's at every level)"


@dataclass(frozen=True)
class Finding:
    """The first difference.

    Attributes:
        what: how the numbers differ.
        kind: of the graph: "forward", "backward" or "inference"; "" where no graph is to blame.
        op: name of the first op that is wrong; ``ops`` are the fewest that are needed for it to be.
        where: the user's line of that op.
        step: the pass, or what else, that makes it wrong.
        region: its graph, with the text of its module and its inputs, for a reproducer.
    """

    what: str
    step: str
    kind: str = ""
    op: str = ""
    ops: tuple[str, ...] = ()
    where: str = ""
    region: Trial | None = None

    def __str__(self) -> str:
        if not self.op:
            return f"different: {self.what}\n  cause: {self.step}"
        lines = [f"different: {self.op} in the {self.kind} graph, at {self.where or 'an unknown line'}"]
        lines += [f"  numbers: {self.what}", f"  cause: {self.step}"]
        lines += [f"  only in the company of: {', '.join(self.ops[:-1])}"] if len(self.ops) > 1 else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Trial:
    """A region ready to be compiled and run, with what torch computes for it; in the regions' own memory layout."""

    graph: RegionGraph
    text: str
    inputs: list[Any]
    weights: list[torch.Tensor]
    expected: list[torch.Tensor]
    exact: list[torch.Tensor] | None
    target: str
    options: dict[str, Any]

    def differs(self, passes: Sequence[Pass] | None = None, **options: Any) -> str | None:
        """Returns how the results differ, "" where they do not, None where it does not compile."""
        try:
            found = run_text(
                self.text, self.inputs, self.weights, self.target, {**self.options, **options}, passes
            )
        except Exception:  # of whatever kind: a compiler with a step left out may fail in any way
            return None
        return self.judge(found)

    def judge(self, found: Sequence[torch.Tensor]) -> str:
        for i, (actual, expected) in enumerate(zip(found, self.expected, strict=True)):
            told = difference(actual, expected)
            if told and not (self.exact and as_exact(actual, expected, self.exact[i])):
                return told
        return ""


def compare(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Finding | None:
    """Returns the first difference between ``model`` in torch and compiled, or None.

    Without gradients first, then with them and the backward, if the result has any.
    """
    chosen = parse(options)
    with torch.no_grad():
        found = _compare(model, args, kwargs, chosen, dynamic, progress)
    return found or _compare(model, args, kwargs, chosen, dynamic, progress, gradients=True)


def _compare(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: CompileOptions,
    dynamic: bool | None,
    progress: Callable[[str], None],
    gradients: bool = False,
) -> Finding | None:
    from spikingbrain.frontend.dynamo.backend import spikingbrain

    progress("run in torch")
    expected = once.run(model, model, args, kwargs)
    if gradients and not expected.gradients:
        return None
    if told := _unlike(once.run(model, model, args, kwargs), expected):
        return Finding(told, "the model itself: two runs in torch, with the same random numbers, differ")
    graphs: list[Captured] = []
    level = bool(options.level)
    captured = once.run(model, once.fresh(model, recorder(graphs, level), dynamic), args, kwargs)
    if told := _unlike(captured, expected):
        plain = once.run(model, once.fresh(model, recorder([], recurrences=False), dynamic), args, kwargs)
        if not _unlike(plain, expected):
            return Finding(told, "raise-recurrence: a loop was taken for another (frontend/recurrences)")
        return Finding(
            told,
            'torch: its graphs differ before anything is compiled; see backend="aot_eager_decomp_partition"',
        )
    for number, graph in enumerate(graphs if options.level else []):
        if graph.random is None:
            continue  # compiled for a run that did not come
        if found := _in_graph(graph, options, f"compare{number}", progress):
            return found

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return spikingbrain(module, inputs, options=dataclasses.asdict(options))

    progress("run compiled")
    compiled = once.run(model, once.fresh(model, backend, dynamic), args, kwargs)
    if told := _unlike(compiled, expected):
        return Finding(
            told,
            "no region by itself: rounding that grows (compare both with the model in float64), stale code "
            "(options={'cache': False}), or what calls the regions (options={'level': 0})",
        )
    return None


def _unlike(actual: once.Run, expected: once.Run) -> str:
    largest = magnitude(*expected.gradients.values())
    for found, wanted, scale in (
        (actual.outputs, expected.outputs, 0.0),
        (actual.gradients, expected.gradients, largest),
    ):
        for name, value in wanted.items():
            told = difference(found[name], value, scale) if name in found else "is missing"
            if told:
                return f"{name}: {told}"
    return ""


def _in_graph(
    captured: Captured, options: CompileOptions, name: str, progress: Callable[[str], None]
) -> Finding | None:
    planned = plan_again(captured, options, name)
    tensors = [t for t in captured.outputs if isinstance(t, torch.Tensor)]
    scale = magnitude(*tensors) if captured.kind == "backward" else 0.0
    for i, (actual, expected) in enumerate(zip(planned.outputs, captured.outputs, strict=True)):
        if isinstance(expected, torch.Tensor) and (told := difference(actual, expected, scale)):
            return Finding(
                f"result {i} of the {captured.kind} graph: {told}", "a rewrite (frontend/dynamo/rewrites.py)"
            )
    loaded: dict[str, tuple[SharedMemory, str, list[Any]]] = {}
    for number, region in enumerate(planned.regions):
        progress(f"{captured.kind} graph, region {number + 1} of {len(planned.regions)}")
        trial = _trial(planned, region.nodes, options)
        key = trial.graph.key
        if key not in loaded:
            loaded[key] = load_text(trial.text, trial.target, trial.options)
        told = trial.judge(_call(*loaded[key], trial.inputs, trial.weights))
        if told:
            return _locate(planned, region, captured.kind, told, options, progress)
    return None


def _locate(
    planned: Planned,
    region: Region,
    kind: str,
    told: str,
    options: CompileOptions,
    progress: Callable[[str], None],
) -> Finding:
    """Returns the finding for a region that differs."""
    units = _units(region.nodes)

    def differs(first: int, end: int) -> str | None:
        progress(f"ops {first + 1} to {end} of {len(units)}")
        return _trial(planned, [n for unit in units[first:end] for n in unit], options).differs()

    good, bad = 0, len(units)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if differs(0, middle) else (middle, bad)
    needed, spare = 0, bad - 1  # the window of ops from here on differs, and does not
    if differs(bad - 1, bad):
        needed = bad - 1
    while spare - needed > 1:
        middle = (needed + spare) // 2
        needed, spare = (middle, spare) if differs(middle, bad) else (needed, middle)
    nodes = [n for unit in units[needed:bad] for n in unit]
    trial = _trial(planned, nodes, options)
    wrong = units[bad - 1][0]
    return Finding(
        trial.differs() or told,
        guilty(trial, progress),
        kind,
        packet_name(wrong.target),
        tuple(packet_name(unit[0].target) for unit in units[needed:bad]),
        str(user_line(wrong) or ""),
        trial,
    )


def guilty(trial: Trial, progress: Callable[[str], None] = lambda _: None) -> str:
    """Returns the step of the compiler without which the results are right."""
    needed = []
    for pass_ in _effective(trial.text, trial.target):
        progress(f"without {pass_.name}")
        told = trial.differs([p for p in pipeline.default_pipeline() if p.name != pass_.name])
        if told == "":
            return f"pass {pass_.name}"
        if told is None:
            needed.append(pass_.name)
    backend, _ = resolve_target(trial.target)
    if any(f.name == "flags" for f in dataclasses.fields(backend.options)):
        for level in ("O2", "O1", "O0"):
            progress(f"iree-compile at {level}")
            if trial.differs(flags=f"--iree-opt-level={level}") == "":
                return f"iree-compile: it is right at --iree-opt-level={level}"
    return f"{UPSTREAM}; passes that cannot be left out: {', '.join(needed)}" if needed else UPSTREAM


def _effective(text: str, target: str) -> list[Pass]:
    """Returns the passes that change this module."""
    found: list[Pass] = []
    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        before = [str(module)]

        def observe(pass_: Pass, module: ir.Module, _: float) -> None:
            after = str(module)
            if after != before[0]:
                found.append(pass_)
            before[0] = after

        context = PassContext(resolve_target(target)[1].target)
        pipeline.run(pipeline.default_pipeline(), module, context, verify_each=False, observe=observe)
    return found


def _units(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Keeps an op and what takes its several results apart together."""
    units: list[list[fx.Node]] = []
    for node in nodes:
        if units and packet_name(node.target) == "getitem":
            units[-1].append(node)
        else:
            units.append([node])
    return units


def _trial(planned: Planned, nodes: Sequence[fx.Node], options: CompileOptions) -> Trial:
    graph = build(Region(list(nodes)), planned.verdicts, planned.frozen)
    normalise_region(graph.graph)
    importer = GraphImporter()
    importer.add_graph(graph.module, "region")
    text = importer.module.operation.get_asm(enable_debug_info=True)
    inputs = [
        _laid_out(planned.values[n], order) for n, order in zip(graph.inputs, graph.input_orders, strict=True)
    ]
    orders = graph.output_orders
    expected = [_laid_out(planned.values[n], o) for n, o in zip(graph.outputs, orders, strict=True)]
    exact = _in_double(planned, nodes, graph.outputs)
    return Trial(
        graph,
        text,
        inputs,
        [planned.values[n] for n in graph.weights],
        expected,
        [_laid_out(t, o) for t, o in zip(exact, orders, strict=True)] if exact else None,
        options.target,
        options.of_backend,
    )


def _laid_out(value: Any, order: Sequence[int] | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return (value.permute(list(order)) if order else value).contiguous()


def _in_double(
    planned: Planned, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> list[torch.Tensor] | None:
    """Returns a region's results with double precision inside, as far as its ops do not ask for another."""
    known: dict[fx.Node, Any] = {}
    inside = set(nodes)

    def value(node: fx.Node) -> Any:
        if node not in known:
            view = node in planned.verdicts and planned.verdicts[node].kind is Kind.VIEW
            if node in inside or view:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
                known[node] = node.target(*args, **kwargs)
            else:
                found = planned.values[node]
                floating = isinstance(found, torch.Tensor) and found.is_floating_point()
                known[node] = found.double() if floating else found
        return known[node]

    try:
        with torch.no_grad():
            for node in nodes:  # in order: recursion would be as deep as the region is long
                value(node)
        return [known[n] for n in outputs]
    except Exception:  # an op that refuses double precision
        return None


def run_text(
    text: str,
    inputs: Sequence[Any],
    weights: Sequence[torch.Tensor] = (),
    target: str = "cpu",
    options: Mapping[str, Any] | None = None,
    passes: Sequence[Pass] | None = None,
) -> list[torch.Tensor]:
    """Compiles the one function of a module in this process and returns what it computes from ``inputs``."""
    return _call(*load_text(text, target, options or {}, passes), inputs, weights)


def load_text(
    text: str, target: str, options: Mapping[str, Any], passes: Sequence[Pass] | None = None
) -> tuple[SharedMemory, str, list[Any]]:
    """Compiles a module in this process; returns it loaded, the name of its one function and that one's packed weights."""
    backend, status = resolve_target(target)
    context = PassContext(status.target)
    with tempfile.TemporaryDirectory(prefix="spikingbrain-") as folder:
        with new_context(), ir.Location.unknown():
            module = ir.Module.parse(text)
            pipeline.run(
                pipeline.default_pipeline() if passes is None else passes, module, context, verify_each=False
            )
            pipeline.clean(module)
            pipeline.check_lowered(module)
            functions = [op for op in module.body.operations if op.operation.name == "func.func"]
            name = next(str(f.name.value) for f in functions if "sym_visibility" not in f.attributes)
            value: Any = module.operation.get_asm(enable_debug_info=True)
        stage_context = StageContext(status.target, backend.options(**options), Path(folder))
        for stage in backend.stages(status.target).values():
            value = stage(value, stage_context)
    code = {member: memoryview(data) for member, data in value.items()}
    manifest = {"target": {"name": target}, "options": dict(options)}
    executable = cast(SharedMemory, backend.load(code, manifest, {}))
    return executable, name, [dataclasses.asdict(w) for w in context.weight_arguments.get(name, [])]


def _call(
    executable: SharedMemory,
    name: str,
    stored: list[Any],
    inputs: Sequence[Any],
    weights: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    buffers = [executable.to_device(as_numpy(v)) if isinstance(v, torch.Tensor) else v for v in inputs]
    if stored:
        buffers += FrozenWeights(executable, stored).buffers(tuple(weights))
    return [from_dlpack(executable.lend(b)).clone() for b in executable.call(name, buffers)]
