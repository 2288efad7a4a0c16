"""SmolLM2-135M in eager PyTorch: the numbers that compiled programs are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from spikingbrain.errors import MissingDependency
from spikingbrain.models.llama import Llama, MissingPackage, chat_template, smollm2
from spikingbrain.models.llama.tokenizer import tokenizer
from spikingbrain.tools import clean_wiki

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def model() -> Iterator[Llama]:
    try:
        loaded = smollm2.load()
    except MissingPackage as missing:
        pytest.skip(str(missing))
    with torch.no_grad():
        yield loaded


@pytest.fixture(scope="module")
def windowed(model: Llama) -> Llama:
    loaded = smollm2.load(window=256, sinks=1)
    loaded.load_state_dict(model.state_dict(), assign=True)  # one copy of the weights
    return loaded


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    try:
        return tokenizer(smollm2.locate())
    except MissingPackage as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def wiki() -> str:
    try:
        return clean_wiki.wiki_text()
    except MissingDependency as missing:
        pytest.skip(str(missing))


def perplexity(model: Llama, ids: list[int], chunks: int, length: int) -> float:
    loss = 0.0
    for chunk in torch.tensor(ids[: chunks * length]).view(chunks, length):
        logits, _ = model(chunk[None], model.initial_state(1, capacity=length))
        loss += F.cross_entropy(logits[0, :-1], chunk[1:], reduction="sum").item()
    return math.exp(loss / (chunks * (length - 1)))


def test_model_is_the_published_one(model: Llama) -> None:
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert (model.config.layers, model.config.heads, model.config.key_value_heads) == (30, 9, 3)
    assert (model.config.rope_base, model.config.norm_eps, model.config.context) == (100_000.0, 1e-5, 8192)


def test_next_word_is_the_right_one(model: Llama, words: Tokenizer) -> None:
    ids = torch.tensor([words.encode("The capital of France is").ids])
    logits, _ = model(ids, model.initial_state(1, capacity=16))
    assert logits.shape == (1, 5, 49_152) and torch.isfinite(logits).all()
    assert words.decode([int(logits[0, -1].argmax())]) == " Paris"


def test_greedy_continuation(model: Llama, words: Tokenizer) -> None:
    # The closest runner-up on the way is 0.16 behind, far more than the rounding of float32.
    step = torch.tensor([words.encode("Once upon a time").ids])
    state, written = model.initial_state(1, capacity=64), []
    for _ in range(24):
        logits, state = model(step, state, last_only=True)
        step = logits[:, -1].argmax(-1, keepdim=True)
        written.append(int(step))
    assert words.decode(written) == (
        ", the city of Nova Haven was a thriving metropolis, with towering skyscrapers and bustling streets. "
        "But as the years went by"
    )


# Measured with torch 2.13 on x86-64 in float32. On 4 chunks of 1024 tokens: full 21.76, window 22.30; another
# cleaning of the same markup gave 21.59. Without the sink, window 256 falls to 43.1 on the two chunks here.


def test_perplexity_on_wiki(model: Llama, words: Tokenizer, wiki: str) -> None:
    ids = [0, *words.encode(wiki[:20_000]).ids]
    assert perplexity(model, ids, chunks=2, length=1024) == pytest.approx(21.91, rel=0.01)


@pytest.mark.slow
def test_perplexity_with_window_and_sink(windowed: Llama, words: Tokenizer, wiki: str) -> None:
    ids = [0, *words.encode(wiki[:20_000]).ids]
    assert perplexity(windowed, ids, chunks=2, length=1024) == pytest.approx(22.28, rel=0.01)


def test_window_decodes_as_it_prefills(windowed: Llama, words: Tokenizer, wiki: str) -> None:
    ids = torch.tensor([words.encode(wiki[:4_000]).ids[:600]])
    whole, _ = windowed(ids, windowed.initial_state(1))
    state, parts = windowed.initial_state(1), []
    for piece in ids.split([250, 300, *[1] * 20, 30], dim=1):
        logits, state = windowed(piece, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-2)


def test_tokenizer_round_trip_and_digits(words: Tokenizer, wiki: str) -> None:
    text = wiki[:20_000]
    assert words.decode(words.encode(text).ids) == text
    assert words.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    assert words.encode("<|im_start|>user\n").ids[0] == 1
    assert [words.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert "<|im_start|>" in (chat_template(smollm2.locate()) or "")


def test_wiki_text_is_prose(wiki: str) -> None:
    assert wiki.startswith(
        "Anarchism\n\nAnarchism is a political philosophy that advocates self-governed societies"
    )
    assert len(wiki) > 2_500_000
    for markup in ("{{", "[[", "http", "''", "<ref", "&nbsp;"):
        assert wiki.count(markup) <= 2, f"{markup} is left over"
