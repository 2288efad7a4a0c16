"""The published sizes of the SpikingBrain models (arXiv 2509.05276), and small ones of the same architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from spikingbrain.models.errors import ConfigError

Softmax = Literal["window", "full"]


@dataclass(frozen=True)
class LayerConfig:
    """What one layer is made of.

    Attributes:
        linear: it has a branch of linear attention.
        softmax: its branch of softmax attention sees the last tokens ("window") or all of them ("full"); None: no branch.
        experts: its feed-forward network is a mixture of experts; otherwise it is dense.
    """

    linear: bool = False
    softmax: Softmax | None = None
    experts: bool = False

    def __post_init__(self) -> None:
        if not self.linear and self.softmax is None:
            raise ConfigError(
                "a layer without attention", where="LayerConfig", hint="linear, softmax or both"
            )


@dataclass(frozen=True)
class SpikingBrainConfig:
    """Sizes and choices of a SpikingBrain model.

    Attributes:
        layers: what each layer is made of, first to last.
        heads, key_heads: heads of the queries; heads of keys, values and states, each shared by heads / key_heads of them.
        feature_map: of queries and keys in linear attention.
        gate: how a state fades: by two linears of rank ``gate_rank``, by one ("full"), or by 1 - key ("tied").
        window: tokens that a token sees in window attention, itself included.
        sinks: learned embeddings in front of the text, which every token sees.
        context: tokens (sinks included) that full attention holds, and the longest text that the model was trained for.
        separate_projections: the linear branch of a layer with two has projections of its own.
        experts, experts_per_token, shared_experts: of layers with experts: how many there are, how many of them a token is
            sent to, and how many more serve every token.
        router: whether expert scores go through softmax over all experts, or through sigmoid one by one.
    """

    vocabulary: int
    width: int
    layers: tuple[LayerConfig, ...]
    heads: int
    key_heads: int
    head_size: int
    feed_forward: int
    window: int
    feature_map: Literal["relu", "sigmoid"] = "relu"
    gate: Literal["low-rank", "full", "tied"] = "low-rank"
    gate_rank: int = 16
    sinks: int = 0
    context: int = 131_072
    separate_projections: bool = False
    experts: int = 16
    experts_per_token: int = 1
    shared_experts: int = 1
    router: Literal["softmax", "sigmoid"] = "softmax"
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    tied_head: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise _wrong(
                f"{self.heads} query heads cannot share {self.key_heads} key heads",
                "each key head serves the same number of query heads",
                "key_heads that divides heads",
            )
        if self.head_size % 2:
            raise _wrong(
                f"head size {self.head_size} is odd",
                "rotary position embedding turns pairs of values",
                "an even head_size",
            )
        if self.window < 1:
            raise _wrong(f"window of {self.window} tokens", "a token sees itself", "a window of 1 or more")
        if not 0 <= self.sinks < self.context:
            raise _wrong(f"{self.sinks} sinks", f"the context holds {self.context} tokens", "0 or more")
        if not 1 <= self.experts_per_token <= self.experts:
            raise _wrong(
                f"{self.experts_per_token} experts per token of {self.experts}", "", "at most all of them"
            )
        if self.gate == "tied" and self.feature_map != "sigmoid":
            raise _wrong(
                f"a gate of 1 - key with the feature map {self.feature_map}",
                "a state fades by a factor between 0 and 1, so keys must lie there",
                'feature_map="sigmoid"',
            )


def spikingbrain_7b() -> SpikingBrainConfig:
    """SpikingBrain-7B: gated linear attention and window attention take turns; converted from Qwen2.5-7B."""
    return SpikingBrainConfig(
        vocabulary=152_064,
        width=3584,
        layers=_alternating(28),
        heads=28,
        key_heads=4,
        head_size=128,
        feed_forward=18_944,
        window=4096,
    )


def spikingbrain_76b() -> SpikingBrainConfig:
    """SpikingBrain-76B-A12B: linear and softmax attention side by side in each layer, experts, sinks."""
    return SpikingBrainConfig(
        vocabulary=152_064,
        width=3584,
        layers=tuple(
            LayerConfig(
                linear=True,
                softmax="full" if number % 7 == 0 else "window",
                experts=number not in (1, 2, 3, 5, 7, 9, 11),
            )
            for number in range(1, 29)
        ),
        heads=28,
        key_heads=4,
        head_size=128,
        feed_forward=18_944,
        window=4096,
        feature_map="sigmoid",
        gate="tied",
        sinks=128,
    )


def spikingbrain_1b() -> SpikingBrainConfig:
    """Like the 7B in the size of Llama-3.2-1B; the geometry of the published 1B is not known."""
    return SpikingBrainConfig(
        vocabulary=128_256,
        width=2048,
        layers=_alternating(16),
        heads=32,
        key_heads=8,
        head_size=64,
        feed_forward=8192,
        window=4096,
        tied_head=True,
    )


def tiny_7b(vocabulary: int = 256) -> SpikingBrainConfig:
    """The 7B's architecture in a size for tests: two layers of each kind, a window of 8 tokens."""
    return replace(
        spikingbrain_7b(),
        vocabulary=vocabulary,
        width=64,
        layers=_alternating(4),
        heads=4,
        key_heads=2,
        head_size=16,
        feed_forward=160,
        window=8,
        context=128,
    )


def tiny_76b(vocabulary: int = 256) -> SpikingBrainConfig:
    """The 76B's architecture in a size for tests: dense and with experts, window and full, 4 experts, 3 sinks."""
    return replace(
        spikingbrain_76b(),
        vocabulary=vocabulary,
        width=64,
        layers=(
            LayerConfig(linear=True, softmax="window"),
            LayerConfig(linear=True, softmax="window", experts=True),
            LayerConfig(linear=True, softmax="full", experts=True),
        ),
        heads=4,
        key_heads=2,
        head_size=16,
        feed_forward=96,
        window=8,
        sinks=3,
        context=128,
        experts=4,
    )


def _alternating(layers: int) -> tuple[LayerConfig, ...]:
    return tuple(
        LayerConfig(linear=True) if i % 2 == 0 else LayerConfig(softmax="window") for i in range(layers)
    )


def _wrong(what: str, why: str, hint: str) -> ConfigError:
    return ConfigError(what, where="SpikingBrainConfig", why=why, hint=hint)
