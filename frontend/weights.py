"""Torch tensors as numpy arrays without copies."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch


def as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Returns the tensor's memory as an array (bfloat16 by ml_dtypes); copies only what is not on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array
