"""Conversion of Transformers to SpikingBrain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spikingbrain.models.errors import ConfigError
from spikingbrain.models.llama import Llama, LlamaConfig
from spikingbrain.models.spikingbrain import SpikingBrain
from spikingbrain.models.spikingbrain.convert import convert, expert_factors, style_7b, style_76b
from spikingbrain.models.spikingbrain.feed_forward import MixtureOfExperts, SwiGLU
from spikingbrain.models.spikingbrain.fit import attention_pairs, fit_layer

SOURCE = LlamaConfig(
    vocabulary=100,
    width=64,
    layers=9,
    heads=4,
    key_value_heads=2,
    head_size=16,
    feed_forward=96,
    context=256,
    norm_eps=1e-5,
    qkv_bias=True,
)


@pytest.fixture(scope="module")
def source() -> Llama:
    torch.manual_seed(0)
    return Llama(replace(SOURCE, window=7, sinks=1)).double().eval()


def test_windows_and_a_sink_are_the_source_itself(source: Llama) -> None:
    """A sink that begins as the first token of a text is that token: nothing else has changed."""
    model, report = convert(source, style_7b(SOURCE, window=7, linear_layers=(), sinks=1), sink_token=5)
    tokens = torch.randint(0, 100, (2, 30))
    with torch.no_grad():
        begun, _ = source(torch.cat([torch.full((2, 1), 5), tokens], 1), source.initial_state(2))
        logits, _ = model(tokens, model.initial_state(2))
    torch.testing.assert_close(logits, begun[:, 1:], rtol=1e-5, atol=1e-5)  # a Llama's norms are float32
    assert list(report.new) == ["sinks"]


def test_the_7b_style_takes_turns(source: Llama) -> None:
    model, report = convert(source, style_7b(SOURCE, window=7))
    kinds = ["linear" if layer.linear else layer.softmax for layer in model.config.layers]
    assert kinds == ["linear", "window"] * 4 + ["linear"]
    assert model.get_parameter("blocks.3.attention.projections.key.bias") is not None
    assert {n.split(".", 2)[2] for n in report.new} == {
        "attention.linear.gate.0.weight",
        "attention.linear.gate.1.weight",
        "attention.linear.gate.1.bias",
        "attention.linear.norm.weight",
    }
    everything = [*report.copied, *report.upcycled, *report.new]
    assert sorted(everything) == sorted(n for n, _ in model.named_parameters())
    assert sum(report.sizes.values()) == sum(p.numel() for p in model.parameters())
    assert "5 with linear attention, 4 with a window of 7" in str(report)
    shared = model.get_parameter("blocks.0.feed_forward.up.weight").data_ptr()
    assert shared == source.get_parameter("blocks.0.feed_forward.up.weight").data_ptr()


def test_a_fresh_gate_fades_by_half_in_about_sixteen_tokens(source: Llama) -> None:
    model, _ = convert(source, style_7b(SOURCE, window=7))
    x = torch.randn(1, 50, 64, dtype=torch.float64)
    log_decay = torch.nn.functional.logsigmoid(model.blocks[0].attention.linear.gate(x)) / 16
    assert log_decay.mul(16).exp().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("per_token", [1, 2])
def test_experts_begin_as_the_dense_network(source: Llama, router: str, per_token: int) -> None:
    config = replace(style_76b(SOURCE, window=7, experts=8), router=router, experts_per_token=per_token)
    model, report = convert(source, config, exact_experts=True)  # type: ignore[arg-type]
    experts, dense = model.blocks[3].feed_forward, source.blocks[3].feed_forward
    assert isinstance(experts, MixtureOfExperts)
    x = torch.randn(2, 20, 64, dtype=torch.float64)
    with torch.no_grad():
        got, expected = experts(x), dense(x)
        assert (got - expected).norm() / expected.norm() < 0.005  # scores differ by a percent
        chosen = experts.router(x).argmax(-1)
    assert len(chosen.unique()) > 4  # the tie between them is broken
    assert "blocks.3.feed_forward.experts.gate.weight" in report.upcycled
    assert isinstance(model.blocks[2].feed_forward, SwiGLU)


def test_the_published_factor(source: Llama) -> None:
    config = style_76b(SOURCE, window=7)
    assert expert_factors(config) == pytest.approx(dict.fromkeys(("gate", "up", "down"), 0.98), abs=1e-3)
    model, _ = convert(source, config)
    x = torch.randn(2, 20, 64, dtype=torch.float64)
    with torch.no_grad():
        got, expected = model.blocks[3].feed_forward(x), source.blocks[3].feed_forward(x)
    assert (got - expected).norm() / expected.norm() < 0.02


def test_the_76b_style_runs_and_shares_or_separates(source: Llama) -> None:
    for separate in (False, True):
        config = style_76b(SOURCE, window=7, sinks=4, experts=4, separate_projections=separate)
        model, report = convert(source, config, sink_token=0)
        assert isinstance(model, SpikingBrain)
        with torch.no_grad():
            logits, state = model(torch.randint(0, 100, (1, 12)), model.initial_state(1))
        assert logits.isfinite().all() and state.position.item() == 16
        assert ("blocks.0.attention.linear_projections.key.weight" in report.copied) == separate
    assert [i for i, layer in enumerate(config.layers) if layer.softmax == "full"] == [6]


def test_wrong_layers_and_another_config(source: Llama) -> None:
    with pytest.raises(ConfigError, match="no layer 9, 11"):
        style_7b(SOURCE, linear_layers=[0, 9, 11])
    with pytest.raises(ConfigError, match=r"embedding\.weight has shape"):
        convert(source, style_7b(replace(SOURCE, vocabulary=99), window=7))


def test_a_layer_learns_what_the_old_one_did(source: Llama) -> None:
    model, _ = convert(source, style_7b(SOURCE, window=7, linear_layers=[2], sinks=1), sink_token=0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    old = {n: p.clone() for n, p in source.named_parameters()}
    texts = [torch.randint(0, 100, (4, 24)) for _ in range(2)]
    pairs = list(attention_pairs(source, 2, texts))
    seen: list[torch.Tensor] = []
    with source.blocks[2].attention.register_forward_hook(lambda _m, a, r: seen.extend((a[0], r[0]))):
        source(texts[1], source.initial_state(4))
    torch.testing.assert_close(pairs[1], tuple(seen), rtol=0, atol=0)

    losses = fit_layer(model, 2, pairs, steps=40, learning_rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(n.startswith("blocks.2.attention.") for n in changed)
    assert all(torch.equal(p, old[n]) for n, p in source.named_parameters())


def test_only_linear_attention_is_fitted(source: Llama) -> None:
    model, _ = convert(source, style_7b(SOURCE, window=7))
    with pytest.raises(ConfigError, match="the layer has softmax attention"):
        fit_layer(model, 1, [])
