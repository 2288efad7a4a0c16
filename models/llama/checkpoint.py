"""Llama and Qwen2 checkpoints as Hugging Face publishes them: `config.json` and safetensors files.

Nothing is transposed, split or merged: every tensor is a parameter under another name, and a checkpoint that was loaded in
its stored type is saved bit for bit. A file may hold a copy of a tied head; it is not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from spikingbrain.models.checkpoint import Checkpoint, Entry, fill, setting
from spikingbrain.models.checkpoint import save as save_checkpoint
from spikingbrain.models.errors import WeightsError
from spikingbrain.models.llama.model import Llama, LlamaConfig

MODEL = [
    Entry("model.embed_tokens.weight", "embedding.weight"),
    Entry("model.norm.weight", "norm.weight"),
]
HEAD = Entry("lm_head.weight", "head.weight")
LAYER = [
    Entry("input_layernorm.weight", "attention_norm.weight"),
    Entry("self_attn.q_proj.weight", "attention.query.weight"),
    Entry("self_attn.k_proj.weight", "attention.key.weight"),
    Entry("self_attn.v_proj.weight", "attention.value.weight"),
    Entry("self_attn.o_proj.weight", "attention.output.weight"),
    Entry("post_attention_layernorm.weight", "feed_forward_norm.weight"),
    Entry("mlp.gate_proj.weight", "feed_forward.gate.weight"),
    Entry("mlp.up_proj.weight", "feed_forward.up.weight"),
    Entry("mlp.down_proj.weight", "feed_forward.down.weight"),
]
BIASES = [
    Entry("self_attn.q_proj.bias", "attention.query.bias"),
    Entry("self_attn.k_proj.bias", "attention.key.bias"),
    Entry("self_attn.v_proj.bias", "attention.value.bias"),
]


def entries(config: LlamaConfig) -> Iterator[Entry]:
    """Yields the stored name of every parameter."""
    yield from MODEL
    if not config.tied_head:
        yield HEAD
    for i in range(config.layers):
        for entry in (*LAYER, *(BIASES if config.qkv_bias else [])):
            yield Entry(f"model.layers.{i}.{entry.stored}", f"blocks.{i}.{entry.parameter}")


def load(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    window: int | None = None,
    sinks: int = 0,
) -> Llama:
    """Returns the model of a checkpoint, in the stored types or in ``dtype``; `window` and `sinks` choose the attention.

    Raises WeightsError for another kind of model, and one that lists every tensor that does not fit.
    """
    checkpoint = Checkpoint(folder)
    config = read_config(checkpoint, window=window, sinks=sinks)
    if config.tied_head:
        checkpoint.tensors.pop(HEAD.stored, None)
    with torch.device("meta"):
        model = Llama(config)
    fill(model, checkpoint, entries(config), dtype)
    return model.eval()


def save(
    model: Llama, folder: str | os.PathLike[str], companions: str | os.PathLike[str] | None = None
) -> None:
    """Writes a checkpoint; tokenizer files are copied from ``companions``. Raises WeightsError if the folder is not empty."""
    parameters = dict(model.named_parameters())
    tensors = ((e.stored, parameters[e.parameter]) for e in entries(model.config))
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    save_checkpoint(folder, tensors, {**write_config(model.config), "torch_dtype": dtype}, companions)


def read_config(checkpoint: Checkpoint, *, window: int | None = None, sinks: int = 0) -> LlamaConfig:
    """Returns the sizes that config.json gives."""
    kind = checkpoint.config.get("model_type")
    if kind not in ("llama", "qwen2"):
        raise WeightsError(
            f"model_type {kind!r} is neither llama nor qwen2",
            where=str(checkpoint.folder),
            why="this loader knows the names and the arithmetic of these",
        )
    # transformers 5 writes rope_parameters; before, rope_theta and rope_scaling stood by themselves.
    rope: dict[str, Any] = (
        checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    )
    supported = {
        "hidden_act": (checkpoint.config.get("hidden_act", "silu"), "silu"),
        "the scaling of rotary embedding": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "mlp_bias": (checkpoint.config.get("mlp_bias", False), False),
        "attention_bias": (checkpoint.config.get("attention_bias", False), False),
        "use_sliding_window": (checkpoint.config.get("use_sliding_window", False), False),
    }
    for key, (value, only) in supported.items():
        if value != only:
            raise WeightsError(
                f"{key} is {value!r}, and only {only!r} is supported", where=str(checkpoint.folder)
            )
    heads, width = (setting(checkpoint, key) for key in ("num_attention_heads", "hidden_size"))
    return LlamaConfig(
        vocabulary=setting(checkpoint, "vocab_size"),
        width=width,
        layers=setting(checkpoint, "num_hidden_layers"),
        heads=heads,
        key_value_heads=setting(checkpoint, "num_key_value_heads", default=heads),
        head_size=setting(checkpoint, "head_dim", default=width // heads),
        feed_forward=setting(checkpoint, "intermediate_size"),
        context=setting(checkpoint, "max_position_embeddings"),
        rope_base=rope.get("rope_theta", checkpoint.config.get("rope_theta", 10_000.0)),
        norm_eps=setting(checkpoint, "rms_norm_eps"),
        tied_head=setting(checkpoint, "tie_word_embeddings", default=False),
        qkv_bias=kind == "qwen2",
        window=window,
        sinks=sinks,
    )


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """Returns the content of a config.json, as both older and newer versions of transformers read it."""
    kind = "qwen2" if config.qkv_bias else "llama"
    return {
        "model_type": kind,
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
    }
