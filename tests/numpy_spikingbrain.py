"""SpikingBrain in numpy, token by token, written from the technical report: it shares no line with `models/`.

Weights are a mapping from parameter names to float64 arrays. Everything is done the slow way: each token looks at the
list of all tokens before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def logits(w: Mapping[str, Array], config: Any, tokens: list[int]) -> Array:
    """Returns the logits [T, C] of one text."""
    x = np.stack([w["embedding.weight"][t] for t in tokens])
    if config.sinks:
        x = np.concatenate([w["sinks"], x])
    for i, layer in enumerate(config.layers):
        prefix = f"blocks.{i}."
        w_block = {name.removeprefix(prefix): a for name, a in w.items() if name.startswith(prefix)}
        x = x + attention(
            w_block, config, layer, rms_norm(x, w_block["attention_norm.weight"], config.norm_eps)
        )
        x = x + feed_forward(
            w_block, config, layer, rms_norm(x, w_block["feed_forward_norm.weight"], config.norm_eps)
        )
    x = rms_norm(x[config.sinks :], w["norm.weight"], config.norm_eps)
    return x @ w["embedding.weight" if config.tied_head else "head.weight"].T


def attention(w: Mapping[str, Array], config: Any, layer: Any, x: Array) -> Array:
    both = layer.linear and layer.softmax
    T, D = len(x), config.head_size
    share = config.heads // config.key_heads

    def project(name: str, which: str) -> Array:
        y = x @ w[f"attention.{which}.{name}.weight"].T + w[f"attention.{which}.{name}.bias"]
        y = y.reshape(T, -1, D)
        return (
            y if name == "query" else np.repeat(y, share, axis=1)
        )  # a key head serves neighbouring query heads

    def back(o: Array, which: str) -> Array:
        return o.reshape(T, -1) @ w[f"attention.{which}.output.weight"].T

    own = "linear_projections" if both and config.separate_projections else "projections"
    outputs = []
    if layer.linear:
        q, k, v = (project(name, own) for name in ("query", "key", "value"))
        if config.gate == "tied":
            decay = 1 - sigmoid(k)
        else:
            gate = x @ w["attention.linear.gate.0.weight"].T @ w["attention.linear.gate.1.weight"].T
            gate = gate + w["attention.linear.gate.1.bias"]
            decay = np.repeat((sigmoid(gate) ** (1 / 16)).reshape(T, -1, D), share, axis=1)
        of = sigmoid if config.feature_map == "sigmoid" else lambda y: np.maximum(y, 0)
        o = linear_attention(of(q), of(k), v, decay)
        outputs.append((own, rms_norm(o, w["attention.linear.norm.weight"], config.norm_eps)))
    if layer.softmax:
        q, k, v = (project(name, "projections") for name in ("query", "key", "value"))
        o = softmax_attention(config, rotate(q, config), rotate(k, config), v, layer.softmax == "window")
        if both:
            o = rms_norm(o, w["attention.softmax.norm.weight"], config.norm_eps)
        outputs.append(("projections", o))
    weights = w["attention.branch_weights"] if both else [1.0]
    return sum(back(o * weight, which) for (which, o), weight in zip(outputs, weights, strict=True))


def linear_attention(q: Array, k: Array, v: Array, decay: Array) -> Array:
    T, H, D = q.shape
    o = np.zeros_like(v)
    for h in range(H):
        state = np.zeros((D, D))
        for t in range(T):
            state = decay[t, h][:, None] * state + np.outer(k[t, h], v[t, h])
            o[t, h] = q[t, h] / np.sqrt(D) @ state
    return o


def softmax_attention(config: Any, q: Array, k: Array, v: Array, window: bool) -> Array:
    T, H, D = q.shape
    o = np.zeros_like(v)
    for t in range(T):
        if t < config.sinks:
            seen = list(range(config.sinks))  # sinks see each other, later ones too
        else:
            first = max(config.sinks, t - config.window + 1) if window else config.sinks
            seen = [*range(config.sinks), *range(first, t + 1)]
        for h in range(H):
            o[t, h] = softmax(k[seen, h] @ q[t, h] / np.sqrt(D)) @ v[seen, h]
    return o


def rotate(x: Array, config: Any) -> Array:
    T, _, D = x.shape
    out = np.empty_like(x)
    for t in range(T):
        for i in range(D // 2):
            angle = t * config.rope_base ** (-2 * i / D)
            a, b = x[t, :, i], x[t, :, i + D // 2]
            out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, :, i + D // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def feed_forward(w: Mapping[str, Array], config: Any, layer: Any, x: Array) -> Array:
    if not layer.experts:
        return swiglu(x, *(w[f"feed_forward.{name}.weight"] for name in ("gate", "up", "down")))
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        scores = w["feed_forward.router.weight"] @ row
        scores = softmax(scores) if config.router == "softmax" else sigmoid(scores)
        for e in np.argsort(-scores)[: config.experts_per_token]:
            matrices = (w[f"feed_forward.experts.{name}.weight"][e] for name in ("gate", "up", "down"))
            y[t] += scores[e] * swiglu(row, *matrices)
        for s in range(config.shared_experts):
            y[t] += swiglu(
                row, *(w[f"feed_forward.shared.{s}.{name}.weight"] for name in ("gate", "up", "down"))
            )
    return y


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    g = x @ gate.T
    return (g * sigmoid(g) * (x @ up.T)) @ down.T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()
