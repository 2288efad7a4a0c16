"""`spikingbrain::unit_lower_inverse`, and the loops and solves that become it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spikingbrain
from spikingbrain.errors import ShapeError
from spikingbrain.frontend.ops import unit_lower_inverse

sys.path.append(str(Path(__file__).parents[1]))
from tolerances import assert_close

SIZE = 7


# The op


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 16, 17, 33, 64, 65, 100])
def test_equals_forward_substitution(size: int) -> None:
    torch.manual_seed(size)
    lower = torch.randn(2, 3, size, size, dtype=torch.float64) / max(size, 1) ** 0.5
    eye = torch.eye(size, dtype=torch.float64)
    rows: list[Tensor] = []
    for i in range(size):
        above = torch.stack(rows, -2) if rows else lower.new_zeros(2, 3, 0, size)
        rows.append(eye[i] - (lower[..., i, :i, None] * above).sum(-2))
    expected = torch.stack(rows, -2) if rows else lower
    assert_close(unit_lower_inverse(lower), expected, "inverse")
    assert_close(unit_lower_inverse(lower.float()), expected.float(), "inverse in float32", scale=10.0)


def test_only_the_strictly_lower_triangle_is_read() -> None:
    lower = torch.randn(40, 40, dtype=torch.float64) / 8
    noise = torch.full_like(lower, float("nan")).triu()
    assert torch.equal(unit_lower_inverse(lower.tril(-1) + noise), unit_lower_inverse(lower))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    lower = (torch.randn(3, 20, 20) / 5).to(dtype)
    assert torch.equal(unit_lower_inverse(lower), unit_lower_inverse(lower.float()).to(dtype))


@pytest.mark.parametrize("size", [1, 4, 19])
def test_gradient_and_contracts_of_torch(size: int) -> None:
    lower = (torch.randn(2, size, size, dtype=torch.float64) / size).requires_grad_()
    assert torch.autograd.gradcheck(unit_lower_inverse, lower)
    torch.library.opcheck(torch.ops.spikingbrain.unit_lower_inverse, (lower,))


@pytest.mark.parametrize("bad", [torch.randn(3, 4), torch.randn(4), torch.ones(3, 3, dtype=torch.int64)])
def test_what_it_cannot_invert(bad: Tensor) -> None:
    with pytest.raises(ShapeError, match="unit_lower_inverse"):
        unit_lower_inverse(bad)


# What becomes it


def masked(k: Tensor, keep: int = -1) -> Tensor:
    return (k @ k.mT * 0.5).tril(keep)


def rows_in_place(k: Tensor) -> Tensor:
    """As in public code of gated delta rules."""
    attn = -masked(k)
    for i in range(1, SIZE):
        row, above = attn[..., i, :i].clone(), attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return attn + torch.eye(SIZE)


def rows_by_matmul(k: Tensor) -> Tensor:
    mask = torch.triu(torch.ones(SIZE, SIZE, dtype=torch.bool))
    attn = (k @ k.mT).masked_fill(mask, 0)
    for i in range(1, SIZE):
        row = attn[..., i : i + 1, :].clone()
        attn[..., i, :] = (row + row @ attn.clone()).squeeze(-2)
    return attn


def solved(k: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(masked(k), k, upper=False, unitriangular=True)


def solved_upper(k: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(masked(k).mT, k, upper=True, unitriangular=True)


def solved_from_the_right(k: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(masked(k), k.mT, upper=False, left=False, unitriangular=True)


RAISED = [rows_in_place, rows_by_matmul, solved, solved_upper, solved_from_the_right]


def old_rows(k: Tensor) -> Tensor:
    """Reads the matrix from before the loop."""
    first = -masked(k)
    attn = first.clone()
    for i in range(1, SIZE):
        attn[..., i, :i] = first[..., i, :i] + (first[..., i, :i, None] * first[..., :i, :i]).sum(-2)
    return attn


def no_mask(k: Tensor) -> Tensor:
    """The upper triangle stays what it was."""
    attn = k @ k.mT / 9
    for i in range(1, SIZE):
        row, above = attn[..., i, :i].clone(), attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row[..., None] * above).sum(-2)
    return attn


def missing_row(k: Tensor) -> Tensor:
    attn = -masked(k)
    for i in range(1, SIZE - 1):
        row, above = attn[..., i, :i].clone(), attn[..., :i, :i].clone()
        attn[..., i, :i] = row + (row[..., None] * above).sum(-2)
    return attn


def not_linear(k: Tensor) -> Tensor:
    attn = -masked(k)
    for i in range(1, SIZE):
        row, above = attn[..., i, :i].clone(), attn[..., :i, :i].clone()
        attn[..., i, :i] = (row + (row[..., None] * above).sum(-2)).tanh()
    return attn


def one_of_the_batch(k: Tensor) -> Tensor:
    attn = -masked(k)
    for i in range(1, SIZE):
        row, above = attn[0, :, i, :i].clone(), attn[0, :, :i, :i].clone()
        attn[0, :, i, :i] = row + (row[..., None] * above).sum(-2)
    return attn


def solved_with_a_diagonal(k: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(masked(k, 0) + torch.eye(SIZE), k, upper=False)


LEFT = [old_rows, no_mask, missing_row, not_linear, one_of_the_batch, solved_with_a_diagonal]


def became(function: Callable[[Tensor], Tensor], k: Tensor) -> list[str]:
    found = spikingbrain.explain(function, k).to_dict()["recurrences"]
    return [r["op"] for r in found if r["status"] == "raised"]


@pytest.mark.parametrize(
    "function",
    [pytest.param(f, marks=[] if f is RAISED[0] else pytest.mark.slow) for f in (*RAISED, *LEFT)],
    ids=lambda f: f.__name__,
)
def test_loops_over_rows_and_solves(function: Callable[[Tensor], Tensor], fresh_dynamo: None) -> None:
    k = torch.randn(2, 3, SIZE, SIZE) / SIZE**0.5
    assert (became(function, k) == ["unit_lower_inverse"]) == (function in RAISED)
    torch._dynamo.reset()
    given = [k.clone().requires_grad_() for _ in range(2)]
    results = [
        run(x)
        for run, x in zip((torch.compile(function, backend="spikingbrain"), function), given, strict=True)
    ]
    assert_close(results[0], results[1], "result", scale=10.0)
    for result in results:
        (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    assert_close(given[0].grad, given[1].grad, "gradient", scale=10.0)


def test_export(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, k: Tensor) -> Tensor:
            return rows_in_place(k) @ solved(k)

    batch = torch.export.Dim("batch", min=1, max=64)
    k = torch.randn(4, 3, SIZE, SIZE) / SIZE**0.5
    entry = spikingbrain.Entry((k,), dynamic_shapes={"k": {0: batch}})
    artifact = spikingbrain.export(Model(), {"main": entry}, tmp_path / "inverse.sba")
    program = spikingbrain.load(artifact.path)
    for size in (1, 5):
        k = torch.randn(size, 3, SIZE, SIZE) / SIZE**0.5
        found = torch.from_numpy(program.main(k.numpy()))
        assert_close(found, Model()(k), f"batch {size}", scale=10.0)
