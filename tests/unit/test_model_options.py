"""What the command line lets a user choose about a model."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from spikingbrain.artifact import cache_folder
from spikingbrain.errors import ArtifactError, OptionError
from spikingbrain.tools import chat, forecast, named_models, run
from spikingbrain.tools.named_models import (
    ModelOptions,
    SpikeOptions,
    add_model_arguments,
    hand_out,
    known,
    model_options,
    obtain,
)


def parsed(*arguments: str) -> ModelOptions:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return model_options(parser.parse_args(arguments))


def test_nothing_asked_for_is_the_default() -> None:
    assert parsed() == ModelOptions()


def test_each_option_arrives() -> None:
    found = parsed("--window", "8", "--sinks", "1", "--dtype", "bfloat16", "--cache", "int8", "--batch", "3")
    assert found == ModelOptions(8, 1, dtype="bfloat16", cache="int8", batch=3)
    assert parsed("--spike", "k=2,bits=4").spike == SpikeOptions(2.0, bits=4)


@pytest.mark.parametrize("name", ["--batch", "--capacity"])
def test_none_is_too_few(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} 0: .* at the least"):
        parsed(name, "0")


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "kept").write_text("an artifact")
    monkeypatch.setenv("SPIKINGBRAIN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(named_models, "cached_artifact", lambda *_: cache_folder() / "models" / "it")
    with pytest.raises(ArtifactError, match=r"(?s)^cannot write .*Not a directory.*SPIKINGBRAIN_CACHE"):
        obtain("smollm2", "cpu", ModelOptions(), lambda _: None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)  # as between file systems, which cannot share a file
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ArtifactError, match=r"^cannot write .*\n  because: No space left on device$"):
        hand_out(tmp_path / "kept", tmp_path / "model.sbrain")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "kept"]


def test_spikes_are_float32() -> None:
    with pytest.raises(OptionError, match=r"(?s)--dtype float16 with --spike.*integers"):
        parsed("--dtype", "float16", "--spike", "k=3")


@pytest.mark.parametrize(
    "command, option",
    [
        (run, ("--dtype", "float32")),  # the default, asked for, may still not be what the artifact has
        (run, ("--window", "8")),
        (chat, ("--cache", "int8")),
        (forecast, ("--spike", "k=3")),
    ],
)
def test_an_artifact_is_compiled_already(
    command: ModuleType, option: tuple[str, str], tmp_path: Path
) -> None:
    artifact = tmp_path / "model.sbrain"
    artifact.write_bytes(b"")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = [str(artifact), "text", *option] if command is run else [str(artifact), *option]
    with pytest.raises(
        OptionError, match=f"(?s)^{option[0]} with the artifact .*compiled already.*leave it out"
    ):
        command.run(parser.parse_args(words))


def test_target_and_device_are_told_apart(tmp_path: Path) -> None:
    artifact = tmp_path / "model.sbrain"
    artifact.write_bytes(b"")
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    with pytest.raises(OptionError, match="--device says where it runs"):
        run.run(parser.parse_args([str(artifact), "text", "--target", "maca-emulator"]))


def test_an_artifact_is_not_compiled_again(tmp_path: Path) -> None:
    artifact = tmp_path / "model.sbrain"
    with zipfile.ZipFile(artifact, "w"):
        pass
    with pytest.raises(OptionError, match="holds code, and not the model"):
        known(str(artifact))
