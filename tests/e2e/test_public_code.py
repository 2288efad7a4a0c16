"""Models written for NVIDIA GPUs, unchanged: eager by stand-ins, compiled, trained, and with the weights of our own model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler")

import spikingbrain
from spikingbrain import Entry, compat
from spikingbrain.artifact import REPORT
from spikingbrain.models.reference import recurrences as reference
from spikingbrain.models.spikingbrain import SpikingBrain
from spikingbrain.models.spikingbrain.checkpoint import entries
from spikingbrain.models.spikingbrain.config import tiny_7b

sys.path.append(str(Path(__file__).parents[1]))
from tolerances import assert_close

TOKENS = 21  # more than two windows


@pytest.fixture(scope="module")
def public() -> Iterator[Any]:
    """Returns an importer of the files that know of no stand-ins."""
    compat.install()
    yield lambda name: importlib.import_module(f"public_models.{name}")
    compat.uninstall()
    for name in [name for name in sys.modules if name.startswith("public_models")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def models(public: Any) -> tuple[nn.Module, SpikingBrain]:
    """The public model and ours, of the same weights."""
    torch.manual_seed(0)
    config = replace(tiny_7b(61), layers=tiny_7b().layers[:2])
    ours = SpikingBrain(config).eval()
    sizes = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "num_heads": config.heads,
        "num_kv_heads": config.key_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward,
        "gate_low_rank_dim": config.gate_rank,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "window_size": config.window,
    }
    theirs = public("gla_swa").GLASWAForCausalLM(sizes).eval()
    parameters = dict(ours.named_parameters())
    theirs.load_state_dict({e.stored: parameters[e.parameter].detach() for e in entries(config)})
    return theirs, ours


def _tokens(batch: int = 2, length: int = TOKENS) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(61, (batch, length))


def test_the_public_model_is_ours(models: tuple[nn.Module, SpikingBrain]) -> None:
    theirs, ours = models
    tokens = _tokens()
    with torch.no_grad():
        expected, _ = ours(tokens, ours.initial_state(2))
        logits, _ = theirs(tokens)
        assert_close(logits, expected, "logits of the whole text")
        logits, cache = theirs(tokens[:, :13], use_cache=True)
        parts = [logits]
        for t in range(13, TOKENS):
            logits, cache = theirs(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            parts.append(logits)
        assert_close(torch.cat(parts, 1), expected, "logits of a prompt and single tokens")


def test_texts_of_different_lengths(models: tuple[nn.Module, SpikingBrain]) -> None:
    """Padding on the left, as for generation: attention is packed."""
    theirs, ours = models
    tokens = _tokens()
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    with torch.no_grad():
        logits, cache = theirs(tokens[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        step, _ = theirs(tokens[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
        logits = torch.cat((logits, step), 1)
        for b, begin in enumerate((0, 6)):
            expected, _ = ours(tokens[b : b + 1, begin:], ours.initial_state(1))
            assert_close(logits[b : b + 1, begin:], expected, f"logits of text {b}")


def test_the_compiled_model(models: tuple[nn.Module, SpikingBrain], fresh_dynamo: None) -> None:
    theirs, _ = models
    tokens = _tokens(1)
    with torch.no_grad():
        expected, _ = theirs(tokens)
        explanation = spikingbrain.explain(theirs, tokens)
        assert explanation.graph_breaks == []
        compiled = [op for region in explanation.regions if region.status == "compiled" for op in region.ops]
        assert compiled.count("linear_recurrence") == 1
        assert_close(torch.compile(theirs, backend="spikingbrain")(tokens)[0], expected, "logits")


def test_stand_ins_are_exported(public: Any, tmp_path: Path) -> None:
    """Attention over a window, over all keys before and in packed texts becomes our op, as the recurrence does."""
    from fla.ops.gla import chunk_gla  # type: ignore[import-not-found]
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

    class Calls(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
            o, _ = chunk_gla(q[:, :, :2], k, v, -k.abs())
            packed = flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens, cu_seqlens, 12, 12, causal=True)
            window = flash_attn_func(q, k, v, causal=True, window_size=(7, 0))
            return o, packed, window, flash_attn_func(q[:, 9:], k, v, causal=True)

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 21, 4, 16), torch.randn(1, 21, 2, 16), torch.randn(1, 21, 2, 16)
    inputs = (q, k, v, torch.tensor([0, 9, 21], dtype=torch.int32))
    path = tmp_path / "calls.sbrain"
    spikingbrain.export(Calls(), {"call": Entry(inputs)}, path)
    program = spikingbrain.load(path)
    for ours, expected in zip(
        program.call("call", *(x.numpy() for x in inputs)), Calls()(*inputs), strict=True
    ):
        assert_close(torch.from_numpy(ours), expected, "exported")
    records = json.loads(bytes(spikingbrain.Artifact(path).member(REPORT)))["records"]
    assert [r["status"] for r in records if r["pass_name"] == "raise-attention"] == ["raised"] * 3
    assert [r["status"] for r in records if r["pass_name"] == "lower-recurrence"] == ["lowered"]


@pytest.mark.slow
def test_the_compiled_model_trains(models: tuple[nn.Module, SpikingBrain], fresh_dynamo: None) -> None:
    theirs, _ = models
    tokens = _tokens()
    losses, gradients = [], []
    for model in (theirs, torch.compile(theirs, backend="spikingbrain")):
        loss, _ = model(tokens, labels=tokens)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(theirs.parameters())))
    assert_close(losses[1], losses[0], "loss")
    for (name, _), ours, expected in zip(theirs.named_parameters(), *reversed(gradients), strict=True):
        assert_close(ours, expected, name, scale=1e-2)


def _by_hand(layer: Any, x: Tensor) -> Tensor:
    """The layer from loops: of one text."""
    heads = layer.num_heads

    def convolved(conv: nn.Conv1d, y: Tensor) -> Tensor:
        width = y.shape[-1]
        return F.silu(F.conv1d(F.pad(y.mT, (3, 0)), conv.weight, groups=width).mT).unflatten(-1, (heads, -1))

    q, k, v = (
        convolved(conv, proj(x))
        for conv, proj in (
            (layer.q_conv1d, layer.q_proj),
            (layer.k_conv1d, layer.k_proj),
            (layer.v_conv1d, layer.v_proj),
        )
    )
    g = F.logsigmoid(layer.gk_proj(x)).unflatten(-1, (heads, -1)) / 16
    o, _ = reference.gla(q, k, v, g)
    norm = layer.g_norm_swish_gate
    o = F.rms_norm(o, (o.shape[-1],), norm.weight, norm.eps)
    o = o.flatten(2) * F.silu(layer.g_proj(x))
    y: Tensor = layer.o_proj(o)
    return y


@pytest.mark.parametrize("mode", [pytest.param("chunk", marks=pytest.mark.slow), "fused_recurrent"])
def test_a_layer_of_the_library(public: Any, mode: str, fresh_dynamo: None) -> None:
    """Whole, padded, packed and token by token; compiled, with gradients."""
    layer = public("gla_layer").GatedLinearAttention(mode=mode)
    x = torch.randn(2, 11, 32)
    expected = _by_hand(layer, x)
    leaves = list(layer.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for run in (layer, torch.compile(layer, backend="spikingbrain", fullgraph=True)):
        y, *_ = run(x)
        assert_close(y, expected, "outputs")
        for ours, theirs in zip(torch.autograd.grad(y.square().sum(), leaves), wanted, strict=True):
            assert_close(ours, theirs, "gradient", scale=1e-2)

    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        compiled = torch.compile(layer, backend="spikingbrain")
        for run in (layer, compiled) if mode == "chunk" else (layer,):
            y, *_ = run(x, attention_mask=mask)
            assert_close(y[:1, 4:], _by_hand(layer, x[:1, 4:]), "behind the padding")
            assert_close(y[1:], expected[1:].detach(), "without padding")
        from fla.models.utils import Cache  # type: ignore[import-not-found]

        cache = Cache()
        parts = [layer(x[:, :4], past_key_values=cache, use_cache=True)[0]]
        parts += [layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)[0] for t in range(4, 11)]
        assert_close(torch.cat(parts, 1), expected.detach(), "token by token")
