"""SpikingBrain checkpoints: `load` and `save` in the published names, and in our own for models that have none.

| kind | config.json | tensors |
| --- | --- | --- |
| the 7B and its like | `model_type` gla_swa | the tables below |
| its W8ASpike variant | the same | the same; beside each linear weight its scales, see `spiking_checkpoint` |
| the 76B and its like | `model_type` spikingbrain_hybrid (ours: none is published) | named as in `model` |

Nothing is transposed, split or merged: every tensor is a parameter under another name, and a checkpoint that was loaded in
its stored types is saved bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from spikingbrain.models.checkpoint import Checkpoint, Entry, fill, setting
from spikingbrain.models.checkpoint import save as save_checkpoint
from spikingbrain.models.errors import WeightsError
from spikingbrain.models.spikingbrain.config import LayerConfig, SpikingBrainConfig
from spikingbrain.models.spikingbrain.model import SpikingBrain

PUBLISHED, OURS = "gla_swa", "spikingbrain_hybrid"

MODEL = [
    Entry("model.embeddings.weight", "embedding.weight"),
    Entry("model.norm.weight", "norm.weight"),
]
HEAD = Entry("lm_head.weight", "head.weight")
LAYER = [
    Entry("attn_norm.weight", "attention_norm.weight"),
    Entry("mlp_norm.weight", "feed_forward_norm.weight"),
    *(
        Entry(f"attn.{stored}_proj.{part}", f"attention.projections.{ours}.{part}")
        for stored, ours in (("q", "query"), ("k", "key"), ("v", "value"))
        for part in ("weight", "bias")
    ),
    Entry("attn.o_proj.weight", "attention.projections.output.weight"),
    *(Entry(f"mlp.{name}_proj.weight", f"feed_forward.{name}.weight") for name in ("gate", "up", "down")),
]
GATE = {
    "low-rank": [
        Entry("attn.gk_proj.0.weight", "attention.linear.gate.0.weight"),
        Entry("attn.gk_proj.1.weight", "attention.linear.gate.1.weight"),
        Entry("attn.gk_proj.1.bias", "attention.linear.gate.1.bias"),
    ],
    "full": [
        Entry("attn.gk_proj.weight", "attention.linear.gate.weight"),
        Entry("attn.gk_proj.bias", "attention.linear.gate.bias"),
    ],
}
LINEAR = [Entry("attn.g_norm.weight", "attention.linear.norm.weight")]


def entries(config: SpikingBrainConfig) -> Iterator[Entry]:
    """Yields the published name of every parameter; raises WeightsError for an architecture that has none."""
    if not is_published(config):
        raise WeightsError(
            "no names are published for this architecture",
            why="only gated linear attention and window attention by turns, with dense feed-forward networks, have them",
            hint="save(), which uses our own names where there are no others",
        )
    yield from MODEL
    if not config.tied_head:
        yield HEAD
    for i, layer in enumerate(config.layers):
        of_linear = [*GATE[config.gate], *LINEAR] if layer.linear else []
        for entry in (*LAYER, *of_linear):
            yield Entry(f"model.layers.{i}.{entry.stored}", f"blocks.{i}.{entry.parameter}")


def is_published(config: SpikingBrainConfig) -> bool:
    one_branch = all(
        layer.linear != (layer.softmax == "window") and not layer.experts for layer in config.layers
    )
    return one_branch and not config.sinks and config.gate in GATE and config.feature_map == "relu"


def load(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    window_of_flash_attention: bool = False,
) -> SpikingBrain:
    """Returns the model of a checkpoint, in the stored types or in ``dtype``.

    A window of w tokens is token t and the w - 1 before it, as the technical report says and the published code does in its
    SDPA form; ``window_of_flash_attention`` sees one token more, as its flash-attention form does. Raises WeightsError.
    """
    checkpoint = Checkpoint(folder)
    config = read_config(checkpoint, window_of_flash_attention=window_of_flash_attention)
    with torch.device("meta"):
        model = SpikingBrain(config)
    fill(model, checkpoint, names(config, model), dtype)
    return model.eval()


def names(config: SpikingBrainConfig, model: SpikingBrain) -> list[Entry]:
    """Returns what each parameter is called in a checkpoint: by published names where there are any."""
    if is_published(config):
        return list(entries(config))
    return [Entry(name, name) for name, _ in model.named_parameters(remove_duplicate=False)]


def save(
    model: SpikingBrain,
    folder: str | os.PathLike[str],
    companions: str | os.PathLike[str] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint that `load` reads, the tensors bit for bit; tokenizer files are copied from ``companions``, and
    ``files`` (name -> text) written beside them.

    Raises WeightsError if the folder is not empty.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = ((e.stored, parameters[e.parameter]) for e in names(model.config, model))
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    save_checkpoint(folder, tensors, {**write_config(model.config), "torch_dtype": dtype}, companions, files)


def read_config(checkpoint: Checkpoint, *, window_of_flash_attention: bool = False) -> SpikingBrainConfig:
    """Returns the sizes that config.json gives, of either kind."""
    kind = checkpoint.config.get("model_type")
    if kind == OURS:
        return _read_our_config(checkpoint)
    if kind != PUBLISHED:
        raise WeightsError(
            f"model_type {kind!r} is no SpikingBrain",
            where=str(checkpoint.folder),
            why=f"their config.json says {PUBLISHED} or {OURS}",
            hint="for a Qwen2 or Llama checkpoint: spikingbrain convert",
        )
    for key, only in {"use_short_conv": False, "hidden_act": "swish"}.items():
        if (value := checkpoint.config.get(key, only)) != only:
            raise WeightsError(
                f"{key} is {value!r}", where=str(checkpoint.folder), why=f"only {only!r} is known"
            )
    layers, heads, width = (
        setting(checkpoint, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    windows = set(setting(checkpoint, "attn_layers", default=range(1, layers, 2)))
    return SpikingBrainConfig(
        vocabulary=setting(checkpoint, "vocab_size"),
        width=width,
        layers=tuple(
            LayerConfig(softmax="window") if i in windows else LayerConfig(linear=True) for i in range(layers)
        ),
        heads=heads,
        key_heads=setting(checkpoint, "num_key_value_heads"),
        head_size=setting(checkpoint, "head_dim", default=width // heads),
        feed_forward=setting(checkpoint, "intermediate_size"),
        window=setting(checkpoint, "sliding_window") + window_of_flash_attention,
        gate="full"
        if any(name.endswith("attn.gk_proj.weight") for name in checkpoint.tensors)
        else "low-rank",
        gate_rank=_gate_rank(checkpoint),
        context=setting(checkpoint, "max_position_embeddings", default=131_072),
        rope_base=setting(checkpoint, "rope_theta", default=1e6),
        norm_eps=setting(checkpoint, "norm_eps", default=1e-6),
        tied_head=setting(checkpoint, "tie_word_embeddings", default=False),
    )


def write_config(config: SpikingBrainConfig) -> dict[str, Any]:
    """Returns the content of a config.json."""
    if not is_published(config):
        return {"model_type": OURS, "architectures": ["SpikingBrain"], **asdict(config)}
    return {
        "model_type": PUBLISHED,
        "architectures": ["GLAswaForCausalLM"],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward,
        "attn_layers": [i for i, layer in enumerate(config.layers) if layer.softmax],
        "sliding_window": config.window,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "swish",
        "use_short_conv": False,
    }


def _gate_rank(checkpoint: Checkpoint) -> int:
    for name, shape in checkpoint.tensors.items():
        if name.endswith("attn.gk_proj.0.weight"):
            return shape[0]
    return 16


def _read_our_config(checkpoint: Checkpoint) -> SpikingBrainConfig:
    fields: Mapping[str, Any] = SpikingBrainConfig.__dataclass_fields__
    given = {name: value for name, value in checkpoint.config.items() if name in fields}
    try:
        given["layers"] = tuple(LayerConfig(**layer) for layer in given["layers"])
        return SpikingBrainConfig(**given)
    except (KeyError, TypeError) as error:
        raise WeightsError(
            "config.json does not describe a model", where=str(checkpoint.folder), why=str(error)
        ) from error
