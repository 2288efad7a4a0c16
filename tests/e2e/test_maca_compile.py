"""``torch.compile`` for the MetaX emulator: whole models and training steps equal eager torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch.utils import _pytree as pytree
from zoo import ZOO

from spikingbrain.frontend.dynamo import report

QUICK = ("bert",)
OPTIONS = {"target": "maca-emulator", "library": False}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ZOO]
)
def test_every_op_of_a_model_has_a_kernel(name: str) -> None:
    model, inputs = ZOO[name].build("tiny"), ZOO[name].inputs("tiny", 0)
    with report.collect() as reports, torch.no_grad():
        found, wanted = (
            torch.compile(model, backend="spikingbrain", options=OPTIONS)(**inputs),
            model(**inputs),
        )
    regions = [region for graph in reports for region in graph.regions]
    assert any(region.status == "compiled" for region in regions)
    assert [
        region.reason for region in regions if region.failed
    ] == []  # what no target compiles is not tried
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        if isinstance(b, torch.Tensor):
            assert_close(a, b, "output")
