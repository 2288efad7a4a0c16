"""The table of providers: the user's choice, its errors, and the page that is written from it."""

from __future__ import annotations

import pytest

from spikingbrain.backend_maca import providers
from spikingbrain.backend_maca.options import MacaOptions
from spikingbrain.errors import OptionError
from spikingbrain.frontend.dynamo.options import parse
from spikingbrain.tools import gen_provider_docs


def test_the_first_of_a_row_is_the_default_and_a_choice_comes_first() -> None:
    assert MacaOptions().choice() == {"linear": "mcblas", "matmul": "mcblas"}
    assert MacaOptions(" linear=own, ").choice() == {"linear": "own", "matmul": "mcblas"}
    order = providers.choice("linear_recurrence = torch", providers.TORCH)
    assert [p.name for p in order["linear_recurrence"]] == ["torch", "triton", "fla"]
    assert [p.name for p in order["linear_scan"]] == ["triton", "torch"]


ERRORS = {
    "linear": "'linear' is not understood\n  try: OP=PROVIDER, the op one of linear, matmul",
    "conv=own": "names no op that has a choice here\n  try: one of linear, matmul",
    "attention=triton": "'attention' has one in torch.compile with target 'maca'",
    "linear=cublas": "'linear=cublas' names no provider of linear\n  try: one of mcblas, own",
    "linear=own,linear=mcblas": "'linear' is named twice",
}


@pytest.mark.parametrize("text", ERRORS)
def test_wrong_choices_in_a_plan(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        MacaOptions(text)
    assert ERRORS[text] in str(caught.value)


def test_wrong_choices_inside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "installed", lambda name: name == "triton")
    with pytest.raises(OptionError) as caught:
        providers.choice("attention=mcflashattn", providers.TORCH)
    assert str(caught.value) == (
        "providers: 'attention=mcflashattn' cannot be had here\n"
        "  because: the Python package 'flash_attn' is not installed\n"
        "  try: the vendor's build of it, or one of triton, torch"
    )
    with pytest.raises(OptionError, match="'matmul' has one in an exported plan"):
        providers.choice("matmul=own", providers.TORCH)


def test_a_target_without_a_choice_says_so() -> None:
    with pytest.raises(
        OptionError, match="because: target 'cpu' has no choice of providers\n  try: target 'maca'"
    ):
        parse({"target": "cpu", "providers": "attention=triton"})


def test_the_page_is_up_to_date() -> None:
    assert gen_provider_docs.main(["--check"]) == 0, "run `make docs`"


def test_every_op_inside_torch_ends_with_torch() -> None:
    assert all(row[-1].name == "torch" and not row[-1].package for row in providers.TORCH.values())
    assert all(
        p.takes and p.proof
        for table in (providers.PLAN, providers.TORCH)
        for row in table.values()
        for p in row
    )
