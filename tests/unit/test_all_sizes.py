"""Programs that torch alone refuses to export for every size: exported where they hold, refused with the size where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from spikingbrain.frontend.recurrences.all_sizes import export_all_sizes
from spikingbrain.frontend.recurrences.lengths import Narrowed

T = Dim("T", min=1, max=1 << 20)


class Steps(nn.Module):
    """What follows the first step has T - 1 steps, which may be 0 or 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:1].sum(0) + torch.matmul(x[1:].unsqueeze(1), x[1:].unsqueeze(-1)).sum(0).squeeze(-1)


class Padded(nn.Module):
    """torch cannot tell that 4 divides T + (-T mod 4)."""

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, 0, 0, (4 - x.shape[0] % 4) % 4))
        return padded.reshape(-1, 4, 3).sum(1)


class Even(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 2 == 0 else x


class Long(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 1000 else x


class Unrolled(nn.Module):
    """torch forgets to refuse this loop; see `_require_ranges`, which can go when torch.export raises here."""

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.unflatten(0, (-1, 3))
        return torch.cat([chunks[i] * i for i in range(chunks.shape[0])])


def exported(model: nn.Module, *dims: Any) -> tuple[torch.export.ExportedProgram, dict[str, list[int]]]:
    tensors = [torch.randn(9, 3)] + [torch.randn(8, 3)] * (len(dims) - 1)
    return export_all_sizes(model, tensors, [{0: d} for d in dims], tuple, model)


@pytest.mark.parametrize("model", [Steps(), Padded()], ids=lambda m: type(m).__name__)
def test_every_size_is_right(model: nn.Module) -> None:
    with pytest.raises(Exception, match="Constraints violated"):
        torch.export.export(model, (torch.randn(9, 3),), dynamic_shapes=({0: T},))
    program, compared = exported(model, T)
    assert compared["T"][:3] == [1, 2, 3] and len(compared["T"]) > 8
    assert [(int(r.lower), int(r.upper)) for r in program.range_constraints.values()] == [(1, 1 << 20)]
    for length in (1, 2, 3, 16, 301):
        x = torch.randn(length, 3)
        (found,) = torch.fx.Interpreter(program.graph_module).run(x)
        torch.testing.assert_close(found, model(x))


def test_a_range_is_kept() -> None:
    program, _ = exported(Padded(), Dim("T", min=2, max=900))
    assert [(int(r.lower), int(r.upper)) for r in program.range_constraints.values()] == [(2, 900)]


def test_what_torch_exports_is_left_to_it() -> None:
    _, compared = exported(nn.ReLU(), T)
    assert compared == {}


@pytest.mark.parametrize(
    ("model", "told"),
    [(Even(), "at T = 1 the model computes other numbers"), (Long(), r"\[0\] <= 1000")],
    ids=["even", "long"],
)
def test_what_holds_for_some_sizes_is_refused(model: nn.Module, told: str) -> None:
    with pytest.raises(Exception, match=told):
        exported(model, T)


def test_a_range_that_torch_narrows_in_silence_is_noticed() -> None:
    shapes = {0: 3 * Dim("T", min=1, max=100)}
    torch.export.export(Unrolled(), (torch.randn(9, 3),), dynamic_shapes=(shapes,), strict=False)
    with pytest.raises(Narrowed, match="T"):
        export_all_sizes(Unrolled(), [torch.randn(9, 3)], [shapes], tuple, Unrolled())
