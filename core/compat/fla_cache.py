"""`fla.models.utils.Cache`: what each layer keeps between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Entry = dict[str, Any]
_KINDS = ("recurrent_state", "attn_state", "conv_state", "ffn_state")


class Cache:
    """Holds for each layer a dictionary with `recurrent_state`, `attn_state`, `conv_state` and `ffn_state`."""

    def __init__(self, seen_tokens: int = 0):
        self.states: list[Entry] = []
        self._before = seen_tokens
        self._seen: list[int] = []

    def __getitem__(self, layer_idx: int) -> Entry:
        return self.states[layer_idx]

    def __len__(self) -> int:
        return len(self.states)

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Returns how many tokens were seen by that layer."""
        layer = layer_idx or 0
        return self._seen[layer] if layer < len(self._seen) else self._before

    def update(
        self,
        recurrent_state: Any = None,
        attn_state: tuple[Tensor, ...] | None = None,
        conv_state: Any = None,
        ffn_state: Any = None,
        layer_idx: int = 0,
        offset: int | None = 1,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> Entry:
        """Takes the new states of a layer. ``attn_state``, new keys and values [B, T, ...], is put behind those held.

        With ``cache_kwargs["window_size"]`` only so many are kept. Returns the states of the layer; its attn_state is all that
        the new queries may see.
        """
        while len(self.states) <= layer_idx:
            self.states.append(dict.fromkeys(_KINDS))
            self._seen.append(self._before)
        self._seen[layer_idx] += offset or 0
        entry = self.states[layer_idx]
        for kind, state in zip(_KINDS, (recurrent_state, None, conv_state, ffn_state), strict=True):
            if state is not None:
                entry[kind] = state
        if attn_state is None:
            return entry
        held = entry["attn_state"]
        whole = (
            attn_state
            if held is None
            else tuple(torch.cat(pair, 1) for pair in zip(held, attn_state, strict=True))
        )
        window = (cache_kwargs or {}).get("window_size")
        entry["attn_state"] = whole if window is None else tuple(x[:, -window:] for x in whole)
        return {**entry, "attn_state": whole}


def get_layer_cache(module: Any, past_key_values: Cache | None) -> Entry | None:
    if past_key_values is None or len(past_key_values) <= module.layer_idx:
        return None
    return past_key_values[module.layer_idx]


def update_layer_cache(module: Any, past_key_values: Cache | None, **states: Any) -> Cache | None:
    if past_key_values is not None:
        past_key_values.update(layer_idx=module.layer_idx, **states)
    return past_key_values
