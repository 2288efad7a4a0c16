"""The life of an artifact: written, loaded, called, damaged, refused."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import spikingbrain
from spikingbrain import artifact, errors
from spikingbrain.artifact import Artifact, TensorHeader

F32 = 1e-5  # absolute, for sums of a few dozen products of numbers around 1


class Mlp(nn.Module):
    """Two projections and a scalar, so that the weights hold a tensor without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 4)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * self.scale


@dataclass
class Memory:
    """Sums since the start, a row for each batch entry, and the number of calls."""

    total: torch.Tensor
    tokens: torch.Tensor
    calls: torch.Tensor

    @staticmethod
    def empty(batch: int) -> Memory:
        return Memory(torch.zeros(batch, 8), torch.zeros(batch, dtype=torch.int64), torch.tensor(0))


torch.export.register_dataclass(Memory)


class Summing(nn.Module):
    """Adds to each token the sum of all tokens before this call."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        mixed = self.mix(x)
        total = memory.total + mixed.sum(1)
        return mixed + memory.total[:, None], Memory(total, memory.tokens + x.shape[1], memory.calls + 1)


def dims() -> tuple[Any, Any]:
    return Dim("B", min=1, max=16), Dim("T", min=1, max=64)


def export_mlp(path: Path, **options: Any) -> Artifact:
    torch.manual_seed(0)
    model, (b, t) = Mlp(), dims()
    entry = spikingbrain.Entry((torch.randn(2, 5, 8),), dynamic_shapes={"x": {0: b, 1: t}})
    return spikingbrain.export(model, {"main": entry}, path, **options)


def export_summing(path: Path) -> Artifact:
    torch.manual_seed(0)
    model, (b, t) = Summing(), dims()
    shapes = {"x": {0: b, 1: t}, "memory": {"total": {0: b}, "tokens": {0: b}, "calls": None}}
    entry = spikingbrain.Entry((torch.randn(2, 5, 8), Memory.empty(2)), dynamic_shapes=shapes)
    return spikingbrain.export(model, {"step": entry}, path, state="memory")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own: stamps and compiled code of other runs play no part."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKINGBRAIN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def mlp(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_mlp(tmp_path_factory.mktemp("mlp") / "mlp.sbrain").path


@pytest.fixture(scope="module")
def summing(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_summing(tmp_path_factory.mktemp("summing") / "summing.sbrain").path


def numbers(*shape: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def reference(model: type[nn.Module], *arguments: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model()(*arguments)


# Calls


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 5), (3, 7), (16, 64)])
def test_a_call_agrees_with_the_model_at_every_size(mlp: Path, batch: int, length: int) -> None:
    x = numbers(batch, length, 8)
    result = spikingbrain.load(mlp).main(x)
    expected = reference(Mlp, torch.from_numpy(x)).numpy()
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=F32)


def test_torch_tensors_and_strided_arrays_are_taken_as_they_are(mlp: Path) -> None:
    program = spikingbrain.load(mlp)
    x = numbers(8, 5, 2).T
    expected = program.main(np.ascontiguousarray(x))
    np.testing.assert_array_equal(program.main(x), expected)
    np.testing.assert_array_equal(program.main(torch.from_numpy(x).requires_grad_()), expected)


class Doubling(nn.Module):
    def forward(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            x.logical_not() if x.dtype == torch.bool else x + x / 3 if x.is_floating_point() else x + x
            for x in given
        ]


def test_every_element_type_goes_in_and_out(tmp_path: Path) -> None:
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "bool"]
    given = [torch.tensor([[1, 0, 3]]).to(getattr(torch, name)) for name in names]
    entry = spikingbrain.Entry((given,))
    program = spikingbrain.load(spikingbrain.export(Doubling(), {"main": entry}, tmp_path / "types"))
    arrays = [np.array([[1, 0, 3]]).astype(artifact.numpy_dtype(name)) for name in names]
    results = program.main(*arrays)
    for name, result, expected in zip(names, results, Doubling()(given), strict=True):
        assert result.dtype.name == name
        if name == "bfloat16":
            result, expected = result.astype(np.float32), expected.float()
        bound = {"float64": 1e-15, "float32": 1e-6}.get(name, 1e-2)
        np.testing.assert_allclose(result, expected.numpy(), rtol=bound)


def test_two_threads_call_one_program(mlp: Path) -> None:
    program = spikingbrain.load(mlp)
    inputs = [numbers(2, length, 8, seed=length) for length in (3, 50)]
    expected = [program.main(x) for x in inputs]
    wrong: list[Any] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not np.array_equal(program.main(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "main takes 1 arguments, got 0\n  try: x: float32[B, T, 8]"),
        ((numbers(1, 1, 8).astype(np.float64),), "main: x is float64, expected x: float32[B, T, 8]"),
        ((numbers(5, 8),), "main: x has shape (5, 8), expected x: float32[B, T, 8]"),
        ((numbers(1, 1, 9),), "main: x has size 9 along axis 2, expected 8\n  at: x: float32[B, T, 8]"),
        ((numbers(1, 65, 8),), "main: x has T = 65\n  because: it was compiled for 1 to 64"),
        ((numbers(1, 0, 8),), "main: x has T = 0\n  because: it was compiled for 1 to 64"),
        ((numbers(17, 1, 8),), "main: x has B = 17\n  because: it was compiled for 1 to 16"),
    ],
)
def test_arguments_that_do_not_fit(mlp: Path, arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(errors.CallError) as caught:
        spikingbrain.load(mlp).main(*arguments)
    assert str(caught.value) == text


def test_entry_points_and_states_that_do_not_fit(mlp: Path, summing: Path) -> None:
    stateless, stateful = spikingbrain.load(mlp), spikingbrain.load(summing)
    x = numbers(1, 1, 8)
    state = stateful.new_state(batch=1)
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: stateless.call("other", x), "no entry point 'other'\n  try: one of main"),
        (lambda: stateless.main(x, state=state), "entry point 'main' takes no state"),
        (
            lambda: stateless.new_state(),
            "this program has no state\n  try: call its entry points without one",
        ),
        (lambda: stateful.step(x), "entry point 'step' needs a state\n  try: program.new_state() makes one"),
        (
            lambda: stateful.new_state(),
            "the batch size of the state is dynamic\n  try: program.new_state(batch=1)",
        ),
        (
            lambda: stateful.step(numbers(2, 1, 8), state=state),
            "step: x has size 2 along axis 0, expected 1\n  at: x: float32[B, T, 8]",
        ),
    ]
    for call, text in refusals:
        with pytest.raises(errors.CallError) as caught:
            call()
        assert str(caught.value).startswith(text)
    with pytest.raises(AttributeError):
        stateless.other  # noqa: B018


# State


def test_state_is_carried_from_call_to_call(summing: Path) -> None:
    program = spikingbrain.load(summing)
    state, expected = program.new_state(batch=3), Memory.empty(3)
    for length in (4, 1, 1, 7):
        x = numbers(3, length, 8, seed=length)
        result, expected = reference(Summing, torch.from_numpy(x), expected)
        np.testing.assert_allclose(program.step(x, state=state), result.numpy(), atol=F32)
    snapshot = state.snapshot()
    np.testing.assert_allclose(snapshot["total"], expected.total.numpy(), atol=F32)
    np.testing.assert_array_equal(snapshot["tokens"], [13, 13, 13])
    assert snapshot["calls"].shape == ()
    assert snapshot["calls"] == 4


def test_reset_fork_and_restore(summing: Path) -> None:
    program = spikingbrain.load(summing)
    x, y = numbers(2, 3, 8, seed=1), numbers(2, 2, 8, seed=2)
    state = program.new_state(batch=2)
    first = program.step(x, state=state)
    fork, snapshot = state.fork(), state.snapshot()
    after = program.step(y, state=state)

    np.testing.assert_array_equal(program.step(y, state=fork), after)  # the fork did not see the call above
    program.step(y, state=fork)
    np.testing.assert_array_equal(state.snapshot()["calls"], 2)  # nor the state that of the fork

    state.restore(snapshot)
    np.testing.assert_array_equal(program.step(y, state=state), after)
    state.reset()
    np.testing.assert_array_equal(program.step(x, state=state), first)


def test_a_snapshot_is_a_copy(summing: Path) -> None:
    program = spikingbrain.load(summing)
    state = program.new_state(batch=1)
    snapshot = state.snapshot()
    program.step(numbers(1, 3, 8), state=state)
    assert not snapshot["total"].any()
    saved = state.snapshot()
    state.restore(snapshot)
    snapshot["total"] += 1
    assert not state.snapshot()["total"].any()
    assert saved["total"].any()


def test_batch_entries_do_not_touch_each_other(summing: Path) -> None:
    program = spikingbrain.load(summing)
    x, y = numbers(2, 3, 8, seed=1), numbers(2, 2, 8, seed=2)
    both = program.new_state(batch=2)
    program.step(x, state=both)
    together = program.step(y, state=both)
    for i in (0, 1):
        alone = program.new_state(batch=1)
        program.step(x[i : i + 1], state=alone)
        np.testing.assert_allclose(program.step(y[i : i + 1], state=alone)[0], together[i], atol=F32)


def test_state_is_saved_and_loaded(summing: Path, tmp_path: Path) -> None:
    program = spikingbrain.load(summing)
    state = program.new_state(batch=2)
    program.step(numbers(2, 3, 8), state=state)
    state.save(tmp_path / "talk.safetensors")
    assert os.listdir(tmp_path) == ["talk.safetensors"]

    other = spikingbrain.load(summing).new_state(batch=2)
    other.load(tmp_path / "talk.safetensors")
    y = numbers(2, 1, 8, seed=2)
    np.testing.assert_array_equal(program.step(y, state=other), program.step(y, state=state))

    with pytest.raises(errors.CallError) as caught:
        program.new_state(batch=1).load(tmp_path / "talk.safetensors")
    text = "the snapshot does not fit: total is float32[2, 8], expected float32[1, 8]"
    assert str(caught.value) == text


def test_a_state_in_use_is_refused(summing: Path) -> None:
    program = spikingbrain.load(summing)
    state = program.new_state(batch=1)
    buffers = state.take()
    uses = (lambda: program.step(numbers(1, 1, 8), state=state), state.snapshot, state.fork, state.reset)
    for use in uses:
        with pytest.raises(errors.CallError) as caught:
            use()
        assert str(caught.value).startswith("this state is in use by another call")
    state.give(buffers)
    program.step(numbers(1, 1, 8), state=state)


def test_a_state_lost_in_a_failed_call_can_be_reset(summing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = spikingbrain.load(summing)
    state = program.new_state(batch=1)
    expected = program.step(numbers(1, 1, 8), state=program.new_state(batch=1))

    def fail(*_: object) -> list[object]:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(program.executable, "call", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            program.step(numbers(1, 1, 8), state=state)
    with pytest.raises(errors.CallError, match="lost when a call failed"):
        program.step(numbers(1, 1, 8), state=state)
    state.reset()
    np.testing.assert_array_equal(program.step(numbers(1, 1, 8), state=state), expected)


class Scaling(nn.Module):
    """A state without names and of another type."""

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * factor, factor + factor


@pytest.fixture(scope="module")
def scaling(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scaling") / "scaling.sbrain"
    one = torch.ones(2, dtype=torch.bfloat16)  # given twice: still two arguments
    return spikingbrain.export(
        Scaling(), {"scale": spikingbrain.Entry((one, one))}, path, state="factor"
    ).path


def test_a_state_of_another_program_is_refused(summing: Path, scaling: Path) -> None:
    program, other = spikingbrain.load(summing), spikingbrain.load(scaling)
    state = other.new_state()
    with pytest.raises(errors.CallError) as caught:
        program.step(numbers(1, 1, 8), state=state)
    assert str(caught.value) == (
        "entry point 'step' got a state of another program\n  try: program.new_state() makes one"
    )
    state.snapshot()  # it is not lost


def test_a_bfloat16_state_is_saved_and_loaded(scaling: Path, tmp_path: Path) -> None:
    program = spikingbrain.load(scaling)
    state, x = program.new_state(), np.full(2, 3, artifact.numpy_dtype("bfloat16"))
    for factor in (1, 2):
        np.testing.assert_array_equal(program.scale(x, state=state).astype(np.float32), 3 * factor)
    state.save(tmp_path / "state")
    other = program.new_state()
    other.load(tmp_path / "state")
    np.testing.assert_array_equal(program.scale(x, state=other).astype(np.float32), 12)


def test_a_file_that_is_no_state(scaling: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("buy milk")
    with pytest.raises(errors.CallError, match="note is not a saved state\n  because: "):
        spikingbrain.load(scaling).new_state().load(tmp_path / "note")


def test_states_that_can_be_neither_read_nor_written(scaling: Path, tmp_path: Path) -> None:
    state = spikingbrain.load(scaling).new_state()
    with pytest.raises(
        errors.CallError, match=r"there is no saved state to read at .*gone\n  because: No such file"
    ):
        state.load(tmp_path / "gone")
    with pytest.raises(
        errors.CallError, match=r"the state cannot be saved as .*gone/it\n  because: No such file"
    ):
        state.save(tmp_path / "gone" / "it")


@pytest.mark.parametrize(
    "x, why",
    [
        (
            torch.ones(1, 1, 8, device="meta"),
            r"(?s)a Tensor cannot be given.*meta.*dense array in the CPU's memory",
        ),
        (torch.ones(1, 1, 8).to_sparse(), r"(?s)a Tensor cannot be given.*layout.*dense array"),
        ([[1.0], [1.0, 2.0]], r"(?s)a list cannot be given.*inhomogeneous"),
    ],
)
def test_arguments_that_are_no_dense_arrays(x: Any, why: str, summing: Path) -> None:
    program = spikingbrain.load(summing)
    with pytest.raises(errors.CallError, match=why):
        program.step(x, state=program.new_state(batch=1))


def test_what_is_no_state_and_no_entry_point(summing: Path) -> None:
    program = spikingbrain.load(summing)
    with pytest.raises(errors.CallError, match=r"(?s)got a ndarray as its state.*new_state\(\) makes one"):
        program.step(numbers(1, 1, 8), state=np.zeros(8))
    with pytest.raises(AttributeError, match="the program has no entry point 'prefill'; it has step"):
        program.prefill(numbers(1, 1, 8))


class Widening(nn.Module):
    def forward(self, x: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, total + x.double()


_X = torch.ones(2, 3)
WRONG_EXPORTS: list[tuple[Any, Any, dict[str, Any], str]] = [
    (torch.sin, {"main": spikingbrain.Entry((_X,))}, {}, "is no model\n  try: a torch.nn.Module"),
    (nn.Identity(), spikingbrain.Entry((_X,)), {}, "entry points in a Entry\n  try: entries="),
    (nn.Identity(), {"main": (_X,)}, {}, "entry 'main' has its arguments in a tuple\n  try: Entry"),
    (nn.Identity(), {"main": spikingbrain.Entry(_X)}, {}, "has its arguments in a Tensor\n  try: Entry"),
    (nn.Identity(), {"main": spikingbrain.Entry((_X,), dynamic_shapes="x")}, {}, "is a str\n  try: {'x'"),
    (
        nn.Identity(),
        {"main": spikingbrain.Entry((_X,), dynamic_shapes={"input": {2: Dim("B")}})},
        {},
        "input has no axis 2\n  because: its shape is [2, 3]",
    ),
    (
        Widening(),
        {"main": spikingbrain.Entry((_X, _X))},
        {"state": "total"},
        "changes the type of its state tensor total\n  because: from float32 to float64",
    ),
    (nn.Linear(4, 4), {"main": spikingbrain.Entry((_X,))}, {}, "torch.export cannot capture entry 'main'"),
]


@pytest.mark.parametrize("model, entries, more, text", WRONG_EXPORTS, ids=lambda value: None)
def test_what_cannot_be_exported(
    model: Any,
    entries: Any,
    more: dict[str, Any],
    text: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(errors.CompileError, match=re.escape(text)):
        spikingbrain.export(model, entries, tmp_path / "a.sbrain", **more)
    assert all(record.levelno < logging.ERROR for record in caplog.records)  # one error, told once


@pytest.mark.parametrize(
    "more, text",
    [
        ({"tokenizer": 3}, "tokenizer is a int"),
        ({"metadata": {"x": _X}}, "metadata cannot be written as JSON"),
    ],
)
def test_what_an_artifact_cannot_hold(more: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match=text):
        spikingbrain.export(nn.Identity(), {"main": spikingbrain.Entry((_X,))}, tmp_path / "a", **more)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which no file can be made")
def test_a_folder_that_takes_no_file() -> None:
    with pytest.raises(errors.ArtifactError, match=r"cannot write /proc/self/a\n  because: "):
        artifact.write(Path("/proc/self/a"), {}, {}, [], lambda _: _X.numpy(), {})


def test_threads_are_a_number(tmp_path: Path) -> None:
    entries = {"main": spikingbrain.Entry((_X,))}
    with pytest.raises(errors.OptionError, match="threads is 'two'"):
        spikingbrain.export(nn.Identity(), entries, tmp_path / "a", options={"threads": "two"})


def test_a_refused_call_leaves_the_state_alone(summing: Path) -> None:
    program = spikingbrain.load(summing)
    state = program.new_state(batch=1)
    with pytest.raises(errors.CallError):
        program.step(numbers(1, 1, 9), state=state)
    assert state.snapshot()["calls"] == 0


# Damage


@pytest.fixture
def victim(mlp: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "victim.sbrain"
    copy.write_bytes(mlp.read_bytes())
    return copy


def flip(path: Path, member: str, offset: int = 1000) -> None:
    """Changes one bit of a member's content."""
    data = bytearray(path.read_bytes())
    at = data.index(bytes(Artifact(path).member(member))) + offset
    data[at] ^= 1
    path.unlink()
    path.write_bytes(data)


def rewrite(path: Path, without: str = "", **changes: Any) -> None:
    """Writes the archive anew with another manifest: undamaged, as far as a zip archive goes."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != without}
    if artifact.MANIFEST in members:
        manifest = {**json.loads(members[artifact.MANIFEST]), **changes}
        members[artifact.MANIFEST] = json.dumps(manifest).encode()
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def refusal(path: Path, kind: type[errors.SpikingBrainError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        spikingbrain.load(path, **options)
    assert type(caught.value) is kind
    return str(caught.value).replace(str(path), "FILE")


def test_damaged_code(victim: Path) -> None:
    flip(victim, "code/module.vmfb")
    assert refusal(victim, errors.CorruptArtifact) == (
        "FILE: code/module.vmfb is damaged\n  because: its SHA-256 differs from the manifest's"
    )


def test_damaged_manifest(victim: Path) -> None:
    flip(victim, artifact.MANIFEST)
    assert refusal(victim, errors.CorruptArtifact) == (
        "FILE is not a complete artifact\n  because: Bad CRC-32 for file 'manifest.json'\n  try: copy or compile it again"
    )


def test_damaged_weights_are_found_at_the_first_load(victim: Path) -> None:
    flip(victim, artifact.WEIGHTS)
    text = (
        "FILE: the weights are damaged in block 0\n"
        f"  because: the SHA-256 of bytes 0 to {len(Artifact(victim).member(artifact.WEIGHTS))} differs\n"
        "  try: copy or compile it again"
    )
    assert refusal(victim, errors.CorruptArtifact) == text
    assert refusal(victim, errors.CorruptArtifact) == text  # a failed check leaves no stamp


def test_later_damage_is_found_when_asked_for(victim: Path) -> None:
    spikingbrain.load(victim)
    before = victim.stat()
    with open(victim, "r+b") as file:
        file.seek(victim.read_bytes().index(bytes(Artifact(victim).member(artifact.WEIGHTS))) + 1000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if the disk had lost it
    spikingbrain.load(victim)
    assert "the weights are damaged" in refusal(victim, errors.CorruptArtifact, verify=True)
    os.utime(victim)
    assert "the weights are damaged" in refusal(victim, errors.CorruptArtifact)


def test_every_part_of_the_file_is_guarded(victim: Path) -> None:
    good = Artifact(victim)
    content = {name: bytes(good.member(name)) for name in good.manifest["members"]}
    data = victim.read_bytes()
    directory = data.index(b"PK\x01\x02")
    for at in [*range(0, directory, 211), *range(directory, len(data))]:
        damaged = bytearray(data)
        damaged[at] ^= 0x80
        victim.unlink()
        victim.write_bytes(damaged)
        try:
            found = Artifact(victim)
            found.verify_weights(force=True)
        except errors.CorruptArtifact:
            continue
        assert found.manifest == good.manifest, at  # a byte that carries nothing, such as padding
        assert {name: bytes(found.member(name)) for name in content} == content, at


def test_truncated_files(victim: Path) -> None:
    data = victim.read_bytes()
    for length in (0, 1, 100, len(data) // 2, len(data) - 1):
        victim.unlink()
        victim.write_bytes(data[:length])
        assert refusal(victim, errors.CorruptArtifact).startswith("FILE is not a complete artifact")


def test_a_missing_member(victim: Path) -> None:
    rewrite(victim, without="code/module.vmfb")
    assert refusal(victim, errors.CorruptArtifact) == (
        "FILE lacks the member code/module.vmfb\n  try: copy or compile it again"
    )


def test_another_zip_file(victim: Path) -> None:
    rewrite(victim, without=artifact.MANIFEST)
    assert refusal(victim, errors.CorruptArtifact) == (
        "FILE has no manifest.json\n  try: it is a zip file, but no artifact"
    )


def test_a_newer_format(victim: Path) -> None:
    rewrite(victim, format=2, members="in a form of the future")
    assert refusal(victim, errors.NewerFormat) == (
        "FILE has format 2, this version reads up to 1\n  try: pip install --upgrade spikingbrain"
    )


def test_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none", errors.ArtifactError).startswith("no artifact at FILE\n  try: ")


def target(path: Path, **changes: Any) -> dict[str, Any]:
    return {**Artifact(path).manifest["target"], **changes}


def test_a_cpu_with_other_features(victim: Path) -> None:
    rewrite(victim, target=target(victim, features=["avx1024", "fma8"]))
    assert refusal(victim, errors.WrongTarget) == (
        "FILE was compiled for a CPU with avx1024, fma8\n  because: this CPU lacks them\n"
        "  try: compile it here, or with --target x86-64-v3 for most x86-64 machines"
    )


def test_another_processor(victim: Path) -> None:
    here = Artifact(victim).manifest["target"]["arch"]
    rewrite(victim, target=target(victim, arch="s390x"))
    assert refusal(victim, errors.WrongTarget) == (
        f"FILE was compiled for s390x (cpu)\n  because: this machine is {here}\n"
        "  try: compile it with --target for this machine"
    )


def test_an_unknown_target(victim: Path) -> None:
    rewrite(victim, target=target(victim, name="abacus"))
    assert refusal(victim, errors.WrongTarget) == (
        "FILE needs the target 'abacus'\n  because: unknown target 'abacus'"
    )


# Writing


def contents(header: TensorHeader) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(header.shape), dtype=np.float32).reshape(header.shape)


def write(path: Path, content: Callable[[TensorHeader], np.ndarray[Any, Any]]) -> None:
    headers = [
        TensorHeader("one", (3, 5), "f32"),
        TensorHeader("two", (), "f32"),
        TensorHeader("three", (0, 4), "f32"),
    ]
    artifact.write(path, {"entries": {}}, {"code.bin": b"code"}, headers, content, {"note.txt": b"note"})


def test_writing_and_reading(tmp_path: Path) -> None:
    write(tmp_path / "a", contents)
    opened = Artifact(tmp_path / "a")
    assert bytes(opened.code["code.bin"]) == b"code"
    assert bytes(opened.member("note.txt")) == b"note"
    weights = opened.weights()
    assert {name: array.shape for name, array in weights.items()} == {
        "one": (3, 5),
        "two": (),
        "three": (0, 4),
    }
    np.testing.assert_array_equal(weights["one"].reshape(-1), np.arange(15))
    assert not weights["one"].flags.writeable
    assert all(array.ctypes.data % artifact.ALIGNMENT == 0 for array in weights.values() if array.size)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def failing(header: TensorHeader) -> np.ndarray[Any, Any]:
        if header.key == "two":
            raise KeyError("gone")
        return contents(header)

    with pytest.raises(KeyError):
        write(tmp_path / "a", failing)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write(tmp_path / "a", contents)
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(errors.ArtifactError) as caught:
        write(tmp_path / "a", lambda header: np.zeros((2, 2), np.float32))
    assert str(caught.value) == "stored tensor 'one' came out as (2, 2), declared (3, 5)"
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == before


def test_equal_inputs_make_equal_files(tmp_path: Path, mlp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 2e9)  # another day
    write(tmp_path / "a", contents)
    monkeypatch.undo()
    write(tmp_path / "b", contents)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert export_mlp(tmp_path / "again").path.read_bytes() == mlp.read_bytes()


def test_compiling_twice_makes_equal_code(tmp_path: Path, mlp: Path) -> None:
    first, second = Artifact(mlp), export_mlp(tmp_path / "again", use_cache=False)
    assert {n: bytes(c) for n, c in first.code.items()} == {n: bytes(c) for n, c in second.code.items()}
    assert first.manifest["entries"] == second.manifest["entries"]


# The compile cache


def test_the_compile_cache(tmp_path: Path, cache: Path, mlp: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spikingbrain")
    steps: list[str] = []

    def export(**options: Any) -> list[str]:
        steps.clear()
        caplog.clear()
        export_mlp(tmp_path / "out", progress=steps.append, **options)
        assert spikingbrain.load(tmp_path / "out").main(numbers(1, 1, 8)).shape == (1, 1, 4)
        return [record.message for record in caplog.records if record.message.startswith("compile cache")]

    entries = set((cache / "compile").iterdir())
    assert export() == []
    assert "code from the cache" in steps
    assert set((cache / "compile").iterdir()) == entries

    assert export(options={"flags": "--iree-llvmcpu-debug-symbols=false"}) == [
        "compile cache: nothing for this module, target, options and versions"
    ]
    assert "code from the cache" not in steps
    (added,) = set((cache / "compile").iterdir()) - entries

    added.write_bytes(added.read_bytes()[:-40])
    (message,) = export(options={"flags": "--iree-llvmcpu-debug-symbols=false"})
    assert message.startswith(f"compile cache: entry {added.name} is damaged (")
    assert message.endswith(") and will be rebuilt")
    assert "code from the cache" not in steps
    assert export(options={"flags": "--iree-llvmcpu-debug-symbols=false"}) == []


def test_an_unwritable_place_is_refused_before_compiling(tmp_path: Path) -> None:
    def never(step: str) -> None:
        raise AssertionError(f"began to {step}")

    entry = {"main": spikingbrain.Entry((torch.zeros(2, 8),))}
    for path, why in (
        (tmp_path / "missing" / "a.sbrain", "there is no folder"),
        (tmp_path, "it is a folder"),
    ):
        with pytest.raises(errors.ArtifactError, match=why):
            spikingbrain.export(nn.Linear(8, 8), entry, path, progress=never)
