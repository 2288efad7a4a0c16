"""Elementwise ops where op databases are tame: NaN, infinities, the limits of types, mixed types; see ``extremes.py``."""

from __future__ import annotations

import warnings

import extremes
import harness
import pytest
import torch

pytestmark = pytest.mark.slow

# Where a compiled result may differ from eager, and why that stays.
KNOWN = {
    "gelu": "torch: gelu(inf) is NaN in f16 and bf16",
    "tanhshrink": "IREE leaves out the rounding to f16 and bf16 between fused ops",
    "remainder int16": "IREE leaves out the rounding to bf16 between fused ops",
    "remainder bfloat16": "IREE leaves out the rounding to bf16 between fused ops",
    "x ** 2.5": "IREE: (-inf) ** 2.5 is NaN instead of inf",
    "x ** 0.5": "IREE: (-inf) ** 0.5 is NaN instead of inf",
    "x ** -0.5": "IREE: (-inf) ** -0.5 is NaN instead of 0",
}


@pytest.mark.parametrize(
    "samples", [extremes.unary_samples, extremes.binary_samples], ids=["unary", "binary"]
)
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=pytest.mark.gate) if d in ("f32", "i64") else d for d in harness.DTYPES]
)
def test_extremes(dtype: str, samples: object) -> None:
    assert callable(samples)
    batch = list(samples(harness.DTYPES[dtype]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = harness.eager(batch, gradient=False)
        found = harness.compiled(batch, gradient=False)
    wrong = []
    for sample, actual, wanted in zip(batch, found.results, expected.results, strict=True):
        for a, e in zip(actual, wanted, strict=True):
            if (text := extremes.difference(sample.text, a, e, sample.tensors)) and sample.text not in KNOWN:
                wrong.append(f"{sample.text}: {text}")
    assert not wrong, "\n".join(wrong)
    failures = [
        r.reason for g in found.reports for r in g.regions if "stopped" in r.reason or "died" in r.reason
    ]
    assert not failures, "\n".join(failures)


def test_denormals_count_as_zero() -> None:
    """IREE's runtime has the CPU take denormal numbers for zero, in and out. torch does so only if asked."""
    tiny = torch.tensor([torch.finfo(torch.float32).tiny / 4])
    sample = harness.Sample(lambda t: [t[0] == 0, t[0] * 2], [tiny])
    found = harness.compiled([sample], gradient=False)
    assert found.results[0][0].all()
    assert not found.results[0][1].any()
