"""How far a compiled result may lie from eager: one table for all comparisons with floating numbers."""

from __future__ import annotations

import torch
from torch import Tensor

# dtype -> (relative to the element, relative to the largest element of the tensor)
TOLERANCES = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (2e-2, 2e-2),
}


def assert_close(actual: Tensor, expected: Tensor, what: str, scale: float = 0.0) -> None:
    """Raises AssertionError naming the worst element, unless ``actual`` is ``expected`` within `TOLERANCES`.

    ``scale`` is the least magnitude to measure against: a gradient that is zero in exact arithmetic holds
    rounding errors of much larger ones.
    """
    found, wanted = (actual.dtype, tuple(actual.shape)), (expected.dtype, tuple(expected.shape))
    assert found == wanted, (
        f"{what}: {found[0]} of shape {found[1]}, expected {wanted[0]} of shape {wanted[1]}"
    )
    if expected.dtype not in TOLERANCES:
        for index in (actual != expected).nonzero().tolist()[:1]:
            raise AssertionError(
                f"{what}: at {index} is {actual[*index].item()} instead of {expected[*index].item()}"
            )
        return
    rtol, atol = TOLERANCES[expected.dtype]
    a, e = actual.detach().double(), expected.detach().double()
    same = (a == e) | (a.isnan() & e.isnan())  # covers infinities
    finite = e.abs().where(e.isfinite(), 0.0)
    scale = max(scale, finite.max().item() if finite.numel() else 0.0)
    error = (a - e).abs().where(~same, 0.0).nan_to_num(nan=torch.inf)
    allowed = rtol * finite + atol * scale
    if (error <= allowed).all():
        return
    worst = int((error / allowed.clamp(min=1e-300)).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), e.shape))
    raise AssertionError(
        f"{what}: {int((error > allowed).sum())} of {e.numel()} elements differ; the worst, at {list(index)}, "
        f"is {a.flatten()[worst].item():.9g} instead of {e.flatten()[worst].item():.9g}, "
        f"{error.flatten()[worst].item():.2g} off where {allowed.flatten()[worst].item():.2g} is allowed "
        f"(the largest element is {scale:.3g})"
    )
