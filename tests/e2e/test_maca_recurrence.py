"""Gradients of recurrences, compiled for the MetaX emulator, equal those of a loop over time in float64."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from spikingbrain.backend_maca.run.emulate import compiler
from spikingbrain.frontend.dynamo import report
from spikingbrain.frontend.ops import linear_recurrence
from spikingbrain.models.reference import recurrences as reference

pytestmark = pytest.mark.skipif(shutil.which(compiler()) is None, reason="no C++ compiler")
OPTIONS = {"target": "maca-emulator", "library": False}
BATCH, HEADS, STATES, KEYS, VALUES = 2, 4, 2, 20, 12
DECAYS = {"none": None, "head": [], "key": [KEYS], "value": [VALUES]}


def operands(axis: str, delta: bool, time: int, log: bool) -> dict[str, torch.Tensor]:
    """Returns random operands; every state is forgotten at step 5, and some factors are negative."""
    by_key = (BATCH, time, STATES, KEYS)
    k = torch.nn.functional.normalize(torch.randn(by_key), dim=-1)
    found = {
        "q": torch.randn(BATCH, time, HEADS, KEYS),
        "k": k,
        "v": torch.randn(BATCH, time, STATES, VALUES),
        "decay": -2 * torch.rand(BATCH, time, STATES, *DECAYS[axis]),
        "state": torch.randn(BATCH, STATES, KEYS, VALUES),
    }
    if not log:
        found["decay"] = 1 + 0.6 * found["decay"]
    found["decay"][:, 5:6] = -torch.inf if log else 0
    if delta:
        found |= {"erase": -k * torch.rand(BATCH, time, STATES, 1), "predict": k.clone()}
    return found


@pytest.mark.parametrize(
    ("axis", "delta", "reverse", "time", "log"),
    [
        ("key", False, False, 37, True),
        ("key", False, False, 7, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("key", False, False, 0, True),
                ("key", False, False, 1, True),
                ("head", True, False, 37, True),
                ("key", True, False, 19, True),
                ("key", False, True, 19, True),
                ("value", False, False, 37, True),
                ("key", False, False, 37, False),
                ("head", False, True, 70, False),
                ("value", False, False, 37, False),
                ("key", True, False, 19, False),
                ("head", True, True, 19, False),
            ]
        ),
    ],
)
def test_gradients(axis: str, delta: bool, reverse: bool, time: int, log: bool) -> None:
    torch.manual_seed(0)
    given: dict[str, Any] = operands(axis, delta, time, log)
    options = {"decay_axis": axis, "log_decay": log, "reverse": reverse}

    def loss(op: Any, *tensors: torch.Tensor) -> torch.Tensor:
        o, state = op(**dict(zip(given, tensors, strict=True)), **options)
        return o.sin().sum() + state.cos().sum()

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return loss(linear_recurrence, *tensors)

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="spikingbrain", options=OPTIONS)
    found = [x.clone().requires_grad_() for x in given.values()]
    with report.collect() as reports:
        compiled(*found).backward()
    regions = [region for graph in reports for region in graph.regions]
    left = [region.reason for region in regions if region.status == "eager"]
    assert set(left) == (set() if time else {"a tensor without elements"})
    assert ["linear_recurrence" in region.ops for region in regions].count(True) >= 2  # forward and backward
    wanted = [x.double().requires_grad_() for x in given.values()]
    loss(reference.linear_recurrence, *wanted).backward()
    for name, got, want in zip(given, found, wanted, strict=True):
        gradient = torch.zeros_like(want) if want.grad is None else want.grad  # not used without steps
        torch.testing.assert_close(
            got.grad.double(), gradient, atol=3e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
