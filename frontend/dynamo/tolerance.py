"""How far a compiled result may lie from torch's before it counts as different."""

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


def difference(actual: Tensor, expected: Tensor, scale: float = 0.0) -> str:
    """Returns how two tensors differ, by the worst element, or "" where they are the same within ``TOLERANCES``.

    ``scale`` is the least magnitude to measure against: a gradient that is zero in exact arithmetic holds the rounding
    errors of much larger ones.
    """
    found, wanted = (actual.dtype, tuple(actual.shape)), (expected.dtype, tuple(expected.shape))
    if found != wanted:
        return f"{found[0]} of shape {found[1]} instead of {wanted[0]} of shape {wanted[1]}"
    if expected.dtype not in TOLERANCES:
        count = int((actual != expected).sum())
        return f"{count} of {expected.numel()} elements differ" if count else ""
    relative, absolute = TOLERANCES[expected.dtype]
    a, e = actual.detach().double(), expected.detach().double()
    same = (a == e) | (a.isnan() & e.isnan())  # covers infinities
    size = e.abs().where(e.isfinite(), 0.0)
    allowed = relative * size + absolute * max(scale, magnitude(expected))
    error = (a - e).abs().where(~same, 0.0).nan_to_num(nan=torch.inf)
    wrong = int((error > allowed).sum())
    if not wrong:
        return ""
    worst = int((error / allowed.clamp(min=1e-300)).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), e.shape)]
    a_worst, e_worst = a.flatten()[worst].item(), e.flatten()[worst].item()
    return f"{wrong} of {e.numel()} elements differ, the worst at {index}: {a_worst:.7g} instead of {e_worst:.7g}"


def magnitude(*tensors: Tensor) -> float:
    """Returns the largest finite element of floating tensors."""
    found = [t.detach().double().abs() for t in tensors if t.is_floating_point() and t.numel()]
    return max((float(t.where(t.isfinite(), 0.0).max()) for t in found), default=0.0)


def as_exact(actual: Tensor, expected: Tensor, exact: Tensor) -> bool:
    """Returns whether ``actual`` is about as near to ``exact``, the result in double precision, as ``expected`` is.

    Sums that cancel differ by more than any tolerance for their result, and neither side is wrong.
    """
    if actual.shape != exact.shape or not expected.is_floating_point():
        return False
    off, usual = ((t.double() - exact.double()).abs() for t in (actual, expected))
    return bool(off.isfinite().all()) and bool(off.max() <= 4 * usual.max())
