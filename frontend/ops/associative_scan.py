"""torch's ``associative_scan`` as a ``scan`` that is marked as one, for the compiler to raise.

torch itself unrolls it into a tree of slices while a model is traced, for the length of the example. Here one combination
stays as the body of a ``scan``; where the compiler does not raise that, it puts the tree in its place.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import _higher_order_ops as torch_ops
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils import _pytree as pytree


@torch.library.custom_op("spikingbrain::first_or_combined", mutates_args=())
def first_or_combined(first: Tensor, x: Tensor, combined: Tensor) -> Tensor:
    """Returns the element ``x`` at the first step, and what it was combined to at later ones.

    The last op of each step of an associative scan, by which the compiler knows it; it is in no compiled program.
    """
    return torch.where(first, x, combined)


@first_or_combined.register_fake
def _(first: Tensor, x: Tensor, combined: Tensor) -> Tensor:
    return torch.empty_like(combined)


def _keep_first(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
    (first,) = ctx.saved_tensors
    zero = torch.zeros_like(gradient)
    return None, torch.where(first, gradient, zero), torch.where(first, zero, gradient)


first_or_combined.register_autograd(_backward, setup_context=_keep_first)


def associative_scan(
    combine_fn: Callable[[Any, Any], Any],
    xs: Any,
    dim: int,
    reverse: bool = False,
    combine_mode: str = "pointwise",
) -> Any:
    """Takes torch's arguments; returns the same results of a ``scan`` whose steps end in ``first_or_combined``."""
    leaves, spec = pytree.tree_flatten(xs)
    if combine_mode != "generic" or not _by_this_compiler() or not _regular(combine_fn, leaves, spec, dim):
        return _as_written(combine_fn, xs, dim, reverse, combine_mode)

    def step(before: list[Tensor], token: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        first, *given = token
        combined = pytree.tree_leaves(
            combine_fn(pytree.tree_unflatten(before, spec), pytree.tree_unflatten(given, spec))
        )
        after = [
            torch.ops.spikingbrain.first_or_combined(first, x, y)
            for x, y in zip(given, combined, strict=True)
        ]
        return [y.clone() for y in after], after

    moved = [x.movedim(dim, 0) for x in leaves]
    first = torch.arange(moved[0].shape[0], device=moved[0].device) == 0
    start = [x.select(0, -1 if reverse else 0).clone() for x in moved]
    tokens = [x.flip([0]) for x in moved] if reverse else moved
    _, joined = torch_ops.scan(step, start, [first, *tokens])
    joined = [y.flip([0]) for y in joined] if reverse else joined
    return pytree.tree_unflatten([y.movedim(0, dim) for y in joined], spec)


original = torch_ops.associative_scan

# A function of its own, which is not replaced.
_as_written = types.FunctionType(
    original.__code__, original.__globals__, "associative_scan", original.__defaults__, original.__closure__
)


def _regular(combine_fn: Any, leaves: list[Any], spec: Any, dim: int) -> bool:
    """Tells whether the arguments are right and a combination has the shapes and types of what it combines."""
    if not leaves or not callable(combine_fn) or not isinstance(dim, int):
        return False
    if not all(isinstance(x, Tensor) and not x.is_sparse and -x.ndim <= dim < x.ndim for x in leaves):
        return False
    if any(x.ndim != leaves[0].ndim or x.shape[dim] != leaves[0].shape[dim] for x in leaves):
        return False
    if leaves[0].shape[dim] == 0:
        return False
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    if trained and not all(x.is_floating_point() for x in leaves):
        return False  # torch 2.13 finds no gradient of a ``scan`` that carries flags or integers
    slices = [x.select(dim, 0) for x in leaves]
    combined = pytree.tree_leaves(
        combine_fn(pytree.tree_unflatten(slices, spec), pytree.tree_unflatten(slices, spec))
    )
    return len(combined) == len(slices) and all(
        isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype
        for x, y in zip(slices, combined, strict=True)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _by_this_compiler() -> bool:
    """Tells whether a model is traced for this compiler: other backends of ``torch.compile`` get torch's own function.

    Where Dynamo does not trace, a model is being exported.
    """
    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return True
    while inner := next((f for name in _WRAPPED if (f := getattr(backend, name, None))), None):
        backend = inner
    return str(getattr(backend, "__module__", "")).startswith("spikingbrain.")


_WRAPPED = ("_torchdynamo_orig_backend", "compiler_fn", "func")
