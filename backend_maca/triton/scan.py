"""The elementwise recurrence on a GPU: launches of `scan_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.backend_maca.triton import scan_kernels as kernels
from spikingbrain.backend_maca.triton import settings


def linear_scan(
    decay: Tensor, update: Tensor, state: Tensor | None, log_decay: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Returns h [B, T, C] in the dtype of update and the last state [B, C] float32 of h_t = a_t * h_(t-1) + update_t."""
    decay, update = decay.contiguous(), update.contiguous()
    batch, steps, channels = update.shape
    h, last = torch.empty_like(update), update.new_empty(batch, channels, dtype=torch.float32)
    tuning = settings.current()
    kernels.scan_elements[(batch * -(-channels // tuning.scan_channels),)](
        decay, update, last if state is None else state.contiguous(), h, last, steps, channels,
        LOG=log_decay, REVERSE=reverse, HAS_FIRST=state is not None, BC=tuning.scan_channels, **tuning.options("scan"),
    )  # fmt: skip
    return h, last
