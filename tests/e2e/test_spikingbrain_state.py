"""States of compiled SpikingBrain models: what they begin with, any split of a text, batches of texts of different lengths."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import spikingbrain
from spikingbrain.artifact import STATE
from spikingbrain.errors import CompileError, CorruptArtifact
from spikingbrain.frontend.weights import as_numpy
from spikingbrain.generate import batch_ids
from spikingbrain.memory import Forecast
from spikingbrain.models.spikingbrain import LayerConfig, SpikingBrain, tiny_76b
from spikingbrain.state import State
from spikingbrain.tools import cli

CAPACITY = 112
ATOL = 1e-5  # of logits around 1
TOKENS = np.random.default_rng(0).integers(0, 256, (3, 40))


Array = np.ndarray[Any, Any]


@dataclass
class Compiled:
    model: SpikingBrain
    program: spikingbrain.Program

    def eager(self, row: int, *pieces: slice) -> tuple[list[Array], dict[str, Array]]:
        """Returns the model's last logits after each piece of a text, and the state after all."""
        tokens, found = torch.from_numpy(TOKENS[[row]]), []
        with torch.no_grad():
            state = self.model.initial_state(1, CAPACITY)
            for piece in pieces:
                logits, state = self.model(tokens[:, piece], state, last_only=True)
                found.append(logits.numpy())
        return found, numbers(state)

    def run(self, state: State, rows: list[int], *pieces: slice) -> Array:
        """Feeds pieces of the texts and returns the last logits."""
        tokens = TOKENS[rows]
        for piece in pieces:
            part = tokens[:, piece]
            if part.shape[1] == 1:
                logits = self.program.decode(part, state=state)
            else:
                lengths = np.full(len(part), part.shape[1])
                logits = self.program.prefill(part, lengths, state=state)
        return np.array(logits)


def numbers(state: Any) -> dict[str, Array]:
    """Returns a model's state by field name. The last slot of a cache is never read."""
    named = {"memories": state.memories, "keys": state.keys, "values": state.values}
    found = {f"{name}.{i}": t.detach().numpy() for name, ts in named.items() for i, t in enumerate(ts)}
    return {**found, "position": state.position.numpy()}


def assert_close(got: dict[str, Any], expected: dict[str, Any], atol: float = ATOL) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        live = slice(None, -1 if name.startswith(("keys", "values")) else None)
        np.testing.assert_allclose(
            got[name][:, live] if value.ndim > 1 else got[name],
            value[:, live] if value.ndim > 1 else value,
            atol=atol,
            err_msg=name,
        )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param([LayerConfig(linear=True, softmax="window")], id="window"),
        pytest.param(tiny_76b().layers, id="76b", marks=pytest.mark.slow),
    ],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A layer of the 76B, and a small 76B with full attention and experts; both have seen sinks before the text."""
    torch.manual_seed(0)
    model = SpikingBrain(replace(tiny_76b(), layers=tuple(request.param))).eval()
    b, t = Dim("B", min=1, max=8), Dim("T", min=1, max=64)
    state = model.initial_state(2, CAPACITY)
    tokens, lengths = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5, 3])
    entries = {
        "prefill": spikingbrain.Entry(
            (tokens, state, lengths),
            {"last_only": True},
            {"tokens_BT": {0: b, 1: t}, "state": {0: b}, "lengths_B": {0: b}},
        ),
        "decode": spikingbrain.Entry(
            (tokens[:, :1], state), {"last_only": True}, {"tokens_BT": {0: b}, "state": {0: b}}
        ),
    }
    path = tmp_path_factory.mktemp("spikingbrain") / "tiny.sbrain"
    spikingbrain.export(model, entries, path, state="state")
    return Compiled(model, spikingbrain.load(path))


def test_a_fresh_state_has_seen_the_sinks(compiled: Compiled) -> None:
    expected = numbers(compiled.model.initial_state(1, CAPACITY))
    for batch in (1, 3):
        state = compiled.program.new_state(batch)
        state.reset()
        got = state.snapshot()
        assert_close(got, {name: value.repeat(batch, 0) for name, value in expected.items()})
        assert np.abs(got["memories.0"]).min() > 0 and not got["keys.0"][:, 3:].any()


ONES = [slice(i, i + 1) for i in range(40)]


@pytest.mark.parametrize(
    "pieces", [[slice(0, 40)], ONES, [slice(0, 21), *ONES[21:]], [slice(0, 3), slice(3, 4), slice(4, 40)]]
)
def test_any_split_gives_the_same(compiled: Compiled, pieces: list[slice]) -> None:
    """Five windows long: prefill, decode, and what lies between."""
    (expected,), after = compiled.eager(0, slice(0, 40))
    state = compiled.program.new_state(1)
    np.testing.assert_allclose(compiled.run(state, [0], *pieces), expected, atol=ATOL)
    assert_close(state.snapshot(), after)


def test_prompts_of_different_lengths_are_continued_side_by_side(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortest prompt ends in the first of several calls of prefill."""
    program, everything = compiled.program, TOKENS.reshape(-1)
    called: list[tuple[str, tuple[int, ...]]] = []
    call = program.call
    monkeypatch.setattr(
        program, "call", lambda name, *a, **k: called.append((name, a[0].shape)) or call(name, *a, **k)
    )
    prompts = [everything[:n].tolist() for n in (1, 9, 100)]
    texts: list[list[int]] = [[], [], []]
    for number, token in batch_ids(program, prompts, 6):
        texts[number].append(token)
    assert called == [("prefill", (3, 64)), ("prefill", (3, 36)), *[("decode", (3, 1))] * 5]
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *text[:-1]]])
            logits, _ = compiled.model(ids, compiled.model.initial_state(1, CAPACITY))
        likely = logits[0, len(prompt) - 1 :]
        chosen = likely.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert bool((likely.max(1).values - chosen < ATOL).all())  # a tie within rounding may fall either way


def test_the_forecast_is_what_calls_take(compiled: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = compiled.program.artifact
    assert artifact is not None
    state = compiled.program.new_state(3)
    found = Forecast.of(artifact, batch=3)
    assert found.state == {name: array.nbytes for name, array in state.snapshot().items()}
    assert cli.main(["forecast", str(artifact.path), "--batch", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == found.state and told["total"] == found.total
    command = [sys.executable, "-m", "spikingbrain.tools.cli", "forecast", str(artifact.path), "--json"]
    needs = [
        json.loads(subprocess.run([*command, "--tokens", n], capture_output=True, check=True).stdout)
        for n in ("8", "64")
    ]
    few, many = (need["workspace"] for need in needs)
    logits, cache = 256 * 4, 64 * 2 * 16 * 4  # of one token; of 64 tokens' keys
    assert logits < few < many and many > cache


class Counting(nn.Module):
    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return x + table, table + 1


def export_counting(path: Path, table: Tensor, batch: bool) -> None:
    b = {0: Dim("B", min=1, max=8)} if batch else {}
    shapes = {"x": b, "table": b}
    entries = {
        "step": spikingbrain.Entry((table.clone(), table), dynamic_shapes=shapes),
        "later": spikingbrain.Entry((table.clone(), table + 1), dynamic_shapes=shapes),
    }
    spikingbrain.export(Counting(), entries, path, state="table")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_only_what_differs_is_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.zeros(3, 5, 4, dtype=dtype)
    table[:, 1:4, 2] = torch.arange(3, 6, dtype=dtype)
    export_counting(tmp_path / "a.sbrain", table, batch=True)
    program = spikingbrain.load(tmp_path / "a.sbrain")
    assert program.artifact.state_blocks()["table"].shape == (1, 3, 1)
    assert program.manifest["state"][0]["block"] == [0, 1, 2]
    state = program.new_state(2)
    program.step(program.new_state(2).snapshot()["table"], state=state)
    expected = as_numpy(table[:2])
    np.testing.assert_array_equal(state.snapshot()["table"], expected + np.ones_like(expected))
    state.reset()
    np.testing.assert_array_equal(state.snapshot()["table"], expected)
    np.testing.assert_array_equal(state.fork().snapshot()["table"], expected)


def test_entries_that_begin_differently(tmp_path: Path) -> None:
    table = torch.arange(6.0).view(2, 3)
    export_counting(tmp_path / "a.sbrain", table, batch=False)
    np.testing.assert_array_equal(
        spikingbrain.load(tmp_path / "a.sbrain").new_state().snapshot()["table"], table.numpy()
    )
    with pytest.raises(
        CompileError, match="state tensor table begins with other values in each entry of axis 0"
    ):
        export_counting(tmp_path / "b.sbrain", table, batch=True)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sbrain"
    export_counting(path, torch.arange(6.0).view(2, 3), batch=False)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(STATE).header_offset + 300  # in the values
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"state\.safetensors is damaged"):
        spikingbrain.load(path)


def test_texts_of_different_lengths(compiled: Compiled) -> None:
    """A batch prefilled together, shorter and longer than the window, then decoded together: each as if alone."""
    lengths = np.array([1, 8, 27])
    padded = TOKENS[:, :27].copy()
    padded[np.arange(27) >= lengths[:, None]] = 77
    state = compiled.program.new_state(3)
    logits = [np.array(compiled.program.prefill(padded, lengths, state=state))]
    for step in range(6):
        logits.append(np.array(compiled.program.decode(TOKENS[:, 27 + step : 28 + step], state=state)))
    snapshot = state.snapshot()
    np.testing.assert_array_equal(snapshot["position"], 3 + lengths + 6)  # three sinks
    for row, length in enumerate(lengths):
        expected, after = compiled.eager(row, slice(0, int(length)), *ONES[27:33])
        for got, wanted in zip(logits, expected, strict=True):
            np.testing.assert_allclose(got[row], wanted[0], atol=ATOL)
        assert_close({name: value[row : row + 1] for name, value in snapshot.items()}, after)


def test_batch_entries_do_not_touch_each_other(compiled: Compiled) -> None:
    one, other = compiled.program.new_state(2), compiled.program.new_state(2)
    compiled.run(one, [0, 1], slice(0, 12), *ONES[12:14])
    compiled.run(other, [0, 2], slice(0, 12), *ONES[12:14])
    one_after, other_after = one.snapshot(), other.snapshot()
    for name, value in one_after.items():
        # rows that go through one expert are multiplied together: how many there are changes the rounding
        np.testing.assert_allclose(value[0], other_after[name][0], rtol=0, atol=ATOL)
        assert name == "position" or not np.array_equal(value[1], other_after[name][1])


def test_a_conversation_is_forked_saved_and_taken_up_again(compiled: Compiled, tmp_path: Path) -> None:
    state = compiled.program.new_state(2)
    compiled.run(state, [0, 1], slice(0, 11))
    fork, snapshot = state.fork(), state.snapshot()
    state.save(tmp_path / "talk.safetensors")
    expected = compiled.run(state, [0, 1], *ONES[11:14])
    restored, loaded = compiled.program.new_state(2), compiled.program.new_state(2)
    restored.restore(snapshot)
    loaded.load(tmp_path / "talk.safetensors")
    for other in (fork, restored, loaded):
        np.testing.assert_array_equal(compiled.run(other, [0, 1], *ONES[11:14]), expected)
        other.reset()
        assert_close(other.snapshot(), compiled.program.new_state(2).snapshot(), atol=0)
        np.testing.assert_array_equal(compiled.run(other, [0, 1], slice(0, 11), *ONES[11:14]), expected)
