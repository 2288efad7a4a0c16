"""Checkpoints of SpikingBrain: read, checked, written back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikingbrain.models import checkpoint as folders
from spikingbrain.models.errors import WeightsError
from spikingbrain.models.spiking import SpikeLinear, spike
from spikingbrain.models.spikingbrain import SpikingBrain, tiny_7b, tiny_76b
from spikingbrain.models.spikingbrain.checkpoint import load, save
from spikingbrain.models.spikingbrain.spiking_checkpoint import load_spiking, save_spiking

# The published names, written out for a layer of each kind.
GLA_LAYER = [
    "attn_norm.weight",
    "mlp_norm.weight",
    "attn.q_proj.weight",
    "attn.q_proj.bias",
    "attn.k_proj.weight",
    "attn.k_proj.bias",
    "attn.v_proj.weight",
    "attn.v_proj.bias",
    "attn.o_proj.weight",
    "attn.gk_proj.0.weight",
    "attn.gk_proj.1.weight",
    "attn.gk_proj.1.bias",
    "attn.g_norm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
]
WINDOW_LAYER = [name for name in GLA_LAYER if "gk_proj" not in name and "g_norm" not in name]


@pytest.fixture(scope="module")
def model() -> SpikingBrain:
    torch.manual_seed(0)
    return SpikingBrain(tiny_7b()).bfloat16().eval()


@pytest.fixture
def folder(model: SpikingBrain, tmp_path: Path) -> Path:
    save(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def logits(model: SpikingBrain) -> torch.Tensor:
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        return model(tokens, model.initial_state(1))[0]


def test_published_names(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    expected = {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}
    for i, layer in enumerate((GLA_LAYER, WINDOW_LAYER, GLA_LAYER, WINDOW_LAYER)):
        expected |= {f"model.layers.{i}.{name}" for name in layer}
    assert set(stored) == expected
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["attn_layers"], config["sliding_window"]) == ("gla_swa", [1, 3], 8)
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "config",
    [
        tiny_7b(),
        replace(tiny_7b(), gate="full", tied_head=True),
        tiny_76b(),
        replace(tiny_76b(), separate_projections=True, experts_per_token=2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_bit_for_bit(config: object, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = SpikingBrain(config).to(dtype).eval()  # type: ignore[arg-type]
    save(first, tmp_path / "first")
    second = load(tmp_path / "first")
    assert second.config == config
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    # files hold tensors at any address, for which torch may choose other kernels
    torch.testing.assert_close(
        logits(second), logits(first), rtol=1e-4, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
    )
    save(second, tmp_path / "second")
    for file in (p.name for p in (tmp_path / "first").iterdir()):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_in_another_type(model: SpikingBrain, folder: Path) -> None:
    wide = load(folder, torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(wide), logits(model).float(), rtol=0.1, atol=0.1)


def test_shards(model: SpikingBrain, tmp_path: Path) -> None:
    folders.save(
        tmp_path / "many",
        ((name, p) for name, p in load_file_of(model).items()),
        json.loads(json.dumps(config_of(model))),
        shard_bytes=60_000,
    )
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for (name, a), b in zip(model.named_parameters(), load(tmp_path / "many").parameters(), strict=True):
        assert torch.equal(a, b), name
    (tmp_path / "many" / files[1]).unlink()
    with pytest.raises(WeightsError, match=f"{files[1]} cannot be read"):
        load(tmp_path / "many")


def load_file_of(model: SpikingBrain) -> dict[str, torch.Tensor]:
    from spikingbrain.models.spikingbrain.checkpoint import entries

    parameters = dict(model.named_parameters())
    return {e.stored: parameters[e.parameter] for e in entries(model.config)}


def config_of(model: SpikingBrain) -> dict[str, object]:
    from spikingbrain.models.spikingbrain.checkpoint import write_config

    return write_config(model.config)


def test_every_wrong_tensor_is_listed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.attn.g_norm.weight"]
    tensors["model.layers.1.attn.q_proj.bias"] = torch.zeros(3)
    tensors["model.layers.9.attn_norm.weight"] = torch.zeros(64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load(folder)
    for line in (
        "3 tensors of the checkpoint do not fit",
        "model.layers.0.attn.g_norm.weight: missing",
        "model.layers.1.attn.q_proj.bias: has shape [3], the model has [64]",
        "model.layers.9.attn_norm.weight: not part of the model",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is no SpikingBrain"),
        ({"hidden_size": None}, "says nothing about hidden_size"),
        ({"use_short_conv": True}, "use_short_conv is True"),
        ("{", "config.json cannot be read"),
    ],
)
def test_wrong_config(change: object, message: str, folder: Path) -> None:
    file = folder / "config.json"
    text = change if isinstance(change, str) else json.dumps({**json.loads(file.read_text()), **change})  # type: ignore[dict-item]
    file.write_text(text)
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_damaged_file_and_used_folder(model: SpikingBrain, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not empty"):
        save(model, folder)
    (folder / "model.safetensors").write_bytes(b"nonsense" * 9)
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no weights in the folder"):
        load(folder)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_flash_attention_sees_one_token_more(folder: Path) -> None:
    assert load(folder, window_of_flash_attention=True).config.window == load(folder).config.window + 1


def test_spiking_checkpoint_as_published(tmp_path: Path) -> None:
    """Float weights beside scales; some codes outside int8, because scales are not of the largest weight."""
    torch.manual_seed(0)
    config = replace(tiny_7b(), gate="full", width=128, feed_forward=256)
    model = SpikingBrain(config).eval()
    save(model, tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    for name in [n for n in tensors if n.startswith("model.layers.") and "proj.weight" in n]:
        weight = tensors[name]
        groups = weight.unflatten(1, (-1, weight.shape[1] if weight.shape[1] < 128 else 128))
        scales = groups.abs().amax(2, keepdim=True) / 127
        scales[0] *= 0.5
        tensors[name.removesuffix(".weight") + ".weight_quantizer.scales"] = scales
        # what the published layer computes: its float weights rounded, not clamped
        tensors[name + " rounded"] = (torch.round(groups / scales) * scales).flatten(1)
    rounded = {n.removesuffix(" rounded"): tensors.pop(n) for n in list(tensors) if n.endswith(" rounded")}
    save_file(tensors, tmp_path / "plain" / "model.safetensors")

    loaded = load_spiking(tmp_path / "plain")
    layer = loaded.get_submodule("blocks.1.feed_forward.down")
    assert (
        isinstance(layer, SpikeLinear) and layer.codes.dtype == torch.int16 and layer.scale.shape == (128, 2)
    )
    torch.testing.assert_close(layer.weight(), rounded["model.layers.1.mlp.down_proj.weight"], rtol=0, atol=0)
    gate = loaded.get_submodule("blocks.0.attention.linear.gate")
    assert isinstance(gate, SpikeLinear)
    assert torch.equal(gate.bias, model.get_parameter("blocks.0.attention.linear.gate.bias"))
    assert not isinstance(loaded.head, SpikeLinear)

    save_spiking(loaded, tmp_path / "again")
    again = load_spiking(tmp_path / "again")
    for (name, a), b in zip(loaded.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

    del tensors["model.layers.2.mlp.up_proj.weight_quantizer.scales"]
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"up_proj\.weight_quantizer\.scales: missing"):
        load_spiking(tmp_path / "plain")


def test_a_model_that_was_made_to_spike_is_saved(tmp_path: Path) -> None:
    model = SpikingBrain(tiny_7b()).eval()
    with pytest.raises(WeightsError, match="does not spike"):
        save_spiking(model, tmp_path / "not")
    spike(model, group_size=16)
    save_spiking(model, tmp_path / "spiking")
    for (name, a), b in zip(
        model.state_dict().items(), load_spiking(tmp_path / "spiking").state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_embedding_and_head_of_integers_are_refused(tmp_path: Path) -> None:
    model = SpikingBrain(tiny_7b()).eval()
    spike(model, group_size=16, head=True, embedding=True)
    with pytest.raises(WeightsError, match="is made of integers"):
        save_spiking(model, tmp_path / "integers")
    assert not (tmp_path / "integers").exists()


def test_tensors_held_twice_are_written_twice(tmp_path: Path) -> None:
    model = SpikingBrain(replace(tiny_76b(), separate_projections=True)).eval()
    attention = model.blocks[0].attention
    attention.linear_projections.load_state_dict(
        attention.projections.state_dict(keep_vars=True), assign=True
    )
    save(model, tmp_path / "twice")
    stored = load_file(tmp_path / "twice" / "model.safetensors")
    assert len(stored) == sum(1 for _ in model.named_parameters(remove_duplicate=False))
    assert torch.equal(
        stored["blocks.0.attention.linear_projections.key.weight"], attention.projections.key.weight
    )
