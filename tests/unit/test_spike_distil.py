"""Spiking models that learn from the model they were made of."""

from __future__ import annotations

import copy

import pytest
import torch

from spikingbrain.models.llama import Llama, LlamaConfig
from spikingbrain.models.spiking import SpikeLinear, SpikingError, spike
from spikingbrain.models.spiking.distil import distil, freeze

CONFIG = LlamaConfig(
    vocabulary=80, width=32, layers=2, heads=2, key_value_heads=1, head_size=16, feed_forward=64, context=32
)


def test_it_comes_nearer_to_its_teacher_and_stays_there_in_integers() -> None:
    torch.manual_seed(0)
    teacher = Llama(CONFIG).eval()
    student = copy.deepcopy(teacher)
    spike(student, k=1, bits=4, training=True)
    others = {n: p.clone() for n, p in student.named_parameters() if "norm" in n or "embedding" in n}
    state = teacher.initial_state(4)
    calls = [(torch.randint(0, 64, (4, 24)), state) for _ in range(4)]
    losses = distil(student, teacher, calls, steps=60, learning_rate=2e-3)
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    now = dict(student.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in others.items())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())

    with torch.no_grad():
        trained = student(*calls[0])[0]
        assert freeze(student) == 14
        torch.testing.assert_close(student(*calls[0])[0], trained, rtol=1e-3, atol=1e-3)
    assert sum(isinstance(m, SpikeLinear) for m in student.modules()) == 14


def test_without_layers_or_calls() -> None:
    teacher = Llama(CONFIG)
    with pytest.raises(SpikingError, match="nothing to train"):
        distil(copy.deepcopy(teacher), teacher, [()])
    student = copy.deepcopy(teacher)
    spike(student, training=True)
    with pytest.raises(SpikingError, match="nothing to learn from"):
        distil(student, teacher, [])
