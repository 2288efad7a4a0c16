"""Every form through ``spikingbrain.export`` with a dynamic length: one program, right at lengths that were never traced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from form_check import named
from forms import FORMS, Form
from tolerances import assert_close

import spikingbrain
from spikingbrain.errors import SpikingBrainError

LENGTHS = (1, 5, 64, 300)
ANY_LENGTH = [f for f in FORMS.values() if f.dynamic and not f.export]
REFUSED = [f for f in FORMS.values() if f.dynamic and f.export]


def shapes(form: Form) -> Mapping[str, Mapping[int, Any]]:
    """Returns what ``Entry`` takes: which axes are as long as the text, or a multiple of it."""
    length = torch.export.Dim("length", min=1, max=4096)
    if form.multiple > 1:
        length = form.multiple * length
    found = {}
    for text in form.inputs.split():
        name, axes, *_ = text.split(":")
        found[name] = {i: length if a == "T" else 2 * length for i, a in enumerate(axes) if a in "TP"}
    return found


def check_export(form: Form, folder: Path, lengths: Sequence[int] = LENGTHS) -> None:
    """Raises AssertionError unless the exported program gives eager's results at the lengths."""
    module = form.module().eval()
    entry = spikingbrain.Entry(form.example(), dynamic_shapes=shapes(form))
    artifact = spikingbrain.export(module, {"main": entry}, folder / "form.sba")
    program = spikingbrain.load(artifact.path)
    for length in (form.length(n) for n in lengths if n <= form.longest):
        inputs = form.example(length, seed=3)
        with torch.no_grad():
            expected = named("result", module(*inputs))
        actual = named("result", program.main(*inputs))
        assert expected.keys() == actual.keys()
        for what, wanted in expected.items():
            found = torch.from_numpy(np.asarray(actual[what], np.float64)).to(wanted.dtype)
            assert_close(found, wanted, f"{form.name} at length {length}: {what}")


@pytest.mark.slow
@pytest.mark.parametrize("form", ANY_LENGTH, ids=lambda f: f.name)
def test_any_length(form: Form, tmp_path: Path) -> None:
    check_export(form, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", REFUSED, ids=lambda f: f.name)
def test_refused(form: Form, tmp_path: Path) -> None:
    """Nothing is wrong in silence: the error says what stands in the way, at export or at another length than the example's."""
    with pytest.raises(SpikingBrainError, match=re.escape(form.export)):
        check_export(form, tmp_path, lengths=[64])
