"""Differentiable torch ops for recurrences, spikes and attention, `torch.ops.spikingbrain.*`; importing this registers them.

Each has a shape function (dynamic sizes too), a blockwise body in plain PyTorch that runs wherever nothing faster was
compiled, and a backward. docs/recurrence-ops.md has equations, shapes and examples.
"""

from spikingbrain.frontend.ops.grouped_linear import grouped_linear, grouped_outer
from spikingbrain.frontend.ops.linear_recurrence import linear_recurrence
from spikingbrain.frontend.ops.linear_recurrence_backward import linear_recurrence_backward
from spikingbrain.frontend.ops.linear_scan import linear_scan
from spikingbrain.frontend.ops.selective_scan import selective_scan, selective_scan_backward
from spikingbrain.frontend.ops.spike_experts import spike_grouped_linear
from spikingbrain.frontend.ops.spikes import spike_encode, spike_linear
from spikingbrain.frontend.ops.unit_lower_inverse import unit_lower_inverse
from spikingbrain.frontend.ops.window_attention import window_attention, window_attention_backward

__all__ = [
    "grouped_linear",
    "grouped_outer",
    "linear_recurrence",
    "linear_recurrence_backward",
    "linear_scan",
    "selective_scan",
    "selective_scan_backward",
    "spike_encode",
    "spike_grouped_linear",
    "spike_linear",
    "unit_lower_inverse",
    "window_attention",
    "window_attention_backward",
]
