"""Attention of SpikingBrain: linear, softmax, or both side by side. Letters in tensor names: see `model`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain.models.cache import beside, put, rounded
from spikingbrain.models.recurrences.gated import gla
from spikingbrain.models.spikingbrain.config import LayerConfig, SpikingBrainConfig
from spikingbrain.models.spikingbrain.moment import Cache, Moment

# logsigmoid / 16: a gate of a fresh model forgets half of its state in about 16 tokens.
GATE_DIVISOR = 16


class Attention(nn.Module):
    """Projects, attends in one branch or two, and projects back.

    Of two branches each is normalised, and they are added with learned weights, 1 and 1 to begin with. They share their
    projections unless the config separates them.
    """

    def __init__(self, config: SpikingBrainConfig, layer: LayerConfig):
        super().__init__()
        both = layer.linear and layer.softmax is not None
        self.linear = LinearAttention(config) if layer.linear else None
        self.softmax = (
            SoftmaxAttention(config, layer.softmax, norm=both) if layer.softmax is not None else None
        )
        self.projections = Projections(config)
        self.linear_projections = Projections(config) if both and config.separate_projections else None
        self.branch_weights = nn.Parameter(torch.ones(2)) if both else None  # linear, softmax

    def forward(
        self, x_BTE: Tensor, memory_BSDD: Tensor | None, cache: Cache | None, moment: Moment
    ) -> tuple[Tensor, Tensor | None, Cache | None]:
        for_softmax, for_linear = self.projections, self.linear_projections or self.projections
        qkv = for_softmax(x_BTE)
        outputs = []
        if self.linear is not None:
            assert memory_BSDD is not None
            linear_qkv = qkv if for_linear is for_softmax else for_linear(x_BTE)
            o_BTHD, memory_BSDD = self.linear(x_BTE, *linear_qkv, memory_BSDD, moment.live_BT)
            outputs.append((for_linear, o_BTHD))
        if self.softmax is not None:
            assert cache is not None
            o_BTHD, cache = self.softmax(*qkv, cache, moment)
            outputs.append((for_softmax, o_BTHD))
        if self.branch_weights is None:
            [(projections, o_BTHD)] = outputs
            return projections.back(o_BTHD), memory_BSDD, cache
        (_, linear_BTHD), (_, softmax_BTHD) = outputs
        linear_BTHD, softmax_BTHD = (
            o * w for o, w in zip((linear_BTHD, softmax_BTHD), self.branch_weights, strict=True)
        )
        if for_linear is for_softmax:
            return for_softmax.back(linear_BTHD + softmax_BTHD), memory_BSDD, cache
        return for_linear.back(linear_BTHD) + for_softmax.back(softmax_BTHD), memory_BSDD, cache


class Projections(nn.Module):
    """To queries, keys and values, with biases; and back to the width of the model, without."""

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.head_size = config.head_size
        self.query = nn.Linear(config.width, config.heads * config.head_size)
        self.key = nn.Linear(config.width, config.key_heads * config.head_size)
        self.value = nn.Linear(config.width, config.key_heads * config.head_size)
        self.output = nn.Linear(config.heads * config.head_size, config.width, bias=False)

    def forward(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHD, k_BTSD, v_BTSD = (
            project(x_BTE).unflatten(2, (-1, self.head_size))
            for project in (self.query, self.key, self.value)
        )
        return q_BTHD, k_BTSD, v_BTSD

    def back(self, o_BTHD: Tensor) -> Tensor:
        x_BTE: Tensor = self.output(o_BTHD.flatten(2))
        return x_BTE


class LinearAttention(nn.Module):
    """Gated linear attention: S_t = diag(exp g_t) S_(t-1) + k_t v_t^T, o_t = S_t^T q_t / sqrt(D), then a norm per head.

    Queries and keys go through the feature map and are not rotated.
    """

    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.feature_map = F.relu if config.feature_map == "relu" else torch.sigmoid
        self.key_heads, self.head_size = config.key_heads, config.head_size
        channels = config.key_heads * config.head_size
        self.gate: nn.Module | None = None
        if config.gate == "low-rank":
            self.gate = nn.Sequential(
                nn.Linear(config.width, config.gate_rank, bias=False), nn.Linear(config.gate_rank, channels)
            )
        elif config.gate == "full":
            self.gate = nn.Linear(config.width, channels)
        self.norm = nn.RMSNorm(config.head_size, config.norm_eps)

    def forward(
        self,
        x_BTE: Tensor,
        q_BTHD: Tensor,
        k_BTSD: Tensor,
        v_BTSD: Tensor,
        memory_BSDD: Tensor,
        live_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wide = memory_BSDD.dtype  # the recurrence in float32, whatever the model's type
        if self.gate is None:
            # decay 1 - sigmoid(k) = sigmoid(-k)
            g_BTSD = F.logsigmoid(-k_BTSD.to(wide))
        else:
            g = self.gate(x_BTE).unflatten(2, (self.key_heads, self.head_size))
            g_BTSD = F.logsigmoid(g.to(wide)) / GATE_DIVISOR
        q_BTHD, k_BTSD, v_BTSD = (
            self.feature_map(q_BTHD).to(wide),
            self.feature_map(k_BTSD).to(wide),
            v_BTSD.to(wide),
        )
        if live_BT is not None:
            live = live_BT[:, :, None, None]
            v_BTSD, g_BTSD = (torch.where(live, y, 0.0) for y in (v_BTSD, g_BTSD))
        o_BTHD, last_BSDD = gla(
            q_BTHD, k_BTSD, v_BTSD, g_BTSD, initial_state=memory_BSDD, output_final_state=True
        )
        assert last_BSDD is not None  # asked for
        return self.norm(o_BTHD.to(x_BTE.dtype)), last_BSDD


class SoftmaxAttention(nn.Module):
    """Softmax attention with rotated queries and keys, over a window or over all tokens, sinks always among them."""

    def __init__(self, config: SpikingBrainConfig, kind: str, norm: bool):
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(config.head_size, config.norm_eps) if norm else None

    def forward(
        self, q_BTHD: Tensor, k_BTSD: Tensor, v_BTSD: Tensor, cache: Cache, moment: Moment
    ) -> tuple[Tensor, Cache]:
        view = moment.views[self.kind]
        q_BTHD, k_BTSD = rotate(q_BTHD, moment.rotation), rotate(k_BTSD, moment.rotation)
        keys, values = cache
        new_keys, new_values = rounded(k_BTSD, keys), rounded(v_BTSD, values)
        k_BNSD, v_BNSD = beside(keys, new_keys, q_BTHD.dtype), beside(values, new_values, q_BTHD.dtype)
        o_BHTD = F.scaled_dot_product_attention(
            q_BTHD.to(k_BNSD.dtype).transpose(1, 2),
            k_BNSD.transpose(1, 2),
            v_BNSD.transpose(1, 2),
            attn_mask=view.mask_B1TN,
            enable_gqa=True,
        )
        o_BTHD = o_BHTD.transpose(1, 2).to(q_BTHD.dtype)
        if self.norm is not None:
            o_BTHD = self.norm(o_BTHD)
        return o_BTHD, (put(keys, new_keys, view.slots_BT), put(values, new_values, view.slots_BT))


def rotate(x_BTHD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) by its angle: the rotate-half form."""
    cos, sin = rotation
    first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos + torch.cat([-second, first], dim=-1) * sin
