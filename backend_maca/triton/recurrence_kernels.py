"""Triton kernels of the chunked linear recurrence, forward and backward, for keys' decays in log form.

Time is cut into blocks of C steps. With S the state at the start of a block and E the gradient of the state at its end,

    o_i  = (q_i * e^(g to i)) S + sum over j of A_ij v_j,       A_ij = sum of q_i * k_j * e^(g between j and i)
    dv_j = (k_j * e^(g from j)) E + sum over i of A_ij do_i
    dq_i = e^(g to i) * (S do_i) + sum over j of dA_ij k_j e^(g between j and i),       dA_ij = do_i . v_j
    dk_j = e^(g from j) * (E v_j) + sum over i of dA_ij q_i e^(g between j and i)

**The safe rule.** Every exponent is a sum of the gates between two steps, added up in place: no cumulative sum is subtracted
from another and no exponential is inverted. So a gate may be -inf, and a long stretch of strong gates costs no digits. Where
each key has a gate, rows are taken R at a time, and earlier columns are decayed to the start of those rows.

All tensors are contiguous: q, do [B, T, H, .]; k, v [B, T, S, .]; gates [B, T, S] or [B, T, S, K]; scores [B, H, T, C]; states
[B * S, blocks, K, V]. DECAY: 0 none, 1 one gate per state, 2 one per key. EXCLUSIVE: reads are of the state before the step.
Dots take operands of type DOT and add in float32. Syntax of Triton 3.0.
"""

import triton
import triton.language as tl


@triton.jit
def gates(decay, batch, state, steps, S, K, time, keep, columns, DECAY: tl.constexpr):
    """Returns the gates at ``time`` as float32 [rows, columns] (one column if DECAY is 1), 0 where not ``keep``."""
    row = (batch * steps + time) * S + state
    if DECAY == 2:
        there = keep[:, None] & (columns < K)[None, :]
        return tl.load(decay + row[:, None] * K + columns[None, :], mask=there, other=0.0).to(tl.float32)
    else:
        return tl.load(decay + row, mask=keep, other=0.0).to(tl.float32)[:, None]


@triton.jit
def rows_of(x, batch, head, steps, H, D, time, keep, columns):
    """Returns x [B, T, H, D] at ``time`` and ``columns``, 0 where not ``keep`` or beyond D."""
    row = (batch * steps + time) * H + head
    there = keep[:, None] & (columns < D)[None, :]
    return tl.load(x + row[:, None] * D + columns[None, :], mask=there, other=0.0)


@triton.jit
def running(g, DECAY: tl.constexpr, REVERSE: tl.constexpr):
    """Returns running sums of gates over rows; a single column as one axis, as Triton 3.6 sums no other kind of it."""
    if DECAY == 2:
        return tl.cumsum(g, 0, reverse=REVERSE)
    else:
        return tl.cumsum(tl.reshape(g, (g.shape[0],)), 0, reverse=REVERSE)[:, None]


@triton.jit
def gates_to(
    decay, batch, state, steps, S, K, first, time, end, columns, DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr
):
    """Returns sums of gates from step ``first`` (that of row 0) to each row, without the row's own if EXCLUSIVE."""
    if EXCLUSIVE:
        g = gates(
            decay, batch, state, steps, S, K, time - 1, (time > first) & (time - 1 < end), columns, DECAY
        )
    else:
        g = gates(decay, batch, state, steps, S, K, time, (time >= first) & (time < end), columns, DECAY)
    return running(g, DECAY, False)


@triton.jit
def gates_from(decay, batch, state, steps, S, K, time, end, columns, DECAY: tl.constexpr):
    """Returns sums of gates from behind each row to step ``end`` (without it)."""
    g = gates(decay, batch, state, steps, S, K, time + 1, time + 1 < end, columns, DECAY)
    return running(g, DECAY, True)


@triton.jit
def carry_states(
    key, value, decay, first_state, states, last_state, steps, blocks, S, G, K, V,
    DECAY: tl.constexpr, BACKWARD: tl.constexpr, EXCLUSIVE: tl.constexpr, HAS_FIRST: tl.constexpr,
    DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carries a state [K, V] through all blocks, in order or BACKWARD, and stores it as it enters each.

    Forward a block adds k v^T, decayed to its end; backward it adds q do^T of G heads, decayed to its start.
    """
    which = tl.program_id(0)
    batch, state = (which // S).to(tl.int64), which % S
    rows = tl.arange(0, C)
    keys = tl.program_id(1) * BK + tl.arange(0, BK)
    values = tl.program_id(2) * BV + tl.arange(0, BV)
    matrix = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    carried = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_FIRST:
        carried = tl.load(first_state + which.to(tl.int64) * K * V + matrix, mask=inside, other=0.0)
    for n in range(blocks):
        block = n
        if BACKWARD:
            block = blocks - 1 - n
        place = (which.to(tl.int64) * blocks + block) * K * V
        tl.store(states + place + matrix, carried, mask=inside)
        first = block * C
        time = first + rows
        end = tl.minimum(first + C, steps)
        live = time < end
        if DECAY > 0:
            g = gates(decay, batch, state, steps, S, K, time, live, keys, DECAY)
            through = tl.exp(tl.sum(g, 0))
            carried = carried * through[:, None]
        for group in range(G):
            head = state * G + group
            k = rows_of(key, batch, head, steps, S * G, K, time, live, keys).to(tl.float32)
            v = rows_of(value, batch, head, steps, S * G, V, time, live, values)
            if DECAY > 0:
                if BACKWARD:
                    k = k * tl.exp(
                        gates_to(decay, batch, state, steps, S, K, first, time, end, keys, DECAY, EXCLUSIVE)
                    )
                else:
                    k = k * tl.exp(gates_from(decay, batch, state, steps, S, K, time, end, keys, DECAY))
            carried += tl.dot(tl.trans(k.to(DOT)), v.to(DOT), input_precision="ieee")
    tl.store(last_state + which.to(tl.int64) * K * V + matrix, carried, mask=inside)


@triton.jit
def carry_delta(
    key, value, erase, constant, linear, decay, first_state, states, last_state, predicted, steps, blocks, S, K, V,
    DECAY: tl.constexpr, HAS_FIRST: tl.constexpr,
    DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carries a state through all blocks where each step also adds erase p^T, p = S^T predict of the state before the step.

    Inside a block p = constant + linear S, [B * S, blocks, C, .], with S the state at its start. Holds all keys at a time.
    """
    which = tl.program_id(0).to(tl.int64)
    batch, state = which // S, which % S
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    matrix = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    carried = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_FIRST:
        carried = tl.load(first_state + which * K * V + matrix, mask=inside, other=0.0)
    for n in range(blocks):
        block = which * blocks + n
        tl.store(states + block * K * V + matrix, carried, mask=inside)
        first = n * C
        time = first + rows
        end = tl.minimum(first + C, steps)
        live = time < end
        row = block * C + rows
        w = tl.load(linear + row[:, None] * K + keys[None, :], mask=(keys < K)[None, :], other=0.0)
        p = tl.load(constant + row[:, None] * V + values[None, :], mask=(values < V)[None, :], other=0.0)
        p += tl.dot(w.to(DOT), carried.to(DOT), input_precision="ieee")
        row = (batch * steps + time) * S + state
        there = live[:, None] & (values < V)[None, :]
        tl.store(predicted + row[:, None] * V + values[None, :], p, mask=there)
        k = rows_of(key, batch, state, steps, S, K, time, live, keys).to(tl.float32)
        u = rows_of(erase, batch, state, steps, S, K, time, live, keys).to(tl.float32)
        v = rows_of(value, batch, state, steps, S, V, time, live, values)
        if DECAY > 0:
            g = gates(decay, batch, state, steps, S, K, time, live, keys, DECAY)
            carried = carried * tl.exp(tl.sum(g, 0))[:, None]
            after = tl.exp(gates_from(decay, batch, state, steps, S, K, time, end, keys, DECAY))
            k = k * after
            u = u * after
        carried += tl.dot(tl.trans(k.to(DOT)), v.to(DOT), input_precision="ieee")
        carried += tl.dot(tl.trans(u.to(DOT)), p.to(DOT), input_precision="ieee")
    tl.store(last_state + which * K * V + matrix, carried, mask=inside)


@triton.jit
def pair_scores(
    query, key, decay, scores, steps, S, G, K,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr,
    DOT: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Stores A_ij for R rows i and the C columns j of their block: 0 unless j <= i (j < i if EXCLUSIVE)."""
    tiles = tl.cdiv(steps, R)
    which = tl.program_id(0) // tiles
    head = which % (S * G)
    batch, state = (which // (S * G)).to(tl.int64), head // G
    start = tl.program_id(0) % tiles * R
    first = start // C * C
    later, earlier = start + tl.arange(0, R), first + tl.arange(0, C)
    end = tl.minimum(first + C, steps)
    live = later < end
    a = tl.zeros([R, C], dtype=tl.float32)
    for offset in range(0, K, BK):
        columns = offset + tl.arange(0, BK)
        q = rows_of(query, batch, head, steps, S * G, K, later, live, columns).to(tl.float32)
        if DECAY == 2:
            keep = earlier < start
            k = rows_of(key, batch, state, steps, S, K, earlier, keep, columns).to(tl.float32)
            k = k * tl.exp(gates_from(decay, batch, state, steps, S, K, earlier, start, columns, DECAY))
            to = gates_to(decay, batch, state, steps, S, K, start, later, end, columns, DECAY, EXCLUSIVE)
            a += tl.dot((q * tl.exp(to)).to(DOT), tl.trans(k.to(DOT)), input_precision="ieee")
            between = tl.zeros([R, BK], dtype=tl.float32)
            for distance in range(R):
                near = live & (later - distance >= start)
                near_k = rows_of(key, batch, state, steps, S, K, later - distance, near, columns)
                product = tl.sum(q * near_k.to(tl.float32) * tl.exp(between), 1)
                a += tl.where(earlier[None, :] == (later - distance)[:, None], product[:, None], 0.0)
                # an exclusive read is without the row's own gate
                kept = near
                if EXCLUSIVE:
                    kept = near & (distance > 0)
                between += gates(decay, batch, state, steps, S, K, later - distance, kept, columns, DECAY)
        else:
            k = rows_of(key, batch, state, steps, S, K, earlier, earlier < end, columns)
            a += tl.dot(q.to(DOT), tl.trans(k.to(DOT)), input_precision="ieee")
    if DECAY == 1:
        if EXCLUSIVE:
            g = gates(decay, batch, state, steps, S, K, later - 1, live & (later > first), later, DECAY)
            g = tl.where((later - 1)[:, None] > earlier[None, :], g, 0.0)
        else:
            g = gates(decay, batch, state, steps, S, K, later, live, later, DECAY)
            g = tl.where(later[:, None] > earlier[None, :], g, 0.0)
        a = a * tl.exp(tl.cumsum(g, 0))
    if EXCLUSIVE:
        a = tl.where(later[:, None] > earlier[None, :], a, 0.0)
    else:
        a = tl.where(later[:, None] >= earlier[None, :], a, 0.0)
    row = which.to(tl.int64) * steps + later
    tl.store(scores + row[:, None] * C + (earlier - first)[None, :], a, mask=live[:, None])


@triton.jit
def read_states(
    query, value, decay, states, scores, erase_scores, predicted, out, steps, blocks, S, G, K, V,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr, DELTA: tl.constexpr,
    DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Stores o of one block, head and tile of values; with DELTA ``erase_scores`` weigh what was ``predicted`` [B, T, S, V]."""
    block, which = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head = which % (S * G)
    batch, state = (which // (S * G)).to(tl.int64), head // G
    first = block * C
    rows = tl.arange(0, C)
    time = first + rows
    end = tl.minimum(first + C, steps)
    live = time < end
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    o = tl.zeros([C, BV], dtype=tl.float32)
    place = ((batch * S + state) * blocks + block) * K * V
    for offset in range(0, K, BK):
        keys = offset + tl.arange(0, BK)
        q = rows_of(query, batch, head, steps, S * G, K, time, live, keys).to(tl.float32)
        if DECAY > 0:
            q = q * tl.exp(
                gates_to(decay, batch, state, steps, S, K, first, time, end, keys, DECAY, EXCLUSIVE)
            )
        inside = (keys < K)[:, None] & (values < V)[None, :]
        matrix = tl.load(states + place + keys[:, None] * V + values[None, :], mask=inside, other=0.0)
        o += tl.dot(q.to(DOT), matrix.to(DOT), input_precision="ieee")
    row = which.to(tl.int64) * steps + time
    a = tl.load(scores + row[:, None] * C + rows[None, :], mask=live[:, None], other=0.0)
    v = rows_of(value, batch, state, steps, S, V, time, live, values)
    o += tl.dot(a.to(DOT), v.to(DOT), input_precision="ieee")
    if DELTA:
        a = tl.load(erase_scores + row[:, None] * C + rows[None, :], mask=live[:, None], other=0.0)
        p = rows_of(predicted, batch, state, steps, S, V, time, live, values)
        o += tl.dot(a.to(DOT), p.to(DOT), input_precision="ieee")
    row = (batch * steps + time) * S * G + head
    there = live[:, None] & (values < V)[None, :]
    tl.store(out + row[:, None] * V + values[None, :], o.to(out.dtype.element_ty), mask=there)


@triton.jit
def one_step(
    query, key, value, decay, first_state, out, last_state, S, G, K, V,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr, HAS_FIRST: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Stores o of G heads and the next state of one state, for a tile of values and all keys, where there is one step."""
    which = tl.program_id(0).to(tl.int64)
    keys = tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    matrix = which * K * V + keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    k = tl.load(key + which * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    v = tl.load(value + which * V + values, mask=values < V, other=0.0).to(tl.float32)
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_FIRST:
        state = tl.load(first_state + matrix, mask=inside, other=0.0)
    following = state
    if DECAY == 1:
        following = following * tl.exp(tl.load(decay + which).to(tl.float32))
    if DECAY == 2:
        g = tl.load(decay + which * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        following = following * tl.exp(g)[:, None]
    following += k[:, None] * v[None, :]
    tl.store(last_state + matrix, following, mask=inside)
    if not EXCLUSIVE:
        state = following
    for group in range(G):
        head = which * G + group
        q = tl.load(query + head * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        o = tl.sum(q[:, None] * state, 0)
        tl.store(out + head * V + values, o.to(out.dtype.element_ty), mask=values < V)


@triton.jit
def value_gradients(
    key, of_out, decay, of_states, scores, of_value, steps, blocks, S, G, K, V,
    DECAY: tl.constexpr, DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Stores dv of one block, state and tile of values."""
    block, which = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    state = which % S
    batch = (which // S).to(tl.int64)
    first = block * C
    rows = tl.arange(0, C)
    time = first + rows
    end = tl.minimum(first + C, steps)
    live = time < end
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    of_v = tl.zeros([C, BV], dtype=tl.float32)
    place = ((batch * S + state) * blocks + block) * K * V
    for offset in range(0, K, BK):
        keys = offset + tl.arange(0, BK)
        k = rows_of(key, batch, state, steps, S, K, time, live, keys).to(tl.float32)
        if DECAY > 0:
            k = k * tl.exp(gates_from(decay, batch, state, steps, S, K, time, end, keys, DECAY))
        inside = (keys < K)[:, None] & (values < V)[None, :]
        matrix = tl.load(of_states + place + keys[:, None] * V + values[None, :], mask=inside, other=0.0)
        of_v += tl.dot(k.to(DOT), matrix.to(DOT), input_precision="ieee")
    for group in range(G):
        head = state * G + group
        row = (batch * S * G + head) * steps + time
        a = tl.load(scores + row[None, :] * C + rows[:, None], mask=live[None, :], other=0.0)
        of_o = rows_of(of_out, batch, head, steps, S * G, V, time, live, values)
        of_v += tl.dot(a.to(DOT), of_o.to(DOT), input_precision="ieee")
    row = (batch * steps + time) * S + state
    there = live[:, None] & (values < V)[None, :]
    tl.store(of_value + row[:, None] * V + values[None, :], of_v.to(of_value.dtype.element_ty), mask=there)


@triton.jit
def query_gradients(
    key, of_out, decay, states, of_scores, of_query, steps, blocks, S, G, K, V,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr,
    DOT: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Stores dq of R rows (all of a block unless DECAY is 2), one head and a tile of keys."""
    tiles = tl.cdiv(steps, R)
    which = tl.program_id(0) // tiles
    head = which % (S * G)
    batch, state = (which // (S * G)).to(tl.int64), head // G
    start = tl.program_id(0) % tiles * R
    block = start // C
    first = block * C
    later, earlier = start + tl.arange(0, R), first + tl.arange(0, C)
    end = tl.minimum(first + C, steps)
    live = later < end
    keys = tl.program_id(1) * BK + tl.arange(0, BK)
    of_q = tl.zeros([R, BK], dtype=tl.float32)
    place = ((batch * S + state) * blocks + block) * K * V
    for offset in range(0, V, BV):
        values = offset + tl.arange(0, BV)
        of_o = rows_of(of_out, batch, head, steps, S * G, V, later, live, values)
        inside = (keys < K)[None, :] & (values < V)[:, None]
        matrix = tl.load(states + place + keys[None, :] * V + values[:, None], mask=inside, other=0.0)
        of_q += tl.dot(of_o.to(DOT), matrix.to(DOT), input_precision="ieee")
    row = which.to(tl.int64) * steps + later
    of_a = tl.load(of_scores + row[:, None] * C + (earlier - first)[None, :], mask=live[:, None], other=0.0)
    if DECAY == 2:
        to = gates_to(decay, batch, state, steps, S, K, start, later, end, keys, DECAY, EXCLUSIVE)
        before = gates(decay, batch, state, steps, S, K, earlier, earlier < start, keys, DECAY)
        of_q = of_q * tl.exp(tl.sum(before, 0)[None, :])
        k = rows_of(key, batch, state, steps, S, K, earlier, earlier < start, keys).to(tl.float32)
        k = k * tl.exp(gates_from(decay, batch, state, steps, S, K, earlier, start, keys, DECAY))
        of_q += tl.dot(of_a.to(DOT), k.to(DOT), input_precision="ieee")
        of_q = of_q * tl.exp(to)
        between = tl.zeros([R, BK], dtype=tl.float32)
        for distance in range(R):
            near = live & (later - distance >= start)
            near_k = rows_of(key, batch, state, steps, S, K, later - distance, near, keys)
            weight = tl.sum(tl.where(earlier[None, :] == (later - distance)[:, None], of_a, 0.0), 1)
            of_q += weight[:, None] * near_k.to(tl.float32) * tl.exp(between)
            kept = near
            if EXCLUSIVE:
                kept = near & (distance > 0)
            between += gates(decay, batch, state, steps, S, K, later - distance, kept, keys, DECAY)
    else:
        if DECAY == 1:
            of_q = of_q * tl.exp(
                gates_to(decay, batch, state, steps, S, K, first, later, end, keys, DECAY, EXCLUSIVE)
            )
        k = rows_of(key, batch, state, steps, S, K, earlier, earlier < end, keys)
        of_q += tl.dot(of_a.to(DOT), k.to(DOT), input_precision="ieee")
    row = (batch * steps + later) * S * G + head
    there = live[:, None] & (keys < K)[None, :]
    tl.store(of_query + row[:, None] * K + keys[None, :], of_q.to(of_query.dtype.element_ty), mask=there)


@triton.jit
def key_gradients(
    query, value, decay, of_states, of_scores, of_key, steps, blocks, S, G, K, V,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr,
    DOT: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Stores dk of R rows (all of a block unless DECAY is 2), one state and a tile of keys."""
    tiles = tl.cdiv(steps, R)
    which = tl.program_id(0) // tiles
    state = which % S
    batch = (which // S).to(tl.int64)
    start = tl.program_id(0) % tiles * R
    block = start // C
    first = block * C
    earlier, later = start + tl.arange(0, R), first + tl.arange(0, C)
    end = tl.minimum(first + C, steps)
    behind = tl.minimum(start + R, steps)  # the step behind these rows
    live = earlier < end
    keys = tl.program_id(1) * BK + tl.arange(0, BK)
    of_k = tl.zeros([R, BK], dtype=tl.float32)
    place = ((batch * S + state) * blocks + block) * K * V
    for offset in range(0, V, BV):
        values = offset + tl.arange(0, BV)
        v = rows_of(value, batch, state, steps, S, V, earlier, live, values)
        inside = (keys < K)[None, :] & (values < V)[:, None]
        matrix = tl.load(of_states + place + keys[None, :] * V + values[:, None], mask=inside, other=0.0)
        of_k += tl.dot(v.to(DOT), matrix.to(DOT), input_precision="ieee")
    if DECAY == 2:
        after = gates(decay, batch, state, steps, S, K, later, (later >= behind) & (later < end), keys, DECAY)
        of_k = of_k * tl.exp(tl.sum(after, 0)[None, :])
        reach = gates_to(decay, batch, state, steps, S, K, behind, later, end, keys, DECAY, EXCLUSIVE)
        nearby = tl.zeros([R, BK], dtype=tl.float32)
    if DECAY == 1:
        of_k = of_k * tl.exp(gates_from(decay, batch, state, steps, S, K, earlier, end, keys, DECAY))
    for group in range(G):
        head = state * G + group
        row = (batch * S * G + head) * steps + later
        there = (later < end)[None, :]
        of_a = tl.load(of_scores + row[None, :] * C + (earlier - first)[:, None], mask=there, other=0.0)
        if DECAY == 2:
            distant = (later >= behind) & (later < end)
            q = rows_of(query, batch, head, steps, S * G, K, later, distant, keys).to(tl.float32)
            of_k += tl.dot(of_a.to(DOT), (q * tl.exp(reach)).to(DOT), input_precision="ieee")
            between = tl.zeros([R, BK], dtype=tl.float32)
            for distance in range(R):
                near = earlier + distance < behind
                g = gates(
                    decay, batch, state, steps, S, K, earlier + distance, near & (distance > 0), keys, DECAY
                )
                if not EXCLUSIVE:
                    between += g
                near_q = rows_of(query, batch, head, steps, S * G, K, earlier + distance, near, keys)
                weight = tl.sum(tl.where(later[None, :] == (earlier + distance)[:, None], of_a, 0.0), 1)
                nearby += weight[:, None] * near_q.to(tl.float32) * tl.exp(between)
                if EXCLUSIVE:
                    between += g
        else:
            q = rows_of(query, batch, head, steps, S * G, K, later, later < end, keys)
            of_k += tl.dot(of_a.to(DOT), q.to(DOT), input_precision="ieee")
    if DECAY == 2:
        of_k = (
            of_k * tl.exp(gates_from(decay, batch, state, steps, S, K, earlier, behind, keys, DECAY)) + nearby
        )
    row = (batch * steps + earlier) * S + state
    there = live[:, None] & (keys < K)[None, :]
    tl.store(of_key + row[:, None] * K + keys[None, :], of_k.to(of_key.dtype.element_ty), mask=there)
