"""A small language model of gated linear attention (GLA), in plain PyTorch: `(tokens, state) -> (logits, state)`.

Each layer keeps one matrix per key head instead of a cache of keys and values, so the state has one size for any length of
text. The attention is that of SpikingBrain: queries and keys through relu, a gate of low rank for each key channel, key
heads shared by several query heads, a norm per head.

    S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T        o_t = S_t^T q_t / sqrt(K)

Prefill and decode are the same call: any number of tokens at a time, and splitting a text differently changes nothing but
rounding. The state is explicit; it is never changed in place.

Letters in tensor names
  B  batch               H  query heads    K  size of a key      C  vocabulary
  T  tokens of a call    S  key heads      V  size of a value
  E  model width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spikingbrain.models.embedding import TiedEmbedding
from spikingbrain.models.recurrences.gated import gla

# How the recurrence is computed: in blocks of tokens, or token by token. The same function of the same weights.
FORMS = ("blockwise", "loop")

# logsigmoid / 16: a gate of a fresh model forgets half of its state in about 16 tokens (the GLA paper's value).
GATE_DIVISOR = 16


@dataclass(frozen=True)
class GlaConfig:
    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    key_size: int
    value_size: int
    feed_forward: int
    gate_rank: int = 16
    norm_eps: float = 1e-5
    tied_head: bool = True
    form: str = "blockwise"

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise ValueError(
                f"{self.heads} query heads cannot share {self.key_heads} key heads: each key head serves the same "
                "number of query heads; try key_heads that divides heads"
            )
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}; it can be {' or '.join(map(repr, FORMS))}")


def tiny(vocabulary: int = 256, form: str = "blockwise") -> GlaConfig:
    """Returns the sizes of a model for tests and for training in minutes: 0.2 million parameters on bytes."""
    return GlaConfig(
        vocabulary,
        width=96,
        layers=2,
        heads=4,
        key_heads=2,
        key_size=16,
        value_size=24,
        feed_forward=256,
        form=form,
    )


def small(vocabulary: int = 49_152, form: str = "blockwise") -> GlaConfig:
    """Returns the sizes of a model like SmolLM2-135M, with GLA in every layer."""
    return GlaConfig(
        vocabulary,
        width=576,
        layers=30,
        heads=9,
        key_heads=3,
        key_size=64,
        value_size=64,
        feed_forward=1536,
        form=form,
    )


@dataclass
class State:
    """What the model remembers of the tokens seen; batch entries are independent."""

    memories: list[Tensor]  # per layer [B, S, K, V], float32 or wider


pytree.register_dataclass(State)


class Gla(nn.Module):
    def __init__(self, config: GlaConfig):
        super().__init__()
        self.config = config
        table = TiedEmbedding if config.tied_head else nn.Embedding
        self.embedding: Any = table(config.vocabulary, config.width)  # or what `spike` puts there
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(initialise)

    def initial_state(self, batch: int) -> State:
        """Returns the state before the first token."""
        config, weight = self.config, self.norm.weight
        shape = (batch, config.key_heads, config.key_size, config.value_size)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return State([weight.new_zeros(shape, dtype=dtype) for _ in range(config.layers)])

    def forward(self, tokens_BT: Tensor, state: State, last_only: bool = False) -> tuple[Tensor, State]:
        """Returns the logits [B, T, C] ([B, 1, C] of the last token if `last_only`) and the new state."""
        x_BTE = self.embedding(tokens_BT)
        memories = []
        for block, memory_BSKV in zip(self.blocks, state.memories, strict=True):
            x_BTE, memory_BSKV = block(x_BTE, memory_BSKV)
            memories.append(memory_BSKV)
        if last_only:
            x_BTE = x_BTE[:, -1:]
        x_BTE = self.norm(x_BTE)
        logits_BTC: Tensor = self.embedding.logits(x_BTE) if self.head is None else self.head(x_BTE)
        return logits_BTC, State(memories)


class Block(nn.Module):
    def __init__(self, config: GlaConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = GatedLinearAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config)

    def forward(self, x_BTE: Tensor, memory_BSKV: Tensor) -> tuple[Tensor, Tensor]:
        attended_BTE, memory_BSKV = self.attention(self.attention_norm(x_BTE), memory_BSKV)
        x_BTE = x_BTE + attended_BTE
        return x_BTE + self.feed_forward(self.feed_forward_norm(x_BTE)), memory_BSKV


class GatedLinearAttention(nn.Module):
    def __init__(self, config: GlaConfig):
        super().__init__()
        self.form, self.heads, self.key_heads = config.form, config.heads, config.key_heads
        self.key_size, self.value_size = config.key_size, config.value_size
        self.query = nn.Linear(config.width, config.heads * config.key_size, bias=False)
        self.key = nn.Linear(config.width, config.key_heads * config.key_size, bias=False)
        self.value = nn.Linear(config.width, config.key_heads * config.value_size, bias=False)
        self.gate_down = nn.Linear(config.width, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, config.key_heads * config.key_size)
        self.norm = nn.RMSNorm(config.value_size, config.norm_eps)
        self.output = nn.Linear(config.heads * config.value_size, config.width, bias=False)

    def forward(self, x_BTE: Tensor, memory_BSKV: Tensor) -> tuple[Tensor, Tensor]:
        B, T, _ = x_BTE.shape
        q_BTHK = F.relu(self.query(x_BTE)).view(B, T, self.heads, self.key_size)
        k_BTSK = F.relu(self.key(x_BTE)).view(B, T, self.key_heads, self.key_size)
        v_BTSV = self.value(x_BTE).view(B, T, self.key_heads, self.value_size)
        g_BTSK = F.logsigmoid(self.gate_up(self.gate_down(x_BTE))).view(B, T, self.key_heads, self.key_size)
        # the recurrence in float32, whatever the model's type
        q_BTHK, k_BTSK, v_BTSV, g_BTSK = (y.to(memory_BSKV.dtype) for y in (q_BTHK, k_BTSK, v_BTSV, g_BTSK))
        recur = token_by_token if self.form == "loop" else in_blocks
        o_BTHV, memory_BSKV = recur(q_BTHK, k_BTSK, v_BTSV, g_BTSK / GATE_DIVISOR, memory_BSKV)
        return self.output(self.norm(o_BTHV.to(x_BTE.dtype)).flatten(2)), memory_BSKV


def token_by_token(
    q_BTHK: Tensor, k_BTSK: Tensor, v_BTSV: Tensor, g_BTSK: Tensor, memory_BSKV: Tensor
) -> tuple[Tensor, Tensor]:
    """The equation, written down; the compiler makes the blocks of it."""
    (B, T, S, K), H, V = k_BTSK.shape, q_BTHK.shape[2], v_BTSV.shape[3]
    q_BTSGK = q_BTHK.view(B, T, S, H // S, K) * K**-0.5
    outputs = [v_BTSV.new_zeros(B, 0, H, V)]
    for t in range(T):
        update_BSKV = k_BTSK[:, t, :, :, None] * v_BTSV[:, t, :, None, :]
        memory_BSKV = g_BTSK[:, t, :, :, None].exp() * memory_BSKV + update_BSKV
        o_BSGV = torch.einsum("bsgk,bskv->bsgv", q_BTSGK[:, t], memory_BSKV)
        outputs.append(o_BSGV.reshape(B, 1, H, V))
    return torch.cat(outputs, dim=1), memory_BSKV


def in_blocks(
    q_BTHK: Tensor, k_BTSK: Tensor, v_BTSV: Tensor, g_BTSK: Tensor, memory_BSKV: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in matrix products over blocks of tokens, fast without a compiler as well."""
    o_BTHV, last_BSKV = gla(
        q_BTHK, k_BTSK, v_BTSV, g_BTSK, initial_state=memory_BSKV, output_final_state=True
    )
    assert last_BSKV is not None  # asked for
    return o_BTHV, last_BSKV


class SwiGLU(nn.Module):
    def __init__(self, config: GlaConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.feed_forward, bias=False)
        self.up = nn.Linear(config.width, config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        y_BTE: Tensor = self.down(F.silu(self.gate(x_BTE)) * self.up(x_BTE))
        return y_BTE


def initialise(module: nn.Module) -> None:
    """Draws weights of deviation 0.02, as GPT-2 does: with torch's own, a tied head would begin far too sure of itself."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
