"""Text generation with a loaded program: prefill, then one token at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spikingbrain.artifact import TOKENIZER
from spikingbrain.errors import CallError, OptionError

if TYPE_CHECKING:
    from spikingbrain.program import Program
    from spikingbrain.state import State

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it.
        top_k: sample among the k most likely tokens; 0 among all.
        top_p: sample among the most likely tokens whose probabilities sum up to p.
        seed: of the random numbers; None takes fresh ones.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise OptionError(
                f"sampling with temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}",
                hint="temperature >= 0, top_k >= 0, 0 < top_p <= 1",
            )

    def choose(self, logits: Array, random: np.random.Generator) -> int:
        """Returns a token id; ``logits`` is one vector of them."""
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scores, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        weights = np.exp(scores[order] - scores[order[0]])
        weights /= weights.sum()
        kept = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1
        weights = weights[:kept] / weights[:kept].sum()
        return int(random.choice(order[:kept], p=weights))


@dataclass
class Timing:
    """Seconds of a generation: the prompt until the first token, then each further token."""

    first_token: float = 0.0
    tokens: list[float] = field(default_factory=list)

    @property
    def per_token(self) -> float:
        """The median time of a token after the first."""
        return float(np.median(self.tokens)) if self.tokens else 0.0


class Tokens:
    """The artifact's tokenizer, with incremental decoding for streams."""

    def __init__(self, program: Program):
        opened = program.artifact
        if opened is None or not opened.has(TOKENIZER):
            raise CallError(
                "this artifact holds no tokenizer", hint="export it with tokenizer=..., or pass token ids"
            )
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(bytes(opened.member(TOKENIZER)).decode())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Yields text pieces; a character whose bytes are spread over tokens is held back until it is whole."""
        pending: list[int] = []
        shown = ""
        for token in ids:
            pending.append(token)
            text = self._tokenizer.decode(pending, skip_special_tokens=True)
            if text.endswith("\ufffd"):
                continue
            if len(text) > len(shown):
                yield text[len(shown) :]
            shown = text
            if len(pending) > 64 and text.endswith((" ", "\n")):  # keep the work per token constant
                pending, shown = [], ""


def generate_ids(
    program: Program,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    state: State | None = None,
    timing: Timing | None = None,
) -> Iterator[int]:
    """Yields token ids until ``max_tokens`` or a stop token (which is not yielded).

    ``state`` continues a conversation; the program needs the entry points ``prefill`` (any number of tokens) and
    ``decode`` (one), each returning logits ``[B, 1, V]`` of the last token.
    """
    if not prompt:
        raise CallError(
            "the prompt is empty",
            hint="begin with at least one token, such as the tokenizer's first special one",
        )
    given = state
    state = state or program.new_state()
    _check_capacity(program, state, len(prompt) + max_tokens)
    sampling, timing = sampling or Sampling(), timing if timing is not None else Timing()
    random = np.random.default_rng(sampling.seed)
    start = time.perf_counter()
    logits = program.call("prefill", np.asarray([prompt], np.int64), state=state)[0]
    for produced in range(max_tokens):
        token = sampling.choose(logits[0, -1], random)
        now = time.perf_counter()
        if produced == 0:
            timing.first_token = now - start
        else:
            timing.tokens.append(now - start)
        start = now
        if token in stop:
            return
        yield token
        if produced + 1 < max_tokens or given is not None:  # a state that goes on has seen every token
            logits = program.call("decode", np.asarray([[token]], np.int64), state=state)[0]


def _check_capacity(program: Program, state: State, tokens: int) -> None:
    """Raises CallError when a cache of fixed size cannot take so many tokens more."""
    capacity = program.manifest.get("generation", {}).get("capacity")
    if capacity is None:
        return
    seen = int(state.field("position").max()) if "position" in state else 0
    if seen + tokens > capacity:
        raise CallError(
            f"{seen} tokens seen and up to {tokens} more exceed the capacity of {capacity}",
            why="this artifact keeps every key and value in a cache of fixed size",
            hint="ask for fewer tokens, compile with a larger --capacity, or with a window",
        )


def generate(
    program: Program,
    prompt: str,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    state: State | None = None,
    timing: Timing | None = None,
) -> Iterator[str]:
    """Yields the continuation of ``prompt`` piece by piece. Stop tokens come from the artifact."""
    tokens = Tokens(program)
    stop = program.manifest.get("generation", {}).get("stop", [])
    return tokens.stream(
        generate_ids(program, tokens.encode(prompt), max_tokens, sampling, stop, state, timing)
    )
