"""Models of a user's own, named on the command line by the place of the Python object that makes them."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain.errors import OptionError

INPUTS = "example_inputs"
HELP = (
    "PACKAGE.MODULE:NAME or PATH.py:NAME, where NAME is a function that returns (model, args) or (model, args, kwargs), "
    f"or a model beside which {INPUTS} = args stands; or a .pt2 file of torch.export"
)


@dataclass(frozen=True)
class UserModel:
    """A model and the arguments to call it with."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the torch.compile backend, such as library=false; may be repeated",
    )


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options given on the command line, with the types that the backend wants."""
    found: dict[str, Any] = {}
    for item in args.option:
        name, equals, text = item.partition("=")
        if not equals:
            raise OptionError(f"{item!r} is no option", hint="NAME=VALUE, such as library=false")
        words: dict[str, Any] = {"true": True, "false": False}
        found[name] = int(text) if text.isdigit() else words.get(text.lower(), text)
    return found


def load(text: str) -> UserModel:
    """Returns the model that ``text`` names, see ``HELP``; raises OptionError where it names none."""
    if text.endswith(".pt2"):
        return _exported(Path(text))
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise OptionError(f"{text!r} names no model", hint=HELP)
    module = _import(place)
    if not hasattr(module, name):
        raise OptionError(
            f"{place} has no {name!r}", hint=f"a name that it has: {', '.join(_public(module))}"
        )
    found = getattr(module, name)
    if inspect.isfunction(found) and not hasattr(module, INPUTS):
        found = found()
        wrong = f"{text} returned {type(found).__name__}"
    else:
        if not hasattr(module, INPUTS):
            raise OptionError(f"{place} has no {INPUTS}", hint=f"{INPUTS} = (...) beside {name}")
        inputs = getattr(module, INPUTS)
        found = (found, inputs() if callable(inputs) else inputs)
        wrong = f"{INPUTS} of {place} is {type(found[1]).__name__}"
    if not (isinstance(found, tuple) and len(found) in (2, 3) and callable(found[0])):
        raise OptionError(wrong, hint="(model, args) or (model, args, kwargs)")
    model, args, *rest = found
    if not isinstance(args, (tuple, list)):
        raise OptionError(
            wrong if INPUTS in wrong else f"{text} returned args that are no tuple", hint="(x,)"
        )
    return UserModel(model, tuple(args), rest[0] if rest else {})


def _import(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not place.startswith(error.name):
                raise  # the module is there, and one that it imports is not
            raise OptionError(f"there is no module {place!r}", hint="PATH.py:NAME names a file") from None
        finally:
            sys.path.pop(0)
    path = Path(place)
    if not path.is_file():
        raise OptionError(f"there is no file {place}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # classes in it look themselves up there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _exported(path: Path) -> UserModel:
    import torch

    if not path.is_file():
        raise OptionError(f"there is no file {path}")
    program = torch.export.load(path)
    if program.example_inputs is None:
        raise OptionError(f"{path} holds no example inputs")
    args, kwargs = program.example_inputs
    return UserModel(program.module(), tuple(args), kwargs)


def _public(module: Any) -> list[str]:
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
    return sorted(n for n in own if not n.startswith("_")) or ["none"]
