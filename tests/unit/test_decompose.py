"""Programs taken without decomposition give eager's results."""

from __future__ import annotations

import operator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spikingbrain
from spikingbrain.frontend.decompose import DIRECT, decompose

NORMALISED_AWAY = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten.contiguous.default,
    operator.getitem,
}


class Everything(nn.Module):
    """Uses every op that is taken as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.project = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        b, t = ids.shape
        x = self.project(self.table(ids))
        first, second = x.chunk(2, dim=-1)
        y = torch.cat([-second, first.exp().sin()], dim=-1) * x.cos() + F.silu(x) - torch.sigmoid(x) / 3.0
        y = y * torch.rsqrt(y.double().float().square().mean(-1, keepdim=True) + 1e-3)
        positions = torch.arange(t) + torch.arange(0, 2 * b, 2)[:, None]
        key, query = positions[:, None, None, :], positions[:, None, :, None]
        mask = (key >= 0) & (key <= query) & ((key > query - 3) | (key < 1))
        mask = torch.bitwise_and(mask, torch.bitwise_or(key >= 0, key < 0))
        heads = y.view(b, t, 2, 4).transpose(1, 2).contiguous()
        attended = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        merged = attended.permute(0, 2, 1, 3).reshape(b, t, 8)
        scores = torch.relu(merged @ merged.transpose(1, 2)).sum(-1)
        slots = torch.where(positions < 4, positions % 4, 4)
        chosen = torch.where(slots[:, :, None].expand(b, t, 8) < 4, merged, x)
        written = cache.scatter(1, slots[:, :, None].expand(b, t, 8), merged)
        return scores, chosen[:, -1:], written[:, :4].unsqueeze(1), 10.0 ** (-x)


def test_every_direct_op_equals_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    ids, cache = torch.randint(0, 11, (2, 3)), torch.randn(2, 5, 8)
    b, t = torch.export.Dim("B", min=1, max=9), torch.export.Dim("T", min=1, max=99)
    shapes = {"ids": {0: b, 1: t}, "cache": {0: b}}
    program = torch.export.export(model, (ids, cache), dynamic_shapes=shapes, strict=False)
    assert decompose(program) is program
    used = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert DIRECT - used - NORMALISED_AWAY == set()
    spikingbrain.export(
        model, {"main": spikingbrain.Entry((ids, cache), dynamic_shapes=shapes)}, tmp_path / "a.sbrain"
    )
    compiled = spikingbrain.load(tmp_path / "a.sbrain")
    for rows, steps in ((2, 3), (1, 1), (3, 7), (1, 4)):
        ids, cache = torch.randint(0, 11, (rows, steps)), torch.randn(rows, 5, 8)
        # slots from 4 on all name the last one, which is not compared: its content is any of the rows
        for got, wanted in zip(compiled.main(ids, cache), model(ids, cache), strict=True):
            np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_other_ops_are_decomposed() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x)

    program = torch.export.export(Other(), (torch.randn(3),), strict=False)
    assert decompose(program) is not program
