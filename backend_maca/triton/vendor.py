"""What providers of a vendor have in common: gradients of a function that torch differentiates, inside an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_AUTOGRAD = torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutogradFunctionality
)  # tests/unit/test_private_api.py


def differentiated(
    function: Callable[..., Sequence[Tensor] | Tensor],
    inputs: Sequence[Tensor | None],
    of_results: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Returns the gradients of the inputs from those of the results, None of an input that is absent.

    torch records nothing inside the kernel of an op: what it leaves out there is taken in again.
    """
    included, excluded = (
        torch._C._dispatch_tls_local_include_set(),
        torch._C._dispatch_tls_local_exclude_set(),
    )
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD):
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        results = function(*leaves)
        results = [results] if isinstance(results, Tensor) else results
        pairs = [(r, g) for r, g in zip(results, of_results, strict=True) if g is not None]
        wanted = [x for x in leaves if x is not None]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g.to(r.dtype) for r, g in pairs], materialize_grads=True
            )
        )
    return [None if x is None else next(found) for x in leaves]
