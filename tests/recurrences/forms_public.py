"""Recurrences as published: functions of transformers, unmodified, called as its models call them."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from written import register

RAISED = "linear_recurrence"
TRANSFORMERS = "transformers.models"
Function = Callable[..., Any]


def public(
    family: str, writing: str, source: str, inputs: str, expected: str, **more: Any
) -> Callable[[Function], Function]:
    """Puts a form into the table that calls ``source`` ("module:function"), which it gets as its first argument.

    The library is imported when the form is made: that takes seconds.
    """

    def keep(written: Function) -> Function:
        def make() -> nn.Module:
            module, _, name = source.partition(":")
            # beneath the decorators that would call kernels for NVIDIA where they are installed
            function = inspect.unwrap(getattr(importlib.import_module(f"{TRANSFORMERS}.{module}"), name))
            made = nn.Module()
            made.forward = functools.partial(written, function)
            return made

        register(written.__name__, family, f"transformers: {writing}", make, inputs, expected, **more)
        return written

    return keep


DELTA = "q:BTHK k:BTHK v:BTQV beta:BTQ:factor g:BTQ:log"
MODELING = "qwen3_next.modeling_qwen3_next"


@public(
    "Gated DeltaNet",
    "Qwen3-Next, token by token",
    f"{MODELING}:torch_recurrent_gated_delta_rule",
    DELTA,
    RAISED,
)
def qwen3_next(f: Function, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Any:
    return f(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)


@public(
    "Gated DeltaNet",
    "Qwen3-Next, in chunks",
    f"{MODELING}:torch_chunk_gated_delta_rule",
    DELTA,
    "loop + unit_lower_inverse",
    export="has size 64 along axis 1, expected 11",
)
def qwen3_next_chunks(f: Function, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Any:
    return f(q, k, v, g, beta, chunk_size=2, output_final_state=True, use_qk_l2norm_in_kernel=True)


@public(
    "KDA",
    "Kimi Linear, token by token",
    "kimi_linear.modeling_kimi_linear:recurrent_kimi_delta_attention",
    "q:BTHK k:BTHK v:BTHV beta:BTH:factor g:BTHK:log state:BHKV",
    RAISED,
)
def kimi_linear(f: Function, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> Any:
    return f(q, k, v, g, beta, state, output_final_state=True, use_qk_l2norm_in_kernel=True)


@public(
    "Mamba",
    "Mamba, without its kernels",
    "mamba.modeling_mamba:mamba_selective_scan",
    "x:BDT dt:BDT a:DN:rate b:BNT c:BNT d:D z:BDT",
    "selective_scan",
)
def mamba_transformers(
    f: Function, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor
) -> Any:
    return f(x, dt, a, b, c, d, z, delta_softplus=True, return_last_state=True)


@public(
    "Mamba-2",
    "Mamba-2, in chunks",
    "mamba2.modeling_mamba2:mamba2_chunk_scan",
    "x:BTHV dt:BTH a:H:rate b:BTHK c:BTHK d:H",
    RAISED,
)
def mamba2_transformers(
    f: Function, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
) -> Any:
    return f(x, dt, a, b, c, chunk_size=4, D=d, dt_softplus=True, return_final_states=True)


@public(
    "RWKV-4",
    "RWKV, without its kernel",
    "rwkv.modeling_rwkv:rwkv_linear_attention_cpu",
    "decay:D first:D k:BTD v:BTD",
    "pointwise",
)
def rwkv_transformers(f: Function, decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Any:
    return f(decay, first, k, v, return_state=True)


@public(
    "RG-LRU",
    "RecurrentGemma",
    "recurrent_gemma.modeling_recurrent_gemma:RecurrentGemmaRglru",
    "x:BTD a:BTD:factor starts:BT:starts",
    "linear_scan",
)
def recurrent_gemma(f: Any, x: Tensor, a: Tensor, starts: Tensor) -> Any:
    return f._rnn_scan(None, x, a, starts.bool()[..., None], None)


@public(
    "mLSTM",
    "xLSTM, token by token",
    "xlstm.modeling_xlstm:mlstm_recurrent_sequence_native",
    "q:BHTK k:BHTK v:BHTV i:BHT f:BHT",
    "loop",
)
def xlstm(function: Function, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Any:
    return function(q, k, v, i, f, return_last_states=True)
