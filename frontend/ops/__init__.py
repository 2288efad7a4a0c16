"""Differentiable torch ops for recurrences, `torch.ops.spikingbrain.*`: importing this package registers them.

Each has a shape function (dynamic sizes too), a blockwise body in plain PyTorch that runs wherever nothing faster was
compiled, and a backward. docs/recurrence-ops.md has equations, shapes and examples.
"""

from spikingbrain.frontend.ops import linear_recurrence_backward  # noqa: F401  (registers the gradients)
from spikingbrain.frontend.ops.linear_recurrence import linear_recurrence

__all__ = ["linear_recurrence"]
