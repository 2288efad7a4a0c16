"""How the command line finds a user's model, and what it says where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spikingbrain.errors import OptionError
from spikingbrain.tools import user_models

FILE = """
import torch

def both(): return torch.sin, (torch.ones(3),)
def named(): return torch.add, [torch.ones(3)], {"alpha": 2}
def neither(): return torch.sin
def untupled(): return torch.sin, torch.ones(3)
model = torch.nn.Linear(2, 2)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def test_a_function_returns_model_and_arguments(file: Path) -> None:
    found = user_models.load(f"{file}:both")
    assert found.model is torch.sin and torch.equal(found.args[0], torch.ones(3)) and not found.kwargs
    found = user_models.load(f"{file}:named")
    assert isinstance(found.args, tuple) and found.kwargs == {"alpha": 2}


def test_a_model_beside_its_inputs(file: Path) -> None:
    with file.open("a") as more:
        more.write("example_inputs = (torch.ones(1, 2),)\n")
    found = user_models.load(f"{file}:model")
    assert found.model(*found.args).shape == (1, 2)


def test_a_module_of_a_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert user_models.load("mine:both").model is torch.sin


def test_an_exported_program(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "linear.pt2")
    found = user_models.load(str(tmp_path / "linear.pt2"))
    assert found.model(*found.args).shape == (1, 2)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing.py:make", "there is no file nothing.py"),
        ("no_such_module_anywhere:make", "there is no module 'no_such_module_anywhere'"),
        ("nothing.pt2", "there is no file nothing.pt2"),
        ("{file}", "names no model"),
        ("{file}:absent", "has no 'absent'"),
        ("{file}:neither", "returned builtin_function_or_method"),
        ("{file}:untupled", "args that are no tuple"),
        ("{file}:model", "has no example_inputs"),
    ],
)
def test_what_is_no_model(name: str, message: str, file: Path) -> None:
    with pytest.raises(OptionError, match=message):
        user_models.load(name.format(file=file))


def test_a_fault_inside_the_users_file_is_the_users(file: Path) -> None:
    file.write_text("import no_such_module_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        user_models.load(f"{file}:both")


def test_options_get_their_types() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    user_models.add_model_arguments(parser)
    given = ["m:f", "--option", "library=false", "--option", "threads=2", "--option", "target=cpu"]
    assert user_models.options(parser.parse_args(given)) == {"library": False, "threads": 2, "target": "cpu"}
    with pytest.raises(OptionError, match="'library' is no option"):
        user_models.options(parser.parse_args(["m:f", "--option", "library"]))
