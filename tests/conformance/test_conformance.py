"""torch's op database through the backend, held to ``expected.toml``."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import harness
import hops
import pytest
import sweep
import table

from spikingbrain.frontend.dynamo.options import CompileOptions
from spikingbrain.tools import gen_conformance_docs

# What models are made of.
_COMMON = """
add sub mul div.no_rounding_mode pow exp log sqrt rsqrt sin cos tanh sigmoid abs neg sign floor round clamp maximum minimum
where masked_fill eq lt gt logical_and logical_not sum mean var amax amin argmax any all prod softmax log_softmax cumsum cat
stack permute reshape transpose expand squeeze unsqueeze split chunk index_select gather tril triu flip matmul bmm
nn.functional.linear nn.functional.layer_norm nn.functional.rms_norm nn.functional.group_norm nn.functional.batch_norm
nn.functional.gelu nn.functional.silu nn.functional.relu nn.functional.softplus nn.functional.embedding
nn.functional.cross_entropy nn.functional.mse_loss nn.functional.scaled_dot_product_attention
nn.functional.conv1d nn.functional.pad.constant
"""
COMMON = _COMMON.split()
FURTHER = {
    "grad": "mul softmax nn.functional.layer_norm nn.functional.gelu nn.functional.cross_entropy",
    "bf16": "add softmax nn.functional.layer_norm nn.functional.silu sum",
    "i64": "add div.floor_rounding remainder eq sum",
    "bool": "logical_and any sum",
}
HIGHER_ORDER = [
    pytest.param(op, mode, marks=[pytest.mark.gate] if mode == "f32" else [])
    for op, mode in table.expected()
    if op.startswith(hops.PREFIX) and mode in ("f32", "grad", "f32+dynamic")
]


@pytest.mark.gate
@pytest.mark.slow
@pytest.mark.parametrize("op", COMMON)
def test_common_op(op: str) -> None:
    check(op, "f32")


@pytest.mark.gate
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "op"), [(m, op) for m, ops in FURTHER.items() for op in ops.split()])
def test_further_types(mode: str, op: str) -> None:
    check(op, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "mode"), HIGHER_ORDER)
def test_higher_order_op(op: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # torch writes graphs that it fails on where it runs
    name, _, dynamic = mode.partition("+")
    result = harness.conform(harness.database()[op], name, dynamic=bool(dynamic))
    assert not table.complaints({(op, mode): (result.status, result.reason)})


def test_every_higher_order_op_is_tried() -> None:
    tried = table.tried()
    for op, info in hops.database().items():
        for mode in ("f32", "grad"):
            if harness.supports(info, mode):
                assert mode in tried.get(op, []), f"run.py --ops {op} --modes {mode} --update"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("mode", "op"),
    [("f32", op) for op in COMMON] + [(m, op) for m, ops in FURTHER.items() for op in ops.split()],
)
def test_on_the_metax_emulator(mode: str, op: str) -> None:
    check(op, mode, dataclasses.replace(harness.OPTIONS, target="maca-emulator"))


def check(op: str, mode: str, options: CompileOptions = harness.OPTIONS) -> None:
    result = harness.conform(harness.database()[op], mode, count=3, options=options)
    wanted = table.expected()[op, mode]
    allowed = {"partly": ("compiled", "partly", "eager")}.get(
        wanted[0], (wanted[0],)
    )  # fewer samples, fewer kinds
    assert result.status in allowed, f"{result.status} instead of {wanted[0]}: {result.reason}"


@pytest.mark.slow
def test_whole_table() -> None:
    """Takes about an hour on two cores."""
    if not os.environ.get("SPIKINGBRAIN_CONFORMANCE"):
        pytest.skip("SPIKINGBRAIN_CONFORMANCE=1 runs it; so does python tests/conformance/run.py")
    with open(os.devnull, "w") as log:
        done = sweep.run(table.jobs(["*"], []), os.cpu_count() or 1, log)
    assert not table.complaints(done)


def test_only_acceptable_statuses_are_expected() -> None:
    assert {status for status, _ in table.expected().values()} <= {"compiled", *table.ACCEPTABLE}


def test_page_is_up_to_date() -> None:
    assert gen_conformance_docs.main(["--check"]) == 0, "run `make docs`"
