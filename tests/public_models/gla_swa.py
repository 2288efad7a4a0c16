"""A hybrid language model as people publish them for NVIDIA GPUs: gated linear attention and window attention by turns.

Names of parameters, imports and calls are those of SpikingBrain-7B's kind of file; nothing here knows of this project.
"""

import torch
import torch.nn.functional as F
from fla.layers.utils import pad_input, unpad_input
from fla.models.utils import Cache
from fla.modules import FusedCrossEntropyLoss, RMSNorm, RotaryEmbedding
from fla.modules.activations import ACT2FN, swiglu
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import nn


class GatedLinearAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config["head_dim"]
        self.groups = config["num_heads"] // config["num_kv_heads"]
        width, kv = config["hidden_size"], config["num_kv_heads"] * self.head_dim
        self.q_proj = nn.Linear(width, config["num_heads"] * self.head_dim, bias=True)
        self.k_proj = nn.Linear(width, kv, bias=True)
        self.v_proj = nn.Linear(width, kv, bias=True)
        self.gk_proj = nn.Sequential(
            nn.Linear(width, config["gate_low_rank_dim"], bias=False),
            nn.Linear(config["gate_low_rank_dim"], kv, bias=True),
        )
        self.g_norm = RMSNorm(hidden_size=self.head_dim, eps=config["norm_eps"], dtype=torch.float32)
        self.o_proj = nn.Linear(config["num_heads"] * self.head_dim, width, bias=False)
        self.feature_map_fn = ACT2FN["relu"]

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        batch_size, q_len, _ = hidden_states.shape
        last_state = None
        if past_key_values is not None and len(past_key_values) > self.layer_idx:
            last_state = past_key_values[self.layer_idx]
        q, k, v, gk = (
            f(hidden_states).view(batch_size, q_len, -1, self.head_dim)
            for f in (self.q_proj, self.k_proj, self.v_proj, self.gk_proj)
        )
        k, v, gk = (x.repeat_interleave(self.groups, dim=2) for x in (k, v, gk))
        q, k = self.feature_map_fn(q), self.feature_map_fn(k)
        gk = F.logsigmoid(gk) / 16
        if attention_mask is not None:  # padding is on the left
            mask = attention_mask[:, -q_len:, None, None]
            v, gk = v.mul(mask), gk.mul(mask)
        recurrent_state = last_state["recurrent_state"] if last_state is not None else None
        if q_len == 1:
            o, recurrent_state = fused_recurrent_gla(
                q=q, k=k, v=v, gk=gk, initial_state=recurrent_state, output_final_state=use_cache
            )
        else:
            o, recurrent_state = chunk_gla(
                q=q, k=k, v=v, g=gk, initial_state=recurrent_state, output_final_state=use_cache
            )
        if past_key_values is not None:
            past_key_values.update(recurrent_state=recurrent_state, layer_idx=self.layer_idx, offset=q_len)
        o = self.g_norm(o).reshape(batch_size, q_len, -1)
        return self.o_proj(o), None, past_key_values


class SlidingWindowAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config["head_dim"]
        self.window_size = config["window_size"]
        width, kv = config["hidden_size"], config["num_kv_heads"] * self.head_dim
        self.q_proj = nn.Linear(width, config["num_heads"] * self.head_dim, bias=True)
        self.k_proj = nn.Linear(width, kv, bias=True)
        self.v_proj = nn.Linear(width, kv, bias=True)
        self.o_proj = nn.Linear(config["num_heads"] * self.head_dim, width, bias=False)
        self.rotary = RotaryEmbedding(dim=self.head_dim, base=config["rope_theta"])

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        batch_size, q_len, _ = hidden_states.shape
        q, k, v = (
            f(hidden_states).view(batch_size, q_len, -1, self.head_dim)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        seqlen_offset, max_seqlen = 0, q_len
        if past_key_values is not None:
            seqlen_offset = past_key_values.get_seq_length(self.layer_idx)
            max_seqlen = q_len + seqlen_offset
        if attention_mask is not None:
            seqlen_offset = seqlen_offset + attention_mask.sum(-1) - attention_mask.shape[-1]
        q, k = self.rotary(q, k, seqlen_offset=seqlen_offset, max_seqlen=max_seqlen)
        if past_key_values is not None:
            k, v = past_key_values.update(
                attn_state=(k.flatten(-2, -1), v.flatten(-2, -1)),
                layer_idx=self.layer_idx,
                offset=q_len,
                cache_kwargs=dict(window_size=self.window_size),
            )["attn_state"]
            k, v = (x.view(batch_size, x.shape[1], -1, self.head_dim) for x in (k, v))
        window = (self.window_size - 1, 0)
        if attention_mask is not None:
            mask = attention_mask[:, -k.shape[1] :]
            q, (k, v), indices_q, (cu_q, cu_k), (max_q, max_k) = unpad_input(q, (k, v), mask, q_len)
            o = flash_attn_varlen_func(
                q,
                k,
                v,
                cu_seqlens_q=cu_q,
                cu_seqlens_k=cu_k,
                max_seqlen_q=max_q,
                max_seqlen_k=max_k,
                causal=True,
                window_size=window,
            )
            o = pad_input(o, indices_q, batch_size, q_len)
        else:
            o = flash_attn_func(q, k, v, causal=True, window_size=window)
        return self.o_proj(o.reshape(batch_size, q_len, -1)), None, past_key_values


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        kind = SlidingWindowAttention if layer_idx % 2 else GatedLinearAttention
        self.attn_norm = RMSNorm(config["hidden_size"], eps=config["norm_eps"])
        self.attn = kind(config, layer_idx)
        self.mlp_norm = RMSNorm(config["hidden_size"], eps=config["norm_eps"])
        self.mlp = MLP(config)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        residual = hidden_states
        hidden_states, attentions, past_key_values = self.attn(
            self.attn_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        hidden_states, residual = self.mlp_norm(hidden_states, residual, True)
        return residual + self.mlp(hidden_states), attentions, past_key_values


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Block(config, i) for i in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], eps=config["norm_eps"])


class GLASWAForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = Model(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(
        self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, labels=None, **kwargs
    ):
        if use_cache and past_key_values is None:
            past_key_values = Cache()
        hidden_states = self.model.embeddings(input_ids)
        for layer in self.model.layers:
            hidden_states, _, past_key_values = layer(
                hidden_states, attention_mask, past_key_values=past_key_values, use_cache=use_cache
            )
        logits = self.lm_head(self.model.norm(hidden_states))
        if labels is None:
            return logits, past_key_values
        labels = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), 1)
        return FusedCrossEntropyLoss()(logits.view(labels.numel(), -1), labels.view(-1)), past_key_values
