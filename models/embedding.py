"""A table of token vectors that is the head, too."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TiedEmbedding(nn.Embedding):
    """``nn.Embedding`` of a model whose head has the same weights: one module, so that both can be replaced as one."""

    def logits(self, x: Tensor) -> Tensor:
        """x [..., E] -> [..., C], the product with the vector of each token."""
        return F.linear(x, self.weight)
