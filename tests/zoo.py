"""The architectures by which the `torch.compile` backend is proven: models of `transformers` with random weights.

    model = ZOO["llama"].build("tiny")
    output = model(**ZOO["llama"].inputs("tiny", seed=0))

"tiny" is for tests (a compile takes seconds), "small" for benchmarks (a forward takes tens of milliseconds).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def _hide_torchvision() -> None:
    """transformers would import torchvision for image files; a build that does not fit torch then breaks every model."""
    visible = "torchvision" in sys.modules
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # the answer is cached
    if not visible:
        del sys.modules["torchvision"]


_hide_torchvision()
import transformers  # noqa: E402

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    image: int
    patch: int
    window: int
    samples: int

    @property
    def head(self) -> int:
        return self.width // self.heads


SIZES = {
    "tiny": Size(2, 64, 4, 128, 13, 2, 32, 8, 4, 1600),
    "small": Size(6, 384, 6, 4000, 96, 1, 168, 14, 7, 32000),
}


@dataclass(frozen=True)
class ZooModel:
    name: str
    category: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[str, int], Inputs]


ZOO: dict[str, ZooModel] = {}


def loss(output: Any) -> Tensor:
    """Returns the sum over the output's floating tensors of their mean square."""
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.stack([t.float().square().mean() for t in tensors]).sum()


def _add(
    name: str,
    category: str,
    auto: type,
    inputs: Callable[[Size, torch.Generator], Inputs],
    config: Callable[[Size], dict[str, Any]],
    type_: str = "",
    longest: int = 1000,
) -> None:
    sizes = {size: replace(s, length=min(s.length, longest)) for size, s in SIZES.items()}

    def build(size: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = transformers.AutoConfig.for_model(type_ or name, **config(sizes[size]))
            model = auto.from_config(made).eval()  # type: ignore[attr-defined]
            _roughen(model)
        return model

    def make(size: str, seed: int = 0) -> Inputs:
        return inputs(sizes[size], torch.Generator().manual_seed(seed))

    ZOO[name] = ZooModel(name, category, build, make)


@torch.no_grad()
def _roughen(model: nn.Module) -> None:
    """Moves biases off 0 and norm weights off 1, so that losing one of them shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)


# Text. Identifiers 0, 1 and 2 mean padding, begin and end everywhere.


def _text(s: Size) -> dict[str, Any]:
    return {
        "vocab_size": s.vocabulary,
        "hidden_size": s.width,
        "intermediate_size": 2 * s.width,
        "ffn_dim": 2 * s.width,  # OPT
        "hidden_dim": 2 * s.width,  # DistilBERT
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "max_position_embeddings": 2 * s.length,
        "initializer_range": s.width**-0.5,  # the usual 0.02 leaves attention nearly uniform at these widths
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tokens(s: Size, generator: torch.Generator, length: int = 0) -> Tensor:
    return torch.randint(3, s.vocabulary, (s.batch, length or s.length), generator=generator)


def _padded(s: Size, generator: torch.Generator) -> Inputs:
    """Tokens of which the last row has three of padding."""
    tokens, mask = _tokens(s, generator), torch.ones(s.batch, s.length, dtype=torch.int64)
    tokens[-1, -3:] = mask[-1, -3:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _decoder(
    name: str, category: str, extra: Callable[[Size], dict[str, Any]] = lambda s: {}, longest: int = 1000
) -> None:
    def inputs(s: Size, generator: torch.Generator) -> Inputs:
        return {"input_ids": _tokens(s, generator)}

    _add(
        name,
        category,
        transformers.AutoModelForCausalLM,
        inputs,
        lambda s: _text(s) | extra(s),
        longest=longest,
    )


def _grouped(s: Size) -> dict[str, Any]:
    return {"num_key_value_heads": 2}


def _sliding(s: Size) -> dict[str, Any]:
    return _grouped(s) | {"head_dim": s.head, "sliding_window": s.length // 2}


for _name in ("llama", "qwen2", "olmo2", "granite"):
    _decoder(_name, "dense", _grouped)
for _name in ("gpt2", "gpt_neox", "phi", "opt", "bloom", "falcon"):
    _decoder(_name, "dense")
_decoder("qwen3", "dense", lambda s: _grouped(s) | {"head_dim": s.head})
_decoder("mistral", "dense", _sliding)
_decoder("starcoder2", "dense", _sliding)
_decoder("gemma2", "dense", lambda s: _sliding(s) | {"query_pre_attn_scalar": s.head})
_decoder("gemma3_text", "dense", lambda s: _sliding(s) | {"query_pre_attn_scalar": s.head})
_decoder("smollm3", "dense", lambda s: _grouped(s) | {"no_rope_layer_interval": 2})
_decoder("phi3", "dense", _grouped)


def _experts(s: Size) -> dict[str, Any]:
    return {
        "num_key_value_heads": 2,
        "head_dim": s.head,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": s.width,
        "shared_expert_intermediate_size": s.width,
    }


for _name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):
    _decoder(_name, "moe", _experts)
_decoder(
    "deepseek_v3",
    "moe",
    lambda s: {
        "num_key_value_heads": s.heads,
        "moe_intermediate_size": s.width,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": s.width // 2,
        "kv_lora_rank": s.width // 2,
        "qk_nope_head_dim": s.head,
        "qk_rope_head_dim": s.head // 2,
        "v_head_dim": s.head,
    },
)


def _mamba(s: Size) -> dict[str, Any]:
    return {
        "state_size": 8,
        "time_step_rank": s.width // 16,
        "intermediate_size": 2 * s.width,
        "conv_kernel": 4,
    }


_decoder("mamba", "ssm", _mamba)
_decoder("falcon_mamba", "ssm", _mamba)
_decoder(
    "mamba2",
    "ssm",
    lambda s: {
        "num_heads": 2 * s.heads,
        "head_dim": s.head,
        "state_size": 16,
        "n_groups": 2,
        "chunk_size": 32,
        "expand": 2,
    },
)
# Short, because tracing unrolls its loop over time.
_decoder(
    "rwkv", "ssm", lambda s: {"attention_hidden_size": s.width, "context_length": 2 * s.length}, longest=32
)
_decoder(
    "recurrent_gemma",
    "hybrid",
    lambda s: (
        _grouped(s)
        | {
            "head_dim": s.head,
            "lru_width": s.width,
            "attention_window_size": 8,
            "num_hidden_layers": s.layers + 1,
        }
    ),
)


def _mamba_layers(s: Size) -> dict[str, Any]:
    return _grouped(s) | {
        "mamba_n_heads": 2 * s.heads,
        "mamba_d_head": s.head,
        "mamba_d_ssm": 2 * s.width,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_chunk_size": 32,
    }


_decoder(
    "jamba",
    "hybrid",
    lambda s: (
        _experts(s)
        | {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        }
    ),
)
_decoder("bamba", "hybrid", lambda s: _mamba_layers(s) | {"attn_layer_indices": [1]})
_decoder("falcon_h1", "hybrid", _mamba_layers)
_decoder(
    "zamba2",
    "hybrid",
    lambda s: {
        "mamba_d_state": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 2 * s.heads,
        "chunk_size": 32,
        "layers_block_type": ["linear_attention", "hybrid"] * (s.layers // 2),
        "num_key_value_heads": s.heads,
        "adapter_rank": 8,
        "attention_hidden_size": 2 * s.width,
        "attention_head_dim": 2 * s.head,
    },
)
# Its backward stops under "aot_eager": softplus_backward of the CPU returns other strides than its meta function says.
_decoder(
    "qwen3_next",
    "hybrid",
    lambda s: (
        _experts(s)
        | {
            "layer_types": ["linear_attention", "full_attention"] * (s.layers // 2),
            "linear_key_head_dim": s.head,
            "linear_value_head_dim": s.head,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }
    ),
)
# Chunks and blocks are shorter than the text, and do not divide it.
_decoder(
    "granitemoehybrid",
    "hybrid",
    lambda s: (
        _experts(s)
        | _mamba_layers(s)
        | {
            "mamba_chunk_size": s.length // 3,
            "shared_intermediate_size": s.width,
            "layer_types": ["linear_attention", "full_attention"] * (s.layers // 2),
        }
    ),
)
_decoder(
    "nemotron_h",
    "hybrid",
    lambda s: (
        _experts(s)
        | {
            "num_hidden_layers": None,  # it counts the types
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * (s.layers // 2),
            "ssm_state_size": 16,
            "mamba_num_heads": 2 * s.heads,
            "mamba_head_dim": s.head,
            "n_groups": 2,
            "chunk_size": s.length // 3,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": s.width,
        }
    ),
)
_decoder(
    "minimax",
    "hybrid",
    lambda s: (
        _experts(s)
        | {
            "layer_types": ["linear_attention", "full_attention"] * (s.layers // 2),
            "block_size": s.length // 3,
            "linear_attn_alpha_factor": 1.1,
            "linear_attn_beta_factor": 0.9,
        }
    ),
)
_decoder(
    "lfm2",
    "hybrid",
    lambda s: _grouped(s) | {"layer_types": ["conv", "full_attention"] * (s.layers // 2)},
)


for _name in ("bert", "roberta", "distilbert", "electra", "modernbert", "albert"):
    _add(
        _name,
        "encoder",
        transformers.AutoModelForMaskedLM,
        _padded,
        lambda s: (
            _text(s)
            | {
                "embedding_size": s.width // 2,
                "local_attention": s.length // 2,
                "cls_token_id": 1,
                "sep_token_id": 2,
            }
        ),
    )
_add(
    "deberta_v2",
    "encoder",
    transformers.AutoModelForMaskedLM,
    _padded,
    lambda s: (
        _text(s) | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": s.width}
    ),
    type_="deberta-v2",
)


def _seq2seq(s: Size) -> dict[str, Any]:
    sizes = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in _side(s).items()}
    t5 = {"d_kv": s.head, "d_ff": 2 * s.width, "num_layers": s.layers, "num_heads": s.heads}
    start = {"decoder_start_token_id": 1, "forced_eos_token_id": 2}
    return (
        _text(s)
        | sizes
        | t5
        | start
        | {"d_model": s.width, "init_std": s.width**-0.5, "tie_word_embeddings": True}
    )


def _side(s: Size) -> dict[str, Any]:
    return {"layers": s.layers, "attention_heads": s.heads, "ffn_dim": 2 * s.width}


def _pairs(s: Size, generator: torch.Generator) -> Inputs:
    return _padded(s, generator) | {"decoder_input_ids": _tokens(s, generator, s.length - 2)}


def _speech(s: Size, generator: torch.Generator) -> Inputs:
    return {
        "input_features": torch.randn(s.batch, 20, 4 * s.length, generator=generator),
        "decoder_input_ids": _tokens(s, generator),
    }


for _name in ("t5", "bart", "pegasus"):
    _add(_name, "seq2seq", transformers.AutoModelForSeq2SeqLM, _pairs, _seq2seq)
_add(
    "whisper",
    "seq2seq",
    transformers.AutoModelForSpeechSeq2Seq,
    _speech,
    lambda s: (
        _seq2seq(s)
        | {"num_mel_bins": 20, "max_source_positions": 2 * s.length, "max_target_positions": 2 * s.length}
    ),
)


# Pictures and sound.


def _pixels(s: Size, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(s.batch, 3, s.image, s.image, generator=generator)}


def _vision(s: Size) -> dict[str, Any]:
    return {
        "image_size": s.image,
        "patch_size": s.patch,
        "hidden_size": s.width,
        "intermediate_size": 2 * s.width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_labels": 16,
        "initializer_range": s.width**-0.5,
    }


def _stages(s: Size) -> dict[str, Any]:
    """Networks of stages that halve the picture and double the width."""
    return {
        "image_size": s.image,
        "depths": [1, s.layers],
        "num_stages": 2,
        "num_labels": 16,
        "initializer_range": 0.1,
    }


for _name in ("vit", "dinov2"):
    _add(_name, "vision", transformers.AutoModelForImageClassification, _pixels, _vision)
_add(
    "convnext",
    "vision",
    transformers.AutoModelForImageClassification,
    _pixels,
    lambda s: _stages(s) | {"hidden_sizes": [s.width // 4, s.width // 2], "layer_scale_init_value": 0.1},
)
_add(
    "swin",
    "vision",
    transformers.AutoModelForImageClassification,
    _pixels,
    lambda s: _stages(s) | {"embed_dim": s.width // 4, "num_heads": [2, 4], "window_size": s.window},
)
_add(
    "resnet",
    "vision",
    transformers.AutoModelForImageClassification,
    _pixels,
    lambda s: (
        _stages(s)
        | {"embedding_size": s.width // 4, "hidden_sizes": [s.width // 2, s.width], "layer_type": "basic"}
    ),
)
for _name in ("clip", "siglip"):
    _add(
        _name,
        "vision",
        transformers.AutoModel,
        lambda s, generator: _padded(s, generator) | _pixels(s, generator),
        lambda s: {"text_config": _text(s), "vision_config": _vision(s), "projection_dim": s.width},
    )


def _waves(s: Size, generator: torch.Generator) -> Inputs:
    return {"input_values": torch.randn(s.batch, s.samples, generator=generator)}


for _name in ("wav2vec2", "hubert"):
    _add(
        _name,
        "audio",
        transformers.AutoModelForCTC,
        _waves,
        lambda s: (
            _text(s)
            | {
                "vocab_size": 32,
                "conv_dim": [s.width // 2] * 4,
                "conv_kernel": [10, 3, 3, 2],
                "conv_stride": [5, 4, 4, 2],
                "num_conv_pos_embeddings": 16,
                "num_conv_pos_embedding_groups": 4,
            }
        ),
    )
_add(
    "audio_spectrogram_transformer",
    "audio",
    transformers.AutoModelForAudioClassification,
    lambda s, generator: {"input_values": torch.randn(s.batch, 8 * s.length, 24, generator=generator)},
    lambda s: _vision(s) | {"patch_size": 8, "max_length": 8 * s.length, "num_mel_bins": 24},
    type_="audio-spectrogram-transformer",
)
