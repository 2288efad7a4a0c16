"""Functions of `flash_attn` as scaled dot product attention whose masks compare positions, which `raise-attention` knows.

Tensors are [B, T, H, D]. With fewer queries than keys the last query is at the last key. A window (left, right) is what a query
sees beside its own position; -1 is everything.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikingbrain.compat.packed import apart, cu_seqlens_of, lengths_of, positions_of, together, unpacking
from spikingbrain.compat.rotary import rotated
from spikingbrain.errors import UnsupportedOp


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """q [B, T, H, D]; k, v [B, S, G, D], where H is a multiple of G; returns [B, T, H, D]."""
    _refuse(
        "flash_attn_func", softcap=softcap, alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs
    )
    steps, seen = q.shape[1], k.shape[1]
    query = torch.arange(steps, device=q.device) + (seen - steps)
    key = torch.arange(seen, device=q.device)
    batch = q.shape[0]
    return _attend(
        q,
        k,
        v,
        query.expand(batch, -1),
        key.expand(batch, -1),
        dropout_p,
        softmax_scale,
        _limits(causal, window_size),
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Packed texts: q [total, H, D]; k, v [total of keys, G, D]; returns [total, H, D]."""
    _refuse(
        "flash_attn_varlen_func",
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
        block_table=block_table,
    )
    longest_q, longest_k = int(max_seqlen_q), int(max_seqlen_k)
    shift = lengths_of(cu_seqlens_k) - lengths_of(cu_seqlens_q)
    query = shift[:, None] + torch.arange(longest_q, device=q.device)
    key = torch.arange(longest_k, device=q.device).expand(query.shape[0], -1)
    o = _attend(
        apart(q, cu_seqlens_q, longest_q),
        apart(k, cu_seqlens_k, longest_k),
        apart(v, cu_seqlens_k, longest_k),
        query,
        torch.where(key < lengths_of(cu_seqlens_k)[:, None], key, -1),
        dropout_p,
        softmax_scale,
        _limits(causal, window_size),
    )
    return together(o, cu_seqlens_q, q.shape[0])


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """Caches [B, S, G, D] hold ``cache_seqlens`` tokens; k and v [B, T', G, D] are written behind them, in place."""
    _refuse(
        "flash_attn_with_kvcache",
        rotary_cos=rotary_cos,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_softmax_lse=return_softmax_lse,
    )
    batch, slots = k_cache.shape[:2]
    held = slots if cache_seqlens is None else cache_seqlens
    length = held.long() if isinstance(held, Tensor) else torch.full((batch,), held, device=q.device)
    if k is not None and v is not None:
        places = length[:, None] + torch.arange(k.shape[1], device=q.device)
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache.scatter_(1, places[:, :, None, None].expand_as(new), new.to(cache.dtype))
        length = length + k.shape[1]
    query = length[:, None] - q.shape[1] + torch.arange(q.shape[1], device=q.device)
    key = torch.arange(slots, device=q.device).expand(batch, -1)
    return _attend(
        q,
        k_cache,
        v_cache,
        query,
        torch.where(key < length[:, None], key, -1),
        0.0,
        softmax_scale,
        _limits(causal, window_size),
    )


def flash_attn_qkvpacked_func(qkv: Tensor, *options: Any, **named: Any) -> Tensor:
    """qkv [B, T, 3, H, D]."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *options, **named)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *options: Any, **named: Any) -> Tensor:
    """kv [B, S, 2, G, D]."""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *options, **named)


def _limits(causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    return window[0], 0 if causal else window[1]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_BT: Tensor,
    key_BS: Tensor,
    dropout: float,
    scale: float | None,
    limits: tuple[int, int],
) -> Tensor:
    """Keys at positions below 0 are not there. A query that sees none gets zeros, as from the kernel."""
    query, key = query_BT[:, None, :, None], key_BS[:, None, None, :]
    left, right = limits
    mask = key >= 0
    if right >= 0:
        mask = mask & (key <= query + right if right else key <= query)
    if left >= 0:
        mask = mask & (key > query - (left + 1))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask.expand(-1, 1, q.shape[1], -1),
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


def _refuse(name: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None and value is not False and not (isinstance(value, float) and value == 0.0):
            raise UnsupportedOp(
                f"flash_attn's {name} with {option}",
                why="its stand-in is scaled dot product attention, which has no such option",
            )


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """`flash_attn.bert_padding`: returns the tokens of [B, T, ...] where the mask is 1, their indices, cu_seqlens, the greatest
    length and all lengths."""
    if unused_mask is not None:
        raise UnsupportedOp("flash_attn's unpad_input with unused_mask")
    indices, cu_seqlens, longest = unpacking(attention_mask)
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest, lengths_of(cu_seqlens)


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    return x[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    empty = values.new_zeros(first_axis_dim, *values.shape[1:])
    return empty.index_put((indices,), values)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: [B, T, ...], zeros where the mask was 0."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *rows.shape[1:])


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`flash_attn.layers.rotary`: x [B, T, H, D], or packed [total, H, D]; cos, sin [positions, R] turn the first 2R channels."""
    if cu_seqlens is None:
        place = torch.arange(x.shape[1], device=x.device)
        place = place + (seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    else:
        text, place = positions_of(cu_seqlens, x.shape[0])
        place = place + (seqlen_offsets[text] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    y = rotated(x, cos[place].unsqueeze(-2), sin[place].unsqueeze(-2), interleaved)
    return x.copy_(y) if inplace else y


def layers_unpad_input(
    q: Tensor, states: tuple[Tensor, ...], attention_mask: Tensor, q_len: int, keepdim: bool = False
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor], tuple[int, int]]:
    """`fla.layers.utils.unpad_input`: queries of all positions or of the last one only."""
    indices, cu_keys, longest = unpacking(attention_mask)
    packed = tuple(x.flatten(0, 1)[indices] for x in states)
    if q_len == states[0].shape[1]:
        q, of_q, cu_queries, longest_q = q.flatten(0, 1)[indices], indices, cu_keys, longest
    elif q_len == 1:
        cu_queries = cu_seqlens_of(torch.ones(q.shape[0], dtype=torch.int32, device=q.device))
        q, of_q, longest_q = q.squeeze(1), cu_queries[:-1], 1
    else:
        raise UnsupportedOp("fla's unpad_input with some of the queries", hint="all of them, or one")
    if keepdim:
        q, packed = q.unsqueeze(0), tuple(x.unsqueeze(0) for x in packed)
    return q, packed, of_q, (cu_queries, cu_keys), (longest_q, longest)
