"""Rewrites of the exported graph: each on a minimal case, then all of them end to end."""

from __future__ import annotations

import itertools
import operator
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops import scan

import spikingbrain
from spikingbrain.frontend.capture import Entry, capture
from spikingbrain.frontend.normalise import (
    compare_alike,
    drop_identities,
    drop_idle_casts,
    drop_shape_checks,
    make_scatter_dims_positive,
    normalise,
    rename_synonyms,
    spell_out_remainders,
    state_epsilon,
)

aten = torch.ops.aten
X, INDEX = torch.randn(2, 3, 4), torch.tensor([[[1, 0, 2, 3]] * 3] * 2)


def exported(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> fx.Graph:
    class Module(nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return function(*tensors)

    program = torch.export.export(Module(), inputs, strict=False, **options)
    return program.run_decompositions({}).graph


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


SCATTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scatter.src": lambda x, index: torch.scatter(x, -1, index, x * 2),
    "scatter.value": lambda x, index: torch.scatter(x, -2, index % 3, 3.0),
    "scatter_add": lambda x, index: torch.scatter_add(x, -1, index, x),
    "scatter_reduce": lambda x, index: torch.scatter_reduce(x, -3, index // 4, x, "amax"),
}


@pytest.mark.parametrize("name", SCATTERS)
def test_scatter_dims_become_positive(name: str) -> None:
    """torch-mlir aborts the process on a negative dim of these."""
    graph = exported(SCATTERS[name], X, INDEX)
    (node,) = [n for n in graph.nodes if "scatter" in str(n.target)]
    before = node.args[1]
    assert before < 0 and make_scatter_dims_positive(graph) == 1
    assert node.args[1] == before + 3
    assert make_scatter_dims_positive(graph) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_epsilon_of_rms_norm_is_said(dtype: torch.dtype) -> None:
    """torch-mlir takes 0 where torch has the epsilon of the type it computes in: a row of zeros became NaN."""
    x = torch.tensor([[0.0, 0.0], [1e-4, 2e-4]], dtype=dtype)
    for weights in ((), (torch.ones(2, dtype=dtype),)):
        graph = exported(lambda x, *w: torch.rms_norm(x, (2,), *w), x, *weights)
        assert state_epsilon(graph) == 1 and state_epsilon(graph) == 0
        module = fx.GraphModule(nn.Module(), graph)
        assert torch.equal(module(x, *weights)[0], torch.rms_norm(x, (2,), *weights))
    assert state_epsilon(exported(lambda x: torch.rms_norm(x, (2,), eps=1e-5), x)) == 0


def test_identities_go() -> None:
    graph = exported(lambda x: x.clone().contiguous().detach() + 1, X)
    assert drop_identities(graph) > 0
    assert targets(graph) == [aten.add.Tensor]


def test_what_changes_a_value_stays() -> None:
    graph = exported(lambda x: (x.to(torch.float64) + 1).abs(), X)
    before = targets(graph)
    assert drop_identities(graph) == drop_idle_casts(graph) == 0
    assert targets(graph) == before


def test_casts_to_the_same_type_go() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    same, other = (graph.call_function(aten.to.dtype, (x, t)) for t in (torch.float32, torch.float64))
    for node, dtype in ((x, torch.float32), (same, torch.float32), (other, torch.float64)):
        node.meta["val"] = torch.empty(2, dtype=dtype)
    output = graph.output((same, other))
    assert drop_idle_casts(graph) == 1
    assert output.args[0] == (x, other)


def test_synonyms_get_one_name() -> None:
    """Python's operators on booleans; torch-mlir lowers the bitwise spelling."""
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    both = graph.call_function(aten.__and__.Tensor, (a, b))
    either = graph.call_function(aten.__or__.Tensor, (a, both))
    graph.output(graph.call_function(aten.add.Tensor, (either, b)))
    assert rename_synonyms(graph) == 2
    assert targets(graph) == [aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.add.Tensor]


_FOLDED = """
from torch_mlir import ir
from torch_mlir.dialects import torch
from torch_mlir.passmanager import PassManager
for _ in range(100):
    with ir.Context() as context:
        torch.register_dialect(context)
        module = ir.Module.parse('''
            func.func @main() -> !torch.vtensor<[2],i1> {
              %zero = torch.vtensor.literal(dense<0.0> : tensor<2xf32>) : !torch.vtensor<[2],f32>
              %int0 = torch.constant.int 0
              %0 = torch.aten.gt.Scalar %zero, %int0 : !torch.vtensor<[2],f32>, !torch.int -> !torch.vtensor<[2],i1>
              return %0 : !torch.vtensor<[2],i1>
            }''')
        PassManager.parse("builtin.module(canonicalize)").run(module.operation)
        assert "dense<false>" in str(module)
"""


@pytest.mark.xfail(reason="torch-mlir; if it passes time and again, compare_alike can go")
def test_torch_mlir_folds_comparisons() -> None:
    assert subprocess.run([sys.executable, "-c", _FOLDED], capture_output=True).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_comparisons_of_constants(dtype: torch.dtype) -> None:
    compared = [torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne]

    def model(x: Tensor) -> tuple[Tensor, ...]:
        cases = itertools.product(compared, (0, 1), (0, 1, 0.5, 1.0, True))
        return tuple(x + f(torch.full((2,), i, dtype=dtype), number) for f, i, number in cases)

    torch._dynamo.reset()
    x = torch.zeros(2)
    options = {"strict": True, "cache": False}
    for found, expected in zip(
        torch.compile(model, backend="spikingbrain", options=options)(x), model(x), strict=True
    ):
        assert torch.equal(found, expected)


def test_comparisons_are_of_one_kind() -> None:
    graph = exported(lambda x, i: (x > 0, i > 0.5, x > 0.5, i > 1), torch.randn(3), torch.arange(3))
    assert compare_alike(graph) == 2
    numbers = [n.args[1] for n in graph.find_nodes(op="call_function", target=aten.gt.Scalar)]
    assert [type(n) for n in numbers] == [float, float, float, int]


class Padding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 0, 0, (4 - x.shape[0] % 4) % 4))


def test_size_checks_go() -> None:
    """The artifact checks its arguments against the declared ranges itself."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten._assert_scalar.default, (True, "positive"))
    graph.call_function(aten.sym_constrain_range_for_size.default, (4,))
    graph.output(graph.call_function(aten.neg.default, (x,)))
    assert drop_shape_checks(graph) == 2
    assert targets(graph) == [aten.neg.default]


def test_remainders_of_sizes_are_spelled_out() -> None:
    """torch-mlir imports % as aten.fmod.int, which it does not lower."""
    dims = {0: torch.export.Dim("T", min=1, max=99)}
    program = torch.export.export(Padding(), (torch.randn(7, 3),), dynamic_shapes=(dims,))
    assert spell_out_remainders(program.graph) == 2
    assert operator.mod not in targets(program.graph)
    program.graph_module.recompile()
    for length in (1, 4, 6, 7):
        x = torch.randn(length, 3)
        (found,) = torch.fx.Interpreter(program.graph_module).run(x)
        assert torch.equal(found, Padding()(x))


def test_bodies_of_loops_are_normalised_too() -> None:
    def model(x: Tensor, index: Tensor) -> Tensor:
        def step(state: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
            state = torch.scatter(state, -1, index[0], now)
            return state, state.clone()

        return scan(step, torch.zeros(3, 4), x)[1]

    graph = exported(model, X, INDEX)
    normalise(graph)
    (body,) = [m for m in graph.owning_module.modules() if m is not graph.owning_module]
    (node,) = [n for n in body.graph.nodes if n.target == aten.scatter.src]
    assert node.args[1] == 1
    assert aten.clone.default not in targets(body.graph)


class Everything(nn.Module):
    """Results that only come out right with every rewrite: negative dims, copies as results, an input as a result."""

    def forward(self, x: Tensor, index: Tensor) -> list[Tensor]:
        scattered = [function(x, index) for function in SCATTERS.values()]
        values, places = torch.topk(x, 2, dim=-1)
        copies = [(x * 2).clone(), x.clone(), x.to(torch.float32)]
        return [
            *scattered,
            values,
            places,
            *copies,
            torch.gather(x, -1, index),
            ((x > 0) & (x < 1)) | (x < -1),
        ]


def test_end_to_end(tmp_path: Path) -> None:
    artifact = spikingbrain.export(Everything(), {"main": Entry((X, INDEX))}, tmp_path / "all.sb")
    results = spikingbrain.load(artifact).main(X, INDEX)
    for number, (result, wanted) in enumerate(zip(results, Everything()(X, INDEX), strict=True)):
        np.testing.assert_allclose(result, wanted.numpy(), rtol=1e-6, err_msg=f"result {number}")


def test_copies_as_results_keep_their_places() -> None:
    """A copy that is a result gives way to what it copies, also in the program's signature."""

    class Copies(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.clone(), (x * 2).detach(), x.to(torch.float32)

    text = capture(Copies(), {"main": Entry((X,))}).module
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("return")]
    assert line.split()[1:4] == ["%arg0,", "%0,", "%arg0"]
