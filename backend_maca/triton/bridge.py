"""Which op of ours goes to which Triton kernel, and what those do not take.

Arguments are those of the ops `spikingbrain::...`, checked, with their defaults filled in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain.backend import TorchKernel, TorchKernels
from spikingbrain.backend_maca.triton import attention, delta, recurrence, scan, spikes
from spikingbrain.backend_maca.triton.device import Device
from spikingbrain.backend_maca.triton.dots import DOTS


def kernels(device: Device) -> TorchKernels:
    """Returns the kernels for tensors of ``device``."""
    return TorchKernels(
        device.torch_type,
        f"Triton on {device.name}",
        {
            "linear_recurrence": TorchKernel(_refuse_recurrence, _recurrence),
            "linear_recurrence_backward": TorchKernel(_refuse_recurrence_backward, _recurrence_backward),
            "linear_scan": TorchKernel(_refuse_scan, scan.linear_scan),
            "spike_linear": TorchKernel(_refuse_spikes, _spikes),
            "window_attention": TorchKernel(_refuse_attention, attention.forward),
            "window_attention_backward": TorchKernel(_refuse_attention_backward, attention.backward),
        },
    )


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


def _refuse_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float | None
) -> str | None:
    return attention.refusal(q, v)


def _refuse_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sums: Tensor,
    window: int,
    sinks: int,
    scale: float | None,
) -> str | None:
    return attention.refusal(q, v)
