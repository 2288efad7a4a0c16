"""torch's grouped products, and those of transformers, run on ``grouped_linear``: forward, backward and exported."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers.integrations.moe")

import spikingbrain
from spikingbrain.frontend.dynamo import report

GROUPS, INPUTS, OUTPUTS = 5, 16, 24
OPTIONS = {"library": False, "strict": True}
# where groups end, of 7 rows: some without rows, one with all, rows after the last end
ENDS = [[2, 2, 3, 7, 7], [0, 0, 0, 0, 7], [7, 7, 7, 7, 7], [1, 2, 3, 4, 5]]


def reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [S, K] by matrices [N, K, O], group by group."""
    parts, first = [], 0
    for e, end in enumerate(ends.tolist()):
        parts.append(x[first:end] @ weight[e])
        first = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - first, weight.shape[2])])


class Sorted(nn.Module):
    """A gated projection by the experts that a router chooses, rows sorted by expert as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(GROUPS, OUTPUTS, INPUTS, generator=generator) / 4)
        self.down = nn.Parameter(torch.randn(GROUPS, OUTPUTS, INPUTS, generator=generator) / 4)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        chosen, order = expert.sort()
        ends = (chosen.unsqueeze(1) == torch.arange(GROUPS)).sum(0).cumsum(0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        hidden = F.silu(product(x[order], self.up.transpose(-2, -1), ends))
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return product(hidden, self.down, ends)[back]


def written_out(model: Sorted, x: Tensor, expert: Tensor) -> Tensor:
    hidden = F.silu(torch.einsum("rk,rok->ro", x, model.up[expert]))
    return torch.einsum("ro,rok->rk", hidden, model.down[expert])


def test_training() -> None:
    torch._dynamo.reset()
    model, generator = Sorted(), torch.Generator().manual_seed(1)
    x = torch.randn(7, INPUTS, generator=generator, requires_grad=True)
    expert = torch.randint(0, 3, (7,), generator=generator)  # some experts have no rows
    with report.collect() as reports:
        y = torch.compile(model, backend="spikingbrain", options={"library": False})(x, expert)
        results = []
        for value in (y, written_out(model, x, expert)):
            gradients = torch.autograd.grad(value.square().sum(), [x, *model.parameters()])
            results.append([value, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [r.reason for g in reports for r in g.regions if r.status == "eager"] == []
    assert {"grouped_linear", "grouped_outer"} <= {op for g in reports for r in g.regions for op in r.ops}


def test_inference_reads_packed_weights_in_place() -> None:
    torch._dynamo.reset()
    model, x = Sorted().eval(), torch.randn(2, INPUTS)
    with torch.no_grad(), report.collect() as reports:
        for expert in (torch.tensor([4, 1]), torch.tensor([3, 3])):
            found = torch.compile(model, backend="spikingbrain")(x, expert)
            torch.testing.assert_close(found, written_out(model, x, expert), rtol=1e-4, atol=1e-5)
    status = {op: r.status for graph in reports for r in graph.regions for op in r.ops}
    assert status["grouped_linear"] == "compiled"


def test_groups_of_rows() -> None:
    """With rows after the last end, whose NaN reaches nothing."""
    torch._dynamo.reset()
    product = torch.ops.transformers.grouped_mm_fallback
    compiled = torch.compile(product, backend="spikingbrain", options=OPTIONS)
    generator = torch.Generator().manual_seed(2)
    for ends in ENDS:
        x = torch.randn(7, INPUTS, generator=generator)
        weight = torch.randn(GROUPS, INPUTS, 8, generator=generator)
        x[ends[-1] :] = float("nan")
        leaves, last = (x.requires_grad_(), weight.requires_grad_()), torch.tensor(ends, dtype=torch.int32)
        y, wanted = compiled(*leaves, last), reference(*leaves, last)
        torch.testing.assert_close(y, wanted)
        g = torch.randn(y.shape, generator=generator)
        gradients = [torch.autograd.grad(value, leaves, g) for value in (y, wanted)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_torchs_own_op_in_all_its_forms() -> None:
    """It takes bfloat16 alone when it is traced, and axes of whole 16 bytes."""
    torch._dynamo.reset()
    ends = torch.tensor([0, 3, 8, 8, 16], dtype=torch.int32)

    def products(a: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        rows = F.grouped_mm(a, w.mT, offs=ends)  # [16, K] by [N, K, O]
        columns = F.grouped_mm(w, a.mT, offs=ends)  # [N, O, K] by [K, 16]
        groups = F.grouped_mm(a.mT, rows, offs=ends)  # [K, 16] by [16, O]
        return rows, columns, groups, F.grouped_mm(w.mT, w)

    generator = torch.Generator().manual_seed(3)
    leaves = [
        torch.randn(s, generator=generator).bfloat16().requires_grad_()
        for s in ((16, INPUTS), (GROUPS, OUTPUTS, INPUTS))
    ]
    found = torch.compile(products, backend="spikingbrain", options=OPTIONS)(*leaves)
    a, w = (t.detach().float().requires_grad_() for t in leaves)
    rows = reference(a, w.mT, ends)
    bounds = [0, *ends.tolist()]
    groups = torch.stack([a[i:j].mT @ rows[i:j] for i, j in itertools.pairwise(bounds)])
    wanted = (rows, rows.mT, groups, w.mT @ w)
    for f, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(f.float(), e, rtol=2e-2, atol=2e-2 * e.abs().max().item())
    got = torch.autograd.grad(sum(f.float().square().sum() for f in found), leaves)
    exact = torch.autograd.grad(sum(e.square().sum() for e in wanted), (a, w))
    for f, e in zip(got, exact, strict=True):
        torch.testing.assert_close(f.float(), e, rtol=3e-2, atol=3e-2 * e.abs().max().item())


@pytest.mark.slow
def test_exported(tmp_path: Path) -> None:
    model = Sorted().eval()
    rows = torch.export.Dim("rows", min=1, max=64)
    example: tuple[Any, ...] = (torch.randn(6, INPUTS), torch.randint(0, GROUPS, (6,)))
    entry = spikingbrain.Entry(example, dynamic_shapes={"x": {0: rows}, "expert": {0: rows}})
    spikingbrain.export(model, {"main": entry}, tmp_path / "sorted.sbrain")
    program = spikingbrain.load(tmp_path / "sorted.sbrain")
    for count in (1, 7):
        x, expert = torch.randn(count, INPUTS), torch.randint(0, GROUPS, (count,))
        found = torch.as_tensor(program.main(x.numpy(), expert.numpy()))
        torch.testing.assert_close(found, written_out(model, x, expert).detach(), rtol=1e-4, atol=1e-5)
