"""Spiking projections in the ways that people write them, through both doors; and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spikingbrain
from spikingbrain.errors import CallError
from spikingbrain.frontend.dynamo import report
from spikingbrain.models import spiking
from spikingbrain.models.spiking import SpikeLinear, SpikeLinearTraining

C, N, K = 64, 24, 3.0
Call = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """Weights in all the shapes that forms ask for, and one form."""

    def __init__(self, form: Call, group: int = 16):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.form = form
        self.weight = nn.Parameter(torch.randn(N, C, generator=generator) / 8)
        self.bias = nn.Parameter(torch.randn(N, generator=generator))
        codes, scale = spiking.quantise_weight(self.weight.detach(), group)
        self.register_buffer("scales", scale.unsqueeze(-1))
        self.register_buffer("codes", codes)
        whole, row = spiking.quantise_weight(self.weight.detach())
        self.register_buffer("whole", whole)
        self.register_buffer("row", row)
        self.register_buffer("other", torch.randn(N, C, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def threshold(x: Tensor, dim: int = -1) -> Tensor:
    return (x.abs().mean(dim, keepdim=True) / K).clamp(1e-5, 1e4)


def told(x: Tensor) -> Tensor:
    v = threshold(x)
    return torch.round(x / v) * v


def grouped(m: Layer) -> Tensor:
    w = m.weight.view(N, -1, C // m.scales.shape[1])
    return (torch.round(w / m.scales) * m.scales).view(N, C)


def published(m: Layer, x: Tensor) -> Tensor:
    return F.linear(told(x), grouped(m), m.bias)


def by_row(m: Layer, x: Tensor) -> Tensor:
    return F.linear(told(x), torch.round(m.weight / m.row) * m.row)


def stored_codes(m: Layer, x: Tensor) -> Tensor:
    return F.linear(told(x), m.whole.float() * m.row, m.bias)


def integers(m: Layer, x: Tensor) -> Tensor:
    v = threshold(x)
    counts = torch.round(x / v).to(torch.int32)
    return (counts @ m.whole.to(torch.int32).T).float() * m.row.squeeze(1) * v + m.bias


def products(m: Layer, x: Tensor) -> Tensor:
    v = threshold(x)
    return torch.einsum("btc,nc->btn", torch.round(x / v), m.whole.float()) * v * m.row.T


def sums(m: Layer, x: Tensor) -> Tensor:
    v = torch.clamp_max(torch.clamp_min(x.abs().sum(-1, keepdim=True) / (K * C), 1e-5), 1e4)
    return F.linear((x / v).round() * v, m.whole.float() * m.row)


def norms(m: Layer, x: Tensor) -> Tensor:
    v = torch.linalg.vector_norm(x, 1, -1, keepdim=True).mul(1 / (K * C)).clamp(min=1e-5)
    return F.linear(v * torch.round(x / v), m.whole.float() * m.row)


def maximum(m: Layer, x: Tensor) -> Tensor:
    v = torch.maximum(x.abs().mean(dim=-1), x.new_full((), 3e-5)).unsqueeze(-1) / K
    return F.linear(torch.round(x / v) * v, m.whole.float() * m.row)


def straight_through(m: Layer, x: Tensor) -> Tensor:
    return F.linear(x + (told(x) - x).detach(), m.weight + (grouped(m) - m.weight).detach(), m.bias)


def channels_first(m: Layer, x: Tensor) -> Tensor:
    x = x.transpose(1, 2).contiguous()  # [B, C, T]
    v = threshold(x, 1)
    return (m.whole.float() * m.row) @ (torch.round(x / v) * v) + m.bias[:, None]


def with_counts(m: Layer, x: Tensor) -> Tensor:
    v = threshold(x)
    counts = torch.round(x / v)
    return torch.cat((F.linear(counts * v, grouped(m)), counts), -1)


FORMS: list[Call] = [
    published, by_row, stored_codes, integers, products, sums, norms, maximum, straight_through, channels_first,
    with_counts,
]  # fmt: skip


def layers() -> dict[str, nn.Module]:
    linear = nn.Linear(C, N)
    scale = torch.rand(C) + 0.5
    return {
        **{form.__name__: Layer(form) for form in FORMS},
        "SpikeLinear": SpikeLinear.of(linear),
        "SpikeLinear of groups": SpikeLinear.of(linear, group_size=32),
        "SpikeLinear of 4 bits": SpikeLinear.of(linear, bits=4),
        "SpikeLinear, scaled channels": SpikeLinear.of(linear, channel_scale=scale),
        "SpikeLinear, wide codes": SpikeLinear.of(linear, scale=torch.full((N, 1), 5e-4)),
        "SpikeLinear, int16": SpikeLinear.of(nn.Linear(C, N), scale=torch.full((N, 1), 1e-4)),
    }


def rows() -> Tensor:
    """Usual rows, one with a channel that no byte holds, one whose threshold is clamped, and one of zeros."""
    x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(3))
    x[0, 1, 7] = 900.0
    x[1, 0] *= 1e-7
    x[1, 2] = 0.0
    return x


class All(nn.Module):
    """Several layers on the same input, compiled at once."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def compiled(model: nn.Module, x: Tensor) -> tuple[Any, list[dict[str, Any]]]:
    torch._dynamo.reset()
    with report.collect_found() as found:
        y = torch.compile(model, backend="spikingbrain")(x)
    return y, [s.to_dict() for s in found.spikes]


def close(actual: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual), wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max())
    )


@torch.no_grad()
def test_every_form_becomes_integers() -> None:
    named, x = layers(), rows()
    results, spikes = compiled(All(named.values()), x)
    assert [(s["status"], s["inputs"], s["outputs"], s["k"]) for s in spikes] == [
        ("raised", C, N, 3.0)
    ] * len(named), spikes
    assert sorted({s["bits"] for s in spikes}) == [8, 16]  # weights may change, and then need a byte
    assert {s["groups"] for s in spikes} == {1, 2, 4}
    for y, layer in zip(results, named.values(), strict=True):
        close(y, layer(x))


def test_forms_are_exported_for_every_length(tmp_path: Path) -> None:
    named = layers()
    model = All(named[n] for n in ("published", "integers", "channels_first", "SpikeLinear of 4 bits"))
    entry = spikingbrain.Entry((rows(),), {}, {"x": {1: torch.export.Dim("T", min=1, max=512)}})
    artifact = spikingbrain.export(model, {"main": entry}, tmp_path / "m.sbrain")
    spikes = artifact.manifest["entries"]["main"]["spikes"]
    assert [s["status"] for s in spikes] == ["raised"] * 4
    assert sorted(s["bits"] for s in spikes) == [4, 8, 8, 8]
    program = spikingbrain.load(tmp_path / "m.sbrain")
    for steps in (1, 5, 33):
        x = torch.randn(2, steps, C)
        with torch.no_grad():
            for y, wanted in zip(program.main(x.numpy()), model(x), strict=True):
                close(np.asarray(y), wanted)


@torch.no_grad()
def test_rows_that_are_not_finite_give_what_eager_gives() -> None:
    named = layers()
    model = All(named[n] for n in ("published", "stored_codes", "SpikeLinear", "SpikeLinear of groups"))
    x = rows()
    x[0, 0, 3], x[0, 2, 5], x[1, 1, 9] = float("nan"), float("inf"), -float("inf")
    x[1, 3] = 3e35
    x[1, 4, ::2] = 1e30
    results, spikes = compiled(model, x)
    assert [s["status"] for s in spikes] == ["raised"] * 4
    for y, wanted in zip(results, model(x), strict=True):
        finite = wanted.isfinite()
        assert torch.equal(y.isnan(), wanted.isnan())
        assert torch.equal(y[~finite].nan_to_num(), wanted[~finite].nan_to_num())
        usual = wanted[0, [1, 3, 4]]
        close(y[0, [1, 3, 4]], usual)
        large = wanted[1, 4]
        torch.testing.assert_close(y[1, 4], large, rtol=1e-4, atol=1e-4 * float(large.abs().max()))


@torch.no_grad()
def test_one_input_is_encoded_once() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projections = nn.ModuleList(SpikeLinear.of(nn.Linear(C, N), group_size=16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([p(x) for p in self.projections], -1)

    model, x = Attention(), rows()
    torch._dynamo.reset()
    explanation = spikingbrain.explain(model, x)
    assert [s["status"] for s in explanation.to_dict()["spikes"]] == ["raised"] * 3
    ops = [op for region in explanation.regions for op in region.ops]
    assert ops.count("spike_encode") == 1 and ops.count("spike_linear") == 3
    close(torch.compile(model, backend="spikingbrain")(x), model(x))


# What only looks like it


def float_weights(m: Layer, x: Tensor) -> Tensor:
    return F.linear(told(x), m.weight)


def mixed_weights(m: Layer, x: Tensor) -> Tensor:
    return F.linear(told(x), grouped(m) + m.other)


def twice(m: Layer, x: Tensor) -> Tensor:
    v = threshold(x)
    return F.linear(torch.round(x / v) * v, grouped(m)) * v


@torch.no_grad()
def test_what_only_looks_like_it_stays() -> None:
    forms = (float_weights, mixed_weights)
    model, x = All(Layer(form) for form in forms), rows()[:1].clamp(-3, 3)
    results, spikes = compiled(model, x)
    assert spikes and all(s["status"] == "float" and s["reason"] for s in spikes), spikes
    for y, wanted in zip(results, model(x), strict=True):
        close(y, wanted)


@torch.no_grad()
def test_what_follows_a_projection_is_not_taken_into_it() -> None:
    model, x = Layer(twice), rows()[:1].clamp(-3, 3)
    y, spikes = compiled(model, x)
    assert [s["status"] for s in spikes] == ["raised"]
    close(y, model(x))


# Weights that change, and training


@torch.no_grad()
def test_weights_may_change_after_compilation() -> None:
    torch._dynamo.reset()
    model, x = Layer(published), rows()
    fast = torch.compile(model, backend="spikingbrain")
    close(fast(x), model(x))
    model.weight.mul_(-0.5)
    model.scales.mul_(0.5)
    close(fast(x), model(x))


@torch.no_grad()
def test_codes_may_grow_after_compilation() -> None:
    torch._dynamo.reset()
    model, x = SpikeLinear.of(nn.Linear(C, N), bits=4), rows()
    fast = torch.compile(model, backend="spikingbrain")
    close(fast(x), model(x))
    model.codes.fill_(100)
    close(fast(x), model(x))
    fast = torch.compile(Layer(published), backend="spikingbrain")
    fast(x)
    fast.scales.mul_(1e-3)
    with pytest.raises(CallError, match=r"weights have changed(.|\n)*do not fit 8 bits"):
        fast(x)


@pytest.mark.parametrize("shape", [(C,), (1, C), (2, 0, C), (3, 7, C)])
@torch.no_grad()
def test_inputs_of_any_rank_and_length(shape: tuple[int, ...]) -> None:
    model, x = SpikeLinear.of(nn.Linear(C, N), group_size=16), torch.randn(shape)
    y, spikes = compiled(model, x)
    assert [s["reason"] for s in spikes] == [
        "counts of an adaptive threshold times integers" if x.numel() else "its input is empty"
    ]
    torch.testing.assert_close(y, model(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", [straight_through, published], ids=lambda f: f.__name__)
def test_gradients_are_eagers(form: Call) -> None:
    torch._dynamo.reset()
    x = rows().clamp(-3, 3)

    def gradients(call: Callable[[Tensor], Tensor], model: Layer) -> list[Tensor]:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        return [t.grad.clone() for t in (leaf, model.weight, model.bias) if t.grad is not None]

    model = Layer(form)
    with report.collect_found() as found:
        got = gradients(torch.compile(model, backend="spikingbrain"), model)
    assert [s.status for s in found.spikes] == ["raised"]
    wanted = gradients(model, model)
    assert len(got) == len(wanted)
    for actual, expected in zip(got, wanted, strict=True):
        close(actual, expected)


def test_a_spiking_model_trains_as_in_eager() -> None:
    torch._dynamo.reset()

    def losses(compile_it: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(
            SpikeLinearTraining(16, 32, group_size=8), nn.GELU(), SpikeLinearTraining(32, 4)
        )
        call = torch.compile(model, backend="spikingbrain") if compile_it else model
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        x, y = torch.randn(64, 16), torch.randn(64, 4)
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.mse_loss(call(x), y)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    eager, fast = losses(False), losses(True)
    assert eager[-1] < 0.8 * eager[0]
    np.testing.assert_allclose(fast, eager, rtol=2e-2)
