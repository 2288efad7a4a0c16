"""The real model, compiled: the same perplexity, text and state as torch eager, at texts longer than the window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spikingbrain
from spikingbrain.generate import Timing, generate_ids
from spikingbrain.models.llama import Llama
from spikingbrain.sampling import Sampling
from spikingbrain.tokens import Tokens
from spikingbrain.tools.clean_wiki import wiki_text
from spikingbrain.tools.named_models import ModelOptions, compile_named

pytestmark = [pytest.mark.weights, pytest.mark.slow, pytest.mark.gate]

WINDOW, SINKS, CHUNK = 256, 1, 1024
END_OF_TEXT = 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> spikingbrain.Program:
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("smollm2") / "smollm2.sbrain"
    compile_named("smollm2", path, "cpu", ModelOptions(WINDOW, SINKS, score=True), lambda _: None)
    return spikingbrain.load(path)


@pytest.fixture(scope="module")
def model() -> Llama:
    from spikingbrain.models.llama import smollm2

    return smollm2.load(window=WINDOW, sinks=SINKS).eval()


@pytest.fixture(scope="module")
def wiki(program: spikingbrain.Program) -> np.ndarray:
    ids = Tokens(program).encode(wiki_text()[:40_000])
    return np.array([[END_OF_TEXT, *ids[: 2 * CHUNK - 1]]], np.int64)


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    log_probabilities = torch.from_numpy(np.array(logits[0, :-1])).double().log_softmax(-1).numpy()
    return float(np.exp(-log_probabilities[np.arange(ids.shape[1] - 1), ids[0, 1:]].mean()))


def test_perplexity_equals_eagers(program: spikingbrain.Program, model: Llama, wiki: np.ndarray) -> None:
    ids = wiki[:, :CHUNK]
    with torch.inference_mode():
        expected, _ = model(torch.from_numpy(ids), model.initial_state(1))
    compiled = program.score(ids, state=program.new_state())
    assert perplexity(compiled, ids) == pytest.approx(perplexity(expected.numpy(), ids), rel=1e-4)
    assert np.abs(compiled - expected.numpy()).max() < 2e-2


def test_any_split_of_a_text_gives_the_same_state_and_logits(
    program: spikingbrain.Program, wiki: np.ndarray
) -> None:
    ids = wiki[:, : WINDOW + 44]
    whole = program.new_state()
    logits = program.prefill(ids, state=whole)
    for lengths in ([1] * ids.shape[1], [7, 1, 250, 1, 41], [299, 1], [150, 150]):
        state, at = program.new_state(), 0
        for n in lengths:
            piece = ids[:, at : at + n]
            last = (program.decode if n == 1 else program.prefill)(piece, state=state)
            at += n
        np.testing.assert_allclose(last, logits, atol=5e-3)
        expected, got = whole.snapshot(), state.snapshot()
        np.testing.assert_array_equal(got["slot_positions"], expected["slot_positions"])
        np.testing.assert_array_equal(got["position"], expected["position"])
        for name in ("keys.0", "keys.29", "values.29"):  # the last slot is the spill slot: never read
            np.testing.assert_allclose(got[name][:, :-1], expected[name][:, :-1], atol=5e-3)


def test_greedy_text_equals_eagers(program: spikingbrain.Program, model: Llama) -> None:
    prompt = Tokens(program).encode("Once upon a time")
    timing = Timing()
    compiled = list(generate_ids(program, prompt, 48, Sampling(), timing=timing))
    assert len(timing.tokens) == 47
    with torch.inference_mode():
        logits, _ = model(torch.tensor([prompt + compiled[:-1]]), model.initial_state(1))
    best = logits[0, len(prompt) - 1 :].topk(2)
    for token, values, ids in zip(compiled, best.values, best.indices, strict=True):
        if values[0] - values[1] > 1e-3:  # a tie within rounding may fall either way
            assert token == int(ids[0])


def test_fork_and_snapshot_continue_alike(program: spikingbrain.Program, wiki: np.ndarray) -> None:
    state = program.new_state()
    program.prefill(wiki[:, :300], state=state)
    copy, kept = state.fork(), state.snapshot()
    first = program.decode(wiki[:, 300:301], state=state)
    np.testing.assert_array_equal(program.decode(wiki[:, 300:301], state=copy), first)
    state.restore(kept)
    np.testing.assert_array_equal(program.decode(wiki[:, 300:301], state=state), first)


def test_a_conversation_goes_on_where_it_stopped(program: spikingbrain.Program) -> None:
    prompt, more = Tokens(program).encode("Once upon a time"), Tokens(program).encode(" And then")
    state = program.new_state()
    first = list(generate_ids(program, prompt, 6, state=state))
    assert int(state.field("position")[0]) == len(prompt) + len(first)
    second = list(generate_ids(program, more, 6, state=state))
    assert second == list(generate_ids(program, [*prompt, *first, *more], 6))
