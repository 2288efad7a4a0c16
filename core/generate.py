"""Text generation with a loaded program: prefill, then one token at a time, for one text or several side by side.

The program needs two entry points. ``prefill(tokens [B, T], state)`` takes any number of tokens, ``decode(tokens [B, 1],
state)`` one; each returns the logits ``[B, 1, C]`` of the last token. Where prefill also takes the number of tokens that
count of each text, ``lengths [B]``, prompts of different lengths are read together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spikingbrain.errors import CallError
from spikingbrain.sampling import Sampler, Sampling
from spikingbrain.tokens import Tokens, Writer

if TYPE_CHECKING:
    from spikingbrain.program import Program
    from spikingbrain.state import State

Array = np.ndarray[Any, Any]


@dataclass
class Timing:
    """Seconds of a generation: the prompt until the first token, then each further token."""

    first_token: float = 0.0
    tokens: list[float] = field(default_factory=list)

    @property
    def per_token(self) -> float:
        """The median time of a token after the first."""
        return float(np.median(self.tokens)) if self.tokens else 0.0


def generate(
    program: Program,
    prompt: str,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    state: State | None = None,
    timing: Timing | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yields the continuation of ``prompt`` piece by piece.

    The text ends at a stop token of the artifact, before the first of the stop strings, or with ``max_tokens``.
    """
    tokens = Tokens(program)
    ids = generate_ids(
        program, tokens.encode(prompt), max_tokens, sampling, stop_tokens(program), state, timing
    )
    return tokens.stream(ids, stop)


def generate_batch(
    program: Program,
    prompts: Sequence[str],
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """Returns the continuation of each prompt: the same as each alone, with the seed of ``sampling`` plus its number."""
    texts = [""] * len(prompts)
    for number, piece in stream_batch(program, prompts, max_tokens, sampling, stop):
        texts[number] += piece
    return texts


def stream_batch(
    program: Program,
    prompts: Sequence[str],
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, str]]:
    """Yields the continuations of several prompts: the number of the prompt, from 0, and a piece of its text."""
    tokens = Tokens(program)
    writers = [Writer(tokens, stop) for _ in prompts]
    ended: set[int] = set()
    ids = [tokens.encode(prompt) for prompt in prompts]
    for number, token in batch_ids(program, ids, max_tokens, sampling, stop_tokens(program), ended):
        if piece := writers[number].push(token):
            yield number, piece
        if writers[number].stopped:
            ended.add(number)
    for number, writer in enumerate(writers):
        if piece := writer.finish():
            yield number, piece


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

    ``state`` continues a conversation; when all tokens were taken from here it has seen each that was yielded.
    """
    _check_prompts([prompt])
    given = state
    state = state or program.new_state(batch=1)
    _check_capacity(program, state, len(prompt) + max_tokens)
    sampler, timing = Sampler(sampling or Sampling(), prompt), timing if timing is not None else Timing()
    start = time.perf_counter()
    logits = prefill(program, [prompt], state)
    for produced in range(max_tokens):
        token = sampler.choose(logits[0])
        now = time.perf_counter()
        if produced == 0:
            timing.first_token = now - start
        else:
            timing.tokens.append(now - start)
        start = now
        if token in stop:
            return
        yield token
        if produced + 1 < max_tokens or given is not None:
            logits = decode(program, [token], state)


def batch_ids(
    program: Program,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    ended: set[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yields the number of a prompt and the next token of its text, each until ``max_tokens`` or a stop token.

    Prompts are read and continued side by side where the program can: its batch size is dynamic, and prefill takes lengths
    or all prompts have one length. Otherwise one text comes after the other. A prompt whose number the caller puts into
    ``ended`` is not continued.
    """
    _check_prompts(prompts)
    sampling, ended = sampling or Sampling(), ended if ended is not None else set()
    samplers = [Sampler(sampling, prompt, number) for number, prompt in enumerate(prompts)]
    one_length = len({len(prompt) for prompt in prompts}) <= 1
    together = _most_texts(program) if one_length or _takes_lengths(program) else 1
    for first in range(0, len(prompts), together):
        group = range(first, min(first + together, len(prompts)))
        state = program.new_state(batch=len(group))
        _check_capacity(program, state, max(len(prompts[i]) for i in group) + max_tokens)
        logits = prefill(program, [prompts[i] for i in group], state)
        last = [0] * len(group)  # an ended text goes on with any token, which nobody reads
        for produced in range(max_tokens):
            for row, number in enumerate(group):
                if number in ended:
                    continue
                last[row] = samplers[number].choose(logits[row])
                if last[row] in stop:
                    ended.add(number)
                else:
                    yield number, last[row]
            if ended.issuperset(group) or produced + 1 == max_tokens:
                break
            logits = decode(program, last, state)


def prefill(program: Program, prompts: Sequence[Sequence[int]], state: State) -> Array:
    """Feeds a prompt to each text of the state, in pieces as long as the program takes; returns the next logits [B, C]."""
    spec = program.entries["prefill"]
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    limit = _range(program, "prefill", 1)[1] or int(lengths.max())
    logits: Array | None = None
    for start in range(0, int(lengths.max()), limit):
        pieces = [prompt[start : start + limit] for prompt in prompts]
        counts = np.array([len(piece) for piece in pieces], np.int64)
        tokens = np.zeros((len(pieces), counts.max()), spec.inputs[0].numpy_dtype)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece)] = piece
        arguments = [tokens, counts] if _takes_lengths(program) else [tokens]
        found = program.call("prefill", *arguments, state=state)[0][:, -1]
        logits = found if logits is None else np.where(counts[:, None] > 0, found, logits)
    assert logits is not None  # no prompt is empty
    return logits


def decode(program: Program, tokens: Sequence[int], state: State) -> Array:
    """Feeds a token to each text of the state; returns the next logits [B, C]."""
    column = np.asarray(tokens, program.entries["decode"].inputs[0].numpy_dtype)[:, None]
    logits: Array = program.call("decode", column, state=state)[0][:, -1]
    return logits


def stop_tokens(program: Program) -> list[int]:
    """Returns the tokens that end a text, which the artifact names."""
    stop: list[int] = program.manifest.get("generation", {}).get("stop", [])
    return stop


def _takes_lengths(program: Program) -> bool:
    return len(program.entries["prefill"].inputs) > 1


def _most_texts(program: Program) -> int:
    """Returns how many texts a call takes at the most: 1 where the batch size is fixed."""
    ranges = [_range(program, entry, 0) for entry in ("prefill", "decode")]
    if any(low == high for low, high in ranges):
        return 1
    return min((high for _, high in ranges if high is not None), default=1 << 30)


def _range(program: Program, entry: str, axis: int) -> tuple[int, int | None]:
    """Returns the least and the largest size that an entry takes for an axis of its tokens; None: any."""
    if entry not in program.entries:
        raise CallError(
            f"this artifact has no entry point {entry!r}",
            why="text is generated by prefill and decode",
            hint=f"its entry points are {', '.join(program.entries)}",
        )
    spec = program.entries[entry]
    size = spec.inputs[0].shape[axis]
    return (size, size) if isinstance(size, int) else spec.ranges.get(size, (0, None))


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise CallError(
                f"{which} is empty",
                hint="begin with at least one token, such as the tokenizer's first special one",
            )


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
