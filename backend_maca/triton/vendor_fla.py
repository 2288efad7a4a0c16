"""Recurrences by flash-linear-attention, the package `fla`: its functions called with our ops' arguments.

The functions are those of `fla.ops`, by name. Layouts [B, T, H, .] and states [B, H, K, V] are ours; older versions ask for them
by ``head_first``. The scale is in q already, so that it is 1. What differs, and so is refused: FLA has a state for every head,
reads states after the step, and multiplies float32 as TF32 in chunks. In its chunks gates below -100 count as -100: it
subtracts sums of gates from each other, where -inf gives not-a-number.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spikingbrain.backend_maca.triton.dots import DOTS
from spikingbrain.backend_maca.triton.vendor import differentiated
from spikingbrain.errors import MissingDependency

STEPS = 16  # up to here the kernels that go step by step: exact, a state in registers
LEAST_GATE = -100.0  # of a chunk; its exponential is below float32's smallest normal number


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor | None,
    predict: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    decay_axis: str,
    log_decay: bool,
    exclusive: bool,
    reverse: bool,
) -> str | None:
    """Returns why FLA does not take a call of `linear_recurrence`, or None."""
    dtype = str(q.dtype).removeprefix("torch.")
    if q.dtype not in DOTS:
        return f"{dtype}; FLA computes on float32, bfloat16 and float16"
    if bonus is not None or exclusive:
        return "a read of the state before the step; FLA's are of the state after it"
    if decay is not None and not log_decay:
        return "a decay given as a factor; FLA takes its logarithm"
    if q.shape[2] != k.shape[2]:
        return f"{q.shape[2]} heads read {k.shape[2]} states; FLA has a state for each head"
    if any(isinstance(n, int) and n == 0 for n in (*q.shape, v.shape[3])):
        return "a tensor without elements"
    steps = q.shape[1]
    if isinstance(steps, int) and steps <= STEPS:
        if erase is not None and decay_axis == "value":
            return "a decay of values beside the rank-one part has no function in FLA"
        return None
    if erase is not None:
        return f"the rank-one part (erase, predict) over more than {STEPS} steps; FLA's chunks ask for keys and strengths"
    if decay_axis == "value":
        return f"a decay of values over more than {STEPS} steps has no function in FLA"
    if q.dtype == torch.float32:
        return f"float32 over more than {STEPS} steps; FLA's chunks multiply in TF32"
    return None


def backward_refusal(do: Tensor, dlast: Tensor, *given: Any) -> str | None:
    """Returns why FLA does not take a call of `linear_recurrence_backward`, or None."""
    if given[4] is not None:
        return "the rank-one part (erase, predict); FLA's function for it has no backward"
    return refusal(*given)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor | None,
    predict: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    decay_axis: str,
    log_decay: bool,
    exclusive: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Returns what the op `linear_recurrence` does."""
    q_, k_, v_, decay_, u, w = (_in_order(x, reverse) for x in (q, k, v, decay, erase, predict))
    assert q_ is not None and k_ is not None and v_ is not None
    if u is None or w is None:
        o, last = _attend(q_, k_, v_, decay_, state, decay_axis)
    else:
        gates = torch.zeros_like(k_) if decay_ is None else decay_
        gates = gates.unsqueeze(-1).expand_as(k_) if decay_axis == "head" else gates
        function = _function("generalized_delta_rule", "fused_recurrent_dplr_delta_rule")
        o, last = function(
            q_, k_, v_, w, u, gates.contiguous(), initial_state=state, scale=1.0, output_final_state=True
        )
    o = o.to(q.dtype)
    return (o.flip(1) if reverse else o).contiguous(), last.float().contiguous()


def backward(
    do: Tensor,
    dlast: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor | None,
    predict: Tensor | None,
    bonus: Tensor | None,
    state: Tensor | None,
    decay_axis: str,
    log_decay: bool,
    exclusive: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Returns what the op `linear_recurrence_backward` does, by FLA's own backward behind another run of its forward."""

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> Sequence[Tensor]:
        return _attend(q, k, v, decay, state, decay_axis)

    ordered = [_in_order(x, reverse) for x in (do, q, k, v, decay)]
    of_q, of_k, of_v, of_decay, of_state = differentiated(run, [*ordered[1:], state], [ordered[0], dlast])
    of_q, of_k, of_v, of_decay = (_in_order(g, reverse) for g in (of_q, of_k, of_v, of_decay))
    given = ((of_q, q), (of_k, k), (of_v, v), (of_decay, decay), (None, None), (None, None), (None, None))
    gradients = [q.new_empty(0) if g is None or x is None else g.to(x.dtype).contiguous() for g, x in given]
    return *gradients, dlast.new_empty(0) if of_state is None else of_state.float().contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, axis: str
) -> tuple[Tensor, Tensor]:
    """Returns outputs and the last state, in order of time and without the rank-one part."""
    few = q.shape[1] <= STEPS
    named: dict[str, Any] = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    if decay is not None and not few:
        decay = decay.clamp(min=LEAST_GATE)
    if axis in ("key", "value"):
        if few:
            gate = {"gk" if axis == "key" else "gv": decay}
            return _called("gla", "fused_recurrent_gla", q, k, v, **gate, **named)
        return _called("gla", "chunk_gla", q, k, v, g=decay, **named)
    gate_BTH = q.new_zeros(q.shape[:3]) if decay is None else decay
    name = "fused_recurrent_simple_gla" if few else "chunk_simple_gla"
    return _called("simple_gla", name, q, k, v, g=gate_BTH, **named)


def _called(module: str, name: str, *given: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    function = _function(module, name)
    if "head_first" in inspect.signature(function).parameters:  # [B, H, T, .] unless told otherwise
        named["head_first"] = False
    o, last = function(*(x.contiguous() for x in given), **named)
    return o, last


def _function(module: str, name: str) -> Callable[..., Any]:
    """Returns a function of `fla.ops`. Raises MissingDependency where the version that is installed has none of that name."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise MissingDependency(
            f"fla.ops.{module}.{name} cannot be had: {error}",
            hint="another version of fla, or providers without 'linear_recurrence=fla'",
        ) from error
    return function


def _in_order(x: Tensor | None, reverse: bool) -> Tensor | None:
    return x.flip(1) if x is not None and reverse else x
