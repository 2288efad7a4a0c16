"""`spikingbrain::unit_lower_inverse`, what forward substitution computes: shape function, eager body and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikingbrain.errors import ShapeError
from spikingbrain.frontend.ops.checks import require_dtype, up

_NAME = "unit_lower_inverse"
_SMALL = 16  # blocks of up to this size are inverted under masks; larger ones in halves


@torch.library.custom_op("spikingbrain::unit_lower_inverse", mutates_args=())
def unit_lower_inverse(lower: Tensor) -> Tensor:
    """Returns (I + L)^-1 [..., N, N], where L is the strictly lower triangle of ``lower`` [..., N, N].

    The rest of ``lower`` is not read. It is what solves the delta rules within a chunk (Yang et al. 2024, "Parallelizing
    Linear Transformers with the Delta Rule over Sequence Length", equation 10): w = (I + tril(beta k k^T, -1))^-1 (beta k).
    It is made of products, so a NaN in one row may make others NaN, earlier ones too.
    Arithmetic is float32 (float64 for float64); the result has the dtype of ``lower``.

    Raises:
        ShapeError: ``lower`` is not of square matrices, or not floating.
    """
    _check(lower)
    return inverse(lower)


@unit_lower_inverse.register_fake
def _(lower: Tensor) -> Tensor:
    _check(lower)
    return lower.new_empty(lower.shape)


def _check(lower: Tensor) -> None:
    if lower.ndim < 2 or lower.shape[-1] != lower.shape[-2]:
        raise ShapeError(f"{_NAME}: lower has shape {list(lower.shape)}", why="it must be [..., N, N]")
    require_dtype(_NAME, lower, None)


def inverse(lower: Tensor) -> Tensor:
    """Computes the op in matrix products: all that a compiler needs to know of it."""
    size = lower.shape[-1]
    found = _halves(up(lower)) if size > _SMALL else _masked(up(lower))
    return found.to(lower.dtype).contiguous()


def _halves(lower: Tensor) -> Tensor:
    """Inverts both diagonal blocks at once, and from them [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]].

    An odd size is made even by a row and a column of the identity.
    """
    size = lower.shape[-1]
    half = (size + 1) // 2
    if size % 2:
        lower = torch.nn.functional.pad(lower, (0, 1, 0, 1))
    diagonal = torch.stack((lower[..., :half, :half], lower[..., half:, half:]))
    upper_left, lower_right = (_halves(diagonal) if half > _SMALL else _masked(diagonal)).unbind(0)
    below = -(lower_right @ lower[..., half:, :half] @ upper_left)
    top = torch.cat((upper_left, torch.zeros_like(upper_left)), -1)
    return torch.cat((top, torch.cat((below, lower_right), -1)), -2)[..., :size, :size]


def _masked(lower: Tensor) -> Tensor:
    """The same without slices: X - X C X doubles the size of the inverted blocks, C being the blocks between them."""
    size = lower.shape[-1]
    index = torch.arange(size, device=lower.device)
    found = torch.eye(size, dtype=lower.dtype, device=lower.device)
    width = 1
    while width < size:
        block = index // width
        between = (block[:, None] // 2 == block // 2) & (block[:, None] > block)
        off = torch.where(between, lower, 0.0)  # a mask, not a product: what is not read may be infinite
        found = found - (off if width == 1 else found @ off @ found)
        width *= 2
    return found.expand(lower.shape) if size < 2 else found


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    """Returns -tril(X^T G X^T, -1), from dX = -X dL X."""
    (found,) = ctx.saved_tensors
    x = up(found).mT
    return -(x @ up(gradient) @ x).tril(-1).to(found.dtype)


unit_lower_inverse.register_autograd(_backward, setup_context=_save)
