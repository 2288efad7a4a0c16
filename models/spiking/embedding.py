"""Token vectors as integers: the table of a model in its codes, which the head may share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain.models.spiking.linear import SpikeLinear
from spikingbrain.models.spiking.quantise import dequantise_weight


class SpikeEmbedding(nn.Module):
    """``nn.Embedding`` whose vectors are codes times scales; as a head, a spiking layer over the same codes.

    Attributes:
        table: the codes int8 [C, E] and scales [C, G] of C tokens, and how the head spikes.
        dtype: of the vectors.
    """

    def __init__(self, table: SpikeLinear, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.table, self.dtype = table, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...], 0 to C - 1 -> [..., E]. Raises IndexError for a token that there is not."""
        codes, scale = (F.embedding(tokens, table) for table in (self.table.codes, self.table.scale))
        return dequantise_weight(codes, scale).to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """x [..., E] -> [..., C]."""
        y: Tensor = self.table(x)
        return y
