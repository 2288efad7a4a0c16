"""Results that share memory with the state: handed out as copies, because the next call overwrites the state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import spikingbrain
from spikingbrain.errors import CompileError


@dataclass
class Memory:
    seen: Tensor
    last: Tensor


pytree.register_dataclass(Memory)


class Recorder(nn.Module):
    """Returns its own state: the new one, reshaped, and the one before the call."""

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Memory]:
        slots = memory.last[:, None].expand(1, 1)
        seen = memory.seen.scatter(1, slots[:, :, None].expand(1, 1, 4), x[:, None])
        return seen.view(1, 12), memory.seen, Memory(seen, (memory.last + 1) % 3)


class Doubled(nn.Module):
    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        total = memory.seen + x
        return x + 1, Memory(total, total)


def test_results_do_not_change_with_the_next_call(tmp_path: Path) -> None:
    model = Recorder()
    eager = Memory(torch.zeros(1, 3, 4), torch.zeros(1, dtype=torch.int64))
    entry = spikingbrain.Entry((torch.zeros(1, 4), eager))
    spikingbrain.export(model, {"step": entry}, tmp_path / "a.sbrain", state="memory")
    program = spikingbrain.load(tmp_path / "a.sbrain")
    state, results, expected = program.new_state(), [], []
    for t in range(5):
        x = torch.full((1, 4), float(t + 1))
        results.append(program.step(x, state=state))
        new, old, eager = model(x, eager)
        expected.append((new.clone(), old.clone()))
    for got, wanted in zip(results, expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a, b.numpy())


def test_one_tensor_twice_in_the_state_is_refused(tmp_path: Path) -> None:
    memory = Memory(torch.zeros(4), torch.zeros(4))
    entry = spikingbrain.Entry((torch.zeros(4), memory))
    with pytest.raises(CompileError, match="two tensors of the new state are one and the same"):
        spikingbrain.export(Doubled(), {"step": entry}, tmp_path / "a.sbrain", state="memory")
