"""A tiny Llama through the whole road: dynamic batch and length, state in place, every op raised to its kernel."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import spikingbrain
from spikingbrain.artifact import REPORT
from spikingbrain.models.llama import Llama, LlamaConfig
from spikingbrain.tools import cli

VOCABULARY, CAPACITY = 97, 40


def tiny(window: int | None, sinks: int) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocabulary=VOCABULARY,
        width=64,
        layers=2,
        heads=4,
        key_value_heads=2,
        head_size=16,
        feed_forward=96,
        context=CAPACITY,
        window=window,
        sinks=sinks,
    )
    return Llama(config).eval()


@pytest.fixture(scope="module", params=[(8, 1), (None, 0)], ids=["window", "full"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Llama, spikingbrain.Program]:
    model = tiny(*request.param)
    state = model.initial_state(2)
    batch, length = torch.export.Dim("B", min=1, max=16), torch.export.Dim("T", min=1, max=64)
    shapes = {"tokens_BT": {0: batch, 1: length}, "state": {0: batch}}
    entries = {
        "score": spikingbrain.Entry((torch.zeros(2, 5, dtype=torch.int64), state), dynamic_shapes=shapes),
        "step": spikingbrain.Entry(
            (torch.zeros(2, 1, dtype=torch.int64), state),
            dynamic_shapes={"tokens_BT": {0: batch}, "state": {0: batch}},
        ),
    }
    path = tmp_path_factory.mktemp("llama") / "tiny.sbrain"
    spikingbrain.export(model, entries, path, state="state")
    return model, spikingbrain.load(path)


@pytest.mark.parametrize(("batch", "lengths"), [(1, [1, 1]), (2, [5, 3]), (3, [17, 1, 12]), (1, [30])])
def test_equals_eager_at_other_sizes(
    compiled: tuple[Llama, spikingbrain.Program], batch: int, lengths: list[int]
) -> None:
    model, program = compiled
    eager, state = model.initial_state(batch), program.new_state(batch)
    for length in lengths:
        tokens = torch.randint(0, VOCABULARY, (batch, length))
        with torch.no_grad():
            expected, eager = model(tokens, eager)
        np.testing.assert_allclose(program.score(tokens, state=state), expected.numpy(), atol=1e-4)
    snapshot = state.snapshot()
    np.testing.assert_array_equal(snapshot["slot_positions"], eager.slot_positions.numpy())
    np.testing.assert_array_equal(snapshot["position"], eager.position.numpy())
    np.testing.assert_allclose(snapshot["keys.1"][:, :-1], eager.keys[1][:, :-1].numpy(), atol=1e-5)


def test_steps_equal_one_prefill(compiled: tuple[Llama, spikingbrain.Program]) -> None:
    _, program = compiled
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 23))
    together, apart = program.new_state(2), program.new_state(2)
    whole = program.score(tokens, state=together)
    steps = [np.array(program.step(tokens[:, t : t + 1], state=apart)) for t in range(tokens.shape[1])]
    np.testing.assert_allclose(np.concatenate(steps, 1), whole, atol=1e-4)


def test_batch_entries_may_be_at_different_positions(compiled: tuple[Llama, spikingbrain.Program]) -> None:
    _, program = compiled
    tokens = torch.randint(0, VOCABULARY, (2, 19))
    alone = [program.new_state(1), program.new_state(1)]
    for row, seen in enumerate((3, 12)):
        program.score(tokens[row : row + 1, :seen], state=alone[row])
    both = program.new_state(2)
    snapshots = [s.snapshot() for s in alone]
    both.restore({name: np.concatenate([s[name] for s in snapshots]) for name in snapshots[0]})
    joint = program.score(tokens[:, 12:16], state=both)
    for row, state in enumerate(alone):
        np.testing.assert_allclose(
            program.score(tokens[row : row + 1, 12:16], state=state)[0], joint[row], atol=1e-4
        )


def test_caches_are_updated_in_place(compiled: tuple[Llama, spikingbrain.Program]) -> None:
    _, program = compiled
    state = program.new_state(1)

    def addresses() -> dict[str, int]:
        buffers = state.take()
        state.give(buffers)
        names = [field["name"] for field in program.manifest["state"]]
        return {n: program.executable.to_host(b).ctypes.data for n, b in zip(names, buffers, strict=True)}

    for entry, tokens in (("score", [[5, 6, 7]]), ("step", [[8]])):
        before = addresses()
        program.call(entry, np.array(tokens), state=state)
        after = addresses()
        moved = [name for name in before if before[name] != after[name]]
        assert not [name for name in moved if name.startswith(("keys", "values"))]


def test_every_building_block_is_recognised(compiled: tuple[Llama, spikingbrain.Program]) -> None:
    _, program = compiled
    assert program.artifact is not None
    records = json.loads(bytes(program.artifact.member(REPORT)))["records"]
    assert not [r for r in records if r["status"] == "refused"]
    raised = {r["op"] for r in records if r["status"] == "raised"}
    assert raised == {
        "torch.aten.embedding",
        "torch.aten.linear",
        "torch.aten.scaled_dot_product_attention",
        "torch.aten.scatter.src",
    }
    lowered = [r for r in records if r["pass_name"] == "lower-attention"]
    assert len(lowered) == 4 and all(r["reason"] == "kernel" for r in lowered)
    assert all("models/llama/model.py" in r["where"] for r in records if r["status"] == "raised")


def test_a_tied_head_is_stored_once(compiled: tuple[Llama, spikingbrain.Program]) -> None:
    model, program = compiled
    assert program.artifact is not None
    stored = sum(a.nbytes for a in program.artifact.weights().values())
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    padding = (-VOCABULARY % 64) * 64 * 4
    assert stored <= parameters + padding + 64 * 2 * 96 * 4  # columns are padded to whole blocks


def test_ids_outside_the_vocabulary_are_seen(compiled: tuple[Llama, spikingbrain.Program]) -> None:
    _, program = compiled
    logits = program.score(np.array([[1, VOCABULARY, 2]]), state=program.new_state(1))
    assert np.isnan(logits[0, 1]).all()


def test_report_tells_what_was_done(
    compiled: tuple[Llama, spikingbrain.Program], capsys: pytest.CaptureFixture[str]
) -> None:
    _, program = compiled
    assert program.artifact is not None
    assert cli.main(["report", str(program.artifact.path)]) == 0
    text = capsys.readouterr().out
    assert "score(tokens_BT: int64[B, T], state) -> output0: float32[B, T, 97]" in text
    assert "raise-attention: raised torch.aten.scaled_dot_product_attention  first at" in text
    assert cli.main(["report", "--json", str(program.artifact.path)]) == 0
    assert json.loads(capsys.readouterr().out)["records"]
