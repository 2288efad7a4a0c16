"""Text from tokens, and texts side by side: with a small tokenizer and programs that need no compiler."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import spikingbrain
from spikingbrain.artifact import TOKENIZER
from spikingbrain.chat import Chat
from spikingbrain.errors import CallError, MissingDependency, OptionError
from spikingbrain.generate import batch_ids, generate_batch, generate_ids, stream_batch
from spikingbrain.program import Program
from spikingbrain.sampling import Sampling
from spikingbrain.tokens import Tokens, Writer
from spikingbrain.tools import cli

VOCABULARY = 256  # a token for each byte


def tokenizer_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    text: str = built.to_str()
    return text


class Holder:
    """What a program reads of its artifact."""

    def __init__(self, tokenizer: str | None):
        self._members = {} if tokenizer is None else {TOKENIZER: tokenizer.encode()}

    def has(self, name: str) -> bool:
        return name in self._members

    def member(self, name: str) -> memoryview:
        return memoryview(self._members[name])

    def state_blocks(self) -> dict[str, Any]:
        return {}


class Hashing:
    """An executable in numpy. Its state is a hash of all tokens of a text; logits are random numbers with that seed.

    Attributes:
        calls: (entry, shape of its tokens) of each call.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def call(self, entry: str, arguments: Sequence[Any]) -> list[Any]:
        tokens, *lengths, hashes, position = arguments
        self.calls.append((entry, tokens.shape))
        counts = lengths[0] if lengths else np.full(len(tokens), tokens.shape[1])
        hashes = hashes.copy()
        for row, count in enumerate(counts):
            for token in tokens[row, :count]:
                hashes[row] = (hashes[row] * 31 + token + 1) % 1_000_003
        logits = np.stack([np.random.default_rng(h).normal(0, 2, VOCABULARY) for h in hashes])
        return [logits.astype(np.float32)[:, None], hashes, position + counts]

    def to_device(self, array: Any) -> Any:
        return array

    def to_host(self, buffer: Any) -> Any:
        return buffer


def program(lengths: bool = True, dynamic: bool = True, **generation: Any) -> Program:
    """A program that takes up to 8 tokens and 4 texts in a call."""
    b: int | str = "B" if dynamic else 1

    def tensor(name: str, *shape: int | str, dtype: str = "int64") -> dict[str, Any]:
        return {"name": name, "shape": list(shape), "dtype": dtype, "fill": 0}

    logits = [tensor("output0", b, 1, VOCABULARY, dtype="float32")]
    common = {"outputs": logits, "ranges": {"B": [1, 4], "T": [1, 8]}, "uses_state": True}
    manifest: Mapping[str, Any] = {
        "entries": {
            "prefill": {
                "inputs": [tensor("tokens_BT", b, "T"), *([tensor("lengths_B", b)] if lengths else [])],
                **common,
            },
            "decode": {"inputs": [tensor("tokens_BT", b, 1)], **common},
        },
        "state": [tensor("hashes", b), tensor("position", b)],
        "generation": generation,
    }
    holder: Any = Holder(tokenizer_json())
    return Program(manifest, Hashing(), holder)


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """Returns the greedy text after a prompt, from the whole of it each time."""
    text = list(prompt)
    for _ in range(count):
        seen = 0
        for token in text:
            seen = (seen * 31 + token + 1) % 1_000_003
        text.append(int(np.random.default_rng(seen).normal(0, 2, VOCABULARY).astype(np.float32).argmax()))
    return text[len(prompt) :]


PROMPTS = [[5], list(range(20)), [1, 2, 3], list(range(100, 117)), [9] * 8, [4, 4]]


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_texts_are_the_same_side_by_side_and_alone(lengths: bool, dynamic: bool) -> None:
    """More prompts than a call takes, and prompts longer than one takes."""
    made = program(lengths, dynamic)
    together: list[list[int]] = [[] for _ in PROMPTS]
    for number, token in batch_ids(made, PROMPTS, 7):
        together[number].append(token)
    for prompt, text in zip(PROMPTS, together, strict=True):
        assert text == expected(prompt, 7) == list(generate_ids(made, prompt, 7))
    sides = max(shape[0] for _, shape in made.executable.calls)  # type: ignore[attr-defined]
    assert sides == (4 if lengths and dynamic else 1)


def test_prompts_of_one_length_need_no_lengths() -> None:
    made = program(lengths=False)
    texts: list[list[int]] = [[], []]
    for number, token in batch_ids(made, [[1, 2, 3], [3, 2, 1]], 4):
        texts[number].append(token)
    assert texts == [expected([1, 2, 3], 4), expected([3, 2, 1], 4)]
    assert made.executable.calls == [("prefill", (2, 3)), *[("decode", (2, 1))] * 3]  # type: ignore[attr-defined]


def test_a_stop_token_ends_one_text_of_a_batch() -> None:
    made, whole = program(), expected(PROMPTS[1], 7)
    stop = whole[2]
    texts: list[list[int]] = [[] for _ in PROMPTS[:2]]
    for number, token in batch_ids(made, PROMPTS[:2], 7, stop=[stop]):
        texts[number].append(token)
    assert texts[1] == whole[:2] == list(generate_ids(made, PROMPTS[1], 7, stop=[stop]))
    assert texts[0] == list(generate_ids(made, PROMPTS[0], 7, stop=[stop]))
    calls = len(made.executable.calls)  # type: ignore[attr-defined]
    assert list(batch_ids(made, PROMPTS[1:2], 7, stop=[whole[0]])) == []
    assert len(made.executable.calls) == calls + 3  # type: ignore[attr-defined]  # no decode


def test_sampled_texts_of_a_batch_have_their_own_seeds() -> None:
    made, sampling = program(), Sampling(1.0, top_p=0.9, repetition_penalty=1.2, seed=40)
    texts: list[list[int]] = [[], [], []]
    for number, token in batch_ids(made, [[7, 8]] * 3, 9, sampling):
        texts[number].append(token)
    for number, text in enumerate(texts):
        again = Sampling(1.0, top_p=0.9, repetition_penalty=1.2, seed=40 + number)
        assert text == list(generate_ids(made, [7, 8], 9, again))
    assert len({tuple(text) for text in texts}) == 3


def test_a_conversation_goes_on_from_its_state() -> None:
    made = program()
    state = made.new_state(1)
    first = list(generate_ids(made, [1, 2], 5, state=state))
    assert list(generate_ids(made, [3], 5, state=state)) == expected([1, 2, *first, 3], 5)
    assert state.snapshot()["position"] == [13]


def test_texts_of_a_batch_and_its_stream() -> None:
    made = program()
    prompts = ["Once", "upon a time there was", "x"]
    whole = [Tokens(made).decode(expected(Tokens(made).encode(p), 30)) for p in prompts]
    streamed = ["", "", ""]
    for number, piece in stream_batch(made, prompts, 30):
        streamed[number] += piece
    assert streamed == generate_batch(made, prompts, 30) == made.generate_batch(prompts, 30)
    for text, prompt, full in zip(streamed, prompts, whole, strict=True):
        assert full.startswith(text) and text == "".join(made.generate(prompt, 30))
    stop = [next(c for c in streamed[1] if c != "\ufffd")]
    stopped = generate_batch(made, prompts, 30, stop=stop)
    assert stopped == [text.split(stop[0])[0] for text in streamed]
    assert stopped[0] == "".join(made.generate(prompts[0], 30, stop=stop))


def test_prompts_that_do_not_fit() -> None:
    with pytest.raises(CallError, match="prompt 1 is empty"):
        list(batch_ids(program(), [[1], []], 3))
    with pytest.raises(CallError, match="the prompt is empty"):
        list(generate_ids(program(), [], 3))
    with pytest.raises(CallError, match="0 tokens seen and up to 11 more exceed the capacity of 10"):
        list(batch_ids(program(capacity=10), [[1], [2] * 8], 3))
    assert list(batch_ids(program(), [], 3)) == []
    made = program()
    del made.entries["decode"]
    with pytest.raises(CallError, match="no entry point 'decode'"):
        list(batch_ids(made, [[1]], 3))


# Text that is written while its tokens arrive


def pieces(text: str, cuts: Sequence[int], stop: Sequence[str]) -> tuple[list[str], bool]:
    """Returns what a writer makes of a text that arrives in pieces, each of them one token."""

    class Words:
        def decode(self, ids: Sequence[int]) -> str:
            return "".join(words[i] for i in ids)

    edges = [0, *cuts, len(text)]
    words = [text[a:b] for a, b in itertools.pairwise(edges)]
    source: Any = Words()
    writer = Writer(source, stop)
    shown = [writer.push(i) for i in range(len(words))]
    return [*shown, writer.finish()], writer.stopped


def all_cuts(text: str) -> Iterator[list[int]]:
    for mask in range(1 << (len(text) - 1)):
        yield [i + 1 for i in range(len(text) - 1) if mask >> i & 1]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two", [], "one two"),
        ("ab--cd", ["--"], "ab"),
        ("a-b--", ["--"], "a-b"),
        ("a-b-", ["--"], "a-b-"),  # the last may have been the beginning of a stop
        ("aaab", ["aab"], "a"),  # found although its beginning repeats
        ("xabcdy", ["abcd", "bc"], "xa"),  # the first that is complete
        ("xabcy", ["c", "abc"], "x"),  # of those complete at once, the longer
        ("--x", ["--"], ""),
        ("abcabd", ["abd"], "abc"),
    ],
)
def test_a_stop_string_ends_the_text_however_it_is_cut(text: str, stop: list[str], shown: str) -> None:
    for cuts in all_cuts(text):
        found, stopped = pieces(text, cuts, stop)
        assert "".join(found) == shown, cuts
        assert stopped == (shown != text)


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    assert pieces("abc", [1, 2], ["cx"])[0] == ["a", "b", "", "c"]
    assert pieces("abc", [1, 2], [])[0] == ["a", "b", "c", ""]


def test_a_character_is_shown_when_its_bytes_are_whole() -> None:
    tokens = Tokens(program())
    text = "Grüße, 世界 🦊! " * 12
    ids = tokens.encode(text)
    assert len(ids) == len(text.encode())
    found = list(tokens.stream(ids))
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found) and all(len(piece) == 1 for piece in found)


def test_spaces_between_words_stay() -> None:
    """A tokenizer that writes a word's space only behind another word."""
    vocabulary = {"▁once": 0, "▁upon": 1, "▁a": 2, "▁time": 3, "<unk>": 4}
    built = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    built.decoder = decoders.Metaspace()
    made = program()
    holder: Any = Holder(json.dumps(json.loads(built.to_str())))
    made.artifact = holder
    ids = [0, 1, 2, 3] * 30
    assert "".join(Tokens(made).stream(ids)) == " ".join(["once upon a time"] * 30)


@pytest.mark.parametrize("stop", ["text", ["a", ""]])
def test_stop_strings_that_are_none(stop: Any) -> None:
    with pytest.raises(OptionError, match="stop strings"):
        list(program().generate("x", 1, stop=stop))


def test_no_tokenizer() -> None:
    made = program()
    holder: Any = Holder(None)
    made.artifact = holder
    with pytest.raises(CallError, match="holds no tokenizer"):
        made.generate("x")


# Conversations

TEMPLATE = """{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"""


def chatting(template: str = TEMPLATE, **special: str) -> Program:
    return program(chat={"template": template, **special})


def test_each_turn_reads_what_is_new() -> None:
    """The template writes a reply's tokens as they were: the second turn goes on from the state."""
    made = chatting()
    tokens = Tokens(made)

    def answer(system: str) -> str:
        return tokens.decode(expected(tokens.encode(f"<s>{system}\n<u>Hi\n<a>"), 1))

    # one that is answered by a byte that is a character
    chat = Chat(made, system=next(s for s in map(str, range(99)) if answer(s).isalpha()))
    assert "".join(chat.say("Hi", 1)).isalpha()
    read = sum(shape[1] for _, shape in made.executable.calls)  # type: ignore[attr-defined]
    "".join(chat.say("And?", 3))
    new = sum(shape[1] for _, shape in made.executable.calls) - read  # type: ignore[attr-defined]
    assert new == len("\n<u>And?\n<a>") + 3
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    text = "".join(f"<{m['role'][0]}>{m['content']}\n" for m in chat.messages[:-1]) + "<a>"
    assert chat.messages[-1]["content"] == tokens.decode(expected(tokens.encode(text), 3)).rstrip("\ufffd")


def test_a_reply_that_reads_differently_is_read_anew() -> None:
    made = chatting(TEMPLATE.replace("m.content", "m.content | upper"))
    chat, tokens = Chat(made), Tokens(made)
    reply = next(chat.say("hello", 40))  # left after its first piece
    assert chat.messages[-1] == {"role": "assistant", "content": reply}
    second = "".join(chat.say("more", 9))
    ids = tokens.encode(f"<u>HELLO\n<a>{reply.upper()}\n<u>MORE\n<a>")
    assert second == "".join(tokens.stream(expected(ids, 9)))
    chat.reset()
    assert not chat.messages
    assert next(chat.say("hello", 40)) == reply


def test_templates_that_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CallError, match="no chat template"):
        Chat(program())
    with pytest.raises(CallError, match="no Jinja template"):
        Chat(chatting("{% for %}"))
    with pytest.raises(CallError, match="refuses these messages\n  because: no names"):
        next(Chat(chatting("{{ raise_exception('no names') }}")).say("x"))
    with pytest.raises(CallError, match=r"fails on these messages\n  because: .* unsafe"):
        next(Chat(chatting("{{ ''.__class__.__mro__ }}")).say("x"))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependency, match="pip install jinja2"):
        Chat(chatting())


def test_special_tokens_reach_the_template() -> None:
    made = chatting("{{ bos_token }}" + TEMPLATE, bos_token="#")
    text = "".join(Chat(made).say("x", 5))
    assert text == "".join(Tokens(made).stream(expected(Tokens(made).encode("#<u>x\n<a>"), 5)))


# Commands


@pytest.fixture
def commanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Program, str]:
    """A program that every artifact file is loaded as, and such a file."""
    made = chatting()

    def load(path: Path, *, device: str | None, check_memory: bool) -> Program:
        assert device in (None, "maca-emulator")
        made.manifest = {**made.manifest, "device": device}
        return made

    monkeypatch.setattr(spikingbrain, "load", load, raising=False)
    (tmp_path / "a.sbrain").touch()
    return made, str(tmp_path / "a.sbrain")


@pytest.mark.parametrize("command", [["run", "FILE", "Once"], ["chat", "FILE"]])
def test_commands_choose_the_device(
    commanded: tuple[Program, str], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, file = commanded
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    words = [file if word == "FILE" else word for word in command]
    assert cli.main([*words, "--tokens", "2", "--device", "maca-emulator"]) == 0
    assert made.manifest["device"] == "maca-emulator"
    assert cli.main([*words, "--tokens", "2"]) == 0
    assert made.manifest["device"] is None


def test_run_passes_its_options_on(
    commanded: tuple[Program, str], capsys: pytest.CaptureFixture[str]
) -> None:
    made, file = commanded
    options = [
        "--tokens",
        "20",
        "--temperature",
        "1",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--min-p",
        "0.01",
        "--seed",
        "2",
    ]
    penalties = ["--repetition-penalty", "1.5", "--presence-penalty", "0.2", "--frequency-penalty", "-0.1"]
    assert cli.main(["run", file, "Once", *options, *penalties]) == 0
    text = "".join(made.generate("Once", 20, sampling=Sampling(1, 50, 0.9, 0.01, 1.5, 0.2, -0.1, 2)))
    found = capsys.readouterr().out
    assert found == f"Once{text}\n" and len(text) > 5
    assert (
        cli.main(["run", file, "Once", "--quiet", "--stop", text[2], "--stop", text[4], *options, *penalties])
        == 0
    )
    assert capsys.readouterr().out == text[: min(text.index(text[2]), text.index(text[4]))] + "\n"
    assert cli.main(["run", file, "Once", "--min-p", "2"]) == 1
    assert "min_p is from 0 to 1" in capsys.readouterr().err


def test_run_continues_the_lines_of_a_file(
    commanded: tuple[Program, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, file = commanded
    lines = tmp_path / "lines.txt"
    lines.write_text("Once\n\nOnce upon\n")
    command = ["run", file, "--tokens", "6", f"@{lines}"]
    assert cli.main(command) == 0
    first, second = ("".join(made.generate(p, 6, sampling=Sampling())) for p in ("Once", "Once upon"))
    assert capsys.readouterr().out == f"Once{first}\n\nOnce upon{second}\n"
    lines.write_text("\n")
    assert cli.main(command) == 1 and "has no line of text" in capsys.readouterr().err
    lines.unlink()
    assert cli.main(command) == 1 and "cannot be read" in capsys.readouterr().err


def test_chat_takes_a_turn_a_line(
    commanded: tuple[Program, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, file = commanded
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nAnd?\n/reset\nHi\n"))
    assert cli.main(["chat", file, "--quiet", "--system", "Be", "--tokens", "6"]) == 0
    chat = Chat(made, "Be")
    first, second = "".join(chat.say("Hi", 6)), "".join(chat.say("And?", 6))
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_chat_goes_on_after_what_does_not_fit(
    commanded: tuple[Program, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, file = commanded
    made.manifest["generation"]["capacity"] = 40
    monkeypatch.setattr(sys, "stdin", io.StringIO("too long a line for the cache\nHi\n"))
    assert cli.main(["chat", file, "--quiet", "--tokens", "9"]) == 0
    out, err = capsys.readouterr()
    assert "exceed the capacity of 40" in err
    assert out == "".join(Chat(made).say("Hi", 9)) + "\n"
