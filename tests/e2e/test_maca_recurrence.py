"""Gradients of recurrences, compiled for the MetaX emulator, equal those of eager torch."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from spikingbrain.backend_maca.run.emulate import compiler
from spikingbrain.frontend.dynamo import report
from spikingbrain.frontend.ops import linear_recurrence

pytestmark = pytest.mark.skipif(shutil.which(compiler()) is None, reason="no C++ compiler")
BATCH, HEADS, STATES, KEYS, VALUES = 2, 4, 2, 20, 12
DECAYS = {"none": None, "head": [], "key": [KEYS], "value": [VALUES]}


def operands(axis: str, delta: bool, time: int) -> dict[str, torch.Tensor]:
    """Returns random operands; every state is forgotten at step 5."""
    by_key = (BATCH, time, STATES, KEYS)
    k = torch.nn.functional.normalize(torch.randn(by_key), dim=-1)
    found = {
        "q": torch.randn(BATCH, time, HEADS, KEYS),
        "k": k,
        "v": torch.randn(BATCH, time, STATES, VALUES),
        "decay": -2 * torch.rand(BATCH, time, STATES, *DECAYS[axis]),
        "state": torch.randn(BATCH, STATES, KEYS, VALUES),
    }
    found["decay"][:, 5] = -torch.inf
    if delta:
        found |= {"erase": -k * torch.rand(BATCH, time, STATES, 1), "predict": k.clone()}
    return found


@pytest.mark.parametrize(
    ("axis", "delta", "reverse"),
    [
        ("key", False, False),
        pytest.param("head", True, False, marks=pytest.mark.slow),
        pytest.param("key", False, True, marks=pytest.mark.slow),
        pytest.param("value", False, False, marks=pytest.mark.slow),
    ],
)
def test_gradients(axis: str, delta: bool, reverse: bool) -> None:
    torch.manual_seed(0)
    given: dict[str, Any] = operands(axis, delta, 19)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(given, tensors, strict=True))
        o, state = linear_recurrence(**named, decay_axis=axis, log_decay=True, reverse=reverse)
        return o.sin().sum() + state.cos().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="spikingbrain", options={"target": "maca-emulator"})
    gradients = []
    for function in (compiled, loss):
        leaves = [x.clone().requires_grad_() for x in given.values()]
        with report.collect() as reports:
            function(*leaves).backward()
        if function is compiled:
            assert "compiled" in [region.status for graph in reports for region in graph.regions]
        gradients.append([x.grad for x in leaves])
    for name, got, want in zip(given, *gradients, strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
