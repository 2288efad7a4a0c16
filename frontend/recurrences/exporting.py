"""torch.export of one entry point, with recurrences and spikes raised and its loops over time of any length."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops import associative_scan
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from spikingbrain.errors import CompileError
from spikingbrain.finite import WatchedLayer
from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.decompose import decompose
from spikingbrain.frontend.experts import ExpertReport, may_route, note_spiking, raise_experts
from spikingbrain.frontend.ops.substitutions import substituted
from spikingbrain.frontend.recurrences.all_sizes import export_all_sizes, symbols_of
from spikingbrain.frontend.recurrences.associative import associative_scans
from spikingbrain.frontend.recurrences.counted import note_constants
from spikingbrain.frontend.recurrences.inverses import may_invert, raise_inverses
from spikingbrain.frontend.recurrences.lengths import (
    AnyLength,
    export_any_length,
    looped_dimensions,
    name_outputs,
    shortened,
)
from spikingbrain.frontend.recurrences.raising import calls, promising, raise_recurrences, would_raise
from spikingbrain.frontend.recurrences.report import RecurrenceReport
from spikingbrain.frontend.recurrences.unify import Dims, NotUnified, root_of, step_of
from spikingbrain.frontend.spikes.finite import Watch
from spikingbrain.frontend.spikes.raising import may_spike, raise_spikes
from spikingbrain.frontend.spikes.report import SpikeReport

log = logging.getLogger("spikingbrain.compile")

_LONGEST_FIXED = 4096  # steps that torch.export unrolls in minutes


@dataclass
class Exported:
    """A program of ops that the importer takes.

    Attributes:
        recurrences: the loops and forms found in it.
        spikes: the products of spike counts found in it.
        experts: the products with weights of experts found in it.
        verified: for a dimension that the code loops over, the lengths at which the program was compared with the model.
        fixed: for a dimension that had to be fixed, why.
        watched: spiking layers whose inputs' states the program returns, after the model's results and before its state.
    """

    program: torch.export.ExportedProgram
    recurrences: list[RecurrenceReport] = field(default_factory=list)
    spikes: list[SpikeReport] = field(default_factory=list)
    experts: list[ExpertReport] = field(default_factory=list)
    verified: dict[str, list[int]] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    watched: list[WatchedLayer] = field(default_factory=list)


def export_program(
    model: nn.Module,
    tensors: Sequence[torch.Tensor],
    dims: Dims,
    name: str,
    watch: Watch | None = None,
) -> Exported:
    """Exports ``model(*tensors)``; ``dims`` are the dynamic axes of each tensor, as torch.export takes them.

    With a ``watch`` the program also returns whether inputs of spiking layers are finite.

    Raises what torch.export raises.
    """
    # what a model tells of its ops (torch.fx.traceback.annotate) is kept
    with torch.no_grad(), preserve_node_meta(), warnings.catch_warnings():
        # torch warns about its own use of its own deprecated class
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        examples = shortened(tensors, dims)
        try:
            exported = _export(model, examples, dims)
        except Exception as error:
            looped = looped_dimensions(error)
            if not looped:
                raise
            exported = _of_looped(model, tensors, dims, looped, name)
        else:
            exported = _raised(exported, model, tensors, dims, name)
        exported.spikes = _raise_spikes(exported.program, watch)
        _raise_experts(exported)
        exported.watched = watch.layers if watch else []
        exported.program = decompose(exported.program)
    return exported


def _export(
    model: nn.Module,
    tensors: Sequence[torch.Tensor],
    dims: Dims,
    keep: Collection[Callable[..., Any]] = (),
) -> Exported:
    with substituted(keep):
        program, compared = export_all_sizes(model, tensors, dims, lambda dims: (tuple(dims),), model)
    return Exported(program, verified=compared)


def _of_looped(
    model: nn.Module, tensors: Sequence[torch.Tensor], dims: Dims, looped: Sequence[str], name: str
) -> Exported:
    """Exports a model whose code loops over a dimension: for any length if that can be shown, else for the example's."""
    try:
        found = export_any_length(model, tensors, dims, lambda step: log.info("%s: %s", name, step))
    except NotUnified as reason:
        longest = max(t.shape[a] for t, by in zip(tensors, dims, strict=True) for a in by or {})
        if longest > _LONGEST_FIXED:
            raise CompileError(
                f"entry {name!r} loops {longest} times over {', '.join(looped)}, and cannot be made one program for any length",
                why=str(reason),
                hint="torch's scan is a loop that torch.export keeps; or give a shorter example",
            ) from None
        log.warning("entry %r: %s is fixed at its example's length: %s", name, ", ".join(looped), reason)
        kept = [
            {a: d for a, d in (by or {}).items() if not (step_of(d) and root_of(d) in looped)} for by in dims
        ]
        exported = _export(model, tensors, kept)
        exported.fixed = dict.fromkeys(looped, str(reason))
        _raise(exported)
        return _with_trees(exported, model, tensors, kept, name)
    return _of_any_length(model, found, dims)


def _of_any_length(model: nn.Module, found: AnyLength, dims: Dims) -> Exported:
    program, compared = export_all_sizes(found.module, found.tensors, dims, tuple, model)
    verified = {n: sorted({*sizes, *compared.get(n, ())}) for n, sizes in found.verified.items()}
    return Exported(program, found.recurrences, verified=verified)


def _raised(
    exported: Exported, model: nn.Module, tensors: Sequence[torch.Tensor], dims: Dims, name: str
) -> Exported:
    """Raises what a program without Python loops over dynamic sizes holds: scans and written forms."""
    exported.recurrences += calls(exported.program.graph)
    symbols = any(isinstance(s, torch.SymInt) for n in _inputs(exported.program) for s in n.meta["val"].shape)
    if not symbols:
        _raise(exported)
        return _with_trees(exported, model, tensors, dims, name)
    if may_invert(exported.program.graph):
        exported.program = _functional(exported.program)
        exported.recurrences += raise_inverses(exported.program.graph_module)
        name_outputs(exported.program)
    if promising(exported.program.graph) and would_raise(exported.program.graph_module):
        try:
            found = export_any_length(model, tensors, dims, lambda step: log.info("%s: %s", name, step))
        except NotUnified as reason:
            log.info("entry %r: its recurrences are not raised: %s", name, reason)
            return _with_trees(exported, model, tensors, dims, name, str(reason))
        return _of_any_length(model, found, dims)
    return exported


def _with_trees(
    exported: Exported,
    model: nn.Module,
    tensors: Sequence[torch.Tensor],
    dims: Dims,
    name: str,
    reason: str = "",
) -> Exported:
    """Exports anew, as torch does, a model whose associative scans are not raised: trees, each for one length."""
    scans = associative_scans(exported.program.graph_module)
    if not scans:
        return exported
    names = symbols_of(exported.program, dims)
    sizes = [n.args[2][1].meta["val"].shape[0] for n in scans]
    free = [s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols]
    fixed = sorted({names[s] for s in free if s in names})
    if fixed:
        log.warning("entry %r: %s is fixed at its example's length: %s", name, ", ".join(fixed), reason)
    kept = [{a: d for a, d in (by or {}).items() if not (step_of(d) and root_of(d) in fixed)} for by in dims]
    made = _export(model, tensors, kept, keep=(associative_scan,))
    made.recurrences = [r for r in exported.recurrences if r.status == "unrolled"]
    if reason:
        made.recurrences.append(RecurrenceReport("unrolled", "", str(user_line(scans[0]) or ""), reason))
    made.fixed = {**exported.fixed, **dict.fromkeys(fixed, reason)}
    if not any(kept):
        left = made.recurrences
        _raise(made)
        made.recurrences = [*left, *(r for r in made.recurrences if r not in left)]
    return made


def _inputs(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [
        n for n in program.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor)
    ]


def _raise(exported: Exported) -> None:
    """Raises in a program whose sizes are known."""
    program = exported.program
    if not promising(program.graph):
        return
    program = _functional(program)
    note_constants(program)
    found = raise_recurrences(program.graph_module, keep_detach=False)
    exported.recurrences = found or exported.recurrences
    if any(r.status != "unrolled" for r in found):
        exported.program = program
        name_outputs(program)


def _raise_spikes(program: torch.export.ExportedProgram, watch: Watch | None) -> list[SpikeReport]:
    """Raises in place what multiplies spike counts by weights."""
    if not may_spike(program.graph):
        return []
    found = raise_spikes(program.graph_module, _weights(program), fixed=True, watch=watch)
    if watch is not None and watch.states:
        _declare_results(program, watch)
    if (watch and watch.states) or any(s.status == "raised" for s in found):
        name_outputs(program)
    return found


def _declare_results(program: torch.export.ExportedProgram, watch: Watch) -> None:
    """Makes what a ``watch`` has added to the results of a flat program known to everything that counts them."""
    specs = program.graph_signature.output_specs
    place = len(specs) - watch.behind
    specs[place:place] = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in watch.states
    ]
    program.module_call_graph[0].signature.out_spec = pytree.tree_structure([0] * len(specs))


def _raise_experts(exported: Exported) -> None:
    """Raises what multiplies rows by the weights of their experts."""
    if may_route(exported.program.graph):
        exported.program = _functional(exported.program)
        exported.experts = raise_experts(exported.program.graph_module)
        if any(e.status == "raised" for e in exported.experts):
            name_outputs(exported.program)
    exported.experts += note_spiking(exported.program.graph, _weights(exported.program))


def _weights(program: torch.export.ExportedProgram) -> dict[torch.fx.Node, torch.Tensor]:
    """Returns the tensors that placeholders of a program stand for: parameters, buffers and constants."""
    signature = program.graph_signature
    held = {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    return {
        n: held[names[n.name]]
        for n in program.graph.find_nodes(op="placeholder")
        if isinstance(held.get(names.get(n.name, "")), torch.Tensor)
    }


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    return program.run_decompositions({}) if any(_mutates(n) for n in program.graph.nodes) else program


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
