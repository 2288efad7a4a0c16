"""Triton kernels of softmax attention over a window, forward and backward, with sinks and grouped heads.

Query i stands at position i + N - T and sees the key at position j when 0 <= j <= position and (j > position - window or
j < sinks); window 0 is unlimited. With POSITIONS those of queries [B, T] and of keys [B, N] are given, in any order. Softmax
is taken online, block of keys by block of keys; blocks that no row sees are not visited. All tensors are contiguous: q, o
[B, T, H, D], k [B, N, S, D], v [B, N, S, E], logarithms of sums [B, H, T] to the base 2. Dots take operands of type DOT and add
in float32. Syntax of Triton 3.0.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(x, batch, head, length, heads, D, time, columns):
    """Returns x [B, T, H, D] at ``time`` and ``columns``, 0 outside."""
    row = (batch * length + time) * heads + head
    there = (time < length)[:, None] & (columns < D)[None, :]
    return tl.load(x + row[:, None] * D + columns[None, :], mask=there, other=0.0)


@triton.jit
def positions_of(given, batch, length, index, POSITIONS: tl.constexpr):
    """Returns the positions at ``index`` of a row: those given [B, length], -1 outside, or the index itself."""
    if POSITIONS:
        there = (index >= 0) & (index < length)
        return tl.load(given + batch * length + index, mask=there, other=-1).to(tl.int32)
    else:
        return index


@triton.jit
def is_visible(position, key, there, window, sinks):
    """Returns whether rows at ``position`` see columns at positions ``key``, if they are ``there``."""
    near = (key[None, :] > position[:, None] - window) | (window == 0) | (key < sinks)[None, :]
    return near & (key[None, :] <= position[:, None]) & ((key >= 0) & there)[None, :]


@triton.jit
def any_of(seen, POSITIONS: tl.constexpr):
    """Returns whether a block is to be visited: with positions in any order, where something is seen."""
    if POSITIONS:
        return tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0
    else:
        return True


@triton.jit
def attend(
    q, k, v, query_at, key_at, out, sums, T, N, S, G, D, E, window, sinks, scale,
    POSITIONS: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Stores o of BM queries of one head, and log2 of the sums of exponentials. ``scale`` is in units of log2(e)."""
    tiles = tl.cdiv(T, BM)
    which = tl.program_id(0) // tiles
    head = which % (S * G)
    batch, source = (which // (S * G)).to(tl.int64), head // G
    start = tl.program_id(0) % tiles * BM
    time = start + tl.arange(0, BM)
    if POSITIONS:
        position = positions_of(query_at, batch, T, time, POSITIONS)
    else:
        position = time + N - T
    sizes, values = tl.arange(0, BD), tl.arange(0, BE)
    query = load_rows(q, batch, head, T, S * G, D, time, sizes).to(DOT)
    largest = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    o = tl.zeros([BM, BE], dtype=tl.float32)

    behind = (tl.minimum(start + BM, T) + N - T + BN - 1) // BN  # the block behind the last that is seen
    first = 0
    if window > 0:
        first = tl.maximum(start + N - T - window + 1, 0) // BN
    with_sinks = tl.minimum((sinks + BN - 1) // BN, first)
    if POSITIONS:
        first = 0
        with_sinks = 0
        behind = tl.cdiv(N, BN)
    for i in range(with_sinks + behind - first):
        block = i
        if i >= with_sinks:
            block = i - with_sinks + first
        index = block * BN + tl.arange(0, BN)
        seen = is_visible(
            position, positions_of(key_at, batch, N, index, POSITIONS), index < N, window, sinks
        )
        if any_of(seen, POSITIONS):
            keys = load_rows(k, batch, source, N, S, D, index, sizes).to(DOT)
            score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(largest, tl.max(score, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(score - base[:, None])
            fade = tl.exp2(largest - base)
            total = total * fade + tl.sum(p, 1)
            read = load_rows(v, batch, source, N, S, E, index, values).to(DOT)
            o = o * fade[:, None] + tl.dot(p.to(DOT), read, input_precision="ieee")
            largest = higher
    some = total > 0
    o = tl.where(some[:, None], o / tl.where(some, total, 1.0)[:, None], 0.0)
    row = (batch * T + time) * S * G + head
    there = (time < T)[:, None] & (values < E)[None, :]
    tl.store(out + row[:, None] * E + values[None, :], o.to(out.dtype.element_ty), mask=there)
    log = tl.where(some, largest + tl.log2(tl.where(some, total, 1.0)), 0.0)
    tl.store(sums + which.to(tl.int64) * T + time, log, mask=time < T)


@triton.jit
def attend_query_gradients(
    q, k, v, query_at, key_at, do, sums, products, dq, T, N, S, G, D, E, window, sinks, scale, factor,
    POSITIONS: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Stores dq of BM queries of one head; ``products`` [B, H, T] are o . do, ``factor`` is the scale itself."""
    tiles = tl.cdiv(T, BM)
    which = tl.program_id(0) // tiles
    head = which % (S * G)
    batch, source = (which // (S * G)).to(tl.int64), head // G
    start = tl.program_id(0) % tiles * BM
    time = start + tl.arange(0, BM)
    if POSITIONS:
        position = positions_of(query_at, batch, T, time, POSITIONS)
    else:
        position = time + N - T
    sizes, values = tl.arange(0, BD), tl.arange(0, BE)
    query = load_rows(q, batch, head, T, S * G, D, time, sizes).to(DOT)
    of_o = load_rows(do, batch, head, T, S * G, E, time, values).to(DOT)
    row = which.to(tl.int64) * T + time
    log = tl.load(sums + row, mask=time < T, other=0.0)
    product = tl.load(products + row, mask=time < T, other=0.0)
    of_q = tl.zeros([BM, BD], dtype=tl.float32)

    behind = (tl.minimum(start + BM, T) + N - T + BN - 1) // BN
    first = 0
    if window > 0:
        first = tl.maximum(start + N - T - window + 1, 0) // BN
    with_sinks = tl.minimum((sinks + BN - 1) // BN, first)
    if POSITIONS:
        first = 0
        with_sinks = 0
        behind = tl.cdiv(N, BN)
    for i in range(with_sinks + behind - first):
        block = i
        if i >= with_sinks:
            block = i - with_sinks + first
        index = block * BN + tl.arange(0, BN)
        seen = is_visible(
            position, positions_of(key_at, batch, N, index, POSITIONS), index < N, window, sinks
        )
        if any_of(seen, POSITIONS):
            keys = load_rows(k, batch, source, N, S, D, index, sizes).to(DOT)
            score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
            p = tl.exp2(tl.where(seen, score, float("-inf")) - log[:, None])
            read = load_rows(v, batch, source, N, S, E, index, values).to(DOT)
            of_p = tl.dot(of_o, tl.trans(read), input_precision="ieee")
            of_score = p * (of_p - product[:, None]) * factor
            of_q += tl.dot(of_score.to(DOT), keys, input_precision="ieee")
    row = (batch * T + time) * S * G + head
    there = (time < T)[:, None] & (sizes < D)[None, :]
    tl.store(dq + row[:, None] * D + sizes[None, :], of_q.to(dq.dtype.element_ty), mask=there)


@triton.jit
def attend_key_gradients(
    q, k, v, query_at, key_at, do, sums, products, dk, dv, T, N, S, G, D, E, window, sinks, scale, factor,
    POSITIONS: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Stores dk and dv of BN keys of one source of G heads."""
    tiles = tl.cdiv(N, BN)
    which = tl.program_id(0) // tiles
    source = which % S
    batch = (which // S).to(tl.int64)
    start = tl.program_id(0) % tiles * BN
    index = start + tl.arange(0, BN)
    key = positions_of(key_at, batch, N, index, POSITIONS)
    sizes, values = tl.arange(0, BD), tl.arange(0, BE)
    keys = load_rows(k, batch, source, N, S, D, index, sizes).to(DOT)
    read = load_rows(v, batch, source, N, S, E, index, values).to(DOT)
    of_k = tl.zeros([BN, BD], dtype=tl.float32)
    of_v = tl.zeros([BN, BE], dtype=tl.float32)

    first = tl.maximum(start - (N - T), 0) // BM
    behind = (T + BM - 1) // BM
    if (window > 0) & (start >= sinks):
        behind = tl.minimum(behind, (tl.maximum(start + BN - 1 + window - (N - T), 0) + BM - 1) // BM)
    if POSITIONS:
        first = 0
        behind = tl.cdiv(T, BM)
    for block in range(first, behind):
        time = block * BM + tl.arange(0, BM)
        if POSITIONS:
            position = positions_of(query_at, batch, T, time, POSITIONS)
        else:
            position = time + N - T
        seen = is_visible(position, key, index < N, window, sinks) & (time < T)[:, None]
        if any_of(seen, POSITIONS):
            for group in range(G):
                head = source * G + group
                query = load_rows(q, batch, head, T, S * G, D, time, sizes).to(DOT)
                of_o = load_rows(do, batch, head, T, S * G, E, time, values).to(DOT)
                row = (batch * S * G + head) * T + time
                log = tl.load(sums + row, mask=time < T, other=0.0)
                product = tl.load(products + row, mask=time < T, other=0.0)
                score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
                p = tl.exp2(tl.where(seen, score, float("-inf")) - log[:, None])
                of_v += tl.dot(tl.trans(p.to(DOT)), of_o, input_precision="ieee")
                of_p = tl.dot(of_o, tl.trans(read), input_precision="ieee")
                of_score = p * (of_p - product[:, None]) * factor
                of_k += tl.dot(tl.trans(of_score.to(DOT)), query, input_precision="ieee")
    row = (batch * N + index) * S + source
    there = (index < N)[:, None] & (sizes < D)[None, :]
    tl.store(dk + row[:, None] * D + sizes[None, :], of_k.to(dk.dtype.element_ty), mask=there)
    there = (index < N)[:, None] & (values < E)[None, :]
    tl.store(dv + row[:, None] * E + values[None, :], of_v.to(dv.dtype.element_ty), mask=there)
