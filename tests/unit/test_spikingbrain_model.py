"""The SpikingBrain models against numpy, in pieces of any size, and their published sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy_spikingbrain
import pytest
import torch

from spikingbrain.models.errors import ConfigError
from spikingbrain.models.spikingbrain import (
    LayerConfig,
    SpikingBrain,
    SpikingBrainConfig,
    State,
    spikingbrain_1b,
    spikingbrain_7b,
    spikingbrain_76b,
    tiny_7b,
    tiny_76b,
)

CONFIGS = {
    "7b": tiny_7b(),
    "7b, tied head": replace(tiny_7b(), tied_head=True),
    "76b": tiny_76b(),
    "76b, separate projections": replace(tiny_76b(), separate_projections=True),
    "76b, two experts a token by sigmoid": replace(tiny_76b(), experts_per_token=2, router="sigmoid"),
    "no sinks": replace(tiny_76b(), sinks=0),
}


def make(config: SpikingBrainConfig, dtype: torch.dtype = torch.float64) -> SpikingBrain:
    torch.manual_seed(0)
    model = SpikingBrain(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # all away from their first values, norms and biases as well
            parameter += torch.randn_like(parameter) * 0.2
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_numpy(name: str) -> None:
    """Past the window, with sinks, experts, gates: all of it written a second time, token by token."""
    model = make(CONFIGS[name])
    tokens = torch.randint(0, 256, (2, 21))
    with torch.no_grad():
        logits, _ = model(tokens, model.initial_state(2))
    weights = {n: p.detach().numpy() for n, p in model.named_parameters()}
    for row in range(2):
        expected = numpy_spikingbrain.logits(weights, model.config, tokens[row].tolist())
        # angles of rotary embedding are float32 in any model
        np.testing.assert_allclose(logits[row].numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["7b", "76b"])
@pytest.mark.parametrize("pieces", [[1] * 21, [20, 1], [3, 8, 9, 1], [9, 12], [0, 21]])
def test_any_split_gives_the_same(name: str, pieces: list[int]) -> None:
    model = make(CONFIGS[name])
    tokens = torch.randint(0, 256, (1, 21))
    with torch.no_grad():
        whole, state_of_whole = model(tokens, model.initial_state(1))
        state, parts = model.initial_state(1), []
        for piece in tokens.split(pieces, dim=1):
            logits, state = model(piece, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    assert_states_close(model, state, state_of_whole)


@pytest.mark.parametrize("name", ["7b", "76b"])
def test_texts_of_different_lengths(name: str) -> None:
    """Padding leaves no trace: each text of the batch has the logits and the state that it has alone, also later on."""
    model = make(CONFIGS[name])
    tokens, lengths = torch.randint(0, 256, (3, 13)), torch.tensor([13, 1, 9])
    with torch.no_grad():
        logits, state = model(tokens, model.initial_state(3), lengths, last_only=True)
        more, state = model(tokens[:, :2], state)
        for row, length in enumerate(lengths.tolist()):
            alone, state_alone = model(tokens[row : row + 1, :length], model.initial_state(1), last_only=True)
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-9, atol=1e-9)
            more_alone, state_alone = model(tokens[row : row + 1, :2], state_alone)
            torch.testing.assert_close(more[row : row + 1], more_alone, rtol=1e-9, atol=1e-9)
            assert state.position[row] == state_alone.position[0]


def test_a_window_sees_exactly_its_tokens() -> None:
    config = replace(tiny_7b(), layers=(LayerConfig(softmax="window"),), window=5)
    model = make(config)
    tokens = torch.randint(0, 256, (1, 12))
    with torch.no_grad():
        logits, _ = model(tokens, model.initial_state(1))
        for changed in range(12):
            other = tokens.clone()
            other[0, changed] = (other[0, changed] + 1) % 256
            moved = (model(other, model.initial_state(1))[0] != logits).any(-1)[0]
            assert moved.nonzero().flatten().tolist() == list(range(changed, min(12, changed + 5)))


def test_sinks_are_seen_from_beyond_the_window_and_learn() -> None:
    config = replace(tiny_76b(), layers=(LayerConfig(linear=True, softmax="window"),))
    model = make(config)
    logits, _ = model(torch.randint(0, 256, (1, 30)), model.initial_state(1))
    (gradient,) = torch.autograd.grad(logits[0, -1].sum(), model.sinks)
    assert (gradient.abs().amax(1) > 0).all()


def test_bfloat16_keeps_memories_in_float32() -> None:
    model = make(tiny_76b(), torch.bfloat16)
    with torch.no_grad():
        logits, state = model(torch.randint(0, 256, (1, 12)), model.initial_state(1))
    assert logits.dtype == state.keys[0].dtype == torch.bfloat16
    assert state.memories[0].dtype == torch.float32
    wide = make(tiny_76b(), torch.bfloat16).double()
    with torch.no_grad():
        expected, _ = wide(torch.randint(0, 256, (1, 12)), wide.initial_state(1))
    assert expected.dtype == torch.float64 and logits.isfinite().all()


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (spikingbrain_7b(), 7.61e9, None),
        (spikingbrain_76b(), 76.06e9, 11.9e9),
        (replace(spikingbrain_76b(), separate_projections=True), 76.9e9, 12.7e9),
        (spikingbrain_1b(), 1.24e9, None),
    ],
)
def test_published_sizes(config: SpikingBrainConfig, total: float, active: float | None) -> None:
    with torch.device("meta"):
        model = SpikingBrain(config)
        state = model.initial_state(1, capacity=256)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(total, rel=0.004)
    if active is not None:
        routed = sum(p.numel() for n, p in model.named_parameters() if ".feed_forward.experts." in n)
        idle = routed * (1 - config.experts_per_token / config.experts)
        # the embedding's table is looked up, not multiplied
        assert count - idle == pytest.approx(active, rel=0.06)
    assert len(state.memories) == sum(layer.linear for layer in config.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_heads": 3}, "cannot share 3 key heads"),
        ({"window": 0}, "window of 0"),
        ({"gate": "tied"}, "gate of 1 - key"),
        ({"head_size": 15}, "head size 15 is odd"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(tiny_7b(), **change)  # type: ignore[arg-type]


def assert_states_close(model: SpikingBrain, one: State, other: State) -> None:
    """Compares all but the spill slots, which hold anything."""
    assert torch.equal(one.position, other.position)
    for a, b in zip(one.memories, other.memories, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(one.keys + one.values, other.keys + other.values, strict=True):
        torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=1e-9, atol=1e-9)
