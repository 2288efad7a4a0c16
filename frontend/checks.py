"""What ahead-of-time capture refuses, in the user's words and before anything is compiled."""

from __future__ import annotations

import re

import torch
from torch import fx

from spikingbrain.errors import CompileError, SourceLine, UnsupportedOp

_FRAME = re.compile(r'File "(.+?)", line (\d+)')


def check(program: torch.export.ExportedProgram, entry: str) -> None:
    """Raises CompileError or UnsupportedOp for what a compiled program could not do as the model does."""
    signature = program.graph_signature
    for buffer in signature.buffers_to_mutate.values():
        raise CompileError(
            f"entry {entry!r} changes the buffer {buffer.removeprefix('model.')!r}",
            where=_line_of(program.graph, signature.buffers_to_mutate, buffer),
            why="a compiled program's weights never change",
            hint="carry it in the state: an argument that forward returns anew (export(..., state=NAME))",
        )
    for argument in signature.user_inputs_to_mutate.values():
        raise CompileError(
            f"entry {entry!r} changes an argument in place",
            where=_line_of(program.graph, signature.user_inputs_to_mutate, argument),
            why="a compiled program never writes into its caller's tensors",
            hint="return the new value, or name the argument as the state",
        )
    for node in program.graph.nodes:
        if node.op == "call_function":
            _check_node(node)


def _check_node(node: fx.Node) -> None:
    target = node.target
    if getattr(target, "__name__", "") == "with_effects":
        raise UnsupportedOp(
            f"no lowering for {node.args[1]}", where=user_line(node), why="it has side effects"
        )
    if draws_random_numbers(node):
        raise UnsupportedOp(
            f"{target} draws random numbers",
            where=user_line(node),
            why="a compiled program has no random state of its own, and would not follow torch.manual_seed",
            hint="draw them outside and pass them in; call model.eval() to switch dropout off",
        )
    if target == torch.ops.aten.logcumsumexp.default:
        raise UnsupportedOp(
            f"no exact lowering for {target}",
            where=user_line(node),
            why="torch-mlir sums the exponentials as they are, which overflow",
            hint="write the recurrence as a loop over time, h = a * h + b; it becomes one op",
        )
    if target == torch.ops.aten.index.Tensor and any(
        isinstance(i, fx.Node) and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in node.args[1]
    ):
        raise UnsupportedOp(
            f"{target} selects by a mask",
            where=user_line(node),
            why="the number of elements that a mask selects is known only when they are there",
            hint="torch.where(mask, x, other), which keeps the shape; or topk, for a fixed number of elements",
        )
    values = node.meta.get("val")
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(value, torch.Tensor) and value.dtype.is_complex:
            raise UnsupportedOp(
                f"{target} makes complex numbers",
                where=user_line(node),
                why="they are not lowered",
                hint="keep real and imaginary parts as real tensors",
            )


def draws_random_numbers(node: fx.Node) -> bool:
    """Returns whether an op takes numbers from torch's generator."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    position = _DROPOUT.get(target)
    if position is None:
        return True
    return bool(node.kwargs.get("dropout_p", node.args[position] if len(node.args) > position else 0.0))


# Attention draws only with dropout; where that argument stands.
_DROPOUT = {
    torch.ops.aten.scaled_dot_product_attention.default: 4,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
}


def user_line(node: fx.Node) -> SourceLine | None:
    """Returns the innermost line of the model that made ``node``, from its stack trace."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [
        f for f in frames if "/torch/" not in f[0] and "/frontend/" not in f[0] and not f[0].startswith("<")
    ]
    if not own:
        return None
    file, line = own[-1]
    return SourceLine(file, int(line))


def _line_of(graph: fx.Graph, mutations: dict[str, str], wanted: str) -> SourceLine | None:
    producers = {node.name: node for node in graph.nodes}
    for producer, name in mutations.items():
        if name == wanted and producer in producers:
            return user_line(producers[producer])
    return None
