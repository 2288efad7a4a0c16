"""torch.export where torch cannot prove that its program holds for every size that the user allows.

Tracing asks questions about sizes: is it 1 (then it would broadcast), does 4 divide T + (-T mod 4)? Where torch cannot tell
the answer for all sizes, it refuses to export. Here such a program is traced at sizes of at least three with its open
questions kept as assertions; then it is compared with the model at all small sizes, and the assertions are evaluated at
thousands of others. A program that fails either is refused still.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from spikingbrain.errors import CompileError
from spikingbrain.frontend.recurrences.lengths import Narrowed, looped_dimensions, resized, same_results
from spikingbrain.frontend.recurrences.unify import Dims, NotUnified, Sizes, root_of, step_of

_FREE = 3  # from here on a size is none of those that torch treats as special
_COMPARED = 12  # small sizes of each dimension at which the program is compared with the model
_EVALUATED = 4096  # sizes of each dimension at which assertions are evaluated
_JOINT = 2048  # combinations of sizes of several dimensions

Shapes = Callable[[Dims], Any]  # writes dims as the model's signature wants them


def export_all_sizes(
    model: nn.Module, tensors: Sequence[torch.Tensor], dims: Dims, shapes: Shapes, reference: nn.Module
) -> tuple[ExportedProgram, dict[str, list[int]]]:
    """Exports for all sizes; returns the program, and where torch could not prove it, the sizes at which it was compared.

    Args:
        reference: what the program must compute.

    Raises what torch.export raises, and CompileError where the program holds for some of the sizes only.
    """
    try:
        program = _exported(model, tensors, shapes(dims))
        _require_ranges(program, dims)
        return program, {}
    except Exception as error:
        if "Constraints violated" not in str(error) or looped_dimensions(error):
            raise
        lowest, highest = _bounds(dims)
        if any(high < 2 * _FREE for high in highest.values()):
            raise
        sizes = Sizes.of(tensors, dims)
        examples = resized(tensors, dims, {name: counts[0] for name, counts in sizes.counts.items()})
        try:
            program = _exported(model, examples, shapes(_at_least(dims, _FREE)), defer=True)
        except Exception as second:
            raise (second if looped_dimensions(second) else error) from None
        refusal = error
    questions = _taken_out(program.graph)
    unchecked = program.module(check_guards=False)
    module = fx.GraphModule(unchecked, unchecked.graph)  # without the hooks that check sizes
    lengths = {n: _small(lowest[n], highest[n]) for n in sizes.counts}
    skipped: set[tuple[str, int]] = set()
    for point in _points(lengths):
        told = ", ".join(f"{n} = {size * sizes.steps[n]}" for n, size in point.items())
        try:
            same_results(reference, module, resized(tensors, dims, point), told)
        except IndexError:
            if not program.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan):
                raise
            skipped.update(point.items())  # torch cannot run a scan of no steps
        except (NotUnified, RuntimeError) as reason:
            raise _refused(str(reason)) from refusal
    names = symbols_of(program, dims)
    _evaluate(questions, names, lengths, highest)
    for symbol, name in names.items():
        held = program.range_constraints[symbol]
        program.range_constraints[symbol] = ValueRanges(lengths[name][0], held.upper)
    compared = {n: [s for s in found if (n, s) not in skipped] for n, found in lengths.items()}
    return program, {n: [size * sizes.steps[n] for size in found] for n, found in compared.items()}


def _exported(
    model: nn.Module, tensors: Sequence[torch.Tensor], shapes: Any, defer: bool = False
) -> ExportedProgram:
    # Size-oblivious: a size such as T - 1, of the steps after the first, is not asked whether it is 1.
    with torch.fx.experimental._config.patch(backed_size_oblivious=defer):
        return torch.export.export(
            model,
            tuple(tensors),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=defer,
        )


def _require_ranges(program: ExportedProgram, dims: Dims) -> None:
    """Raises Narrowed where the program holds for fewer sizes than were asked for.

    torch 2.13 forgets to refuse: a loop over ``x.unflatten(1, (-1, 3)).shape[1]`` with a dimension of ``3 * Dim(...)`` is
    unrolled for the example's length, and only the lower end of the range tells.
    """
    lowest, highest = _bounds(dims)
    narrowed = []
    for symbol, name in symbols_of(program, dims).items():
        held = program.range_constraints[symbol]
        if held.lower > max(2, lowest[name]) or held.upper < highest[name]:
            narrowed.append(name)
    if narrowed:
        raise Narrowed(narrowed)


def _refused(why: str) -> CompileError:
    return CompileError(
        "the program that torch.export makes does not hold for all sizes",
        why=why,
        hint="narrow the range of the dimension with min= and max=, or give sizes it must be a multiple of: 8 * Dim(...)",
    )


# Ranges of sizes


def _bounds(dims: Dims) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the least (at least 1) and the greatest count of each dimension's steps."""
    lowest: dict[str, int] = {}
    highest: dict[str, int] = {}
    for dim in itertools.chain.from_iterable((by or {}).values() for by in dims):
        if step_of(dim):
            root = getattr(dim, "root", dim)
            lowest[root_of(dim)] = max(1, int(getattr(root, "min", 0) or 0))
            highest[root_of(dim)] = min(1 << 40, int(getattr(root, "max", 1 << 40) or 1 << 40))
    return lowest, highest


def _at_least(dims: Dims, least: int) -> Dims:
    roots: dict[str, Any] = {}

    def grown(dim: Any) -> Any:
        step = step_of(dim)
        if step is None:
            return dim
        root = getattr(dim, "root", dim)
        name = root_of(dim)
        if name not in roots:
            roots[name] = Dim(name, min=max(least, int(root.min or 0)), max=root.max)
        return roots[name] if step == 1 and root is dim else step * roots[name]

    return [{axis: grown(dim) for axis, dim in (by or {}).items()} for by in dims]


def _small(lowest: int, highest: int) -> list[int]:
    return list(range(lowest, min(highest, lowest + _COMPARED) + 1))


def _points(lengths: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Yields every small size of each dimension while the others have one, and all combinations of the two smallest."""
    middle = {name: sizes[len(sizes) // 2] for name, sizes in lengths.items()}
    for name, sizes in lengths.items():
        for size in sizes:
            yield {**middle, name: size}
    for corner in itertools.product(*[sizes[:2] for sizes in lengths.values()]):
        yield dict(zip(lengths, corner, strict=True))


# Assertions


def _taken_out(graph: fx.Graph) -> list[sympy.Basic]:
    """Removes the assertions about sizes from a graph and returns them."""
    found = []
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
        if isinstance(value, torch.SymBool):
            found.append(value.node.shape_env.replace(value.node.expr))
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return found


def symbols_of(program: ExportedProgram, dims: Dims) -> dict[sympy.Symbol, str]:
    """Returns the dimension that each symbol counts."""
    nodes = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    names: dict[sympy.Symbol, str] = {}
    for argument, by_axis in zip(program.graph_signature.user_inputs, dims, strict=True):
        for axis, dim in (by_axis or {}).items():
            size = nodes[str(argument)].meta["val"].shape[axis]
            if step_of(dim) and isinstance(size, torch.SymInt):
                names |= dict.fromkeys(size.node.expr.free_symbols, root_of(dim))
    return {symbol: names[symbol] for symbol in program.range_constraints if symbol in names}


def _evaluate(
    questions: Sequence[sympy.Basic],
    names: Mapping[sympy.Symbol, str],
    compared: Mapping[str, Sequence[int]],
    highest: Mapping[str, int],
) -> None:
    """Raises CompileError where an assertion fails at sizes beyond those at which the program was compared."""
    generator = random.Random(0)
    ranges = {n: (sizes[-1] + 1, highest[n]) for n, sizes in compared.items()}
    for question in questions:
        free = [s for s in question.free_symbols if s in names]
        if len(free) != len(question.free_symbols) or question is sympy.false:
            raise _refused(f"tracing took for granted that {question}")
        if not free:
            continue
        small = itertools.product(*[compared[names[s]] for s in free])
        if len(free) == 1 and not all(_holds(question, free, values) for values in small):
            continue  # the program was right all the same
        bounds = [ranges[names[s]] for s in free]
        if any(low > high for low, high in bounds):
            continue
        tried = itertools.chain(
            itertools.product(*[_spread(*b, int(_EVALUATED ** (1 / len(free)))) for b in bounds]),
            (tuple(generator.randint(*b) for b in bounds) for _ in range(_JOINT if len(free) > 1 else 0)),
        )
        for values in tried:
            if not _holds(question, free, values):
                told = ", ".join(f"{names[s]} = {v}" for s, v in zip(free, values, strict=True))
                raise _refused(f"at {told} it is not true that {question}, which tracing took for granted")


def _holds(question: sympy.Basic, symbols: Sequence[sympy.Symbol], values: Sequence[int]) -> bool:
    given = {s: sympy.Integer(v) for s, v in zip(symbols, values, strict=True)}
    return question.xreplace(given) is not sympy.false


def _spread(low: int, high: int, count: int) -> list[int]:
    """Returns all numbers of a short range; of a long one its beginning, powers of two with neighbours, and its end."""
    near = range(low, min(high, low + count) + 1)
    powers = [2**e + d for e in range(2, int(math.log2(high)) + 1) for d in (-1, 0, 1)]
    return sorted({*near, *(p for p in powers if low <= p <= high), high})
