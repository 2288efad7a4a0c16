"""Distillation: a spiking model learns, on a little text, to answer like the model that it was made of.

Calibration by scales (`calibrate`) lowers the error of each layer; what matters in the end is how the errors of all layers add up
in the output. Here the weights of the spiking layers, rounded at each call, are trained for some ten steps so that the
distribution of the next token comes near the teacher's (Hinton et al., arXiv 1503.02531). No labels are needed.

    teacher, student = load(), load()
    spike(student, training=True)
    distil(student, teacher, calls, steps=60)
    freeze(student)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.linear import SpikeLinearTraining


def distil(
    student: nn.Module,
    teacher: nn.Module,
    calls: Sequence[Any],
    steps: int = 60,
    learning_rate: float = 2e-5,
    wrap: Callable[[nn.Module], Callable[..., Any]] = lambda module: module,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Trains the spiking layers of ``student``, in place, with Adam; returns the loss of each step.

    Args:
        student: made by ``spike(model, training=True)``. Only its spiking layers change.
        teacher: the same model without spikes; it gives logits [..., C], alone or first of several results.
        calls: arguments for both, a tuple for each call; they come by turns.
        wrap: makes the function that is trained of ``student``, such as ``torch.compile``.
        progress: hears of each step.

    The loss is the Kullback-Leibler divergence of the student's next token from the teacher's, in nats a token. Raises
    SpikingError if no layer of ``student`` can be trained, or there are no calls.
    """
    layers = [m for m in student.modules() if isinstance(m, SpikeLinearTraining)]
    if not layers or not calls:
        raise SpikingError(
            "nothing to train" if not layers else "nothing to learn from",
            where="distil",
            hint="spike(model, training=True)" if not layers else "some calls, such as 40 of 512 tokens",
        )
    trained = [p for layer in layers for p in layer.parameters()]
    before = {p: p.requires_grad for p in student.parameters()}
    student.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(trained, learning_rate, betas=(0.9, 0.98))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, max(0.1, 1 - (step - warm) / max(1, steps - warm)))
    )
    called, losses = wrap(student), []
    try:
        for step in range(steps):
            call = calls[step % len(calls)]
            arguments = call if isinstance(call, tuple) else (call,)
            with torch.no_grad():
                wanted = F.log_softmax(_logits(teacher(*arguments)), dim=-1).flatten(0, -2)
            given = F.log_softmax(_logits(called(*arguments)), dim=-1).flatten(0, -2)
            loss = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            progress(step, losses[-1])
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
    return losses


def freeze(model: nn.Module) -> int:
    """Replaces the trainable spiking layers of ``model``, in place, by those for inference; returns how many."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, SpikeLinearTraining)}
    for name, layer in found.items():
        model.set_submodule(name, layer.frozen().train(layer.training))
    return len(found)


def _logits(result: Any) -> Tensor:
    logits: Tensor = result[0] if isinstance(result, tuple) else result
    return logits
