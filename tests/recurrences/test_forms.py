"""Every form of ``forms.py`` through ``torch.compile``: what becomes of it; eager's results, final states and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from form_check import check, explained, outcome
from forms import FORMS, Form

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

QUICK = [f for f in FORMS.values() if f.quick]
REST = [f for f in FORMS.values() if not f.quick]
GATES = {"log", "factor"}
WITHOUT_A_LOOP = ("quadratic", "cum", "chunk")


def name(form: Form) -> str:
    return form.name


@pytest.mark.parametrize("form", QUICK, ids=name)
def test_quick_form(form: Form) -> None:
    assert outcome(check(form)) == form.expected


@pytest.mark.slow
@pytest.mark.parametrize("form", REST, ids=name)
def test_form(form: Form) -> None:
    assert outcome(check(form)) == form.expected


def of_any_length(forms: list[Form]) -> Iterator[Form]:
    return (f for f in forms if f.dynamic and f.name != "state_in_the_middle")


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 4, 16])
@pytest.mark.parametrize("form", of_any_length(QUICK), ids=name)
def test_lengths(form: Form, length: int) -> None:
    check(form, form.length(length))


def gated() -> Iterator[Form]:
    """Yields loops with gates. What people write without one divides by products of gates: eager itself gives NaN."""
    for form in FORMS.values():
        kinds = {text.split(":")[-1] for text in form.inputs.split()}
        if kinds & GATES and not any(word in form.writing for word in WITHOUT_A_LOOP):
            yield form


@pytest.mark.slow
@pytest.mark.parametrize("form", gated(), ids=name)
def test_extreme_gates(form: Form) -> None:
    """Gates that are shut (0, -inf as a log), open (1, 0 as a log), and all that lies between."""
    check(form, extreme=True)


@pytest.mark.parametrize(
    "name", [pytest.param("gla_two_layers", marks=pytest.mark.slow), "state_in_the_middle"]
)
def test_explain_says_what_became_of_it(name: str) -> None:
    form = FORMS[name]
    recurrences = explained(form)
    assert outcome(recurrences) == form.expected
    assert all(Path(r["where"]).name.startswith("forms_") and r["reason"] for r in recurrences)
    assert len(recurrences) == {"gla_two_layers": 2, "state_in_the_middle": 1}[name]
