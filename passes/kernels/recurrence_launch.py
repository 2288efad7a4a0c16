"""How kernels of recurrences join a module: one function for each that differs, launched in place of the op."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import func, tensor

from spikingbrain.passes.dialect_fused import Part, linear
from spikingbrain.passes.kernels.builders import index, launch, root_module, size
from spikingbrain.passes.kernels.recurrence_base import Operands, Problem
from spikingbrain.passes.kernels.recurrence_operands import Computed, Memory
from spikingbrain.passes.wave_kernels.builders import set_threads


@dataclass(frozen=True)
class Result:
    """A result of a launch: its type, its leading sizes, and whether it is written over the state that the launch reads."""

    type: ir.Type
    sizes: Sequence[ir.Value]
    in_place: bool = False

    @property
    def dynamic_sizes(self) -> list[ir.Value]:
        dynamic = ir.RankedTensorType(self.type).is_dynamic_dim
        return [] if self.in_place else [size for axis, size in enumerate(self.sizes) if dynamic(axis)]


def launch_kernel(
    problem: Problem,
    schedule: Any,
    kernel: Any,
    parts: Sequence[Part],
    state: ir.Value | None,
    results: Sequence[Result],
    grid: Sequence[ir.Value],
    threads: int = 0,
) -> list[ir.Value]:
    """Emits the launch of a kernel at the insertion point, and the kernel unless an equal one exists; returns the results.

    ``kernel(problem, schedule, workgroup, operands).build()`` fills it; its ``o`` is the first result, its ``state`` the last, or
    the state that is read where there is one result. ``threads`` of a block make it a wave kernel.
    """
    inputs: list[ir.Value] = []
    for read in (read for part in parts for read in part.reads):
        if read.value not in inputs:
            inputs.append(read.value)
    if state is not None:
        inputs.append(state)
    fresh = [result for result in results if not result.in_place]
    shaped = [ir.RankedTensorType(t) for t in [*(v.type for v in inputs), *(r.type for r in fresh)]]
    types = [ir.IndexType.get()] * 3 + [ir.MemRefType.get(t.shape, t.element_type) for t in shaped]
    places = [r.in_place for r in results]
    facts = (
        f"{kernel.__name__} {problem} {schedule} {places} {', '.join(map(str, types))} {_text(parts, inputs)}"
    )
    digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
    name = f"recurrence_{problem.heads}x{problem.states}x{problem.key_size}x{problem.value_size}_{digest}"

    def build(arguments: list[ir.Value]) -> None:
        workgroup, memrefs = arguments[:3], arguments[3:]
        given, made = memrefs[: len(inputs)], iter(memrefs[len(inputs) :])
        initial = given[-1] if state is not None else None
        computed = [
            Computed(part, [Memory(given[inputs.index(r.value)], r.map) for r in part.reads])
            for part in parts
        ]
        written = [initial if result.in_place else next(made) for result in results]
        if problem.time is not None:
            length = index(problem.time)
        else:
            length = size_of([(m.memref, m.map) for c in computed for m in c.memory], results[0].type, 1)
        last = written[-1] if len(written) > 1 else initial
        operands = Operands(computed, written[0], last, initial, length)
        kernel(problem, schedule, workgroup, operands).build()

    _add_kernel(name, types, threads, build)
    sizes = [size for result in results for size in result.dynamic_sizes]
    tied = [len(inputs) - 1 if result.in_place else -1 for result in results]
    return list(launch(name, [r.type for r in results], grid, inputs, sizes, tied).results)


def _add_kernel(
    name: str, types: Sequence[ir.Type], threads: int, build: Callable[[list[ir.Value]], None]
) -> None:
    module = root_module()
    if name in ir.SymbolTable(module.operation):
        return
    with ir.InsertionPoint.at_block_begin(module.regions[0].blocks[0]):
        function = func.FuncOp(name, (types, []), visibility="private")
        if threads:
            set_threads(function, threads)
    with ir.InsertionPoint(function.add_entry_block()):
        build(list(function.arguments))
        func.ReturnOp([])


def is_read_once(value: ir.Value) -> bool:
    """Tells whether one op reads a value; its sizes may be asked for besides."""
    readers = [use for use in value.uses if use.owner.operation.name != "tensor.dim"]
    return len(readers) == 1


def cast(value: ir.Value, kind: ir.Type) -> ir.Value:
    """Returns a tensor as one of a type that knows more, or fewer, of its sizes."""
    return value if value.type == kind else tensor.CastOp(kind, value).result


def size_of(reads: Sequence[tuple[ir.Value, ir.AffineMap | None]], y: ir.Type, axis: int) -> ir.Value:
    """Returns the size of the batch (axis 0) or of time (1): static if anything tells, else that of a tensor that is read."""
    ranked = ir.RankedTensorType(y)
    if not ranked.is_dynamic_dim(axis):
        return index(ranked.shape[axis])
    unit = ([int(i == axis) for i in range(4)], 0)
    found = []
    for value, map_ in reads:
        forms = [unit if i == axis else None for i in range(2)] if map_ is None else map(linear, map_.results)
        found += [(value, at) for at, form in enumerate(forms) if form == unit]
    known = [(v, at) for v, at in found if not ir.ShapedType(v.type).is_dynamic_dim(at)]
    return size(*(known or found)[0])


def _text(parts: Sequence[Part], inputs: Sequence[ir.Value]) -> str:
    """Returns what tells kernels apart that differ only in what they compute."""
    read = [(part.name, [(inputs.index(r.value), str(r.map)) for r in part.reads]) for part in parts]
    return f"{read} {[_body_text(part.body) for part in parts if part.body is not None]}"


def _body_text(body: ir.Block) -> str:
    """Returns what a block computes; printing it would number and verify the whole module, each time."""
    numbers = {hash(argument): i for i, argument in enumerate(body.arguments)}
    lines = []
    for op in (view.operation for view in body.operations):
        assert not len(op.regions), "bodies are scalar ops"
        operands = [numbers[hash(value)] for value in op.operands]
        attributes = [f"{name} = {op.attributes[name]}" for name in op.attributes]
        lines.append(f"{op.name} {operands} {attributes} {[str(r.type) for r in op.results]}")
        numbers |= {hash(r): len(numbers) + i for i, r in enumerate(op.results)}
    return "; ".join(lines)
