"""Makes a SpikingBrain of a Llama or Qwen2: projections and feed-forward networks are taken over, little is new.

    model, report = convert(load("Qwen2.5-7B"), style_7b(config, window=4096))

Softmax attention over a window works at once if something is there to attend to at the far end: a sink that begins as the
embedding of the token which texts begin with. Linear attention has to be trained afterwards, one layer at a time (`fit`) or
all together.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from spikingbrain.models.checkpoint import replace_parameter
from spikingbrain.models.errors import ConfigError
from spikingbrain.models.llama.model import Llama, LlamaConfig
from spikingbrain.models.spikingbrain.config import (
    LayerConfig,
    SpikingBrainConfig,
    spikingbrain_7b,
    spikingbrain_76b,
)
from spikingbrain.models.spikingbrain.feed_forward import MixtureOfExperts
from spikingbrain.models.spikingbrain.model import SpikingBrain

# Of a fresh router: scores differ by about a percent, which breaks the tie between experts that are copies of each other.
ROUTER_DEVIATION = 0.01

OUTSIDE = {"embedding.weight": "embedding.weight", "norm.weight": "norm.weight", "head.weight": "head.weight"}
IN_BLOCK = {
    "attention_norm.weight": "attention_norm.weight",
    "feed_forward_norm.weight": "feed_forward_norm.weight",
    **{
        f"attention.projections.{name}.{part}": f"attention.{name}.{part}"
        for name in ("query", "key", "value", "output")
        for part in ("weight", "bias")
    },
    **{
        f"attention.linear_projections.{name}.{part}": f"attention.{name}.{part}"
        for name in ("query", "key", "value", "output")
        for part in ("weight", "bias")
    },
    **{f"feed_forward.{name}.weight": f"feed_forward.{name}.weight" for name in ("gate", "up", "down")},
}
TO_EXPERTS = {
    f"feed_forward.experts.{name}.weight": f"feed_forward.{name}.weight" for name in ("gate", "up", "down")
}


@dataclass
class ConversionReport:
    """What became of each parameter: copied as it was, upcycled into experts, or new and how it begins."""

    config: SpikingBrainConfig
    copied: list[str] = field(default_factory=list)
    upcycled: list[str] = field(default_factory=list)
    new: dict[str, str] = field(default_factory=dict)  # parameter -> how it begins
    sizes: dict[str, int] = field(default_factory=dict)  # "copied", "upcycled", "new" -> values

    def __str__(self) -> str:
        layers = self.config.layers
        lines = [
            f"{len(layers)} layers: {sum(x.linear for x in layers)} with linear attention, "
            f"{sum(x.softmax == 'window' for x in layers)} with a window of {self.config.window}, "
            f"{sum(x.softmax == 'full' for x in layers)} with full attention, "
            f"{sum(x.experts for x in layers)} with experts; {self.config.sinks} sinks",
            f"  copied: {len(self.copied)} tensors, {self.sizes['copied'] / 1e6:.2f} million values",
        ]
        if self.upcycled:
            lines.append(
                f"  upcycled: {len(self.upcycled)} tensors, {self.sizes['upcycled'] / 1e6:.2f} million values"
            )
        kinds: dict[str, list[str]] = {}
        for name, how in self.new.items():
            inside = ".".join(part for part in name.split(".")[2:]) if name.startswith("blocks.") else name
            kinds.setdefault(f"{inside} ({how})", []).append(name)
        lines.append(f"  new: {len(self.new)} tensors, {self.sizes['new'] / 1e6:.2f} million values")
        lines += [f"    {len(names)} x {kind}" for kind, names in kinds.items()]
        return "\n".join(lines)


def style_7b(
    source: LlamaConfig, window: int = 4096, linear_layers: Collection[int] | None = None, sinks: int = 0
) -> SpikingBrainConfig:
    """Returns the sizes of a source model in the 7B's style.

    ``linear_layers``: counted from 0, those with gated linear attention; the others have window attention. By default every
    second one, the first among them. Raises ConfigError for a layer that the source does not have.
    """
    chosen = range(0, source.layers, 2) if linear_layers is None else linear_layers
    _check_layers(source, chosen)
    layers = tuple(
        LayerConfig(linear=True) if i in chosen else LayerConfig(softmax="window")
        for i in range(source.layers)
    )
    return replace(spikingbrain_7b(), **_sizes(source, window), layers=layers, sinks=sinks)  # type: ignore[arg-type]


def style_76b(
    source: LlamaConfig,
    window: int = 4096,
    full_layers: Collection[int] | None = None,
    dense_layers: Collection[int] | None = None,
    sinks: int = 128,
    experts: int = 16,
    separate_projections: bool = False,
) -> SpikingBrainConfig:
    """Returns the sizes of a source model in the 76B's style: two branches in each layer, and experts.

    Layers are counted from 0. ``full_layers``: those with full attention beside the linear one; by default every seventh.
    ``dense_layers``: those without experts; by default the first three and every second one up to the eleventh. Raises
    ConfigError for a layer that the source does not have.
    """
    full = range(6, source.layers, 7) if full_layers is None else full_layers
    published = (0, 1, 2, 4, 6, 8, 10)
    dense = [i for i in published if i < source.layers] if dense_layers is None else dense_layers
    _check_layers(source, [*full, *dense])
    layers = tuple(
        LayerConfig(linear=True, softmax="full" if i in full else "window", experts=i not in dense)
        for i in range(source.layers)
    )
    return replace(
        spikingbrain_76b(),
        **_sizes(source, window),  # type: ignore[arg-type]
        layers=layers,
        sinks=sinks,
        experts=experts,
        separate_projections=separate_projections,
    )


def convert(
    source: Llama,
    config: SpikingBrainConfig,
    sink_token: int | None = None,
    exact_experts: bool = False,
    seed: int = 0,
) -> tuple[SpikingBrain, ConversionReport]:
    """Returns a SpikingBrain with the weights of ``source``, whose tensors it shares, and a report of every parameter.

    Args:
        config: from `style_7b` or `style_76b` of the source's config.
        sink_token: the token whose embedding the sinks begin as, with a little noise if there are several; None: like
            embeddings drawn at random. One sink that is the token which texts begin with lets windows work without training.
        exact_experts: see `expert_factors`.
        seed: of what is drawn.

    New parameters: norms are 1; biases of projections and gates 0, so that a state fades by half in about 16 tokens; gate
    weights small, routers nearly 0. A dense network is copied to every expert and scaled as `expert_factors` says.
    """
    with torch.device("meta"):
        model = SpikingBrain(config)
    given = dict(source.named_parameters())
    report = ConversionReport(config, sizes={"copied": 0, "upcycled": 0, "new": 0})
    like = source.embedding.weight
    factors = expert_factors(config, exact_experts)
    generator = torch.Generator(like.device).manual_seed(seed)

    def draw(shape: torch.Size, deviation: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=like.device) * deviation

    for name, parameter in list(model.named_parameters()):
        origin = given.get(_origin(name, {**OUTSIDE, **IN_BLOCK}))
        to_expert = given.get(_origin(_unshared(name), TO_EXPERTS)) if ".feed_forward." in name else None
        if origin is not None:
            value, fate = origin.detach(), "copied"
            report.copied.append(name)
        elif to_expert is not None:
            factor = factors[name.split(".")[-2]]
            scaled = (to_expert.detach().float() * factor).to(like.dtype)
            value = scaled if parameter.dim() == 2 else scaled.expand(parameter.shape).contiguous()
            fate = "upcycled"
            report.upcycled.append(name)
        else:
            value, how = _begin(name, parameter, model, source, sink_token, draw)
            value, fate = value.to(like.dtype), "new"
            report.new[name] = how
        if value.shape != parameter.shape:
            raise ConfigError(
                f"{name} has shape {list(parameter.shape)}, the source has {list(value.shape)}",
                where="convert",
                why="the config is not that of the source in another style",
                hint="style_7b(source.config), style_76b(source.config)",
            )
        report.sizes[fate] += value.numel()
        replace_parameter(model, name, value)
    return model.eval(), report


def expert_factors(config: SpikingBrainConfig, exact: bool = False) -> dict[str, float]:
    """Returns what the three matrices of an expert are multiplied by when it is a copy of a dense network.

    All experts, S shared ones and k of N routed ones with their scores, add up to S + k / N times the dense network (with
    sigmoid scores of 1/2, S + k / 2). The technical report puts the cube root of the inverse on each matrix; since silu is not
    linear, outputs then agree within a percent for the 76B, and less well for other numbers. ``exact``: the square root on
    `up` and `down`, and `gate` as it was, which is the dense network exactly.
    """
    score = 1 / config.experts if config.router == "softmax" else 0.5
    size = config.shared_experts + config.experts_per_token * score
    if exact:
        return {"gate": 1.0, "up": size**-0.5, "down": size**-0.5}
    return dict.fromkeys(("gate", "up", "down"), size ** (-1 / 3))


def _begin(
    name: str,
    parameter: Tensor,
    model: SpikingBrain,
    source: Llama,
    sink_token: int | None,
    draw: object,
) -> tuple[Tensor, str]:
    """Returns the first value of a parameter that the source does not have, and how it was made."""
    assert callable(draw)
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    table = source.embedding.weight.detach()
    if name == "sinks":
        if sink_token is None:
            return draw(parameter.shape, 1.0) * table.float().std() + table.float().mean(0), "like embeddings"
        noise = draw(parameter.shape, 0.1) * table.float().std()
        noise[0] = 0  # the first is the token itself
        return table[sink_token].float() + noise, f"embedding of token {sink_token}"
    if isinstance(module, nn.RMSNorm) or attribute == "branch_weights":
        return torch.ones(parameter.shape, device=table.device), "1"
    if attribute == "bias":
        return torch.zeros(parameter.shape, device=table.device), "0"
    if isinstance(model.get_submodule(owner.rpartition(".")[0]), MixtureOfExperts):
        return draw(parameter.shape, ROUTER_DEVIATION * parameter.shape[1] ** -0.5), "nearly 0"
    return draw(parameter.shape, 0.02), "deviation 0.02"


def _origin(name: str, table: dict[str, str]) -> str:
    """Returns what a parameter of ours is called in the source; "" if it has none there."""
    if not name.startswith("blocks."):
        return table.get(name, "")
    _, number, inside = name.split(".", 2)
    return f"blocks.{number}.{table[inside]}" if inside in table else ""


def _unshared(name: str) -> str:
    """Returns the name of the routed experts' weight for that of a shared expert."""
    before, shared, after = name.partition(".shared.")
    return f"{before}.experts.{after.split('.', 1)[1]}" if shared else name


def _sizes(source: LlamaConfig, window: int) -> dict[str, object]:
    return {
        "vocabulary": source.vocabulary,
        "width": source.width,
        "heads": source.heads,
        "key_heads": source.key_value_heads,
        "head_size": source.head_size,
        "feed_forward": source.feed_forward,
        "window": window,
        "context": source.context,
        "rope_base": source.rope_base,
        "norm_eps": source.norm_eps,
        "tied_head": source.tied_head,
    }


def _check_layers(source: LlamaConfig, chosen: Collection[int]) -> None:
    beyond = sorted(i for i in chosen if not 0 <= i < source.layers)
    if beyond:
        raise ConfigError(
            f"no layer {', '.join(map(str, beyond))}",
            where="conversion",
            why=f"layers are counted from 0 to {source.layers - 1}",
        )
