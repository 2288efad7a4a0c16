"""What the recurrence ops demand of their arguments, and the dtypes they compute in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from spikingbrain.errors import CompileError, OptionError, ShapeError
from spikingbrain.models.recurrences.dtypes import wide

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
AXES = ("none", "head", "key", "value")


def require_shape(
    op: str, name: str, tensor: Tensor, letters: str, expected: Sequence[int | torch.SymInt]
) -> None:
    """Raises ShapeError unless ``tensor`` has the ``expected`` sizes; ``letters`` says what they are."""
    if tensor.ndim != len(expected) or any(a != b for a, b in zip(tensor.shape, expected, strict=True)):
        raise ShapeError(
            f"{op}: {name} has shape {list(tensor.shape)}",
            why=f"with the other arguments, [{letters}] is {list(expected)}",
        )


def require_rank(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """Raises ShapeError unless ``tensor`` has one dimension for each of ``letters``."""
    if tensor.ndim != len(letters.split(", ")):
        raise ShapeError(f"{op}: {name} has shape {list(tensor.shape)}", why=f"it must be [{letters}]")


def require_dtype(op: str, like: Tensor, state: Tensor | None, **tensors: Tensor | None) -> None:
    """Raises ShapeError unless all ``tensors`` share the floating dtype of ``like``, and ``state`` has `state_dtype` of it."""
    if like.dtype not in DTYPES:
        raise ShapeError(
            f"{op}: arguments of {like.dtype}", why=f"it computes on {', '.join(map(str, DTYPES))}"
        )
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != like.dtype:
            raise ShapeError(
                f"{op}: {name} is {tensor.dtype}",
                why=f"the first argument is {like.dtype}",
                hint=f"{name}.to({like.dtype})",
            )
    if state is not None and state.dtype != state_dtype(like):
        wanted = state_dtype(like)
        raise ShapeError(
            f"{op}: the state is {state.dtype}", why=f"it is kept in {wanted}", hint=f"state.to({wanted})"
        )


def require_axis(op: str, axis: str, decay: Tensor | None) -> None:
    """Raises OptionError unless ``axis`` is known, and "none" exactly when there is no decay."""
    if axis not in AXES:
        raise OptionError(f"{op}: unknown decay_axis {axis!r}", hint=f"one of {', '.join(AXES)}")
    if (axis == "none") != (decay is None):
        given = "without a decay" if decay is None else "with a decay"
        raise OptionError(
            f"{op}: decay_axis {axis!r} {given}", hint='"none" without a decay, else the axis that it scales'
        )


def state_dtype(like: Tensor) -> torch.dtype:
    """Returns the dtype of states and of arithmetic: float64 for float64, else float32."""
    return wide(like.dtype)


def up(x: Tensor) -> Tensor:
    """Returns ``x`` in the dtype of arithmetic."""
    return x.to(state_dtype(x))


def once_only(op: str) -> Callable[..., NoReturn]:
    """Returns the backward of a backward: an error, as second derivatives are not written down."""

    def fail(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise CompileError(
            f"{op} can be differentiated only once",
            why="its backward is an op of explicit formulas without a derivative",
            hint="the plain function of that name in spikingbrain.models.recurrences, or no create_graph=True",
        )

    return fail


def needed(ctx: Any, count: int) -> tuple[bool, ...]:
    """Returns which of ``count`` arguments want a gradient; torch drops trailing ones left at their defaults."""
    given: tuple[bool, ...] = ctx.needs_input_grad
    return (given + (False,) * count)[:count]
