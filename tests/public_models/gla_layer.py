"""A layer of gated linear attention in the style of the fla library: short convolutions, packed texts, a gated norm."""

import torch.nn.functional as F
from fla.layers.utils import get_unpad_data, index_first_axis, pad_input
from fla.modules import FusedRMSNormGated, ShortConvolution
from fla.ops.gla import chunk_gla, fused_chunk_gla, fused_recurrent_gla
from torch import nn


class GatedLinearAttention(nn.Module):
    def __init__(self, mode="chunk", hidden_size=32, num_heads=2, conv_size=4, layer_idx=0):
        super().__init__()
        self.mode, self.num_heads, self.layer_idx = mode, num_heads, layer_idx
        self.head_k_dim, self.head_v_dim = hidden_size // 2 // num_heads, hidden_size // num_heads
        key_dim, value_dim = hidden_size // 2, hidden_size
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.q_conv1d = ShortConvolution(hidden_size=key_dim, kernel_size=conv_size, activation="silu")
        self.k_conv1d = ShortConvolution(hidden_size=key_dim, kernel_size=conv_size, activation="silu")
        self.v_conv1d = ShortConvolution(hidden_size=value_dim, kernel_size=conv_size, activation="silu")
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, 16, bias=False), nn.Linear(16, key_dim, bias=True)
        )
        self.g_norm_swish_gate = FusedRMSNormGated(
            hidden_size=self.head_v_dim, elementwise_affine=True, eps=1e-5
        )
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        batch_size, q_len, _ = hidden_states.shape
        mode = "fused_recurrent" if q_len == 1 else self.mode
        last_state = None
        if past_key_values is not None and len(past_key_values) > self.layer_idx:
            last_state = past_key_values[self.layer_idx]
        cu_seqlens = kwargs.get("cu_seqlens")
        if attention_mask is not None:
            indices, cu_seqlens, _ = get_unpad_data(attention_mask[:, -q_len:])
            hidden_states = index_first_axis(hidden_states.flatten(0, 1), indices).unsqueeze(0)

        states = last_state["conv_state"] if last_state is not None else (None, None, None)
        results = [
            conv(x=proj(hidden_states), cache=state, output_final_state=use_cache, cu_seqlens=cu_seqlens)
            for conv, proj, state in zip(
                (self.q_conv1d, self.k_conv1d, self.v_conv1d),
                (self.q_proj, self.k_proj, self.v_proj),
                states,
                strict=True,
            )
        ]
        (q, k, v), conv_state = zip(*results, strict=True)
        gk = self.gk_proj(hidden_states)
        q, k, v, gk = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v, gk))
        gk = F.logsigmoid(gk) / 16

        recurrent_state = last_state["recurrent_state"] if last_state is not None else None
        if mode == "fused_recurrent":
            o, recurrent_state = fused_recurrent_gla(
                q=q,
                k=k,
                v=v,
                gk=gk,
                initial_state=recurrent_state,
                output_final_state=use_cache,
                state_v_first=True,
                cu_seqlens=cu_seqlens,
            )
        else:
            kernel = fused_chunk_gla if mode == "fused_chunk" else chunk_gla
            o, recurrent_state = kernel(
                q=q,
                k=k,
                v=v,
                g=gk,
                initial_state=recurrent_state,
                output_final_state=use_cache,
                state_v_first=True,
                cu_seqlens=cu_seqlens,
            )
        if past_key_values is not None:
            past_key_values.update(
                recurrent_state=recurrent_state,
                conv_state=conv_state,
                layer_idx=self.layer_idx,
                offset=q_len,
            )
        g = self.g_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        o = self.o_proj(self.g_norm_swish_gate(o, g).flatten(-2))
        if attention_mask is not None:
            o = pad_input(o.squeeze(0), indices, batch_size, q_len)
        return o, None, past_key_values
