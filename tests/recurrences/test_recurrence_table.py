"""The table of forms: complete, as expected, shown in docs/recurrences.md, whose code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from form_check import check
from form_table import Found, read
from forms import FORMS
from torch import Tensor

from spikingbrain.tools import gen_recurrence_docs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recurrences.md"


def test_every_form_was_tried_and_is_as_expected() -> None:
    table = read()
    assert list(table) == list(FORMS), "run tests/recurrences/run.py --update"
    differ = [
        f"{n}: {table[n].found}, not {f.expected}" for n, f in FORMS.items() if table[n].found != f.expected
    ]
    assert not differ
    assert table == {n: Found.of(f, table[n].found, table[n].reason) for n, f in FORMS.items()}


def test_nothing_that_only_resembles_a_recurrence_is_raised() -> None:
    for form in FORMS.values():
        if form.negative:
            assert set(form.expected.split(" + ")) <= {"unrolled", "loop", "pointwise"}, form.name


def test_the_page_shows_the_table() -> None:
    assert gen_recurrence_docs.main(["--check"]) == 0, "run `make docs`"


def test_the_code_of_the_page(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("raised linear_recurrence\n")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.001


def wrong_result(graph: torch.fx.GraphModule, _: Any) -> Callable[..., list[Tensor]]:
    return lambda *inputs: [r * 1.001 for r in graph(*inputs)]


def wrong_gradient(graph: torch.fx.GraphModule, _: Any) -> Callable[..., list[Tensor]]:
    return lambda *inputs: [WrongGradient.apply(r) for r in graph(*inputs)]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", [wrong_result, wrong_gradient])
def test_a_difference_of_a_thousandth_is_seen(backend: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match="elements differ"):
        check(FORMS["gla_preallocated"], backend=backend)
