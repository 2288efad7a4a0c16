"""How the next token is chosen from the logits, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spikingbrain.errors import CallError, OptionError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Penalties change the logits; then they are divided by the temperature; then each of ``top_k``, ``top_p`` and ``min_p``, in
    this order, leaves some of the tokens, among which probabilities are scaled to sum up to 1. Of equally likely tokens
    the one with the lower id comes first.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it.
        top_k: leaves the k most likely tokens; 0 all.
        top_p: leaves the fewest most likely tokens whose probabilities sum up to p.
        min_p: leaves the tokens that are at least p times as likely as the most likely one.
        repetition_penalty: of each token in the prompt or the text, a positive logit is divided by it, a negative one
            multiplied (arXiv 1909.05858); 1: no penalty.
        presence_penalty: what is subtracted from the logit of each token in the text.
        frequency_penalty: what is subtracted for each time that the token is in the text.
        seed: of the random numbers; None takes fresh ones.

    Raises OptionError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (fine, rule) in _RULES.items():
            value = getattr(self, name)
            if not fine(value):
                raise OptionError(f"sampling with {name} {value}", hint=f"{name} {rule}")

    def distribution(
        self, logits: Array, prompt: Sequence[int] = (), text: Sequence[int] = ()
    ) -> tuple[Array, Array]:
        """Returns the tokens that may come next and their probabilities.

        Args:
            logits: of each token of the vocabulary [C].
            prompt: tokens before the text.
            text: tokens chosen so far.

        Raises CallError for logits that are no numbers.
        """
        scores = logits.astype(np.float64)  # a copy
        self._penalise(scores, prompt, text)
        highest = scores.max()
        if not np.isfinite(highest):  # NaN wins every comparison of max
            raise CallError(
                f"the highest logit is {highest}", why="the model overflowed, or its weights are damaged"
            )
        if self.temperature == 0:
            return np.array([scores.argmax()]), np.ones(1)
        kept = np.arange(len(scores)) if self.top_k == 0 else _highest(scores, self.top_k)
        with np.errstate(
            over="ignore"
        ):  # a small temperature takes what is less likely to exp(-inf), which is 0
            weights = np.exp((scores[kept] - highest) / self.temperature)
        if self.top_p < 1:
            few = _fewest(weights, self.top_p)
            kept, weights = kept[few], weights[few]
        likely = (weights > 0) & (weights >= self.min_p)  # of the most likely token it is 1
        kept, weights = kept[likely], weights[likely]
        return kept, weights / weights.sum()

    def _penalise(self, scores: Array, prompt: Sequence[int], text: Sequence[int]) -> None:
        if self.repetition_penalty != 1:
            seen = np.unique(np.asarray([*prompt, *text], np.int64))
            found = scores[seen]
            scores[seen] = np.where(
                found > 0, found / self.repetition_penalty, found * self.repetition_penalty
            )
        if self.presence_penalty or self.frequency_penalty:
            tokens, counts = np.unique(np.asarray(text, np.int64), return_counts=True)
            scores[tokens] -= self.presence_penalty + self.frequency_penalty * counts


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda v: 0 <= v < np.inf, "is 0 or more"),
    "top_k": (lambda v: v >= 0 and v == int(v), "is a whole number, 0 or more"),
    "top_p": (lambda v: 0 < v <= 1, "is above 0 and at most 1"),
    "min_p": (lambda v: 0 <= v <= 1, "is from 0 to 1"),
    "repetition_penalty": (lambda v: 0 < v < np.inf, "is above 0"),
    "presence_penalty": (np.isfinite, "is a number"),
    "frequency_penalty": (np.isfinite, "is a number"),
    "seed": (lambda v: v is None or (v >= 0 and v == int(v)), "is a whole number, 0 or more"),
}


def _highest(scores: Array, count: int) -> Array:
    """Returns the places of the ``count`` highest scores; of equal ones those in front come first."""
    count = min(count, len(scores))
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def _fewest(weights: Array, share: float) -> Array:
    """Returns the places of the fewest highest weights that make up a share of their sum."""
    wanted = share * weights.sum()
    # those below the mean of what may be left out cannot be needed, and sorting all would take most of the time
    large = np.flatnonzero(weights >= (weights.sum() - wanted) / len(weights))
    order = large[np.argsort(-weights[large], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1
    return np.sort(order[:count])


class Sampler:
    """Chooses the tokens of one text, one after the other."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], number: int = 0):
        """``number`` is that of the text in a batch: each has random numbers of its own, from the seed + number."""
        self._sampling, self._prompt, self._text = sampling, prompt, list[int]()
        seed = None if sampling.seed is None else sampling.seed + number
        self._random = np.random.default_rng(seed)

    def choose(self, logits: Array) -> int:
        """Returns the next token; ``logits`` [C]."""
        tokens, probabilities = self._sampling.distribution(logits, self._prompt, self._text)
        token = int(tokens[0])
        if len(tokens) > 1:
            sums = np.cumsum(probabilities)
            place = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
            token = int(tokens[min(place, len(tokens) - 1)])
        self._text.append(token)
        return token
