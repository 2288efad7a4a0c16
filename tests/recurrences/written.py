"""What a form is: a recurrence as somebody writes it in PyTorch, its inputs, and what is to become of it.

A form is a function or a module with a line above it that says all this::

    @form("GLA", "list and stack", "q:BTHK k:BTHK v:BTHV g:BTHK:log", expected="linear_recurrence")
    def gla(q, k, v, g): ...

Letters of the inputs' axes: B batch, T time, P twice the time, H heads, Q query heads (several to a head), K key, V value,
D channels, N state of a channel, M slots. No two sizes are equal, so that a mistaken axis shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"B": 2, "H": 3, "Q": 6, "K": 5, "V": 4, "D": 10, "N": 7, "M": 8}
LENGTH = 11

OUTCOMES = (
    "linear_recurrence",
    "linear_scan",
    "selective_scan",
    "pointwise",
    "loop",
    "unit_lower_inverse",
    "unrolled",
)

# What the values of an input look like; the third part of its description.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "log": F.logsigmoid,  # a gate in log form
    "factor": torch.sigmoid,  # a gate
    "positive": F.softplus,
    "rate": lambda x: -F.softplus(x),  # what a step size is multiplied with, below an exp
    "unit": lambda x: F.normalize(x, dim=-1),
    "drive": lambda x: x.abs(),  # an input current that makes neurons fire
    "index": lambda x: (x.abs() * 100).long() % 4,
    "starts": lambda x: (x > 0.7).to(x.dtype),  # 1 where a document begins
}

LINEAR = "q:BTHK k:BTHK v:BTHV"
LINEAR_HEADS_FIRST = "q:BHTK k:BHTK v:BHTV"


@dataclass(frozen=True)
class Form:
    """One way of writing one recurrence.

    Attributes:
        family: which recurrence (or, with ``negative``, what it resembles).
        writing: how it is written.
        make: returns the module.
        inputs: ``"name:AXES"`` or ``"name:AXES:kind"``, separated by spaces, in the order of ``forward``'s arguments.
        expected: what becomes of it in ``torch.compile``: one of `OUTCOMES`, or several joined by " + ".
        negative: it resembles a recurrence that can be raised, and is none.
        dtype: of the inputs and parameters.
        multiple: lengths are multiples of this (loops over chunks).
        dynamic: whether it can be run at any length at all.
        export: what ``export`` says where it makes no program of any length of it.
        longest: up to this length the results are numbers, and steady ones: what people write may overflow beyond.
        gradients: whether torch itself can train it.
        quick: whether it is in the subset that every change runs.
    """

    name: str
    family: str
    writing: str
    make: Callable[[], nn.Module]
    inputs: str
    expected: str
    negative: bool = False
    dtype: torch.dtype = torch.float32
    multiple: int = 1
    dynamic: bool = True
    export: str = ""
    longest: int = 300
    gradients: bool = True
    quick: bool = False

    def module(self) -> nn.Module:
        """Returns the module, always with the same parameters."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.make().to(self.dtype)

    def length(self, about: int | None = None) -> int:
        """Returns a length that the form can be run with, not less than ``about``; without, one for most tests."""
        if about is None:
            about = LENGTH if self.multiple == 1 else 6 * self.multiple
        return -(-about // self.multiple) * self.multiple

    def example(self, length: int | None = None, seed: int = 0, extreme: bool = False) -> tuple[Tensor, ...]:
        """Returns inputs; the same for the same length and seed. ``extreme``: gates far from 1, quite open, or shut."""
        sizes = SIZES | {"T": self.length() if length is None else length}
        sizes["P"] = 2 * sizes["T"]
        generator = torch.Generator().manual_seed(seed)
        found = []
        for text in self.inputs.split():
            _, axes, kind = (text + ":").split(":")[:3]
            values = torch.randn([sizes[a] for a in axes], generator=generator, dtype=torch.float64)
            if extreme and kind in ("log", "factor"):
                values = (40 * values).where(values.abs() < 1, values.sign() * torch.inf)
            values = KINDS[kind](values)
            found.append(values.to(self.dtype) if values.is_floating_point() else values)
        return tuple(found)

    def time_axes(self) -> dict[str, int | None]:
        """Returns for each input, by name, which of its axes is time."""
        parts = (text.split(":") for text in self.inputs.split())
        return {name: next((axes.index(a) for a in "TP" if a in axes), None) for name, axes, *_ in parts}


FORMS: dict[str, Form] = {}


def as_module(function: Callable[..., Any]) -> type[nn.Module]:
    """Returns a module class whose ``forward`` is the function, with its arguments."""
    return type(function.__name__, (nn.Module,), {"forward": staticmethod(function)})


def register(
    name: str,
    family: str,
    writing: str,
    make: Callable[[], nn.Module],
    inputs: str,
    expected: str,
    **more: Any,
) -> None:
    """Puts a form into `FORMS`."""
    assert set(expected.split(" + ")) <= set(OUTCOMES), expected
    assert name not in FORMS, f"two forms are called {name}"
    FORMS[name] = Form(name, family, writing, make, inputs, expected, **more)


def form(
    family: str, writing: str, inputs: str, expected: str, **more: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Puts the function or module class below it into `FORMS`, under its name."""

    def keep(written: Callable[..., Any]) -> Callable[..., Any]:
        make = written if isinstance(written, type) else as_module(written)
        arguments = [n for n in inspect.signature(make.forward).parameters if n != "self"]
        assert arguments == [text.split(":")[0] for text in inputs.split()], f"inputs of {written.__name__}"
        register(written.__name__, family, writing, make, inputs, expected, **more)
        return written

    return keep


def negative(family: str, writing: str, inputs: str, expected: str = "unrolled", **more: Any) -> Any:
    """Like `form`, for what resembles a recurrence and must not be taken for one."""
    return form(family, writing, inputs, expected, negative=True, **more)
