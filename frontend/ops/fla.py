"""Functions of `fla.ops` (flash-linear-attention 0.6) in the recurrences of `models/`, so that model code that calls its GPU
kernels can be compiled for any target.

Parameters stand in fla's order and have its names. What a recurrence of ours cannot do (packed texts of different lengths,
above all) is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikingbrain.errors import UnsupportedOp
from spikingbrain.models import recurrences
from spikingbrain.models.recurrences.attend import attend
from spikingbrain.models.recurrences.dtypes import wide

Result = tuple[Tensor, Any]

# Options that only say how fla computes, not what.
_HOW = {
    "chunk_size",
    "checkpoint_level",
    "disable_recompute",
    "safe_gate",
    "use_graph",
    "max_num_seqs",
    "cu_seqlens_cpu",
}
_NORM_EPSILON = 1e-6


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    _refuse("chunk_gla", rest)
    state = _state(initial_state, state_v_first)
    return _turned(recurrences.gla(q, k, v, g, scale, state, output_final_state), state_v_first)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    _refuse("fused_recurrent_gla", rest)
    if gk is not None and gv is not None:
        raise UnsupportedOp(
            "fused_recurrent_gla with both gk and gv", why="one state has one gate", hint="one of them"
        )
    result = attend(
        q,
        k,
        v,
        gv if gk is None else gk,
        "key" if gk is not None else "none" if gv is None else "value",
        scale=scale,
        initial_state=_state(initial_state, state_v_first),
        output_final_state=output_final_state,
        reverse=reverse,
    )
    return _turned(result, state_v_first)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    return fused_recurrent_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, False, state_v_first, **rest
    )


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    """The gate is the sum of g [B, T, H] and the constant g_gamma [H]."""
    _refuse("simple_gla", rest)
    if g_gamma is not None:
        g = g_gamma.expand(k.shape[:3]) if g is None else g + g_gamma
    result = attend(
        q,
        k,
        v,
        g,
        "none" if g is None else "head",
        scale=scale,
        initial_state=_state(initial_state, state_v_first),
        output_final_state=output_final_state,
        reverse=reverse,
    )
    return _turned(result, state_v_first)


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    normalize: bool = True,
    **rest: Any,
) -> Result:
    return fused_recurrent_linear_attn(
        q, k, v, scale, initial_state, output_final_state, False, normalize, **rest
    )


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    **rest: Any,
) -> Result:
    """With ``normalize`` the state is a pair: the matrices and the running sum of keys [B, 1, H, K]."""
    _refuse("linear_attn", rest)
    if not normalize:
        return recurrences.linear_attention(q, k, v, scale, initial_state, output_final_state, reverse)
    state = initial_state
    if state is not None:
        keys = state[1].squeeze(1) if isinstance(state, tuple) else state.new_zeros(state.shape[:3])
        state = (state[0] if isinstance(state, tuple) else state, keys)
    o, last = recurrences.normalised_linear_attention(q, k, v, scale, state, True, reverse)
    assert last is not None
    return o, (last[0] if output_final_state else None, last[1].unsqueeze(1))


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Result:
    _refuse("chunk_retention", rest)
    return recurrences.retention(q, k, v, scale, initial_state, output_final_state)


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    _refuse("fused_recurrent_retention", rest)
    state = _state(initial_state, state_v_first)
    return _turned(recurrences.retention(q, k, v, scale, state, output_final_state, reverse), state_v_first)


def lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    **rest: Any,
) -> Result:
    _refuse("lightning_attn", rest)
    return recurrences.lightning_attention(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, reverse
    )


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **rest: Any,
) -> Result:
    _refuse("delta_rule", rest)
    q, k, beta = _for_delta("delta_rule", q, k, v, beta, use_qk_l2norm_in_kernel)
    return recurrences.delta_rule(q, k, v, beta, scale, initial_state, output_final_state)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    """q and k [B, T, H, K]; v [B, T, HV, V], g and beta [B, T, HV], where HV is a multiple of H."""
    return fused_recurrent_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        **rest,
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    """``use_gate_in_kernel``: the gate is -exp(A_log) softplus(g + dt_bias), with A_log and dt_bias [HV]."""
    name = "gated_delta_rule"
    _refuse(name, {**rest, "gk": gk, "gv": gv})
    if g is None:
        raise UnsupportedOp(f"fla's {name} without g", hint="delta_rule, which has no gate")
    q, k, beta = _for_delta(
        name, q, k, v, beta, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    if use_gate_in_kernel:
        g = _gate(name, g, A_log, dt_bias)
    state = _state(initial_state, state_v_first)
    return _turned(
        recurrences.gated_delta_rule(q, k, v, g, beta, scale, state, output_final_state), state_v_first
    )


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    """``use_gate_in_kernel``: the gate is -exp(A_log) softplus(g + dt_bias), with A_log [HV] and dt_bias [HV K], or, if
    ``lower_bound`` is given, lower_bound sigmoid(exp(A_log) (g + dt_bias)). What follows beta is passed by name: fla's two
    functions differ in the order."""
    _refuse("kda", rest)
    q, k, beta = _for_delta(
        "kda", q, k, v, beta, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    if use_gate_in_kernel:
        heads, size = g.shape[2:]
        bias = None if dt_bias is None else dt_bias.view(heads, size)
        g = _gate("kda", g, None if A_log is None else A_log.view(heads, 1), bias, lower_bound)
    state = _state(initial_state, state_v_first)
    return _turned(recurrences.kda(q, k, v, g, beta, scale, state, output_final_state), state_v_first)


def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Result:
    _refuse("chunk_rwkv6", rest)
    return recurrences.rwkv6(r, k, v, w, u, scale, initial_state, output_final_state)


def fused_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    **rest: Any,
) -> Result:
    _refuse("fused_recurrent_rwkv6", rest)
    return recurrences.rwkv6(r, k, v, w, u, scale, initial_state, output_final_state, reverse)


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Result:
    _refuse("gsa", rest)
    if g is not None:
        o, last = recurrences.gsa(q, k, v, s, g, scale, initial_state, output_final_state)
        return o, (None, None) if last is None else last
    if initial_state is not None or output_final_state:
        raise UnsupportedOp(
            "fla's gsa with a state and no gate", why="the weights so far are not part of its state"
        )
    return recurrences.abc(q, k, v, s, scale), (None, None)


def hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Result:
    _refuse("hgrn", rest)
    return recurrences.hgrn(x, g, initial_state, output_final_state)


def _refuse(name: str, rest: dict[str, Any]) -> None:
    """Raises UnsupportedOp for an option that is set and changes what is computed."""
    for option, value in rest.items():
        if option not in _HOW and value is not None and value is not False:
            raise UnsupportedOp(
                f"fla's {name} with {option}",
                why="no op of ours computes that",
                hint="texts of one length in a batch, and no " + option,
            )


def _state(state: Tensor | None, transposed: bool) -> Tensor | None:
    return state.mT if state is not None and transposed else state


def _turned(result: tuple[Tensor, Tensor | None], transposed: bool) -> Result:
    return result[0], _state(result[1], transposed)


def _for_delta(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    normalise: bool,
    sigmoid: bool = False,
    negative: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q and k for each value head, normalised if asked for, and beta as a factor."""
    if normalise:
        q, k = (_normalised(x) for x in (q, k))
    shared = v.shape[2] // q.shape[2]
    if shared > 1:
        q, k = q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    if beta.ndim != 3:
        raise UnsupportedOp(
            f"fla's {name} with a beta for each value channel", why="beta is a number for each head here"
        )
    beta = beta.sigmoid() if sigmoid else beta
    return q, k, 2 * beta if negative else beta


def _normalised(x: Tensor) -> Tensor:
    high = x.to(wide(x.dtype))
    return (high * torch.rsqrt(high.square().sum(-1, keepdim=True) + _NORM_EPSILON)).to(x.dtype)


def _gate(
    name: str, g: Tensor, A_log: Tensor | None, bias: Tensor | None, lower_bound: float | None = None
) -> Tensor:
    g = g.to(wide(g.dtype))
    g = g if bias is None else g + bias
    if lower_bound is not None:
        return lower_bound * (g if A_log is None else A_log.exp() * g).sigmoid()
    if A_log is None:
        raise UnsupportedOp(
            f"fla's {name} with use_gate_in_kernel and no A_log", hint="A_log, one number for each head"
        )
    return -A_log.exp() * F.softplus(g)


TABLE: dict[str, tuple[str, Callable[..., Result]]] = {
    "chunk_gla": ("fla.ops.gla", gla),
    "fused_chunk_gla": ("fla.ops.gla", gla),
    "fused_recurrent_gla": ("fla.ops.gla", fused_recurrent_gla),
    "chunk_simple_gla": ("fla.ops.simple_gla", chunk_simple_gla),
    "fused_recurrent_simple_gla": ("fla.ops.simple_gla", fused_recurrent_simple_gla),
    "chunk_linear_attn": ("fla.ops.linear_attn", chunk_linear_attn),
    "fused_recurrent_linear_attn": ("fla.ops.linear_attn", fused_recurrent_linear_attn),
    "chunk_retention": ("fla.ops.retention", chunk_retention),
    "fused_recurrent_retention": ("fla.ops.retention", fused_recurrent_retention),
    "chunk_lightning_attn": ("fla.ops.lightning_attn", lightning_attn),
    "fused_recurrent_lightning_attn": ("fla.ops.lightning_attn", lightning_attn),
    "chunk_delta_rule": ("fla.ops.delta_rule", delta_rule),
    "fused_recurrent_delta_rule": ("fla.ops.delta_rule", delta_rule),
    "chunk_gated_delta_rule": ("fla.ops.gated_delta_rule", chunk_gated_delta_rule),
    "fused_recurrent_gated_delta_rule": ("fla.ops.gated_delta_rule", fused_recurrent_gated_delta_rule),
    "chunk_kda": ("fla.ops.kda", kda),
    "fused_recurrent_kda": ("fla.ops.kda", kda),
    "chunk_rwkv6": ("fla.ops.rwkv6", chunk_rwkv6),
    "fused_recurrent_rwkv6": ("fla.ops.rwkv6", fused_recurrent_rwkv6),
    "chunk_gsa": ("fla.ops.gsa", gsa),
    "fused_recurrent_gsa": ("fla.ops.gsa", gsa),
    "chunk_hgrn": ("fla.ops.hgrn", hgrn),
    "fused_recurrent_hgrn": ("fla.ops.hgrn", hgrn),
}
