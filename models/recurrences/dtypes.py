"""In which dtype recurrences are computed. Not torch.promote_types: torch.export writes calls of that into graphs."""

from __future__ import annotations

import torch
from torch import Tensor


def common(*tensors: Tensor | None) -> torch.dtype:
    """Returns the dtype in which floating tensors of different dtypes meet without being rounded."""
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of states and of arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
