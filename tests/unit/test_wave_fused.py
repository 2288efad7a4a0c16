"""What recurrences compute around themselves, in wave kernels on the MACA emulator, against torch in three orders of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_fuse_into_recurrence import CASES, Case, captured, joined
from test_maca import compile_text, load, needs_cxx
from test_wave_recurrence import WAVES
from torch_mlir import ir

from spikingbrain.backend_maca.run.emulate import ORDERS
from spikingbrain.passes import pipeline
from spikingbrain.passes.base import PassContext
from spikingbrain.passes.context import new_context

pytestmark = needs_cxx
# Of both kernels: row sums, grouped heads, bfloat16, the bonus, a decay of value channels, the delta rule, wide heads.
NAMES = ("bonus", "delta", "norm_and_gate", "flat_gate", "grouped", "halves", "columns_split")
QUICK = ("delta", "halves")
FUSED = {"columns_split": "computes k, v; computes the output with 1 row sum"}
SOME = [case for case in CASES if case.name in NAMES]


def program(case: Case) -> Any:
    """Returns a compiled case."""
    context = PassContext(WAVES)
    with new_context(), ir.Location.unknown():
        module = joined([captured(case)])
        pipeline.run(pipeline.default_pipeline(), module, context)
        pipeline.clean(module)
        pipeline.check_lowered(module)
        text = str(module)
    # A block has all columns of a row, so that sums over it are computed in more cases than on a CPU.
    said = [r.reason for r in context.records if r.pass_name == "fuse-into-recurrence"]
    assert said == [FUSED.get(case.name, case.fused)]
    assert [r.reason for r in context.records if r.pass_name == "lower-recurrence"] == ["kernel"]
    return load(compile_text(text))


def stored(x: torch.Tensor) -> np.ndarray[Any, Any]:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in QUICK else pytest.mark.slow, id=c.name) for c in SOME],
)
def test_equals_torch(case: Case) -> None:
    made = program(case)
    for time in (0, 1, 37):
        inputs, results = case.inputs(time), []
        for order in ORDERS:
            made.kernels.order = order
            found = made.call(case.name, [made.to_device(stored(x)) for x in inputs])
            results.append([np.array(x) for x in found])
        with torch.no_grad():
            wanted = case.function(*(x.double() if x.dtype == torch.float32 else x for x in inputs))
        for first, second, third, want in zip(*results, wanted, strict=True):
            np.testing.assert_array_equal(first, second)
            np.testing.assert_array_equal(first, third)
            got = torch.from_numpy(first)
            got = got.view(want.dtype).float() if want.dtype == torch.bfloat16 else got
            scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
            limit = 3e-6 if case.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(got, want.float(), rtol=0, atol=limit * scale)
