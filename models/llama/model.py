"""Llama and Qwen2 in plain PyTorch: a pure function `(tokens, state) -> (logits, state)`.

Prefill and decode are the same call: any number of tokens may be fed at a time, and splitting a text
differently changes nothing but rounding. The state is explicit; it is never changed in place.

Letters in tensor names
  B  batch               H  query heads       R  slots of the key/value cache
  T  tokens of a call    K  key/value heads   S  keys seen by a call: R + T
  E  model width         D  head size         V  vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spikingbrain.models.cache import Kept, beside, empty, put, rounded
from spikingbrain.models.embedding import TiedEmbedding
from spikingbrain.models.errors import ConfigError


@dataclass(frozen=True)
class LlamaConfig:
    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    feed_forward: int
    context: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = True
    qkv_bias: bool = False  # of queries, keys and values: Qwen2 has them
    # Attention over the last `window` tokens (None: over all), plus the first `sinks` tokens of the text.
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.key_value_heads:
            raise ConfigError(
                f"{self.heads} query heads cannot share {self.key_value_heads} key/value heads",
                where="LlamaConfig",
                why="each key/value head serves the same number of query heads",
                hint="key_value_heads that divides heads",
            )
        if self.head_size % 2:
            raise ConfigError(
                f"head size {self.head_size} is odd",
                where="LlamaConfig",
                why="rotary position embedding turns pairs of values",
                hint="an even head_size",
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(
                f"window of {self.window} tokens",
                where="LlamaConfig",
                why="a token always attends to itself, so the smallest window is 1",
                hint="window=None for attention over all tokens",
            )
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ConfigError(
                f"{self.sinks} sink tokens with window {self.window}",
                where="LlamaConfig",
                why="sinks are the first tokens of a text that stay visible outside the window",
                hint="sinks=0, or a window",
            )


@dataclass
class State:
    """What the model remembers of the tokens seen.

    Batch entries are independent and may be at different positions. The last slot of each cache is a spill
    slot: it takes the tokens that need not be kept and is never read.
    """

    keys: list[Kept]  # per layer [B, R, K, D], after rotary embedding
    values: list[Kept]  # per layer [B, R, K, D]
    slot_positions: Tensor  # [B, R] int64: position of the token that a slot holds, -1 when empty
    position: Tensor  # [B] int64: number of tokens seen


pytree.register_dataclass(State)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        table = TiedEmbedding if config.tied_head else nn.Embedding
        self.embedding: Any = table(config.vocabulary, config.width)  # or what `spike` puts there
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.width, config.vocabulary, bias=False)

    @property
    def keeps_all_tokens(self) -> bool:
        """Whether a state holds every token, up to its capacity; otherwise it has one size for texts of any length."""
        return self.config.window is None

    def initial_state(
        self, batch: int, capacity: int | None = None, cache: torch.dtype | None = None
    ) -> State:
        """Returns the state before the first token.

        Full attention keeps the first `capacity` tokens (default: the context of the config). Tokens beyond
        it see the kept ones and those of their own call, and are then forgotten without a word: whoever calls
        the model checks that `position + T` stays within the capacity. With a window the state has one size,
        enough for any number of tokens, and `capacity` is not used.

        Keys and values are kept in the type `cache`: a float type, or int8, codes with a scale (`models.cache`);
        None: that of the weights.
        """
        config, weight = self.config, self.norm.weight
        if config.window is None:
            slots = (config.context if capacity is None else capacity) + 1
        else:
            slots = config.sinks + config.window + 1
        shape = (batch, slots, config.key_value_heads, config.head_size)
        return State(
            keys=[empty(weight, shape, cache) for _ in range(config.layers)],
            values=[empty(weight, shape, cache) for _ in range(config.layers)],
            slot_positions=torch.full((batch, slots), -1, dtype=torch.int64, device=weight.device),
            position=torch.zeros(batch, dtype=torch.int64, device=weight.device),
        )

    def forward(self, tokens_BT: Tensor, state: State, last_only: bool = False) -> tuple[Tensor, State]:
        """Returns the logits [B, T, V] ([B, 1, V] of the last token if `last_only`) and the new state."""
        T = tokens_BT.shape[1]
        positions_BT = state.position[:, None] + torch.arange(T, device=tokens_BT.device)
        slots_BT, kept_BT = self.cache_slots(positions_BT, state)
        mask_B1TS = self.attention_mask(positions_BT, state)
        rotation = rotary(positions_BT, self.config, self.norm.weight.dtype)

        x_BTE = self.embedding(tokens_BT)
        keys, values = [], []
        for block, *cache in zip(self.blocks, state.keys, state.values, strict=True):
            x_BTE, new_keys, new_values = block(x_BTE, rotation, mask_B1TS, slots_BT, *cache)
            keys.append(new_keys)
            values.append(new_values)

        if last_only:
            x_BTE = x_BTE[:, -1:]
        x_BTE = self.norm(x_BTE)
        logits_BTV: Tensor = self.embedding.logits(x_BTE) if self.head is None else self.head(x_BTE)

        slot_positions = state.slot_positions.scatter(1, slots_BT, kept_BT)
        return logits_BTV, State(keys, values, slot_positions, state.position + T)

    def cache_slots(self, positions_BT: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Returns the slot of each token [B, T] and the position to note for it [B, T], -1 in the spill slot.

        Sinks have slots of their own in front; the window is a ring behind them. When a call is longer than
        the window, only its last `window` tokens enter the ring, so that no slot but the spill slot is
        written twice.
        """
        window, sinks = self.config.window, self.config.sinks
        spill = state.slot_positions.shape[1] - 1
        if window is None:
            kept = positions_BT < spill
            slots_BT = positions_BT
        else:
            kept = (positions_BT > positions_BT[:, -1:] - window) | (positions_BT < sinks)
            ring_BT = sinks + (positions_BT - sinks) % window
            slots_BT = torch.where(positions_BT < sinks, positions_BT, ring_BT)
        return torch.where(kept, slots_BT, spill), torch.where(kept, positions_BT, -1)

    def attention_mask(self, positions_BT: Tensor, state: State) -> Tensor:
        """Returns which of the cached and new keys each token sees, bool [B, 1, T, S]."""
        window, sinks = self.config.window, self.config.sinks
        keys_BS = torch.cat([state.slot_positions, positions_BT], dim=1)
        key, query = keys_BS[:, None, None, :], positions_BT[:, None, :, None]
        mask = (key >= 0) & (key <= query)
        if window is not None:
            mask = mask & ((key > query - window) | (key < sinks))
        return mask


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config)

    def forward(
        self,
        x_BTE: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask_B1TS: Tensor,
        slots_BT: Tensor,
        keys: Kept,
        values: Kept,
    ) -> tuple[Tensor, Kept, Kept]:
        attended_BTE, keys, values = self.attention(
            self.attention_norm(x_BTE), rotation, mask_B1TS, slots_BT, keys, values
        )
        x_BTE = x_BTE + attended_BTE
        x_BTE = x_BTE + self.feed_forward(self.feed_forward_norm(x_BTE))
        return x_BTE, keys, values


class Attention(nn.Module):
    """Softmax attention with grouped heads over the cached keys and those of this call."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads, self.key_value_heads = config.heads, config.key_value_heads
        self.head_size = config.head_size
        self.query = nn.Linear(config.width, config.heads * config.head_size, config.qkv_bias)
        self.key = nn.Linear(config.width, config.key_value_heads * config.head_size, config.qkv_bias)
        self.value = nn.Linear(config.width, config.key_value_heads * config.head_size, config.qkv_bias)
        self.output = nn.Linear(config.heads * config.head_size, config.width, bias=False)

    def forward(
        self,
        x_BTE: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask_B1TS: Tensor,
        slots_BT: Tensor,
        keys: Kept,
        values: Kept,
    ) -> tuple[Tensor, Kept, Kept]:
        B, T, _ = x_BTE.shape
        q_BTHD = self.query(x_BTE).view(B, T, self.heads, self.head_size)
        k_BTKD = self.key(x_BTE).view(B, T, self.key_value_heads, self.head_size)
        v_BTKD = self.value(x_BTE).view(B, T, self.key_value_heads, self.head_size)
        q_BTHD = rotate(q_BTHD, rotation)
        k_BTKD = rotate(k_BTKD, rotation)

        new_keys, new_values = rounded(k_BTKD, keys), rounded(v_BTKD, values)
        k_BSKD, v_BSKD = beside(keys, new_keys, q_BTHD.dtype), beside(values, new_values, q_BTHD.dtype)
        o_BHTD = F.scaled_dot_product_attention(
            q_BTHD.to(k_BSKD.dtype).transpose(1, 2),
            k_BSKD.transpose(1, 2),
            v_BSKD.transpose(1, 2),
            attn_mask=mask_B1TS,
            enable_gqa=True,
        )
        o_BTE = self.output(o_BHTD.transpose(1, 2).to(x_BTE.dtype).reshape(B, T, self.heads * self.head_size))
        return o_BTE, put(keys, new_keys, slots_BT), put(values, new_values, slots_BT)


class SwiGLU(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.feed_forward, bias=False)
        self.up = nn.Linear(config.width, config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        y_BTE: Tensor = self.down(F.silu(self.gate(x_BTE)) * self.up(x_BTE))
        return y_BTE


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTE: Tensor) -> Tensor:
        x = x_BTE.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x.to(x_BTE.dtype) * self.weight


def rotary(positions_BT: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine [B, T, 1, D] of the rotary embedding; angles are float32 in any model."""
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=positions_BT.device)
    frequencies = config.rope_base ** (-pairs / config.head_size)
    angles = positions_BT[:, :, None, None].float() * frequencies
    angles_BT1D = torch.cat([angles, angles], dim=-1)
    return angles_BT1D.cos().to(dtype), angles_BT1D.sin().to(dtype)


def rotate(x_BTHD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) by its angle: the rotate-half form."""
    cos, sin = rotation
    first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos + torch.cat([-second, first], dim=-1) * sin
