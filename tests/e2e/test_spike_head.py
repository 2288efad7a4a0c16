"""Models whose embedding and head are integers: one table of codes, read row by row and multiplied by counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import spikingbrain
from spikingbrain import Entry
from spikingbrain.errors import OptionError
from spikingbrain.models.spiking import SpikeEmbedding, SpikeLinear, SpikingError, spike
from spikingbrain.models.spikingbrain import LayerConfig, SpikingBrain, tiny_7b
from spikingbrain.tools.named_models import SpikeOptions

_VOCABULARY = 83  # no whole number of panels
_ALL = torch.arange(_VOCABULARY)[None]


class _Table(nn.Module):
    """A head over an embedding's own weights, as other packages write it; what lies between cannot magnify rounding."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 48)
        self.head = nn.Linear(48, _VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(tokens)
        return x, self.head(x)


@pytest.mark.parametrize(
    ("tied", "bits", "target"),
    [(True, 8, "cpu"), (True, 4, "cpu"), (True, 4, "x86-64-v3"), (False, 8, "x86-64-v3")],
)
def test_a_table_of_codes_is_stored_once_and_read_by_both(
    tied: bool, bits: int, target: str, tmp_path: Path
) -> None:
    torch.manual_seed(bits)
    model = _Table(tied).eval()
    report = spike(model, bits=bits, head=True, embedding=True, group_size=16)
    assert isinstance(model.head, SpikeLinear) and isinstance(model.embedding, SpikeEmbedding)
    assert (model.embedding.table is model.head) == tied and report.tables == ([] if tied else ["embedding"])
    shapes = {"tokens": {1: torch.export.Dim("T", min=1, max=256)}}
    made = spikingbrain.export(
        model, {"main": Entry((_ALL[:, :5],), {}, shapes)}, tmp_path / "a.sbrain", target=target
    )
    (found,) = made.manifest["entries"]["main"]["spikes"]
    assert (found["bits"], found["outputs"], found["inputs"], found["groups"]) == (bits, _VOCABULARY, 48, 3)
    stored = sum(w.nbytes for w in made.weights().values() if w.dtype == np.int8)
    table = -(-_VOCABULARY // 64) * 64 * 48  # panels of up to 64 rows
    assert stored <= table * bits // 8 + (0 if tied else _VOCABULARY * 48)
    with torch.no_grad():
        x, logits = (y.numpy() for y in model(_ALL))
    got_x, got = spikingbrain.load(made).main(_ALL.numpy())
    np.testing.assert_array_equal(got_x, x)  # codes times scales: one rounding
    np.testing.assert_allclose(got, logits, rtol=2e-5, atol=1e-6)


def test_the_command_line_names_the_bits_of_head_and_embedding() -> None:
    options = SpikeOptions.parse("k=2,bits=4,head=8,embedding=true")
    assert options == SpikeOptions(k=2.0, bits=4, head=8, embedding=True)
    with pytest.raises(OptionError, match="head=maybe"):
        SpikeOptions.parse("head=maybe")
    with pytest.raises(SpikingError, match="3 bits"):
        spike(_Table(True), head=3)


def test_a_tied_embedding_alone_stays_the_head() -> None:
    torch.manual_seed(0)
    model = SpikingBrain(replace(tiny_7b(), tied_head=True))
    report = spike(model, embedding=True)
    assert list(report.kept) == ["embedding"] and not report.tables


def test_a_token_outside_the_table_has_no_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Table(True).eval()
    spike(model, head=True)
    made = spikingbrain.export(model, {"main": Entry((_ALL[:, :3],))}, tmp_path / "a.sbrain")
    x, logits = spikingbrain.load(made).main(np.array([[1, _VOCABULARY, -1]]))
    assert np.isfinite(x[0, 0]).all() and np.isnan(x[0, 1:]).all() and np.isnan(logits[0, 1:]).all()


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_spikingbrain_model_is_integers_from_end_to_end(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = replace(
        tiny_7b(), tied_head=tied, layers=(LayerConfig(linear=True), LayerConfig(softmax="window"))
    )
    model = SpikingBrain(config).eval()
    report = spike(model, head=True, embedding=True)
    assert not report.kept and isinstance(model.embedding, SpikeEmbedding)
    assert min(r.error for r in report.replaced) > 0
    state = model.initial_state(1)
    tokens = torch.randint(0, config.vocabulary, (1, 1))
    made = spikingbrain.export(
        model, {"decode": Entry((tokens, state), {"last_only": True})}, tmp_path / "a.sbrain", state="state"
    )
    floats = {name: w.size for name, w in made.weights().items() if w.dtype == np.float32 and w.ndim > 1}
    assert max(floats.values()) < config.vocabulary * config.width  # scales, and no matrix
    with torch.no_grad():
        wanted, _ = model(tokens, state, last_only=True)
    program = spikingbrain.load(made)
    got = program.decode(tokens.numpy(), state=program.new_state())
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-3, atol=1e-3)
