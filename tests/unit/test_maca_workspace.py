"""The workspace of MetaX programs: what lives together lies apart, and little more memory is taken than must be."""

from __future__ import annotations

import random

import pytest

from spikingbrain.backend_maca.plan.workspace import ALIGNMENT, Lifetime, aligned, pack


@pytest.mark.parametrize("seed", range(20))
def test_buffers_that_live_together_do_not_overlap(seed: int) -> None:
    draw = random.Random(seed)
    lives = {}
    for i in range(draw.randint(1, 60)):
        first = draw.randint(0, 50)
        lives[i] = Lifetime(
            draw.choice([0, 1, 255, 256, 257, 4096, 100000]), first, first + draw.randint(0, 9)
        )
    made = pack(lives)
    for i, a in lives.items():
        assert made.offsets[i] % ALIGNMENT == 0 and made.offsets[i] + a.size <= made.size
        for j, b in lives.items():
            if i < j and a.first <= b.last and b.first <= a.last:
                ends = (
                    made.offsets[i] + a.size <= made.offsets[j],
                    made.offsets[j] + b.size <= made.offsets[i],
                )
                assert any(ends), (i, j)
    fullest = max(sum(aligned(v.size) for v in lives.values() if v.first <= t <= v.last) for t in range(60))
    assert made.least == fullest
    assert made.least <= made.size <= 1.5 * made.least


def test_a_chain_of_steps_takes_two_places() -> None:
    made = pack({i: Lifetime(1000, i, i + 1) for i in range(50)})
    assert made.size == made.least == 2 * 1024
