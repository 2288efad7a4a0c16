"""Every architecture of the zoo through `torch.compile`: results and gradients as in eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO, Inputs, loss

import spikingbrain

BACKEND = "spikingbrain"
QUICK = ("llama",)  # beside those whose gradients are compared too; the others are slow

pytestmark = pytest.mark.skipif(
    BACKEND not in torch._dynamo.list_backends(()), reason=f"no backend {BACKEND}"
)
TRAINED = ("mamba2",)  # of these, gradients as well
# The gradient of a raised decay is a running sum of q dq - k dk: where heads forget fast, the product of each step with itself,
# which is in both, leaves up to 1 % of rounding in it. Reads without that product would end this.
INACCURATE = ("bamba", "granitemoehybrid")


def every_model(quick: tuple[str, ...]) -> pytest.MarkDecorator:
    names = [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in ZOO]
    return pytest.mark.parametrize("name", names)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def explained(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Returns what the backend says of the model: the share of ops compiled, graph breaks, and why ops ran eagerly."""
    if BACKEND != "spikingbrain" or not hasattr(spikingbrain, "explain"):
        return {}
    report = spikingbrain.explain(model, **inputs).to_dict()
    ops = report["counts"]
    return {
        "ops": ops,
        "compiled_share": ops["compiled"] / max(1, sum(ops.values())),
        "graph_breaks": report["graph_breaks"],
        "eager": [
            (r["where"], r["reason"], r["remedy"]) for r in report["regions"] if r["status"] == "eager"
        ],
    }


def compare_outputs(actual: Any, expected: Any) -> None:
    paths, spec = pytree.tree_flatten_with_path(expected)
    leaves, actual_spec = pytree.tree_flatten(actual)
    assert actual_spec == spec
    for leaf, (path, wanted) in zip(leaves, paths, strict=True):
        if isinstance(wanted, Tensor):
            assert_close(leaf, wanted, f"output{pytree.keystr(path)}")
        else:
            assert leaf == wanted


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@every_model(QUICK)
def test_forward(name: str, record_property: pytest.RecordProperty) -> None:
    model, inputs = ZOO[name].build("tiny"), ZOO[name].inputs("tiny", 0)
    compiled = torch.compile(model, backend=BACKEND)
    with torch.no_grad():
        for seed in (0, 1):  # the second call finds the code of the first
            inputs = ZOO[name].inputs("tiny", seed)
            compare_outputs(compiled(**inputs), model(**inputs))
        for key, value in explained(model, inputs).items():
            record_property(key, value)


@every_model(TRAINED)
def test_gradients(request: pytest.FixtureRequest, name: str) -> None:
    if name in INACCURATE:
        request.applymarker(pytest.mark.xfail(reason="A_log, where heads forget fast", strict=True))
    model, inputs = ZOO[name].build("tiny"), ZOO[name].inputs("tiny", 0)
    output = model(**inputs)
    loss(output).backward()
    expected = gradients(model)
    actual_output = torch.compile(model, backend=BACKEND)(**inputs)
    compare_outputs(actual_output, output)
    loss(actual_output).backward()
    actual = gradients(model)
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    for parameter, gradient in expected.items():
        found = actual[parameter]
        assert (found is None) == (gradient is None), f"gradient of {parameter}: {found}, expected {gradient}"
        if found is not None and gradient is not None:
            assert_close(found, gradient, f"gradient of {parameter}", scale=1e-2 * largest)
