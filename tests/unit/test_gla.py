"""The GLA model: both forms of its recurrence, prefill and decode, and what does not fit are one model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikingbrain.models.gla import Gla, GlaConfig, State, small, tiny

sys.path.append(str(Path(__file__).parents[1]))
from tolerances import assert_close


def model(form: str = "loop") -> Gla:
    torch.manual_seed(0)
    return Gla(tiny(vocabulary=50, form=form)).double().eval()


def tokens(length: int) -> Tensor:
    return torch.randint(0, 50, (3, length), generator=torch.Generator().manual_seed(length))


def run(m: Gla, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    with torch.no_grad():
        return m(ids, state or m.initial_state(len(ids)))


@pytest.mark.parametrize("length", [0, 1, 63, 130])
def test_both_forms_agree(length: int) -> None:
    ids = tokens(length)
    (expected, memory), (actual, other) = run(model(), ids), run(model("blockwise"), ids)
    assert_close(actual, expected, "logits")
    for a, e in zip(other.memories, memory.memories, strict=True):
        assert_close(a, e, "memory")


@pytest.mark.parametrize("form", ["loop", "blockwise"])
def test_a_text_may_be_split_anywhere(form: str) -> None:
    m, ids = model(form), tokens(20)
    expected, _ = run(m, ids)
    state, found = m.initial_state(3), []
    for part in ids.split([13, 1, 6], dim=1):
        logits, state = run(m, part, state)
        found.append(logits)
    assert_close(torch.cat(found, dim=1), expected, "logits")


def test_texts_of_a_batch_are_independent() -> None:
    m, ids = model(), tokens(9)
    expected, _ = run(m, ids)
    assert_close(run(m, ids[1:2])[0], expected[1:2], "logits")


def test_a_token_does_not_see_later_ones() -> None:
    m, ids = model("blockwise"), tokens(70)
    changed = ids.clone()
    changed[:, 66] = (changed[:, 66] + 1) % 50
    before, after = run(m, ids)[0], run(m, changed)[0]
    assert_close(after[:, :66], before[:, :66], "logits")
    assert (after[:, 66:] != before[:, 66:]).flatten(1).any(dim=1).all()


def test_the_last_token_alone() -> None:
    m, ids = model(), tokens(7)
    with torch.no_grad():
        last, _ = m(ids, m.initial_state(3), last_only=True)
    assert_close(last, run(m, ids)[0][:, -1:], "logits")


def test_the_state_of_a_half_precision_model_is_float32() -> None:
    m = model("blockwise").bfloat16()
    logits, state = run(m, tokens(5))
    assert logits.dtype == torch.bfloat16
    assert {x.dtype for x in state.memories} == {torch.float32}


def test_presets() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in Gla(c).parameters()) for c in (tiny(), small())]
    assert 150_000 < counts[0] < 350_000
    assert 120e6 < counts[1] < 150e6


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"3 query heads cannot share 2 key heads: .* try key_heads that divides"
    ):
        GlaConfig(8, 8, 1, heads=3, key_heads=2, key_size=4, value_size=4, feed_forward=8)
    with pytest.raises(ValueError, match="form is 'fast'; it can be 'blockwise' or 'loop'"):
        tiny(form="fast")
