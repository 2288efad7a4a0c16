"""Which products with gathered weights are taken for linear layers of experts, and which are not, and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spikingbrain.frontend.experts import ExpertReport, may_route, raise_experts

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # of torch's own use

# Each gets weights [N, O, K] and [N, K, O], x [R, K] and experts [R].
ROWS: dict[str, Callable[..., Tensor]] = {
    "bmm": lambda w, v, x, e: torch.bmm(w[e], x.unsqueeze(-1)).squeeze(-1),
    "einsum": lambda w, v, x, e: torch.einsum("rk,rok->ro", x, w[e]),
    "einsum, turned round": lambda w, v, x, e: torch.einsum("rok,kr->or", w[e], x.T).T,
    "matmul": lambda w, v, x, e: (w.index_select(0, e) @ x[:, :, None])[..., 0],
    "stored transposed": lambda w, v, x, e: torch.bmm(x.unsqueeze(1), v[e]).squeeze(1),
    "transposed after the gather": lambda w, v, x, e: (x.unsqueeze(1) @ w[e].mT).squeeze(1),
    "transposed before the gather": lambda w, v, x, e: torch.bmm(v.transpose(1, 2)[e], x.unsqueeze(-1))[
        :, :, 0
    ],
    "sum of a product": lambda w, v, x, e: (w[e] * x[:, None, :]).sum(-1),
    "int32": lambda w, v, x, e: torch.bmm(w[e.int()], x.unsqueeze(-1)).squeeze(-1),
}
# The same with experts [R, 2], several for each row.
SEVERAL: dict[str, Callable[..., Tensor]] = {
    "einsum": lambda w, v, x, e: torch.einsum("ti,taoi->tao", x, w[e]),
    "there and back": lambda w, v, x, e: torch.einsum(
        "tao,taio->tai", torch.einsum("ti,taoi->tao", x, w[e]), v[e]
    ),
    "matmul": lambda w, v, x, e: (w[e] @ x[:, None, :, None]).squeeze(-1),
    "flattened": lambda w, v, x, e: torch.bmm(w[e.flatten()], x.repeat_interleave(2, 0)[..., None]).squeeze(
        -1
    ),
}
OTHERS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "several rows": (lambda w, v, x, e: torch.bmm(w[e], x.T.expand(len(e), -1, -1)), "several rows"),
    "a sum over both axes": (lambda w, v, x, e: torch.einsum("rk,rok->r", x, w[e]), "sum over one axis"),
    "a sum over experts": (lambda w, v, x, e: torch.einsum("rk,rok->ok", x, w[e]), "sum over one axis"),
    "an outer product": (lambda w, v, x, e: torch.einsum("rk,rok->rok", x, w[e]), "sum over one axis"),
    "a diagonal": (lambda w, v, x, e: torch.einsum("rk,rkk->rk", x, w[:, :5][e]), "diagonal"),
    "an ellipsis": (lambda w, v, x, e: torch.einsum("...k,...ok->...o", x, w[e]), "every axis"),
}


class Model(torch.nn.Module):
    def __init__(self, form: Callable[..., Tensor]):
        super().__init__()
        self.form = form
        self.weight = torch.nn.Parameter(torch.randn(4, 6, 5))
        self.other = torch.nn.Parameter(torch.randn(4, 5, 6))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return self.form(self.weight, self.other, x, expert)


def raised(model: Model, *args: Tensor) -> tuple[torch.export.ExportedProgram, list[ExpertReport]]:
    rows = {0: torch.export.Dim.AUTO}
    program = torch.export.export(model, args, dynamic_shapes=(rows, rows)).run_decompositions({})
    assert may_route(program.graph)
    return program, raise_experts(program.graph_module)


@pytest.mark.parametrize(("form", "choices"), [*((f, 1) for f in ROWS), *((f, 2) for f in SEVERAL)])
def test_is_raised(form: str, choices: int) -> None:
    torch.manual_seed(0)
    model = Model((ROWS if choices == 1 else SEVERAL)[form])
    x, expert = torch.randn(7, 5), torch.randint(0, 4, (7, 2) if choices == 2 else (7,))
    program, found = raised(model, x, expert)
    products = 2 if form == "there and back" else 1
    assert [(r.status, r.op, r.experts) for r in found] == [("raised", "grouped_linear", 4)] * products
    assert (found[0].inputs, found[0].outputs) == (5, 6)
    assert "test_expert_forms.py" in found[0].where
    left = {str(node.target) for node in program.graph.nodes}
    assert "aten.bmm.default" not in left and "aten.index.Tensor" not in left
    for rows in (7, 3):
        given = x[:rows], expert[:rows]
        torch.testing.assert_close(program.graph_module(*_state(program), *given)[0], model(*given))


def _state(program: torch.export.ExportedProgram) -> list[Tensor]:
    names = program.graph_signature.inputs_to_parameters.values()
    return [program.state_dict[name].detach() for name in names]


@pytest.mark.parametrize("form", OTHERS)
def test_is_left_with_the_reason(form: str) -> None:
    model, reason = Model(OTHERS[form][0]), OTHERS[form][1]
    _, found = raised(model, torch.randn(6, 5), torch.randint(0, 4, (6,)))
    assert [r.status for r in found] == ["gathered"]
    assert reason in found[0].reason


def test_dtypes_that_differ_are_left() -> None:
    def form(w: Tensor, v: Tensor, x: Tensor, e: Tensor) -> Tensor:
        return (w[e] * x.double()[:, None, :]).sum(-1)

    _, found = raised(Model(form), torch.randn(6, 5), torch.randint(0, 4, (6,)))
    assert [(r.status, r.reason) for r in found] == [("gathered", "torch.float64 times torch.float32")]


def test_rows_of_one_matrix_are_no_experts() -> None:
    class Table(torch.nn.Module):
        def forward(self, table: Tensor, x: Tensor, e: Tensor) -> Tensor:
            return table[e] @ x

    program = torch.export.export(Table(), (torch.randn(4, 6), torch.randn(6, 3), torch.tensor([1, 2])))
    assert not may_route(program.graph)
