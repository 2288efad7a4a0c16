"""Which op of ours goes to whose kernel inside a PyTorch process, and what the Triton kernels do not take.

Arguments are those of the ops `spikingbrain::...`, checked, with their defaults filled in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spikingbrain.backend import TorchKernel, TorchKernels
from spikingbrain.backend_maca import providers
from spikingbrain.backend_maca.triton import (
    attention,
    delta,
    recurrence,
    scan,
    settings,
    spikes,
    vendor_attention,
    vendor_fla,
)
from spikingbrain.backend_maca.triton.device import Device
from spikingbrain.backend_maca.triton.dots import DOTS


def kernels(device: Device, chosen: str = "") -> TorchKernels:
    """Returns the kernels for tensors of ``device``, of the providers that are ``chosen``, such as "attention=triton".

    Raises:
        OptionError: a provider that is not known or not installed.
    """
    name = f"Triton on {device.name}"
    orders = providers.choice(chosen, providers.TORCH)
    found = {
        op: in_order(
            op,
            [
                (name if p == "triton" else _NAMES[p], kernel)
                for p, kernel in _available(op, orders[_OPS[op]])
            ],
        )
        for op in _OPS
    }
    return TorchKernels(
        device.torch_type,
        name,
        found,
        ",".join(sorted(chosen.replace(" ", "").split(","))),
        functools.partial(settings.read, device=device.name),
        settings.using,
    )


# Op of torch -> the op whose provider the user chooses.
_OPS = {
    "linear_recurrence": "linear_recurrence",
    "linear_recurrence_backward": "linear_recurrence",
    "linear_scan": "linear_scan",
    "spike_linear": "spike_linear",
    "window_attention": "attention",
    "window_attention_backward": "attention",
}
_NAMES = {"fla": "FLA", "mcflashattn": "mcFlashAttn"}


def _available(op: str, order: Sequence[providers.Provider]) -> Iterator[tuple[str, TorchKernel]]:
    """Yields providers that come before torch and are on this machine, by name, with their kernels."""
    for provider in order:
        if provider.name == "torch":
            return
        if not provider.missing:
            yield provider.name, _kernels()[provider.name][op]


def in_order(op: str, known: Sequence[tuple[str, TorchKernel]]) -> TorchKernel:
    """Returns one kernel made of several, by name: the first that takes the arguments runs."""
    if not known:
        return TorchKernel(lambda *_: f"providers: {_OPS[op]}=torch", lambda *_: None)

    def taker(given: Sequence[Any]) -> tuple[str, TorchKernel | None, list[str]]:
        """Returns who takes the arguments, and why those before do not."""
        reasons: list[str] = []
        for name, kernel in known:
            reason = kernel.refuse(*given)
            if reason is None:
                return name, kernel, reasons
            reasons.append(reason if len(known) == 1 else f"not {name}: {reason}")
        return "", None, reasons

    def refuse(*given: Any) -> str | None:
        _, kernel, reasons = taker(given)
        return None if kernel else "; ".join(reasons)

    def run(*given: Any) -> Any:
        _, kernel, _ = taker(given)
        assert kernel is not None, "refused arguments are not run"
        return kernel.run(*given)

    def told(*given: Any) -> str:
        name, _, reasons = taker(given)
        return "; ".join([name, *reasons])

    return TorchKernel(refuse, run, told)


def _kernels() -> dict[str, dict[str, TorchKernel]]:
    """Returns provider -> op -> kernel."""
    return {
        "triton": {
            "linear_recurrence": TorchKernel(_refuse_recurrence, _recurrence),
            "linear_recurrence_backward": TorchKernel(_refuse_recurrence_backward, _recurrence_backward),
            "linear_scan": TorchKernel(_refuse_scan, scan.linear_scan),
            "spike_linear": TorchKernel(_refuse_spikes, _spikes),
            "window_attention": TorchKernel(_refuse_attention, attention.forward),
            "window_attention_backward": TorchKernel(_refuse_attention_backward, attention.backward),
        },
        "fla": {
            "linear_recurrence": TorchKernel(vendor_fla.refusal, vendor_fla.forward),
            "linear_recurrence_backward": TorchKernel(vendor_fla.backward_refusal, vendor_fla.backward),
        },
        "mcflashattn": {
            "window_attention": TorchKernel(vendor_attention.refusal, vendor_attention.forward),
            "window_attention_backward": TorchKernel(
                vendor_attention.backward_refusal, vendor_attention.backward
            ),
        },
    }


def _refuse(x: Tensor) -> str | None:
    """Returns why no kernel takes tensors like ``x``, or None."""
    if x.dtype not in DOTS:
        return f"{str(x.dtype).removeprefix('torch.')}; the Triton kernel computes on float32, bfloat16 and float16"
    return None


def _refuse_recurrence(
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
    if erase is not None and isinstance(q.shape[3], int) and q.shape[3] > delta.KEYS:
        return (
            f"{q.shape[3]} keys; the Triton kernel of the rank-one part (erase, predict) holds {delta.KEYS}"
        )
    if decay_axis not in recurrence.AXES:
        return f"a decay of {decay_axis}s has no Triton kernel"
    if decay is not None and not log_decay:
        return "a decay given as a factor, which may be negative; the Triton kernel takes its logarithm (log_decay=True)"
    if any(isinstance(n, int) and n == 0 for n in (q.shape[0], q.shape[2], q.shape[3], v.shape[3])):
        return "a tensor without elements"
    return _refuse(q)


def _refuse_recurrence_backward(do: Tensor, dlast: Tensor, *given: object) -> str | None:
    if given[4] is not None:
        return "the backward of the rank-one part (erase, predict) has no Triton kernel"
    return _refuse_recurrence(*given)  # type: ignore[arg-type]


def _recurrence(
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
    q_, k_, v_ = (_in_order(x, reverse) for x in (q, k, v))
    decay = None if decay is None else _in_order(decay, reverse)
    if erase is None or predict is None:
        o, last = recurrence.forward(q_, k_, v_, decay, state, decay_axis, exclusive)
    else:
        u, w = _in_order(erase, reverse), _in_order(predict, reverse)
        o, last = delta.forward(q_, k_, v_, decay, u, w, state, decay_axis, exclusive)
    o = _in_order(o, reverse)
    if bonus is not None:
        groups = q.shape[2] // k.shape[2]
        weight = (q.float() * _per_query(bonus * k.float(), groups)).sum(-1, keepdim=True)
        o = (o + weight * _per_query(v, groups)).to(q.dtype)
    return o.contiguous(), last


def _recurrence_backward(
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
    dq, dk, dv, of_decay, of_state = recurrence.backward(
        _in_order(do, reverse),
        dlast,
        _in_order(q, reverse),
        _in_order(k, reverse),
        _in_order(v, reverse),
        None if decay is None else _in_order(decay, reverse),
        state,
        decay_axis,
        exclusive,
    )
    dq, dk, dv = (_in_order(x, reverse) for x in (dq, dk, dv))
    if of_decay is not None:
        of_decay = _in_order(of_decay, reverse)
    absent = q.new_empty(0)
    of_bonus = None
    if bonus is not None:
        groups = q.shape[2] // k.shape[2]
        key, query, gradient = k.float(), q.float(), do.float()
        read_key = _per_query(bonus * key, groups)
        weight = (gradient * _per_query(v, groups)).sum(-1, keepdim=True)
        of_read_key = _summed(weight * query, groups)
        dq = (dq + weight * read_key).to(q.dtype)
        dk = (dk + of_read_key * bonus).to(k.dtype)
        dv = (dv + _summed((query * read_key).sum(-1, keepdim=True) * gradient, groups)).to(v.dtype)
        of_bonus = (of_read_key * key).sum((0, 1)).to(bonus.dtype)
    return (
        dq.contiguous(),
        dk.contiguous(),
        dv.contiguous(),
        absent if of_decay is None else of_decay.contiguous(),
        absent.clone(),
        absent.clone(),
        absent.clone() if of_bonus is None else of_bonus,
        dlast.new_empty(0) if state is None else of_state,
    )


def _in_order(x: Tensor, reverse: bool) -> Tensor:
    """Returns x [B, T, ...] in the order in which time runs."""
    return x.flip(1) if reverse else x


def _per_query(x: Tensor, groups: int) -> Tensor:
    """[B, T, S, ...] -> [B, T, H, ...]"""
    return x if groups == 1 else x.repeat_interleave(groups, 2)


def _summed(x: Tensor, groups: int) -> Tensor:
    """[B, T, H, ...] -> [B, T, S, ...]"""
    return x if groups == 1 else torch.unflatten(x, 2, (-1, groups)).sum(3)


def _refuse_scan(
    decay: Tensor, update: Tensor, state: Tensor | None, log_decay: bool, reverse: bool
) -> str | None:
    if any(isinstance(n, int) and n == 0 for n in (update.shape[0], update.shape[2])):
        return "a tensor without elements"
    return _refuse(update)


def _refuse_spikes(
    counts: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int
) -> str | None:
    return spikes.refusal(counts, codes, bits)


def _spikes(
    counts: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    return spikes.spike_linear(counts, threshold, codes, scale, bias)


def _refuse_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    return attention.refusal(q, v)


def _refuse_attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    return attention.refusal(q, v)
