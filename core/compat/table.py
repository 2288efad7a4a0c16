"""What stands in for what: each module of the packages that need an NVIDIA GPU, with the names that are mapped."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from spikingbrain.compat import (
    convolution,
    fla_activations,
    fla_cache,
    fla_modules,
    fla_ops,
    flash_attn,
    mamba_ssm,
    packed,
)

Names = dict[str, Any]

# The releases whose signatures are followed.
VERSIONS = {"fla": "0.6.0", "flash_attn": "2.8.3", "causal_conv1d": "1.5.3", "mamba_ssm": "2.2.6"}


def _named(home: Any, *names: str) -> Names:
    return {name: getattr(home, name) for name in names}


_ACTIVATIONS = _named(
    fla_activations,
    "ACT2FN",
    "bias_gelu",
    "fast_gelu_impl",
    "logsigmoid",
    "sigmoid",
    "sqrelu",
    "swiglu",
    "swiglu_linear",
    "swish",
)
_FEATURE_MAPS = {name: value for name, value in vars(fla_activations).items() if name.endswith("FeatureMap")}
_NORMS = _named(fla_modules, "GroupNorm", "LayerNorm", "RMSNorm", "layer_norm", "rms_norm")
_GATED = _named(fla_modules, "FusedLayerNormGated", "FusedRMSNormGated", "FusedRMSNormSwishGate")
_L2 = {"L2Norm": fla_modules.L2Norm, "l2norm": fla_modules.l2norm, "l2_norm": fla_modules.l2norm}
_CONVOLUTION = _named(
    convolution, "ShortConvolution", "can_fuse_qkv_short_conv", "causal_conv1d", "fused_qkv_short_conv"
)
_LOSSES = _named(fla_modules, "FusedCrossEntropyLoss", "FusedLinearCrossEntropyLoss")
_MLP = {
    "GatedMLP": fla_modules.GatedMLP,
    "swiglu": fla_activations.swiglu,
    "swiglu_linear": fla_activations.swiglu_linear,
}
_ROTARY = _named(fla_modules, "RotaryEmbedding")
_SHIFT = _named(fla_modules, "TokenShift", "token_shift")
_LENGTHS = {
    "prepare_cu_seqlens_from_mask": packed.cu_seqlens_from_mask,
    "prepare_lens": packed.lengths_of,
    "prepare_lens_from_mask": packed.lengths_from_mask,
    "prepare_position_ids": packed.position_ids,
    "prepare_sequence_ids": packed.sequence_ids,
}
_PADDING = _named(flash_attn, "index_first_axis", "index_put_first_axis", "pad_input")
_FLASH = _named(
    flash_attn,
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
)

OPS: dict[str, Names] = {
    "abc": {"chunk_abc": fla_ops.chunk_abc},
    "delta_rule": {
        "chunk_delta_rule": fla_ops.delta_rule,
        "fused_chunk_delta_rule": fla_ops.delta_rule,
        "fused_recurrent_delta_rule": fla_ops.delta_rule,
    },
    "gated_delta_rule": {
        "chunk_gated_delta_rule": fla_ops.chunk_gated_delta_rule,
        "fused_recurrent_gated_delta_rule": fla_ops.fused_recurrent_gated_delta_rule,
    },
    "generalized_delta_rule": {
        "chunk_dplr_delta_rule": fla_ops.dplr_delta_rule,
        "chunk_iplr_delta_rule": fla_ops.iplr_delta_rule,
        "fused_recurrent_dplr_delta_rule": fla_ops.dplr_delta_rule,
        "fused_recurrent_iplr_delta_rule": fla_ops.iplr_delta_rule,
    },
    "gla": {
        "chunk_gla": fla_ops.gla,
        "fused_chunk_gla": fla_ops.gla,
        "fused_recurrent_gla": fla_ops.fused_recurrent_gla,
    },
    "gsa": {"chunk_gsa": fla_ops.gsa, "fused_recurrent_gsa": fla_ops.gsa},
    "hgrn": {"chunk_hgrn": fla_ops.hgrn, "fused_recurrent_hgrn": fla_ops.hgrn},
    "kda": {"chunk_kda": fla_ops.kda, "fused_recurrent_kda": fla_ops.kda},
    "lightning_attn": {
        "chunk_lightning_attn": fla_ops.lightning_attn,
        "fused_recurrent_lightning_attn": fla_ops.lightning_attn,
    },
    "linear_attn": {
        "chunk_linear_attn": fla_ops.chunk_linear_attn,
        "fused_chunk_linear_attn": fla_ops.chunk_linear_attn,
        "fused_recurrent_linear_attn": fla_ops.fused_recurrent_linear_attn,
    },
    "retention": {
        "chunk_retention": fla_ops.chunk_retention,
        "fused_chunk_retention": fla_ops.chunk_retention,
        "fused_recurrent_retention": fla_ops.fused_recurrent_retention,
        "parallel_retention": fla_ops.parallel_retention,
    },
    "rwkv6": {"chunk_rwkv6": fla_ops.rwkv6, "fused_recurrent_rwkv6": fla_ops.rwkv6},
    "rwkv7": {"chunk_rwkv7": fla_ops.rwkv7, "fused_recurrent_rwkv7": fla_ops.rwkv7},
    "simple_gla": {
        "chunk_simple_gla": fla_ops.chunk_simple_gla,
        "fused_chunk_simple_gla": fla_ops.chunk_simple_gla,
        "fused_recurrent_simple_gla": fla_ops.fused_recurrent_simple_gla,
        "parallel_simple_gla": fla_ops.parallel_simple_gla,
    },
}

STAND_INS: dict[str, Names] = {
    "fla": {},
    "fla.ops": {name: value for names in OPS.values() for name, value in names.items()},
    **{f"fla.ops.{family}": names for family, names in OPS.items()},
    "fla.ops.utils": _LENGTHS,
    "fla.ops.utils.index": _LENGTHS,
    "fla.modules": {
        name: value
        for group in (_NORMS, _GATED, _L2, _CONVOLUTION, _LOSSES, _MLP, _ROTARY, _SHIFT)
        for name, value in group.items()
        if name[0].isupper()
    },
    "fla.modules.activations": _ACTIVATIONS,
    "fla.modules.convolution": _CONVOLUTION,
    "fla.modules.feature_map": _FEATURE_MAPS,
    "fla.modules.fused_cross_entropy": _named(fla_modules, "FusedCrossEntropyLoss"),
    "fla.modules.fused_linear_cross_entropy": _named(fla_modules, "FusedLinearCrossEntropyLoss"),
    "fla.modules.fused_norm_gate": _GATED,
    "fla.modules.l2norm": _L2,
    "fla.modules.layernorm": _NORMS,
    "fla.modules.mlp": _MLP,
    "fla.modules.rotary": _ROTARY,
    "fla.modules.token_shift": _SHIFT,
    "fla.layers": {},
    "fla.layers.utils": {
        **_PADDING,
        "get_layer_cache": fla_cache.get_layer_cache,
        "get_unpad_data": packed.unpacking,
        "unpad_input": flash_attn.layers_unpad_input,
        "update_layer_cache": fla_cache.update_layer_cache,
    },
    "fla.models": {},
    "fla.models.utils": {"Cache": fla_cache.Cache},
    "flash_attn": _FLASH,
    "flash_attn.flash_attn_interface": _FLASH,
    "flash_attn.bert_padding": {**_PADDING, "unpad_input": flash_attn.unpad_input},
    "flash_attn.layers": {},
    "flash_attn.layers.rotary": _named(flash_attn, "apply_rotary_emb"),
    "causal_conv1d": _named(convolution, "causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_interface": _named(convolution, "causal_conv1d_fn", "causal_conv1d_update"),
    "mamba_ssm": _named(mamba_ssm, "selective_scan_fn"),
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _named(mamba_ssm, "selective_scan_fn"),
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layernorm_gated": _named(mamba_ssm, "RMSNorm", "rmsnorm_fn"),
    "mamba_ssm.ops.triton.selective_state_update": _named(mamba_ssm, "selective_state_update"),
    "mamba_ssm.ops.triton.ssd_combined": _named(mamba_ssm, "mamba_chunk_scan_combined"),
}


def functions() -> list[tuple[str, str, FunctionType]]:
    """Returns module, name and stand-in of what is a function: what can be exchanged while a graph is traced."""
    return [
        (module, name, value)
        for module, names in STAND_INS.items()
        for name, value in names.items()
        if isinstance(value, FunctionType)
    ]
