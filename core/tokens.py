"""Text and tokens: the artifact's tokenizer, and text that is written while its tokens arrive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from spikingbrain.artifact import TOKENIZER, Artifact
from spikingbrain.errors import CallError, OptionError

if TYPE_CHECKING:
    from spikingbrain.program import Program

_CONTEXT = 8  # tokens that a piece of text is decoded after: some tokenizers put a space between words only


# Reading a large vocabulary takes longer than a token of a small model.
_read: weakref.WeakKeyDictionary[Artifact, Any] = weakref.WeakKeyDictionary()


class Tokens:
    """The artifact's tokenizer; raises CallError where there is none."""

    def __init__(self, program: Program):
        opened = program.artifact
        if opened is None or not opened.has(TOKENIZER):
            raise CallError(
                "this artifact holds no tokenizer", hint="export it with tokenizer=..., or pass token ids"
            )
        self._tokenizer: Any = _read.get(opened)
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = _read[opened] = Tokenizer.from_str(bytes(opened.member(TOKENIZER)).decode())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def stream(self, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
        """Yields text piece by piece, up to the first of the stop strings that is complete."""
        writer = Writer(self, stop)
        for token in ids:
            if piece := writer.push(token):
                yield piece
            if writer.stopped:
                return
        if piece := writer.finish():
            yield piece


class Writer:
    """Writes one text while its tokens arrive.

    Held back are a character whose bytes are spread over tokens, until it is whole, and what may be the beginning of a
    stop string, until that is decided. Where the pieces are cut plays no part in where the text stops.

    Attributes:
        stopped: a stop string was complete; the text ends before it.
    """

    def __init__(self, tokens: Tokens, stop: Sequence[str] = ()):
        if isinstance(stop, str) or not all(stop):
            raise OptionError(
                f"stop strings {stop!r}", hint='stop=["\\n\\n"]: a list, without an empty string'
            )
        self._tokens, self._stop, self.stopped = tokens, tuple(stop), False
        self._pending: list[int] = []
        self._shown = self._held = ""

    def push(self, token: int) -> str:
        """Returns the text that is certain with one token more."""
        if self.stopped:
            return ""
        self._pending.append(token)
        text = self._tokens.decode(self._pending)
        if text.endswith("\ufffd"):
            return ""
        self._held += text[len(self._shown) :]
        self._pending = self._pending[-_CONTEXT:]  # keeps the work per token constant
        self._shown = self._tokens.decode(self._pending)
        return self._certain()

    def finish(self) -> str:
        """Returns what was held back, when no more tokens come."""
        held, self._held = self._held, ""
        return held

    def _certain(self) -> str:
        ends = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if ends:
            self.stopped = True
            certain, self._held = self._held[: min(ends)[1]], ""
            return certain
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of ``text`` may be the beginning of ``stop``."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)
