"""Code that imports packages for NVIDIA GPUs gets stand-ins, which compute what those packages document."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain import compat
from spikingbrain.compat import convolution, fla_modules, flash_attn, mamba_ssm, packed
from spikingbrain.compat.table import OPS, STAND_INS
from spikingbrain.errors import NotMapped, UnsupportedOp
from spikingbrain.models.reference import recurrences as reference

sys.path.append(str(Path(__file__).parents[1]))
from tolerances import assert_close

DOCS = Path(__file__).parents[2] / "docs"
LENGTHS = (5, 1, 3)
PACKING = torch.tensor([0, 5, 6, 9], dtype=torch.int32)


@pytest.fixture
def stand_ins() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- the hook


def test_the_page_lists_what_is_mapped() -> None:
    listed = {
        module: set(re.findall(r"`(\w+)`", names))
        for module, names in re.findall(
            r"^\| `([\w.]+)` \| (.*?) \|", (DOCS / "public-code.md").read_text(), re.M
        )
    }
    assert listed == {module: set(names) for module, names in STAND_INS.items() if names}


def test_imports_give_stand_ins(stand_ins: None) -> None:
    for module, names in STAND_INS.items():
        found = importlib.import_module(module)
        assert {name: getattr(found, name) for name in names} == names
    with pytest.raises(NotMapped, match=r"'parallel_nsa' of 'fla.ops' has no stand-in\n.*public-code.md"):
        from fla.ops import parallel_nsa  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(ImportError, match=r"module 'fla\.ops\.nsa' has no stand-in"):
        importlib.import_module("fla.ops.nsa")


def test_nothing_stays_behind() -> None:
    compat.install()
    compat.install()
    importlib.import_module("flash_attn.bert_padding")
    compat.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")


def test_an_installed_package_keeps_what_is_not_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with the package and no GPU: one module loads, the other misses a library."""
    (tmp_path / "fla" / "ops" / "gla").mkdir(parents=True)
    (tmp_path / "flash_attn").mkdir()
    for file, text in {
        "fla/__init__.py": "from fla.ops.gla import chunk_gla\n",
        "fla/ops/__init__.py": "from .gla import chunk_gla\n",
        "fla/ops/gla/__init__.py": "def chunk_gla(*x): raise RuntimeError('0 active drivers')\nOWN = 1\n",
        "fla/own.py": "from fla.ops import chunk_gla\n",
        "flash_attn/__init__.py": "raise ImportError('libcudart.so.12')\n",
    }.items():
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    given = compat.install()
    try:
        assert given["fla"].startswith("installed, without a GPU")
        own, gla = importlib.import_module("fla.own"), importlib.import_module("fla.ops.gla")
        assert own.chunk_gla is gla.chunk_gla is OPS["gla"]["chunk_gla"]
        assert gla.OWN == 1
        assert importlib.import_module("flash_attn").flash_attn_func is flash_attn.flash_attn_func
        with pytest.raises(NotMapped):
            getattr(importlib.import_module("flash_attn"), "flash_attn_unheard_of")  # noqa: B009
    finally:
        compat.uninstall()
    importlib.import_module("fla.own")
    with pytest.raises(NotMapped, match="'fla' was imported before its stand-ins"):
        compat.install()
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        del sys.modules[name]


def test_a_script_runs_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("from flash_attn import flash_attn_func\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, beside, torch\nq = torch.zeros(1, 2, 1, 4)\n"
        "if __name__ == '__main__': print(sys.argv[1:], beside.flash_attn_func(q, q, q).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "spikingbrain.compat", script, "-x"], capture_output=True, text=True
    )
    assert done.stdout == "['-x'] torch.Size([1, 2, 1, 4])\n", done.stderr


# --- fla.ops: packed texts are the texts alone


def _recurrences() -> dict[str, tuple[Any, ...]]:
    x, h = _drawn(1, 9, 2, 4), _drawn(1, 9, 2)
    k = F.normalize(x, dim=-1)
    gate, scalar = F.logsigmoid(_drawn(1, 9, 2, 4)), F.logsigmoid(h)
    return {
        "chunk_gla": (x, k, x, gate),
        "fused_recurrent_gla": (x, k, x, gate),
        "chunk_simple_gla": (x, k, x, scalar),
        "chunk_retention": (x, k, x),
        "fused_recurrent_linear_attn": (x, k, x),
        "chunk_delta_rule": (x, k, x, h.sigmoid()),
        "chunk_gated_delta_rule": (x, k, x, scalar, h.sigmoid()),
        "chunk_kda": (x, k, x, gate, h.sigmoid()),
        "chunk_rwkv6": (x, k, x, gate, x[0, 0]),
        "chunk_rwkv7": (x, gate, k, x, -k, k * h.sigmoid()[..., None]),
        "chunk_iplr_delta_rule": (x, k, x, -k, k),
        "chunk_gsa": (x, k, x, x, gate),
        "chunk_hgrn": (x[..., 0], gate[..., 0]),
    }


@pytest.mark.parametrize("name", _recurrences())
def test_packed_texts(name: str) -> None:
    """Outputs, states before and after, and gradients; both halves of the table's functions meet here and in the reference."""
    function, operands = STAND_INS["fla.ops"][name], _recurrences()[name]
    leaves = [x.clone().requires_grad_(x.ndim > 2) for x in operands]

    def alone(begin: int, end: int, text: int, states: Any) -> tuple[Tensor, Any]:
        of_text = (x[:, begin:end] if x.shape[0] == 1 and x.ndim > 2 else x for x in leaves)
        state = _each(states, lambda s: s[text : text + 1])
        return function(*of_text, initial_state=state, output_final_state=True)

    _, first = function(*leaves, cu_seqlens=PACKING, output_final_state=True)
    first = _each(first, lambda s: s.detach())
    o, last = function(*leaves, cu_seqlens=PACKING, initial_state=first, output_final_state=True)
    grads = torch.autograd.grad(o.square().sum(), [x for x in leaves if x.requires_grad])
    ends = PACKING.tolist()
    singles = [alone(*ends[i : i + 2], i, first) for i in range(len(LENGTHS))]
    expected = torch.cat([s[0] for s in singles], 1)
    assert_close(o, expected, "outputs")
    for i, (_, state) in enumerate(singles):
        for ours, theirs in zip(_flat(last), _flat(state), strict=True):
            assert_close(ours[i : i + 1], theirs, f"state of text {i}")
    wanted = torch.autograd.grad(expected.square().sum(), [x for x in leaves if x.requires_grad])
    for ours, theirs in zip(grads, wanted, strict=True):
        assert_close(ours, theirs, "gradient", scale=1.0)


def _flat(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def _each(states: Any, change: Any) -> Any:
    return tuple(map(change, states)) if isinstance(states, tuple) else change(states)


def test_rwkv7_is_its_loop() -> None:
    r, w, k, v, a, b = _recurrences()["chunk_rwkv7"]
    S, outputs = torch.zeros(1, 2, 4, 4).double(), []
    for t in range(9):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        S = w[:, t].exp()[..., None] * S + b[:, t, ..., None] * read[..., None, :]
        S = S + k[:, t, ..., None] * v[:, t, ..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
    o, state = STAND_INS["fla.ops"]["chunk_rwkv7"](r, w, k, v, a, b, output_final_state=True)
    assert_close(o, torch.stack(outputs, 1), "outputs")
    assert_close(state, S, "state")


# --- flash_attn


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """One text [T, H, D], query by query, key by key."""
    o = torch.zeros_like(q)
    shift, group = k.shape[0] - q.shape[0], q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            seen = [
                s
                for s in range(k.shape[0])
                if not (causal and s > t + shift)
                and not (window[0] >= 0 and s < t + shift - window[0])
                and not (window[1] >= 0 and s > t + shift + window[1])
            ]
            if seen:
                keys, values = k[seen, head // group], v[seen, head // group]
                o[t, head] = ((keys @ q[t, head]) * q.shape[-1] ** -0.5).softmax(0) @ values
    return o


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, 0), (0, 0), (1, 2), (-1, 1)])
@pytest.mark.parametrize("steps, seen", [(6, 6), (3, 7), (7, 3)])
def test_flash_attention(causal: bool, window: tuple[int, int], steps: int, seen: int) -> None:
    q, k, v = _drawn(2, steps, 4, 8), _drawn(2, seen, 2, 8), _drawn(2, seen, 2, 8)
    o = flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window)
    for b in range(2):
        assert_close(o[b], _attention(q[b], k[b], v[b], causal, window), "attention")


@pytest.mark.parametrize("window", [(-1, -1), (2, 0)])
def test_flash_attention_of_packed_texts(window: tuple[int, int]) -> None:
    of_keys = torch.tensor([0, 7, 9, 10], dtype=torch.int32)  # the third text has more queries than keys
    q, k, v = _drawn(9, 4, 8), _drawn(10, 2, 8), _drawn(10, 2, 8)
    q.requires_grad_()
    o = flash_attn.flash_attn_varlen_func(q, k, v, PACKING, of_keys, 5, 7, causal=True, window_size=window)
    for i in range(3):
        (a, b), (c, d) = PACKING[i : i + 2].tolist(), of_keys[i : i + 2].tolist()
        assert_close(o[a:b], _attention(q[a:b], k[c:d], v[c:d], True, window), f"text {i}")
    o.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_flash_attention_with_a_cache() -> None:
    held = torch.tensor([3, 0], dtype=torch.int32)
    q, k, v = _drawn(2, 2, 4, 8), _drawn(2, 2, 2, 8), _drawn(2, 2, 2, 8)
    keys, values = _drawn(2, 9, 2, 8), _drawn(2, 9, 2, 8)
    before = keys.clone()
    o = flash_attn.flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=held, causal=True)
    for b, length in enumerate(held.tolist()):
        end = length + 2
        assert_close(keys[b, length:end], k[b], "written")
        assert_close(keys[b, :length], before[b, :length], "kept")
        assert_close(o[b], _attention(q[b], keys[b, :end], values[b, :end], True, (-1, -1)), "attention")


def test_options_of_flash_attention_are_refused_by_name() -> None:
    q = _drawn(1, 2, 1, 4)
    with pytest.raises(UnsupportedOp, match="flash_attn's flash_attn_func with softcap"):
        flash_attn.flash_attn_func(q, q, q, softcap=30.0)
    with pytest.raises(UnsupportedOp, match="alibi_slopes"):
        flash_attn.flash_attn_func(q, q, q, alibi_slopes=torch.ones(1))


def test_padding_is_taken_out_and_put_back() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    x = _drawn(2, 3, 4)
    tokens, indices, cu_seqlens, longest, lengths = flash_attn.unpad_input(x, mask)
    assert (cu_seqlens.tolist(), longest, lengths.tolist()) == ([0, 2, 4], 2, [2, 2])
    assert torch.equal(tokens, torch.stack((x[0, 1], x[0, 2], x[1, 0], x[1, 1])))
    assert torch.equal(flash_attn.pad_input(tokens, indices, 2, 3), x * mask[..., None])
    assert packed.position_ids(PACKING).tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2]
    assert packed.sequence_ids(PACKING).tolist() == [0] * 5 + [1] + [2] * 3


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(interleaved: bool) -> None:
    """Pairs are complex numbers, turned by position times frequency; both packages agree."""
    q = _drawn(2, 5, 3, 10)
    rotary = fla_modules.RotaryEmbedding(8, interleaved=interleaved)
    offset = torch.tensor([0, 4])
    turned, _ = rotary(q, q, seqlen_offset=offset)
    angles = (offset[:, None] + torch.arange(5))[:, :, None, None].double() * rotary.inv_freq.double()
    pairs = (q[..., 0:8:2], q[..., 1:8:2]) if interleaved else (q[..., :4], q[..., 4:8])
    expected = torch.complex(*pairs) * torch.exp(1j * angles)
    found = (turned[..., 0:8:2], turned[..., 1:8:2]) if interleaved else (turned[..., :4], turned[..., 4:8])
    for ours, theirs in zip(found, (expected.real, expected.imag), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[..., 8:], q[..., 8:])
    table = torch.arange(9)[:, None].double() * rotary.inv_freq.double()
    other = flash_attn.apply_rotary_emb(q, table.cos(), table.sin(), interleaved, seqlen_offsets=offset)
    torch.testing.assert_close(other, turned, rtol=1e-5, atol=1e-5)


# --- layers


def test_norms() -> None:
    x, g, residual = _drawn(2, 3, 8), _drawn(2, 3, 8), _drawn(2, 3, 8)
    rms = fla_modules.RMSNorm(8, eps=1e-3).double()
    nn.init.normal_(rms.weight)
    y, total = rms(x, residual=residual, prenorm=True)
    assert_close(total, x + residual, "sum")
    expected = F.rms_norm(x + residual, (8,), rms.weight, 1e-3)
    assert_close(y, expected, "RMS norm")
    layer = fla_modules.LayerNorm(8, bias=True).double()
    nn.init.normal_(layer.bias)
    assert_close(layer(x), F.layer_norm(x, (8,), layer.weight, layer.bias), "layer norm")
    groups = fla_modules.GroupNorm(2, 8).double()
    assert_close(groups(x), F.group_norm(x.flatten(0, 1), 2, eps=1e-5).view_as(x), "group norm")
    for activation, opened in (("swish", F.silu(g)), ("sigmoid", g.sigmoid())):
        gated = fla_modules.FusedRMSNormGated(8, activation=activation).double()
        assert_close(gated(x, g), F.rms_norm(x, (8,), None, 1e-5) * opened, activation)
    outer = mamba_ssm.RMSNorm(8, group_size=4, norm_before_gate=False).double()
    expected = F.rms_norm((x * F.silu(g)).view(2, 3, 2, 4), (4,), None, 1e-5).flatten(2)
    assert_close(outer(x, g), expected, "gated before the norm")
    assert set(gated.state_dict()) == {"weight"}


@pytest.mark.parametrize("packing", [None, PACKING])
def test_short_convolution(packing: Tensor | None) -> None:
    """Text by text, tap by tap; then in two calls, with the state between; then token by token."""
    layer = convolution.ShortConvolution(3, 4, bias=True).double()
    x = _drawn(1, 9, 3)
    texts = x[0].split([9] if packing is None else list(LENGTHS))
    weight, bias = layer.weight.detach().squeeze(1), layer.bias
    expected = []
    for text in texts:
        for t in range(len(text)):
            taps = [text[t - 3 + i] * weight[:, i] for i in range(4) if t - 3 + i >= 0]
            expected.append(F.silu(sum(taps) + bias))  # type: ignore[arg-type]
    y, state = layer(x, output_final_state=True, cu_seqlens=packing)
    assert_close(y[0], torch.stack(expected), "convolution")
    for i, text in enumerate(texts):
        assert_close(state[i].T, F.pad(text, (0, 0, 4, 0))[-4:].detach(), f"state of text {i}")
    if packing is None:
        _, held = layer(x[:, :5], output_final_state=True)
        rest, _ = layer(x[:, 5:], cache=held)
        assert_close(rest, y[:, 5:], "second half")
        with torch.no_grad():
            cache = torch.zeros(1, 3, 4).double()
            steps = [layer(x[:, t : t + 1], cache=cache, output_final_state=True)[0] for t in range(9)]
        assert_close(torch.cat(steps, 1), y.detach(), "token by token")
        assert_close(cache, state.detach(), "moved on in place")


def test_causal_conv1d() -> None:
    x, weight, bias = _drawn(2, 3, 9), _drawn(3, 4), _drawn(3)
    expected = F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=3)[..., :9])
    y, last = convolution.causal_conv1d_fn(x, weight, bias, return_final_states=True, activation="silu")
    assert_close(y, expected, "whole")
    assert torch.equal(last, x[..., -3:])
    state = torch.zeros(2, 3, 3).double()
    steps = [convolution.causal_conv1d_update(x[..., t], state, weight, bias, "silu") for t in range(9)]
    assert_close(torch.stack(steps, -1), expected, "step by step")
    texts = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 2]).expand(2, -1)
    y = convolution.causal_conv1d_fn(x, weight, bias, seq_idx=texts)
    alone = [convolution.causal_conv1d_fn(part, weight, bias) for part in x.split(LENGTHS, -1)]
    assert_close(y, torch.cat(alone, -1), "texts")


@pytest.mark.parametrize("groups", [1, 2])
def test_selective_scan(groups: int) -> None:
    u, delta, z, b, c = (_drawn(2, 4, 6), _drawn(2, 4, 6), _drawn(2, 4, 6), *_drawn(2, 2, groups, 3, 6))
    a, d, bias = -_drawn(4, 3).exp(), _drawn(4), _drawn(4)
    y, last = mamba_ssm.selective_scan_fn(u, delta, a, b, c, d, z, bias, True, True)
    h, outputs = torch.zeros(2, 4, 3).double(), []
    for t in range(6):
        dt = F.softplus(delta[..., t] + bias)[..., None]
        key, query = (m[..., t].repeat_interleave(4 // groups, 1) for m in (b, c))
        h = (dt * a).exp() * h + dt * u[..., t, None] * key
        outputs.append(((h * query).sum(-1) + d * u[..., t]) * F.silu(z[..., t]))
    assert_close(y, torch.stack(outputs, -1), "selective scan")
    assert_close(last, h, "its state")
    if groups == 1:
        state = torch.zeros(2, 4, 3).double()
        for t in range(6):
            step = mamba_ssm.selective_state_update(
                state, u[..., t], delta[..., t], a, b[:, 0, :, t], c[:, 0, :, t], d, z[..., t], bias, True
            )
        assert_close(step, y[..., -1], "its step")
        assert_close(state, h, "state of the step")


def test_mamba2_in_chunks() -> None:
    x, dt, z = _drawn(2, 6, 4, 5), _drawn(2, 6, 4), _drawn(2, 6, 4, 5)
    b, c = _drawn(2, 6, 2, 3), _drawn(2, 6, 2, 3)
    a, d, bias = -_drawn(4).exp(), _drawn(4), _drawn(4)
    y, last = mamba_ssm.mamba_chunk_scan_combined(
        x, dt, a, b, c, 4, d, z, bias, dt_softplus=True, return_final_states=True
    )
    state = torch.zeros(2, 4, 5, 3).double()
    for t in range(6):
        step = mamba_ssm.selective_state_update(
            state,
            x[:, t],
            dt[:, t, :, None].expand(-1, -1, 5),
            a[:, None, None].expand(4, 5, 3),
            b[:, t],
            c[:, t],
            d[:, None].expand(4, 5),
            z[:, t],
            bias[:, None].expand(4, 5),
            True,
        )
        assert_close(step, y[:, t], f"step {t}")
    assert_close(last, state, "state")


def test_small_layers() -> None:
    x = _drawn(2, 5, 8)
    mlp = fla_modules.GatedMLP(8, hidden_ratio=3).double()
    assert mlp.intermediate_size == 256
    assert_close(mlp(x), mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)), "MLP")
    shifted = fla_modules.TokenShift()(x)
    assert_close(shifted[:, 1:], x[:, :-1] - x[:, 1:], "shift")
    assert_close(shifted[:, 0], -x[:, 0], "shift of the first token")
    loss = fla_modules.FusedLinearCrossEntropyLoss()(
        x[0], torch.tensor([0, 1, -100, 2, 3]), mlp.up_proj.weight
    )
    expected = F.cross_entropy((x[0] @ mlp.up_proj.weight.T)[[0, 1, 3, 4]], torch.tensor([0, 1, 2, 3]))
    assert_close(loss, expected, "loss")
    taylor = STAND_INS["fla.modules.feature_map"]["TaylorFeatureMap"](8)
    score = (x[0, 0] @ x[0, 1]) / 8**0.5
    assert_close(taylor(x[0, 0]) @ taylor(x[0, 1]), 1 + score + score**2 / 2, "Taylor features")
    assert_close(fla_modules.l2norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), "l2 norm")


def test_the_published_layer_calls_its_gate_g() -> None:
    q, k, v, g = _recurrences()["chunk_gla"]
    o, _ = STAND_INS["fla.ops.gla"]["fused_recurrent_gla"](q=q, k=k, v=v, g=g, output_final_state=True)
    assert_close(o, reference.gla(q, k, v, g)[0], "GLA")


def test_the_code_of_the_page(tmp_path: Path) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", (DOCS / "public-code.md").read_text(), re.M | re.S)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "not installed: stand-ins\ntorch.Size([1, 40, 2, 16])\n", done.stderr
