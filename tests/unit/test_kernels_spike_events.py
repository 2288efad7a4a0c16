"""Spiking projections from the channels that fire: bit for bit what integers give, whatever fires and however much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler.tools")
pytest.importorskip("iree.runtime")

import spike_cases
import torch
from spike_cases import Array, Case
from test_kernels_spike import PORTABLE, V2, V3, V4, VNNI, VNNI_256, lowered
from torch_mlir import ir

from spikingbrain.backend_iree import cpu
from spikingbrain.models.spiking import CODINGS, encode
from spikingbrain.models.spiking.codings import step_weights
from spikingbrain.passes import recipes
from spikingbrain.passes.kernels.spike_dot import choose_by_channel
from spikingbrain.passes.spike_forms import SILENT_ENOUGH, form
from spikingbrain.tuning import Tuning

TARGETS = [VNNI, *(pytest.param(t, marks=pytest.mark.slow) for t in (PORTABLE, V3, V4, VNNI_256, V2))]
CASES = {
    "rows": Case(70, 37, silent=0.9, bias=True),
    "row": Case(67, 130, rows=1, silent=0.9),
    "grouped": Case(384, 80, groups=3, rows=1, silent=0.9),
    "nibbles": Case(64, 70, groups=2, bits=4, rows=2, silent=0.9, bias=True),
    "wide_codes": Case(41, 33, bits=16, rows=1, silent=0.9),
}


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def compiled(request: pytest.FixtureRequest) -> Any:
    missing = request.param.features - cpu.features()
    if missing or cpu.architecture() != "x86-64":
        pytest.skip(f"this processor has no {', '.join(sorted(missing)) or 'x86-64 code'}")
    return spike_cases.programs(CASES, request.param)


def check(compiled: Any, name: str, x: Array) -> None:
    case, x = CASES[name], x.astype(np.float32)
    weights = case.weights(np.random.default_rng(0))
    got = compiled[name](x, weights)
    expected, fused = spike_cases.linear(x, weights, case.bias)
    np.testing.assert_array_equal(got, np.where(got == fused, fused, expected))


def firing(rng: np.random.Generator, case: Case, m: int, share: float) -> Array:
    """Returns rows of which a share of channels fires."""
    x = rng.standard_normal((m, case.k))
    return np.where(rng.random(x.shape) < share, x + np.copysign(1, x), 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.0, 0.04, 0.2, 0.5, 1.0])
def test_any_share_fires(compiled: Any, name: str, share: float) -> None:
    case, rng = CASES[name], np.random.default_rng(int(share * 100))
    for m in (0, 1, 2, 5, 8, 9, 13) if case.rows is None else (case.rows,):
        check(compiled, name, firing(rng, case, m, share))


@pytest.mark.parametrize("name", CASES)
def test_counts_of_every_size(compiled: Any, name: str) -> None:
    """One channel holds all of a row's spikes, counts are beyond bytes and words, whole bytes, or no numbers."""
    case, rng = CASES[name], np.random.default_rng(1)
    m = case.rows or 3
    for value in (1e2, 1e4, 1e7, np.nan, np.inf):
        x = firing(rng, case, m, 0.1)
        x[:, rng.integers(case.k, size=3)] = value * rng.choice([-1, 1])
        check(compiled, name, x)
    for k in (0, case.k // 2, case.k - 1):
        check(compiled, name, np.tile(np.eye(case.k)[k], (m, 1)))
    bytes_ = np.zeros(
        (m, case.k)
    )  # at k = 3 the threshold is 1 / 256: counts of 256, whose low byte is 0, and of one more
    bytes_[:, 1] = 1
    bytes_[:, 2:3] = 257 / 256
    bytes_ *= 3 * 513 / (256 * case.k) / np.abs(bytes_).mean()
    check(compiled, name, bytes_)


def test_columns_added_step_by_step_give_the_same_sums(compiled: Any) -> None:
    """Each coding's train, added as its definition says: at each step the weights of the channels that fire."""
    case = CASES["row"]
    weights = case.weights(np.random.default_rng(3))
    weights["s"][:] = 1
    x = np.abs(firing(np.random.default_rng(4), case, 1, 0.1)).astype(np.float32)
    x[0, 5] = 40 * x.max()  # a count that no byte holds
    counts, threshold = spike_cases.encode(x)
    codes = weights["w"].astype(np.int64)
    got = compiled["row"](x, weights)
    for coding in CODINGS:
        train = encode(torch.from_numpy(counts), coding).numpy()
        total = np.zeros(case.n, np.int64)
        for step, weight in zip(train[:, 0], step_weights(len(train), coding).tolist(), strict=True):
            for channel in np.flatnonzero(step):
                total += weight * int(step[channel]) * codes[:, channel]
        np.testing.assert_array_equal(got[0], total.astype(np.float32) * threshold[0], err_msg=coding)


@pytest.mark.parametrize("target", [VNNI, V3, V2, PORTABLE], ids=lambda target: target.name)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_channels_lie_together(target: Any, bits: int) -> None:
    """A channel's weights are one run of bytes: whichever of its rows is read, it holds this channel alone."""
    n, k = 45, 9
    dot = choose_by_channel(target, bits)
    assert dot is not None
    with ir.Context(), ir.Location.unknown():
        shape = tuple(dot.stored_type(n, k).shape)
    codes = np.zeros((n, k), np.int16 if bits == 16 else np.int8)
    codes[:, 4] = np.arange(n) % 13 - 6
    packed = recipes.apply([dot.recipe()], [codes])
    assert packed.shape == shape
    silent = recipes.apply([dot.recipe()], [np.zeros_like(codes)])
    differs = (packed != silent).any((0, 2, 3))
    assert differs.nonzero()[0].tolist() == [4]


@pytest.mark.parametrize(
    ("case", "target", "reason"),
    [
        (Case(64, 32, silent=0.9), VNNI, "kernel of events, 90% silent"),
        (Case(64, 32, silent=SILENT_ENOUGH - 0.01), VNNI, "kernel"),
        (Case(64, 32, silent=0.9), PORTABLE, "kernel of events, 90% silent"),
        (Case(12, 20, groups=4, silent=0.9), VNNI, "linalg: groups of 3 channels; a step takes 4"),
    ],
)
def test_which_form_is_taken(case: Case, target: Any, reason: str) -> None:
    module, reasons = lowered(case.function("f"), target)
    assert reasons[0] == reason
    assert ("callee = @spike_events" in module) == ("events" in reason)


def test_many_rows_are_multiplied_by_the_same_stored_weight() -> None:
    """A prefill of fixed length and a step of decoding keep one weight; the lists are made for few rows alone."""
    few, _ = lowered(Case(64, 32, rows=1, silent=0.9).function("f"), VNNI)
    many, _ = lowered(Case(64, 32, rows=100, silent=0.9).function("f"), VNNI)
    recipe = next(line for line in few.splitlines() if "pack_channels" in line).partition("recipe")[2]
    assert recipe in many
    assert "_events_m1" in few and "_events_m" not in many


def test_the_measured_share_decides() -> None:
    assert [form(share) for share in (0.0, SILENT_ENOUGH - 1e-3, SILENT_ENOUGH, 1.0)] == ["dense"] * 2 + [
        "events"
    ] * 2
    # what is stored by channel is added by channel on average
    assert Tuning().firing_percent / 100 > 1 - SILENT_ENOUGH
