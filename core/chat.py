"""Conversations: turns written by the artifact's template, read into a state that goes on from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spikingbrain.errors import CallError, MissingDependency
from spikingbrain.generate import generate_ids, stop_tokens
from spikingbrain.program import Program
from spikingbrain.sampling import Sampling
from spikingbrain.tokens import Tokens


class Chat:
    """A conversation with a program.

    The artifact's manifest has ``generation.chat``: ``template``, a Jinja template as Hugging Face models publish it, and the
    special tokens that it names, such as ``bos_token``. Each turn, only the tokens after those that the state has seen are
    read; where the template writes the beginning differently than before, all are read anew.

    Attributes:
        messages: the turns so far, ``{"role": "user", "content": ...}`` and so on.

    Raises CallError where the artifact has no template, MissingDependency without jinja2.
    """

    def __init__(self, program: Program, system: str | None = None, sampling: Sampling | None = None):
        self._program, self._sampling, self._tokens = program, sampling, Tokens(program)
        known: Mapping[str, Any] = program.manifest.get("generation", {}).get("chat") or {}
        if "template" not in known:
            raise CallError(
                "this artifact has no chat template",
                why="how turns are written is known only to who trained the model",
                hint="generate() continues a text; or export with metadata={'generation': {'chat': ...}}",
            )
        self._template = _compile(known["template"])
        self._special = {name: text for name, text in known.items() if name != "template"}
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._system)
        self._state = program.new_state(batch=1)
        self._seen: list[int] = []

    def reset(self) -> None:
        """Begins anew, with the same system message."""
        self.messages = list(self._system)
        self._state.reset()
        self._seen = []

    def say(self, text: str, max_tokens: int = 512) -> Iterator[str]:
        """Yields the reply to ``text`` piece by piece. Taken from only in part, it is kept as far as it was taken."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokens.encode(self._render(messages))
        seen, self._seen = self._seen, []
        if ids[: len(seen)] != seen or len(seen) == len(ids):
            seen = []
        if not seen:
            self._state.reset()
        reply: list[int] = []

        def remembered() -> Iterator[int]:
            stop = stop_tokens(self._program)
            for token in generate_ids(
                self._program, ids[len(seen) :], max_tokens, self._sampling, stop, self._state
            ):
                reply.append(token)
                yield token
            self._seen = [*ids, *reply]  # the state has seen all of them

        written = ""
        try:
            for piece in self._tokens.stream(remembered()):
                written += piece
                yield piece
        finally:
            if reply:
                self.messages = [*messages, {"role": "assistant", "content": written}]

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except TemplateError as error:
            raise CallError("the chat template fails on these messages", why=str(error)) from error
        return text


def _compile(template: str) -> Any:
    try:
        from jinja2 import TemplateError, sandbox
    except ModuleNotFoundError as error:
        raise MissingDependency("chat templates need jinja2", hint="pip install jinja2") from error

    def refuse(message: str) -> None:
        raise CallError("the chat template refuses these messages", why=message)

    # a template is somebody else's code
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise CallError("the artifact's chat template is no Jinja template", why=str(error)) from error
