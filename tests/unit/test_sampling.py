"""Samplers against the same thing written plainly, token by token, in Python's own numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spikingbrain.errors import CallError, OptionError
from spikingbrain.sampling import Sampler, Sampling

PROMPT, TEXT = [3, 3, 7, 0], [7, 1, 7, 11]


def reference(
    s: Sampling, logits: Sequence[float], prompt: Sequence[int], text: Sequence[int]
) -> dict[int, float]:
    """Returns the probability of each token that may come next."""
    scores, counts = [float(x) for x in logits], Counter(text)
    for token in {*prompt, *text}:
        up = scores[token] > 0
        scores[token] *= 1 / s.repetition_penalty if up else s.repetition_penalty
    for token, count in counts.items():
        scores[token] -= s.presence_penalty + s.frequency_penalty * count
    ranked = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if s.temperature == 0:
        return {ranked[0]: 1.0}
    if s.top_k:
        ranked = ranked[: s.top_k]
    weights = [math.exp((scores[token] - scores[ranked[0]]) / s.temperature) for token in ranked]
    total, so_far, kept = math.fsum(weights), 0.0, {}
    for token, weight in zip(ranked, weights, strict=True):
        if s.top_p == 1 or so_far < s.top_p * total:
            kept[token] = weight
        so_far += weight
    kept = {token: weight for token, weight in kept.items() if weight > 0 and weight >= s.min_p}
    return {token: weight / math.fsum(kept.values()) for token, weight in kept.items()}


CASES = {
    "greedy": Sampling(),
    "temperature": Sampling(0.7),
    "hot": Sampling(30.0),
    "top_k": Sampling(1.0, top_k=5),
    "top_k of more than there are": Sampling(1.0, top_k=10_000),
    "top_p": Sampling(1.0, top_p=0.8),
    "top_p of almost all": Sampling(1.0, top_p=0.999),
    "top_p of almost none": Sampling(1.0, top_p=1e-9),
    "min_p": Sampling(1.3, min_p=0.1),
    "min_p of the best": Sampling(1.0, min_p=1.0),
    "repetition": Sampling(1.0, repetition_penalty=1.7),
    "repetition wanted": Sampling(0.0, repetition_penalty=0.1),
    "presence": Sampling(0.9, presence_penalty=2.5),
    "frequency": Sampling(0.9, frequency_penalty=-0.75),
    "all": Sampling(0.8, 12, 0.9, 0.05, 1.3, 0.4, 0.6),
    "all, greedy": Sampling(0.0, 12, 0.9, 0.05, 1.3, 0.4, 0.6),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [12, 1001])
def test_distributions_equal_the_plain_ones(name: str, size: int) -> None:
    for seed in range(8):
        logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
        if seed % 2:
            logits = np.round(logits)  # many ties
        if seed == 6:
            logits[size // 2 :] = -np.inf
        expected = reference(CASES[name], logits.tolist(), PROMPT, TEXT)
        tokens, probabilities = CASES[name].distribution(logits, PROMPT, TEXT)
        got = dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-12, abs=0)
        assert logits.dtype == np.float32


def test_extreme_logits() -> None:
    logits = np.array([-3e38, 3e38, -np.inf, 2.9e38], np.float32)
    for temperature in (1e-300, 1.0):
        tokens, probabilities = Sampling(temperature, top_p=0.9).distribution(logits)
        assert (tokens.tolist(), probabilities.tolist()) == ([1], [1.0])
    tokens, probabilities = Sampling(1e300).distribution(logits)
    assert dict(zip(tokens.tolist(), probabilities.tolist(), strict=True)) == {0: 1 / 3, 1: 1 / 3, 3: 1 / 3}
    for bad in (np.nan, np.inf):
        for temperature in (0.0, 1.0):
            with pytest.raises(CallError, match=f"the highest logit is {bad}"):
                Sampling(temperature).distribution(np.array([0, bad, 1], np.float32))


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits, draws = np.log(np.array([5, 1, 0.5, 3, 0.5], np.float32)), 20_000
    sampler = Sampler(Sampling(1.0, top_k=4, seed=3), [])
    found = Counter(sampler.choose(logits) for _ in range(draws))
    for token, share in reference(Sampling(1.0, top_k=4), logits.tolist(), [], []).items():
        deviation = math.sqrt(draws * share * (1 - share))
        assert abs(found[token] - draws * share) < 4 * deviation
    assert set(found) == {0, 1, 2, 3}


def test_penalties_count_what_was_chosen() -> None:
    logits = np.array([1.0, 0.8, 0.5], np.float32)
    sampler = Sampler(Sampling(frequency_penalty=0.3), [0, 0, 0])
    assert [sampler.choose(logits) for _ in range(6)] == [0, 1, 0, 1, 2, 0]


def test_a_seed_repeats_the_text_and_each_number_has_its_own() -> None:
    logits, sampling = np.zeros(1000, np.float32), Sampling(1.0, seed=5)

    def draw(sampler: Sampler) -> list[int]:
        return [sampler.choose(logits) for _ in range(5)]

    first = draw(Sampler(sampling, []))
    assert draw(Sampler(sampling, [])) == first
    assert draw(Sampler(sampling, [], number=2)) == draw(Sampler(replace(sampling, seed=7), [])) != first
    assert draw(Sampler(Sampling(1.0), [])) != draw(Sampler(Sampling(1.0), []))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "sampling with temperature -1\n  try: temperature is 0 or more"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 1.5}, "top_k is a whole number"),
        ({"top_p": 0}, "top_p is above 0 and at most 1"),
        ({"min_p": 1.1}, "min_p is from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is a number"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is a number"),
        ({"seed": -1}, "seed is a whole number"),
    ],
)
def test_values_outside_their_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Sampling(**options)
    assert message in str(caught.value)
