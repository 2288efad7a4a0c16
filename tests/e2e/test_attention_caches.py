"""Attention over caches of 16 and of 8 bits, read as they lie, and ``is_causal``, against eager and a plain loop.

The form of a cache in codes is that of ``Cached`` below. A code of 1 is worth ``scales[b, r, k]``, the largest value
of the token's head divided by 127, so that each value is off by half a scale at most.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import spikingbrain
from spikingbrain.artifact import REPORT

HEADS, KEY_HEADS, SIZE, WINDOW, SINKS = 4, 2, 16, 9, 1
SLOTS = SINKS + WINDOW + 1  # the last takes what is not kept


@dataclass
class State:
    keys: Tensor  # [B, R, K, D]
    values: Tensor
    held: Tensor  # [B, R] int64: position of the token in a slot, -1 in an empty one
    position: Tensor  # [B] int64
    scales: list[Tensor] = field(default_factory=list)  # of keys and of values that are codes, [B, R, K]


pytree.register_dataclass(State)


class Cached(nn.Module):
    """Windowed attention without projections; ``dtype`` is that of the cache."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def initial_state(self, batch: int) -> State:
        rows = torch.zeros(batch, SLOTS, KEY_HEADS, SIZE, dtype=self.dtype)
        scales = [torch.zeros(batch, SLOTS, KEY_HEADS)] * 2 if self.dtype == torch.int8 else []
        held = torch.full((batch, SLOTS), -1)
        position = torch.zeros(batch, dtype=torch.int64)
        return State(rows, rows.clone(), held, position, [s.clone() for s in scales])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """Takes [B, T, H, D] and [B, T, K, D]; returns [B, T, H, D] and the new state."""
        positions = state.position[:, None] + torch.arange(q.shape[1])
        kept = (positions > positions[:, -1:] - WINDOW) | (positions < SINKS)
        ring = torch.where(positions < SINKS, positions, SINKS + (positions - SINKS) % WINDOW)
        slots, noted = torch.where(kept, ring, SLOTS - 1), torch.where(kept, positions, -1)

        j = torch.cat([state.held, positions], 1)[:, None, None, :]
        i = positions[:, None, :, None]
        mask = (j >= 0) & (j <= i) & ((j > i - WINDOW) | (j < SINKS))
        new, stored, scales = [], [], []
        for n, (x, cache) in enumerate(((k, state.keys), (v, state.values))):
            if self.dtype == torch.int8:
                step = x.abs().amax(-1).clamp(min=1e-12) / 127
                rows = (x / step[..., None]).round().to(torch.int8)
                new.append(torch.cat([cache.float() * state.scales[n][..., None], x], 1))
                scales.append(state.scales[n].scatter(1, slots[..., None].expand_as(step), step))
            else:
                rows = x.to(cache.dtype)
                new.append(torch.cat([cache, rows], 1).float())
            stored.append(cache.scatter(1, slots[:, :, None, None].expand_as(rows), rows))
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2), *(x.transpose(1, 2) for x in new), attn_mask=mask, enable_gqa=True
        )
        held = state.held.scatter(1, slots, noted)
        return o.transpose(1, 2), State(*stored, held, state.position + q.shape[1], scales)


def tokens(batch: int, time: int) -> list[Tensor]:
    return [torch.randn(batch, time, h, SIZE) for h in (HEADS, KEY_HEADS, KEY_HEADS)]


Compiled = tuple[Cached, spikingbrain.Program, str]  # and the program as raise-attention leaves it


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16, torch.int8], ids=str)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    model = Cached(request.param).eval()
    batch, time = torch.export.Dim("B", min=1, max=8), torch.export.Dim("T", min=1, max=64)
    entries = {}
    for name, length, dims in (("prefill", 5, {0: batch, 1: time}), ("step", 1, {0: batch})):
        arguments = (*tokens(2, length), model.initial_state(2))
        shapes = {**dict.fromkeys("qkv", dims), "state": {0: batch}}
        entries[name] = spikingbrain.Entry(arguments, dynamic_shapes=shapes)
    path = tmp_path_factory.mktemp("cache") / "cache.sbrain"
    spikingbrain.export(model, entries, path, state="state", dump=path.parent)
    [raised] = path.parent.glob("*-raise-attention.mlir")
    return model, spikingbrain.load(path), raised.read_text()


@pytest.mark.parametrize("splits", [[5], [9, 1, 1], [10, 1, 3], [23, 2, 1], [1, 1, 1, 30, 1]], ids=str)
def test_equals_eager(compiled: Compiled, splits: list[int]) -> None:
    model, program, _ = compiled
    torch.manual_seed(sum(splits))
    eager, state = model.initial_state(2), program.new_state(2)
    for time in splits:
        inputs = tokens(2, time)
        expected, eager = model(*inputs, eager)
        entry = program.step if time == 1 else program.prefill
        np.testing.assert_allclose(entry(*inputs, state=state), expected.numpy(), atol=2e-5)
    snapshot = state.snapshot()
    np.testing.assert_array_equal(snapshot["held"], eager.held.numpy())
    if model.dtype == torch.int8:
        np.testing.assert_array_equal(snapshot["keys"][:, :-1], eager.keys[:, :-1].numpy())


def test_error_of_codes_is_as_stated(compiled: Compiled) -> None:
    model, program, _ = compiled
    if model.dtype != torch.int8:
        pytest.skip("a cache of halves")
    torch.manual_seed(0)
    exact, state = Cached(torch.float32).initial_state(2), program.new_state(2)
    worst = 0.0
    for _ in range(30):
        inputs = tokens(2, 1)
        expected, exact = Cached(torch.float32)(*inputs, exact)
        got = np.asarray(program.step(*inputs, state=state))
        worst = max(worst, float(np.abs(got - expected.numpy()).max()))
    assert 1e-4 < worst < 0.03


def test_caches_are_read_by_the_kernels(compiled: Compiled) -> None:
    model, program, raised = compiled
    ops = [line for line in raised.splitlines() if '"spikingbrain.attention"(' in line]
    rows = {torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "i8"}[model.dtype]
    assert [line.count(f"{SLOTS}x{KEY_HEADS}x{SIZE}x{rows}>") for line in ops] == [2, 2]
    records = json.loads(bytes(program.artifact.member(REPORT)))["records"]
    attention = [r for r in records if r["pass_name"] == "lower-attention"]
    assert [r["reason"] for r in attention] == ["kernel"] * 2
    assert not [r for r in records if r["status"] == "refused"]


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes [B, T, H, D] and [B, T, K, D]; the last result is computed from bf16."""
        qkv = [x.transpose(1, 2) for x in (q, k, v)]
        causal = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
        cut = F.scaled_dot_product_attention(qkv[0][:, :, -3:], *qkv[1:], is_causal=True, enable_gqa=True)
        half = [x.bfloat16() for x in qkv]
        rounded = F.scaled_dot_product_attention(*half, is_causal=True, enable_gqa=True)
        return causal, cut, rounded


def test_is_causal(tmp_path: Path) -> None:
    model, time = Causal().eval(), torch.export.Dim("T", min=3, max=200)
    shapes = {name: {1: time} for name in "qkv"}
    entry = spikingbrain.Entry(tuple(tokens(2, 5)), dynamic_shapes=shapes)
    spikingbrain.export(model, {"main": entry}, tmp_path / "causal.sbrain")
    program = spikingbrain.load(tmp_path / "causal.sbrain")
    records = json.loads(bytes(program.artifact.member(REPORT)))["records"]
    assert [r["reason"] for r in records if r["pass_name"] == "lower-attention"] == ["kernel"] * 3
    for length in (3, 64, 131):
        torch.manual_seed(length)
        inputs = tokens(2, length)
        causal, cut, rounded = (np.asarray(x, dtype=np.float32) for x in program.main(*inputs))
        for got, exact in zip((causal, cut), model(*inputs), strict=False):
            np.testing.assert_allclose(got, exact.numpy(), atol=1e-5)
        exact = model(*(x.bfloat16().float() for x in inputs))[0].numpy()
        # rounded once, at the end: half a unit in the last of 8 bits
        np.testing.assert_allclose(rounded, exact, rtol=2**-8, atol=1e-5)
