"""Functions of `fla.ops` (flash-linear-attention 0.6) in the recurrences of `models/`, so that model code that calls its GPU
kernels runs and can be compiled for any target.

Parameters stand in fla's order and have its names. Texts of different lengths one after another (``cu_seqlens``) are taken apart
for the recurrence and put together again, see `packed`. What a recurrence of ours cannot do is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikingbrain.compat.packed import each_text
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
    "cu_seqlens",
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
    return _attend(
        "chunk_gla", rest, q, k, v, g, "key", scale, initial_state, output_final_state, state_v_first
    )


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
    if "g" in rest:  # the published SpikingBrain layer names the gate so, in both of its functions
        gk = rest.pop("g")
    if gk is not None and gv is not None:
        raise UnsupportedOp(
            "fused_recurrent_gla with both gk and gv", why="one state has one gate", hint="one of them"
        )
    return _attend(
        "fused_recurrent_gla",
        rest,
        q,
        k,
        v,
        gv if gk is None else gk,
        "key" if gk is not None else "value",
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        reverse,
    )


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
    if g_gamma is not None:
        g = g_gamma.expand(k.shape[:3]) if g is None else g + g_gamma
    return _attend(
        "simple_gla",
        rest,
        q,
        k,
        v,
        g,
        "head",
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        reverse,
    )


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    **rest: Any,
) -> Result:
    """The second result, the weights, is None: they are never made."""
    return chunk_simple_gla(q, k, v, g, scale=scale, **_no_weights(output_attentions, rest))


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
    if not normalize:
        return _attend(
            "linear_attn",
            rest,
            q,
            k,
            v,
            None,
            "none",
            scale,
            initial_state,
            output_final_state,
            reverse=reverse,
        )
    packing = _checked("linear_attn", rest)
    if packing is not None:
        raise UnsupportedOp(
            "fla's linear_attn with cu_seqlens and normalize",
            why="behind a text the normaliser is 0",
            hint="normalize=False, or texts of one length",
        )
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
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    return fused_recurrent_retention(
        q, k, v, scale, initial_state, output_final_state, False, state_v_first, **rest
    )


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
    states = torch.arange(k.shape[2], device=k.device, dtype=wide(k.dtype))
    g = torch.log1p(-torch.exp2(-5 - states)).expand(k.shape[:3])
    return _attend(
        "retention",
        rest,
        q,
        k,
        v,
        g,
        "head",
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        reverse,
    )


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    **rest: Any,
) -> Result:
    """The second result, the weights, is None: they are never made."""
    return chunk_retention(q, k, v, scale, **_no_weights(output_attentions, rest))


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
    states = torch.arange(k.shape[2], device=k.device, dtype=wide(k.dtype))
    g = states * (-8 / max(k.shape[2], 1) * (1 - layer_idx / num_layers))
    return fused_recurrent_simple_gla(
        q, k, v, None, g, scale, initial_state, output_final_state, reverse, **rest
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
    state_v_first: bool = False,
    **rest: Any,
) -> Result:
    packing = _checked("delta_rule", rest)
    q, k, beta = _for_delta("delta_rule", q, k, v, beta, use_qk_l2norm_in_kernel)
    state = _state(initial_state, state_v_first)

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Result:
        return recurrences.delta_rule(q, k, v, beta, scale, state, output_final_state)

    return _turned(each_text(run, packing, q, k, v, beta), state_v_first)


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
    packing = _checked(name, {**rest, "gk": gk, "gv": gv})
    if g is None:
        raise UnsupportedOp(f"fla's {name} without g", hint="delta_rule, which has no gate")
    q, k, beta = _for_delta(
        name, q, k, v, beta, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    if use_gate_in_kernel:
        g = _gate(name, g, A_log, dt_bias)
    state = _state(initial_state, state_v_first)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Result:
        return recurrences.gated_delta_rule(q, k, v, g, beta, scale, state, output_final_state)

    return _turned(each_text(run, packing, q, k, v, g, beta), state_v_first)


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
    packing = _checked("kda", rest)
    q, k, beta = _for_delta(
        "kda", q, k, v, beta, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    if use_gate_in_kernel:
        heads, size = g.shape[2:]
        bias = None if dt_bias is None else dt_bias.view(heads, size)
        g = _gate("kda", g, None if A_log is None else A_log.view(heads, 1), bias, lower_bound)
    state = _state(initial_state, state_v_first)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Result:
        return recurrences.kda(q, k, v, g, beta, scale, state, output_final_state)

    return _turned(each_text(run, packing, q, k, v, g, beta), state_v_first)


def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    reverse: bool = False,
    **rest: Any,
) -> Result:
    """A decay for each key channel and a rank-one part: S_t = Diag(exp gk_t) S_(t-1) + b_t (a_t^T S_(t-1)) + k_t v_t^T."""
    packing = _checked("dplr_delta_rule", rest)
    state = _state(initial_state, state_v_first)

    def run(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor | None) -> Result:
        return attend(
            q,
            k,
            v,
            gk,
            "none" if gk is None else "key",
            erase=b,
            predict=a,
            reverse=reverse,
            scale=scale,
            initial_state=state,
            output_final_state=output_final_state,
        )

    return _turned(each_text(run, packing, q, k, v, a, b, gk), state_v_first)


def iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Result:
    """The same without decay."""
    gk = torch.zeros_like(k)
    return dplr_delta_rule(q, k, v, a, b, gk, scale, initial_state, output_final_state, **rest)


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Result:
    """RWKV-7: `dplr_delta_rule` with log decays w and, by default, no scale."""
    return dplr_delta_rule(r, k, v, a, b, w, scale, initial_state, output_final_state, **rest)


def rwkv6(
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
    packing = _checked("rwkv6", rest)

    def run(r: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Result:
        return recurrences.rwkv6(r, k, v, w, u, scale, initial_state, output_final_state, reverse)

    return each_text(run, packing, r, k, v, w)


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
    packing = _checked("gsa", rest)
    if g is None:
        return chunk_abc(q, k, v, s, scale, initial_state, output_final_state, cu_seqlens=packing)

    def run(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> Result:
        return recurrences.gsa(q, k, v, s, g, scale, initial_state, output_final_state)

    o, last = each_text(run, packing, q, k, v, s, g)
    return o, (None, None) if last is None else last


def chunk_abc(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Result:
    if initial_state is not None or output_final_state:
        raise UnsupportedOp(
            "fla's gsa or abc with a state and no gate", why="the weights so far are not part of its state"
        )

    def run(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Result:
        return recurrences.abc(q, k, v, s, scale), (None, None)

    return each_text(run, _checked("abc", rest), q, k, v, s)


def hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Result:
    packing = _checked("hgrn", rest)

    def run(x: Tensor, g: Tensor) -> Result:
        return recurrences.hgrn(x, g, initial_state, output_final_state)

    return each_text(run, packing, x, g)


def _attend(
    name: str,
    rest: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    axis: str,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool = False,
    reverse: bool = False,
) -> Result:
    """What has keys, values and a gate along ``axis``, or none."""
    packing = _checked(name, rest)
    state = _state(initial_state, state_v_first)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Result:
        return attend(
            q,
            k,
            v,
            g,
            "none" if g is None else axis,
            scale=scale,
            initial_state=state,
            output_final_state=output_final_state,
            reverse=reverse,
        )

    return _turned(each_text(run, packing, q, k, v, g), state_v_first)


def _checked(name: str, rest: dict[str, Any]) -> Tensor | None:
    """Returns the option cu_seqlens; raises UnsupportedOp for any other that is set and changes what is computed."""
    for option, value in rest.items():
        if option not in _HOW and value is not None and value is not False:
            raise UnsupportedOp(f"fla's {name} with {option}", why="no op of ours computes that")
    packing: Tensor | None = rest.get("cu_seqlens")
    return packing


def _no_weights(wanted: bool, rest: dict[str, Any]) -> dict[str, Any]:
    return {**rest, "output_attentions": wanted}


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
