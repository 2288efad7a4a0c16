"""Export of a Python loop over time as one program for every length.

Tracing unrolls ``for t in range(T)`` and so fixes T. But the loop is written anew as one op, and then programs traced at several
short lengths differ in nothing but numbers. Where these numbers grow evenly with the length, they are replaced by
expressions of it, and the program holds for any length; that is checked against the model at the user's own length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from spikingbrain.frontend.ops.substitutions import substituted
from spikingbrain.frontend.recurrences.associative import associative_scans
from spikingbrain.frontend.recurrences.counted import note_constants
from spikingbrain.frontend.recurrences.raising import promising, raise_recurrences
from spikingbrain.frontend.recurrences.report import RecurrenceReport
from spikingbrain.frontend.recurrences.unify import Dims, NotUnified, Sizes, root_of, step_of, unify

aten = torch.ops.aten

_LONG = 48  # an example longer than this is first tried at a short length


@dataclass
class AnyLength:
    """A program in which dynamic dimensions are sizes of its inputs.

    Attributes:
        module: takes the tensors of the entry, like the model does.
        tensors: short examples of them.
        recurrences: what was raised.
        verified: for each dynamic dimension the sizes at which it was traced, and that at which it was compared with the model.
    """

    module: nn.Module
    tensors: tuple[torch.Tensor, ...]
    recurrences: list[RecurrenceReport] = field(default_factory=list)
    verified: dict[str, list[int]] = field(default_factory=dict)


class Narrowed(Exception):
    """Raised where torch.export has silently narrowed the range of dimensions; ``names`` them."""

    def __init__(self, names: Sequence[str]):
        super().__init__(f"torch.export narrowed the range of {', '.join(names)}")
        self.names = list(names)


def looped_dimensions(error: Exception) -> list[str]:
    """Returns the names of dimensions that tracing fixed, by the words of torch.export's refusal."""
    if isinstance(error, Narrowed):
        return error.names
    found = re.findall(
        r"You marked (?:\d+\*)?(\w+) as dynamic but your code specialized it to be a constant"
        r"|solving the guards generated for (\w+) = .* resulted in a specialized value",
        str(error),
    )
    found = [first or second for first, second in found]
    return list(dict.fromkeys(found))


def shortened(tensors: Sequence[torch.Tensor], dims: Dims) -> tuple[torch.Tensor, ...]:
    """Returns the examples with every long dynamic axis cut to a short one; tracing does not depend on the example's length."""
    sizes = Sizes.of(tensors, dims)
    long = {
        root_of(dim)
        for tensor, by_axis in zip(tensors, dims, strict=True)
        for axis, dim in (by_axis or {}).items()
        if step_of(dim) and tensor.shape[axis] > _LONG
    }
    return resized(tensors, dims, {name: counts[1] for name, counts in sizes.counts.items() if name in long})


def resized(
    tensors: Sequence[torch.Tensor], dims: Dims, counts: Mapping[str, int]
) -> tuple[torch.Tensor, ...]:
    """Returns the examples with the named dimensions at other lengths (in their steps), shortened or repeated."""
    found = []
    for tensor, by_axis in zip(tensors, dims, strict=True):
        for axis, dim in (by_axis or {}).items():
            step = step_of(dim)
            if step and root_of(dim) in counts:
                length = counts[root_of(dim)] * step
                while tensor.shape[axis] < length:
                    tensor = torch.cat([tensor, tensor], axis)
                tensor = tensor.narrow(axis, 0, length)
        found.append(tensor.contiguous())
    return tuple(found)


def export_any_length(
    model: nn.Module,
    tensors: Sequence[torch.Tensor],
    dims: Dims,
    progress: Callable[[str], None] = lambda _: None,
) -> AnyLength:
    """Returns one program for all sizes of the dynamic dimensions.

    Raises NotUnified where the programs of short lengths are not the same but for numbers that grow evenly with each size, or
    where the program does not compute what the model does at the sizes of the example.
    """
    sizes = Sizes.of(tensors, dims)
    graphs: list[fx.GraphModule] = []
    reports: list[RecurrenceReport] = []
    points = sizes.points()
    for point in points:
        progress("trace " + ", ".join(f"{n} = {c * sizes.steps[n]}" for n, c in point.items()))
        module, reports = _traced(model, resized(tensors, dims, point))
        graphs.append(module)
    if not any(r.status != "unrolled" for r in reports):
        told = [f"the loop at {r.where} is not raised: {r.reason}" for r in reports]
        raise NotUnified(told[0] if told else "no recurrence over it is recognised")
    try:
        unified = unify(graphs, sizes, points)
    except NotUnified as stop:
        left = [r for r in reports if r.status == "unrolled"]
        why = "".join(f"; the loop at {r.where} is not raised: {r.reason}" for r in left[:1])
        raise NotUnified(f"{stop}{why}") from None
    own = {n: tensors[i].shape[a or 0] for n, (i, a) in sizes.places.items()}
    progress("check " + ", ".join(f"{n} = {size}" for n, size in own.items()))
    same_results(model, unified, tensors, ", ".join(f"{n} = {size}" for n, size in own.items()))
    verified = {n: sorted({*(c * sizes.steps[n] for c in sizes.counts[n]), own[n]}) for n in sizes.counts}
    return AnyLength(unified, resized(tensors, dims, points[0]), reports, verified)


def _traced(
    model: nn.Module, tensors: tuple[torch.Tensor, ...]
) -> tuple[fx.GraphModule, list[RecurrenceReport]]:
    """Returns the model as a functional graph of ATen ops with its recurrences raised."""
    with substituted():
        program = torch.export.export(model, tensors, strict=False).run_decompositions({})
    note_constants(program)
    reports = raise_recurrences(program.graph_module, False) if promising(program.graph) else []
    if associative_scans(program.graph_module):
        left = next(r for r in reports if r.status == "unrolled")
        raise NotUnified(f"the loop at {left.where} is not raised: {left.reason}")
    name_outputs(program)
    module = program.module(check_guards=False)
    return fx.GraphModule(module, module.graph), reports  # without the hooks that check sizes


def name_outputs(program: torch.export.ExportedProgram) -> None:
    """Lets the signature name the nodes that the graph returns, where rewrites have put others in their place."""
    returned = program.graph.output_node().args[0]
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(node, fx.Node):
            spec.arg.name = node.name


# The check


def same_results(model: nn.Module, unified: nn.Module, tensors: Sequence[torch.Tensor], sizes: str) -> None:
    """Raises NotUnified unless both give the same for tensors of certain ``sizes``, up to rounding."""
    generator = torch.Generator().manual_seed(0)

    def drawn(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point() or t.any():
            return t
        return torch.rand(t.shape, generator=generator, dtype=torch.float32).to(t.dtype)  # zeros show nothing

    given = [drawn(t) for t in tensors]
    with torch.no_grad():
        expected, found = pytree.tree_leaves(model(*given)), pytree.tree_leaves(unified(*given))
    for e, f in zip(expected, found, strict=True):
        if e.shape != f.shape or e.dtype != f.dtype:
            gives, makes = (f"{t.dtype} {list(t.shape)}" for t in (e, f))
            raise NotUnified(f"at {sizes} the model gives {gives}, the program of short lengths {makes}")
        bound = 0.05 if e.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if e.is_floating_point():
            scale = e.abs().max().clamp(min=1e-6) if e.numel() else torch.tensor(1.0)
            same = torch.allclose(e.float(), f.float(), rtol=bound, atol=float(bound * scale), equal_nan=True)
        else:
            same = torch.equal(e, f)
        if not same:
            raise NotUnified(f"at {sizes} the model computes other numbers than the program of short lengths")
