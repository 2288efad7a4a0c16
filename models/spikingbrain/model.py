"""SpikingBrain in plain PyTorch: a pure function `(tokens, state) -> (logits, state)`.

Layers of the 7B take turns: gated linear attention, which keeps a matrix per head for any length of text, and softmax
attention over a window. Layers of the 76B have both, side by side, and experts in most feed-forward networks.

Prefill and decode are the same call: any number of tokens may be fed at a time, and splitting a text differently changes
nothing but rounding. The state is explicit; it is never changed in place.

Letters in tensor names
  B  batch               H  query heads    R  slots of a cache of keys and values
  T  tokens of a call    S  key heads      N  keys seen by a call: R + T
  E  model width         D  head size      C  vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spikingbrain.models.cache import Kept, empty, slots
from spikingbrain.models.embedding import TiedEmbedding
from spikingbrain.models.spikingbrain.attention import Attention
from spikingbrain.models.spikingbrain.config import LayerConfig, SpikingBrainConfig
from spikingbrain.models.spikingbrain.feed_forward import MixtureOfExperts, SwiGLU
from spikingbrain.models.spikingbrain.moment import Cache, Moment, moment_of_sinks, moment_of_text, slots_of


@dataclass
class State:
    """What the model remembers of the tokens seen.

    Batch entries are independent and may be at different positions. The last slot of each cache is a spill slot: it takes
    the tokens that need not be kept and is never read.
    """

    memories: list[
        Tensor
    ]  # per layer with linear attention [B, S, D, D], key size x value size, float32 or wider
    keys: list[Kept]  # per layer with softmax attention [B, R, S, D], after rotary embedding
    values: list[Kept]  # the same shape
    position: Tensor  # [B] int64: sinks and tokens seen


pytree.register_dataclass(State)


class SpikingBrain(nn.Module):
    def __init__(self, config: SpikingBrainConfig):
        super().__init__()
        self.config = config
        table = TiedEmbedding if config.tied_head else nn.Embedding
        self.embedding: Any = table(config.vocabulary, config.width)  # or what `spike` puts there
        self.sinks = nn.Parameter(torch.randn(config.sinks, config.width) * 0.02) if config.sinks else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.width, config.vocabulary, bias=False)

    @property
    def keeps_all_tokens(self) -> bool:
        """Whether a state holds every token, up to its capacity; otherwise it has one size for texts of any length."""
        return any(layer.softmax == "full" for layer in self.config.layers)

    def initial_state(
        self, batch: int, capacity: int | None = None, cache: torch.dtype | None = None
    ) -> State:
        """Returns the state before the first token of the text, which has seen the sinks.

        Full attention keeps the first ``capacity`` tokens, sinks included (default: the context of the config). Tokens beyond
        it see the kept ones and those of their own call, and are then forgotten without a word: whoever calls the model
        checks that ``position + T`` stays within the capacity. Without full attention a state has one size, enough for any
        number of tokens.

        Keys and values are kept in the type ``cache``: a float type, or int8, codes with a scale (`models.cache`); None: that
        of the weights.
        """
        config, weight = self.config, self.norm.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        heads, size = config.key_heads, config.head_size
        memories = [
            weight.new_zeros(batch, heads, size, size, dtype=wide) for layer in config.layers if layer.linear
        ]
        shapes = [
            (batch, slots_of(layer.softmax, config, capacity), heads, size)
            for layer in config.layers
            if layer.softmax is not None
        ]
        state = State(
            memories,
            [empty(weight, shape, cache) for shape in shapes],
            [empty(weight, shape, cache) for shape in shapes],
            torch.zeros(batch, dtype=torch.int64, device=weight.device),
        )
        if self.sinks is None:
            return state
        x_BTE = self.sinks.expand(batch, -1, -1)
        _, state = self.run(
            x_BTE, state, moment_of_sinks(config, state.position, _slots(config, state), weight.dtype)
        )
        return state

    def forward(
        self, tokens_BT: Tensor, state: State, lengths_B: Tensor | None = None, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """Returns the logits [B, T, C] ([B, 1, C] of the last token if ``last_only``) and the new state.

        Texts of a batch may differ in length: of entry b the first ``lengths_B[b]`` tokens count, the rest is padding that
        leaves no trace in the state.
        """
        x_BTE = self.embedding(tokens_BT)
        moment = moment_of_text(
            self.config,
            state.position,
            tokens_BT.shape[1],
            lengths_B,
            _slots(self.config, state),
            x_BTE.dtype,
        )
        x_BTE, state = self.run(x_BTE, state, moment)
        if last_only:
            x_BTE = x_BTE[:, -1:] if lengths_B is None else _last(x_BTE, lengths_B)
        x_BTE = self.norm(x_BTE)
        logits_BTC: Tensor = self.embedding.logits(x_BTE) if self.head is None else self.head(x_BTE)
        return logits_BTC, state

    def run(self, x_BTE: Tensor, state: State, moment: Moment) -> tuple[Tensor, State]:
        """Takes vectors through all layers; returns them, and the state after them."""
        new = State([], [], [], moment.next_position)
        before = zip_states(self.config, state)
        for block, (memory_BSDD, cache) in zip(self.blocks, before, strict=True):
            x_BTE, memory_BSDD, cache = block(x_BTE, memory_BSDD, cache, moment)
            if memory_BSDD is not None:
                new.memories.append(memory_BSDD)
            if cache is not None:
                new.keys.append(cache[0])
                new.values.append(cache[1])
        return x_BTE, new


class Block(nn.Module):
    def __init__(self, config: SpikingBrainConfig, layer: LayerConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.feed_forward = (
            MixtureOfExperts(config) if layer.experts else SwiGLU(config.width, config.feed_forward)
        )

    def forward(
        self, x_BTE: Tensor, memory_BSDD: Tensor | None, cache: Cache | None, moment: Moment
    ) -> tuple[Tensor, Tensor | None, Cache | None]:
        attended_BTE, memory_BSDD, cache = self.attention(
            self.attention_norm(x_BTE), memory_BSDD, cache, moment
        )
        x_BTE = x_BTE + attended_BTE
        return x_BTE + self.feed_forward(self.feed_forward_norm(x_BTE)), memory_BSDD, cache


def zip_states(config: SpikingBrainConfig, state: State) -> Iterator[tuple[Tensor | None, Cache | None]]:
    """Yields what belongs to each layer: its memory, its keys and values; None for what it has not."""
    memories, caches = iter(state.memories), zip(state.keys, state.values, strict=True)
    for layer in config.layers:
        yield next(memories) if layer.linear else None, next(caches) if layer.softmax is not None else None


def _slots(config: SpikingBrainConfig, state: State) -> dict[str, int]:
    """Returns how many slots the caches of each kind of softmax attention have."""
    kinds = [layer.softmax for layer in config.layers if layer.softmax is not None]
    return {kind: slots(keys) for kind, keys in zip(kinds, state.keys, strict=True)}


def _last(x_BTE: Tensor, lengths_B: Tensor) -> Tensor:
    """Returns the last token of each text, [B, 1, E]; of a text without tokens, any of the padding."""
    last_B = (lengths_B - 1).clamp(min=0)
    return torch.gather(x_BTE, 1, last_B[:, None, None].expand(-1, 1, x_BTE.shape[2]))
