"""Wave kernels with other settings than the usual ones, against the same references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

import test_wave_attention as attention
import test_wave_kernels_linear as products
import test_wave_kernels_spike as spikes
import test_wave_recurrence as recurrence
from test_kernels_attention import arguments
from test_maca import needs_cxx
from wave_programs import Program, joined

from spikingbrain.passes.lower_grouped_linear import LowerGroupedLinear
from spikingbrain.passes.lower_linear import LowerLinear
from spikingbrain.passes.spike_to_int import SpikeToInt
from spikingbrain.tuning import Tuning

pytestmark = needs_cxx
SMALL = Tuning(attention_waves=1, share_keys=64, chunk_steps=16, chunk_waves=1, step_waves=1, staged_steps=3)
PRODUCTS = {  # the second asks for more shared memory than there is
    ("odd", "experts"): Tuning(
        linear_columns=1, linear_row_tiles=2, linear_column_tiles=2, linear_fragments=1
    ),
    ("rows", "bfloats"): Tuning(
        linear_columns=8, linear_row_tiles=4, linear_column_tiles=8, linear_fragments=3
    ),
}
SPIKES = Tuning(spike_row_tiles=4, spike_chunks_ahead=8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "compiled", attention.compiled.__wrapped__)  # which keeps programs
    for module in (attention, recurrence):
        monkeypatch.setattr(module, "WAVES", replace(recurrence.WAVES, tuning=SMALL))


def test_recurrences() -> None:
    recurrence.check(recurrence.STEPS[0], (0, 4))
    recurrence.check(recurrence.TILES[0], (1, 37))


@pytest.mark.slow
def test_attention_of_many_tokens() -> None:
    rule = (40, 2)
    program = attention.compiled(attention.GROUPED, rule, "?", "?")
    attention.check(program, arguments(attention.GROUPED, 35, [90, 5], 70), rule)


def test_attention_of_one_token_to_many_keys() -> None:
    rule = (600, 2)
    program = attention.compiled(attention.ODD, rule, "700", "1")
    attention.check(program, arguments(attention.ODD, 1, [690, 5], 700), rule)


@pytest.mark.parametrize(
    "names",
    [pytest.param(n, marks=[pytest.mark.slow] * (i > 0)) for i, n in enumerate(PRODUCTS)],
    ids="-".join,
)
def test_products(names: tuple[str, str]) -> None:
    cases, tuning = {name: products.CASES[name] for name in names}, PRODUCTS[names]
    program = Program(joined(cases), [LowerGroupedLinear(), LowerLinear()], tuning)
    loaded = program.load({name: {"w": case.weight} for name, case in cases.items()})
    for name, case in cases.items():
        (products.test_experts if case.experts else products.test_products)(loaded, name)


@pytest.mark.slow
def test_spikes() -> None:
    cases = {name: spikes.CASES[name] for name in ("odd", "groups", "groups_row")}
    loaded = Program(joined(cases), [SpikeToInt()], SPIKES).load({n: spikes.weights(n) for n in cases})
    rng = np.random.default_rng(1)
    for name, case in cases.items():
        for rows in (3, 130) if case.rows is None else (case.rows,):
            x = rng.standard_normal((rows, case.k))
            spikes.check(loaded, name, np.where(rng.random(x.shape) < 0.01, x * 1e3, x))
