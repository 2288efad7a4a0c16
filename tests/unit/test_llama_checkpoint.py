"""Llama and Qwen2 checkpoints against transformers, and their GGUF forms."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from spikingbrain.models.errors import WeightsError
from spikingbrain.models.llama import Llama
from spikingbrain.models.llama import load as load_gguf
from spikingbrain.models.llama.checkpoint import load, save

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(17)[None] * 5


def published(kind: str, folder: Path, **changes: object) -> torch.Tensor:
    """Writes a checkpoint with transformers; returns the logits of its model."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, rope_theta=5000.0, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
        model.save_pretrained(folder)
        return model(TOKENS).logits


def logits(model: Llama) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, model.initial_state(1))[0]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": False}),
    ],
)
def test_equals_transformers_and_is_saved_bit_for_bit(
    kind: str, changes: dict[str, object], tmp_path: Path
) -> None:
    import transformers

    expected = published(kind, tmp_path / "theirs", **changes)
    model = load(tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)

    save(model, tmp_path / "ours", companions=tmp_path / "theirs")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is neither"),
        (
            {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None},
            "is 'llama3', and only 'default'",
        ),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rms_norm_eps": None}, "says nothing about rms_norm_eps"),
        ({"intermediate_size": 95}, r"gate_proj.weight: has shape \[96, 64\], the model has \[95, 64\]"),
    ],
)
def test_other_models_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    published("llama", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(WeightsError, match=message):
        load(tmp_path / "model")


def test_qwen2_from_gguf(tmp_path: Path) -> None:
    """The same model in both kinds of files."""
    expected = published("qwen2", tmp_path / "folder", tie_word_embeddings=False)
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, SIZES["num_hidden_layers"])
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5000.0)
    for name, tensor in tensors.items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, model = load_gguf(tmp_path / "model.gguf")
    assert config.qkv_bias
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
