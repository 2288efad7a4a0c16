"""torch.export of one entry point, with its recurrences raised and its loops over time of any length."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spikingbrain.frontend.decompose import decompose
from spikingbrain.frontend.recurrences.lengths import (
    NotUnified,
    export_any_length,
    looped_dimensions,
    name_outputs,
    shortened,
)
from spikingbrain.frontend.recurrences.raising import promising, raise_recurrences
from spikingbrain.frontend.recurrences.report import RecurrenceReport

log = logging.getLogger("spikingbrain.compile")

Dims = Sequence[Mapping[int, Any] | None]


@dataclass
class Exported:
    """A program of ops that the importer takes.

    Attributes:
        recurrences: the loops and forms found in it.
        verified: for a dimension that the code loops over, the lengths at which the program was compared with the model.
        fixed: for a dimension that had to be fixed, why.
    """

    program: torch.export.ExportedProgram
    recurrences: list[RecurrenceReport] = field(default_factory=list)
    verified: dict[str, list[int]] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)


def export_program(model: nn.Module, tensors: Sequence[torch.Tensor], dims: Dims, name: str) -> Exported:
    """Exports ``model(*tensors)``; ``dims`` are the dynamic axes of each tensor, as torch.export takes them.

    Raises what torch.export raises.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # torch warns about its own use of its own deprecated class
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        examples = shortened(tensors, dims)
        try:
            exported = Exported(_export(model, examples, dims))
        except Exception as error:
            looped = looped_dimensions(error)
            if not looped:
                raise
            exported = _of_looped(model, tensors, dims, looped, name)
        _raise(exported)
        exported.program = decompose(exported.program)
    return exported


def _export(model: nn.Module, tensors: Sequence[torch.Tensor], dims: Dims) -> torch.export.ExportedProgram:
    return torch.export.export(model, tuple(tensors), dynamic_shapes=(tuple(dims),), strict=False)


def _of_looped(
    model: nn.Module, tensors: Sequence[torch.Tensor], dims: Dims, looped: Sequence[str], name: str
) -> Exported:
    """Exports a model whose code loops over a dimension: for any length if that can be shown, else for the example's."""
    try:
        found = export_any_length(model, tensors, dims, lambda step: log.info("%s: %s", name, step))
    except NotUnified as reason:
        log.warning("entry %r: %s is fixed at its example's length: %s", name, ", ".join(looped), reason)
        kept = [
            {a: d for a, d in (by or {}).items() if getattr(d, "__name__", "") not in looped} for by in dims
        ]
        return Exported(_export(model, tensors, kept), fixed=dict.fromkeys(looped, str(reason)))
    program = torch.export.export(found.module, found.tensors, dynamic_shapes=tuple(dims), strict=False)
    return Exported(program, found.recurrences, found.verified)


def _raise(exported: Exported) -> None:
    """Raises what is written without a Python loop, or is of fixed length, in the exported graph."""
    program = exported.program
    if not promising(program.graph):
        return
    if any(_mutates(n) for n in program.graph.nodes):
        program = program.run_decompositions({})
    found = raise_recurrences(program.graph_module, keep_detach=False)
    exported.recurrences += found
    if any(r.status != "unrolled" for r in found):
        exported.program = program
        name_outputs(program)


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
