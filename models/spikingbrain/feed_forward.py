"""Feed-forward networks of SpikingBrain: one, or a mixture of experts. Letters in tensor names: see `model`, and

M  rows sent to experts: tokens of all texts, once for each expert that a token is sent to
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain.models.spikingbrain.config import SpikingBrainConfig
from spikingbrain.models.spikingbrain.experts import ExpertLinear


class SwiGLU(nn.Module):
    def __init__(self, width: int, feed_forward: int):
        super().__init__()
        self.gate = nn.Linear(width, feed_forward, bias=False)
        self.up = nn.Linear(width, feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, width, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        y_BTE: Tensor = self.down(F.silu(self.gate(x_BTE)) * self.up(x_BTE))
        return y_BTE


class ExpertSwiGLU(nn.Module):
    """A SwiGLU for each expert; each row goes through the one that it is sent to."""

    def __init__(self, experts: int, width: int, feed_forward: int):
        super().__init__()
        self.gate = ExpertLinear(experts, width, feed_forward)
        self.up = ExpertLinear(experts, width, feed_forward)
        self.down = ExpertLinear(experts, feed_forward, width)

    def forward(self, x_ME: Tensor, expert_M: Tensor) -> Tensor:
        hidden = F.silu(self.gate(x_ME, expert_M)) * self.up(x_ME, expert_M)
        y_ME: Tensor = self.down(hidden, expert_M)
        return y_ME


class MixtureOfExperts(nn.Module):
    """Shared experts serve every token; of the routed ones the best few do, each times its score."""

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.router_kind, self.per_token = config.router, config.experts_per_token
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = ExpertSwiGLU(config.experts, config.width, config.feed_forward)
        self.shared = nn.ModuleList(
            SwiGLU(config.width, config.feed_forward) for _ in range(config.shared_experts)
        )

    def forward(self, x_BTE: Tensor) -> Tensor:
        scores = self.router(x_BTE)  # of each expert
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.softmax(dim=-1) if self.router_kind == "softmax" else scores.sigmoid()
        best, chosen = scores.topk(self.per_token, dim=-1)  # [B, T, experts per token]
        x_ME = x_BTE.unsqueeze(2).expand(-1, -1, self.per_token, -1).flatten(0, 2)
        y_ME = self.experts(x_ME, chosen.flatten())
        y_BTE: Tensor = (y_ME.unflatten(0, chosen.shape) * best.to(y_ME.dtype).unsqueeze(-1)).sum(dim=2)
        for shared in self.shared:
            y_BTE = y_BTE + shared(x_BTE)
        return y_BTE
