"""What becomes of each form of ``tests/recurrences``: loops rolled up and classified, written forms recognised.

Each result is run: a rolled loop step by step in place of the graph's own values, a recurrence against what the step does to
its state and what its reads read, a form without a loop as the recurrence that it is said to be.
"""

from __future__ import annotations

import pytest
import torch
from recurrence_graphs import FORMS, Evaluation, Form, close, trace

from spikingbrain.passes.recurrence.analysis import find_forms
from spikingbrain.passes.recurrence.classify import classify
from spikingbrain.passes.recurrence.form import Loop
from spikingbrain.passes.recurrence.reroll import find_loops

# Found by the adapters, whose ops these are; not exported; or of a library that is not always there.
ELSEWHERE = {"branch_on_data"} | {
    name for name in FORMS if name.startswith(("scan_", "while_", "associative_"))
}
HERE = [f for f in FORMS.values() if f.name not in ELSEWHERE]
WITHOUT_A_LOOP = ("quadratic", "cumulative", "cumsum", "cumprod")

# What this analysis says otherwise, and why.
OTHERWISE = {
    "delta_product": ["loop"],  # two steps of the delta rule in one: of rank two
    "mask_strict": ["linear_recurrence"],  # it reads the state before the step
    "retnet_read_changes": ["linear_recurrence", "unrolled"],  # the steps after the change
    "index_by_data": ["loop"],
    "MambaStatesStacked": ["linear_scan"],  # all states are asked for
    "state_in_the_middle": ["unrolled"],
}


def name(form: Form) -> str:
    return form.name


def outcomes(form: Form) -> list[str]:
    """Returns what became of each loop and form, having run it."""
    traced = trace(form)
    found = find_loops(traced.graph)
    loops = [loop for loop in found if isinstance(loop, Loop)]
    verdicts = [classify(f) if isinstance(f, Loop) else f for f in found]
    with torch.no_grad():
        run = Evaluation(traced, loops, verdicts)
        for result, expected in zip(run.outputs(), traced.expected, strict=True):
            close(result, expected, form.name)
        written = find_forms(traced.graph)
        for verdict in written:
            if verdict.form is not None:
                run.check_form(verdict.form)
    kinds = []
    for v in [*verdicts, *written]:
        kinds += [r.kind for r in v.recurrences] or [v.form.kind if v.form else v.status]
    return kinds


def check(form: Form) -> None:
    kinds = outcomes(form)
    if form.name in OTHERWISE:
        assert sorted(set(kinds)) == sorted(OTHERWISE[form.name])
        return
    expected = set(form.expected.split(" + ")) - {"unit_lower_inverse"}  # found by the adapter
    assert set(kinds) == expected or (expected == {"unrolled"} and not kinds)


@pytest.mark.parametrize("form", [f for f in HERE if f.quick], ids=name)
def test_quick_form(form: Form) -> None:
    check(form)


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in HERE if not f.quick], ids=name)
def test_form(form: Form) -> None:
    check(form)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("form", [f for f in HERE if f.quick and f.name != "state_in_the_middle"], ids=name)
def test_other_lengths(form: Form, length: int) -> None:
    """Whatever is found at a length is right; short loops stay as they are."""
    traced = trace(form, form.length(length))
    found = find_loops(traced.graph)
    loops = [loop for loop in found if isinstance(loop, Loop)]
    with torch.no_grad():
        run = Evaluation(traced, loops, [classify(loop) for loop in loops])
        for result, expected in zip(run.outputs(), traced.expected, strict=True):
            close(result, expected, form.name)
        for verdict in find_forms(traced.graph):
            if verdict.form is not None:
                run.check_form(verdict.form)
    assert length >= 4 or form.multiple > 1 or not loops
