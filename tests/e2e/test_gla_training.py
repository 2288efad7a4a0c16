"""A GLA language model, its recurrence a plain Python loop, learns the same compiled as in eager, on real text."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain.frontend.dynamo import report
from spikingbrain.models.gla import Gla, tiny
from spikingbrain.tools.clean_wiki import wiki_text

STEPS, LENGTH, BATCH = 200, 48, 8


class ByteModel(nn.Module):
    """Predicts the next byte of a text; forward returns the loss."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.model = Gla(tiny(form=form))

    def forward(self, tokens: Tensor) -> Tensor:
        logits, _ = self.model(tokens[:, :-1], self.model.initial_state(len(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batches() -> list[Tensor]:
    data = torch.frombuffer(bytearray(wiki_text()[:500_000], "utf-8"), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, len(data) - LENGTH - 1, (STEPS, BATCH), generator=generator)
    return [torch.stack([data[s : s + LENGTH + 1] for s in row]) for row in starts.tolist()]


def train(model: nn.Module, step: Callable[[Tensor], Tensor]) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for tokens in batches():
        loss = step(tokens)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_the_loss_curve_is_eagers() -> None:
    model = ByteModel("loop")
    twin = copy.deepcopy(model)
    expected = train(model, model)
    with report.collect() as graphs, report.collect_found() as found:
        actual = train(twin, torch.compile(twin, backend="spikingbrain"))
    assert [(r.status, r.op) for r in found.recurrences] == [("raised", "linear_recurrence")] * 2
    assert [graph.kind for graph in graphs] == ["forward", "backward"]
    assert not any(region.failed for graph in graphs for region in graph.regions)
    assert expected[-1] < 0.5 * expected[0], "the model did not learn"
    # rounding differs, and training amplifies it: step by step at first, then on the average
    for i, (a, e) in enumerate(zip(actual[:50], expected[:50], strict=True)):
        assert abs(a - e) < 1e-3 * e, f"step {i}: loss {a} instead of {e}"
    ends = [sum(curve[-50:]) / 50 for curve in (actual, expected)]
    assert abs(ends[0] - ends[1]) < 1e-2 * ends[1]
