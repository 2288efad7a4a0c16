"""Counts that no adaptive threshold makes: computed as they are written, and multiplied by integers all the same."""

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
from spikingbrain.frontend.dynamo import report
from spikingbrain.models.spiking import Budget, SpikeLinear, quantise_weight

C, N = 64, 24
Call = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """Weights, a static threshold, and one form."""

    def __init__(self, form: Call):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.form = form
        self.weight = nn.Parameter(torch.randn(N, C, generator=generator) / 8)
        self.bias = nn.Parameter(torch.randn(N, generator=generator))
        codes, row = quantise_weight(self.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("row", row)
        self.register_buffer("turned_codes", codes.T.contiguous())
        self.register_buffer("group_rows", torch.rand(4, N, generator=generator) + 0.1)
        self.register_buffer("square", torch.randint(-99, 99, (C, C), generator=generator, dtype=torch.int8))
        self.register_buffer("square_row", torch.rand(1, C, generator=generator))
        self.register_buffer("most", torch.rand(N, generator=generator))
        self.register_buffer("v", torch.tensor(0.21))
        self.register_buffer("channels", torch.rand(C, generator=generator) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)

    def floats(self) -> Tensor:
        return self.codes.float() * self.row

    def rounded(self) -> Tensor:
        return self.weight + (torch.round(self.weight / self.row) * self.row - self.weight).detach()


def adaptive(x: Tensor) -> Tensor:
    return (x.abs().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)


def buffer(m: Layer, x: Tensor) -> Tensor:
    return F.linear(torch.round(x / m.v) * m.v, m.floats(), m.bias)


def number(m: Layer, x: Tensor) -> Tensor:
    s = torch.round(x / 0.21)
    return F.linear(s, m.codes.float()) * m.row.T * 0.21 + m.bias


def shared_number(m: Layer, x: Tensor) -> Tensor:
    return F.linear(0.21 * torch.round(x / 0.21), m.floats(), m.bias)


def saturated(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x)
    return F.linear(torch.round(x / v).clamp(-7, 7) * v, m.floats(), m.bias)


def unsigned(m: Layer, x: Tensor) -> Tensor:
    return F.linear(torch.clamp(torch.round(x / m.v), 0, 15) * m.v, m.floats(), m.bias)


def in_bytes(m: Layer, x: Tensor) -> Tensor:
    s = torch.round(x / m.v).clamp(-128, 127).to(torch.int8)
    return (s.to(torch.int32) @ m.codes.to(torch.int32).T).float() * m.row.T * m.v + m.bias


def passing_through(m: Layer, x: Tensor) -> Tensor:
    q = x / m.v
    return F.linear(((q.round() - q).detach() + q) * m.v, m.floats(), m.bias)


def channels_first(m: Layer, x: Tensor) -> Tensor:
    x = x.transpose(1, 2).contiguous()
    v = (x.abs().mean(1, keepdim=True) / 3).clamp(1e-5, 1e4)
    return m.floats() @ (torch.round(x / v).clamp(-31, 31) * v) + m.bias[:, None]


def channels_moved(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x)
    s = torch.round(x / v).clamp(-31, 31).transpose(1, 2)
    return torch.einsum("bct,nc->btn", s * v.transpose(1, 2), m.floats()) + m.bias


def turned(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x)
    return (torch.round(x / v) * v) @ (m.turned_codes.float() * m.row.flatten()) + m.bias


def turned_groups(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x)
    w = (m.turned_codes.float().view(4, C // 4, N) * m.group_rows.view(4, 1, N)).view(C, N)
    return torch.round(x / v).clamp(-99, 99) @ w * v


def turned_square(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x)
    return (torch.round(x / v) * v) @ (m.square.float() * m.square_row)


def computed_scale(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x)
    return F.linear(
        torch.round(x / v) * v, m.codes.float() * (m.most.abs() / 127).clamp_min(1e-8)[:, None], m.bias
    )


def computed_outside(m: Layer, x: Tensor) -> Tensor:
    s = torch.round(x / m.v).clamp(-128, 127).to(torch.int8)
    return (s.to(torch.int32) @ m.codes.to(torch.int32).T).float() * (m.row.T * m.v) + m.bias


def floor(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x)
    return F.linear(torch.floor(x / v) * v, m.floats())


def signed_mean(m: Layer, x: Tensor) -> Tensor:
    v = (x.mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
    return F.linear(torch.round(x / v) * v, m.floats())


def other_threshold(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x.flip(-1) ** 2)
    return F.linear(torch.round(x / v) * v, m.floats())


def of_all_tokens(m: Layer, x: Tensor) -> Tensor:
    v = (x.abs().mean((-2, -1), keepdim=True) / 3).clamp(1e-5, 1e4)
    return F.linear(torch.round(x / v) * v, m.floats())


def reciprocal(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x)
    return F.linear(torch.round(x * (1 / v)) * v, m.floats())


def halves(m: Layer, x: Tensor) -> Tensor:
    h = x.to(torch.bfloat16)
    s = torch.round(h / h.abs().mean(-1, keepdim=True).clamp(1e-5))
    return F.linear(s.float(), m.floats())


FORMS: list[Call] = [
    buffer, number, shared_number, saturated, unsigned, in_bytes, passing_through, channels_first, channels_moved, floor,
    signed_mean, other_threshold, of_all_tokens, reciprocal, halves,
]  # fmt: skip


STORED: list[Call] = [turned, turned_groups, turned_square, computed_scale, computed_outside]


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    linear, v = nn.Linear(C, N), torch.tensor([0.3])
    return {
        **{form.__name__: Layer(form) for form in FORMS},
        "static": SpikeLinear.of(linear, group_size=16, static_threshold=v),
        "dropped": SpikeLinear.of(linear, budget=Budget(3, remainder="drop")),
        "both": SpikeLinear.of(linear, group_size=32, bits=4, static_threshold=v, budget=Budget(4, "ternary", "drop")),
    }  # fmt: skip


class All(nn.Module):
    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def rows() -> Tensor:
    """Usual rows, one with a count that no byte holds, one with one that no word holds, tiny values and zeros."""
    x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(3))
    x[0, 1, 7] = 90.0
    x[0, 2, 5] = 30000.0
    x[1, 0] *= 1e-7
    x[1, 2] = 0.0
    return x


def compiled(model: nn.Module, x: Tensor) -> tuple[Any, list[dict[str, Any]]]:
    torch._dynamo.reset()
    with report.collect_found() as found:
        y = torch.compile(model, backend="spikingbrain")(x)
    return y, [s.to_dict() for s in found.spikes]


def close(actual: Any, wanted: Tensor, name: str = "") -> None:
    size = (
        wanted.abs().amax(-1, keepdim=True)
        if name != "channels_first"
        else wanted.abs().amax(1, keepdim=True)
    )
    error = (torch.as_tensor(actual) - wanted).abs()
    assert bool((error <= 4e-5 * size + 1e-12).all()), (name, float((error / size).nan_to_num().max()))


@torch.no_grad()
def test_counts_as_written_become_integers() -> None:
    named, x = layers(), rows()
    results, spikes = compiled(All(named.values()), x)
    assert [(s["status"], s["inputs"], s["outputs"]) for s in spikes] == [("raised", C, N)] * len(named), (
        spikes
    )
    assert all("computed as they are written" in s["reason"] for s in spikes)
    for y, (name, layer) in zip(results, named.items(), strict=True):
        close(y, layer(x), name)


@torch.no_grad()
def test_not_finite_rows_give_what_eager_gives() -> None:
    named, x = layers(), rows()
    model = All(named[n] for n in ("buffer", "saturated", "unsigned", "static", "both"))
    x[0, 0, 3], x[0, 3, 5], x[1, 1, 9], x[1, 3, 2:4] = float("nan"), float("inf"), -float("inf"), float("inf")
    results, _ = compiled(model, x)
    for y, wanted in zip(results, model(x), strict=True):
        assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())
        assert torch.equal(y[wanted.isinf()], wanted[wanted.isinf()])
        rest = wanted.isfinite().all(-1)
        close(y[rest], wanted[rest])


def test_they_are_exported_for_every_length(tmp_path: Path) -> None:
    named = layers()
    names = ("buffer", "number", "saturated", "unsigned", "in_bytes", "channels_moved", "static", "both")
    model = All(named[n] for n in names)
    entry = spikingbrain.Entry((rows(),), {}, {"x": {1: torch.export.Dim("T", min=1, max=512)}})
    artifact = spikingbrain.export(model, {"main": entry}, tmp_path / "m.sbrain")
    assert [s["status"] for s in artifact.manifest["entries"]["main"]["spikes"]] == ["raised"] * len(names)
    program = spikingbrain.load(artifact)
    for steps in (1, 7):
        x = torch.randn(2, steps, C)
        with torch.no_grad():
            for y, wanted, name in zip(program.main(x.numpy()), model(x), names, strict=True):
                close(np.asarray(y), wanted, name)


@pytest.mark.slow
def test_weights_stored_in_another_way(tmp_path: Path) -> None:
    model, x = All(map(Layer, STORED)), rows().clamp(-99, 99)
    artifact = spikingbrain.export(model, {"main": spikingbrain.Entry((x,))}, tmp_path / "m.sbrain")
    with torch.no_grad():
        results, spikes = compiled(model, x)
        wanted = model(x)
    exported = spikingbrain.load(artifact).main(x)
    for found in (spikes, artifact.manifest["entries"]["main"]["spikes"]):
        assert [s["status"] for s in found] == ["raised"] * len(STORED), found
    for y, other, expected, form in zip(results, exported, wanted, STORED, strict=True):
        close(y, expected, form.__name__)
        close(np.asarray(other), expected, form.__name__)


@torch.no_grad()
def test_a_threshold_may_change_after_compilation() -> None:
    torch._dynamo.reset()
    model, x = Layer(buffer), rows()
    fast = torch.compile(model, backend="spikingbrain")
    close(fast(x), model(x))
    model.v.mul_(2.5)
    close(fast(x), model(x))


@torch.no_grad()
def test_what_stays_says_why() -> None:
    def overflowing(m: Layer, x: Tensor) -> Tensor:
        s = torch.round(x / m.v).to(torch.int8)
        return (s.to(torch.int32) @ m.codes.to(torch.int32).T).float() * m.row.T

    def by_channel(m: Layer, x: Tensor) -> Tensor:
        return F.linear(torch.round(x / m.channels) * m.channels, m.floats())

    def float_weights(m: Layer, x: Tensor) -> Tensor:
        return F.linear(torch.round(x / m.v) * m.v, m.weight)

    def all_halves(m: Layer, x: Tensor) -> Tensor:
        h = x.to(torch.bfloat16)
        v = h.abs().mean(-1, keepdim=True)
        return F.linear(torch.round(h / v) * v, m.floats().to(torch.bfloat16)).float()

    forms = (overflowing, by_channel, float_weights, all_halves)
    model, x = All(map(Layer, forms)), rows()[1:].clamp(-3, 3)
    results, spikes = compiled(model, x)
    assert [s["status"] for s in spikes] == ["float"] * len(forms), spikes
    reasons = [
        "cast to int8, which has no room",
        "a factor for each channel",
        "no weights that are",
        "its product is in bfloat16",
    ]
    for spike, reason in zip(spikes, reasons, strict=True):
        assert reason in spike["reason"], spike
    for y, wanted in zip(results, model(x), strict=True):
        torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2, equal_nan=True)


# Half floats


def upcast(m: Layer, x: Tensor) -> Tensor:
    h = x.float()
    v = adaptive(h)
    return F.linear(torch.round(h / v) * v, m.floats(), m.bias).to(x.dtype)


def half_weights(m: Layer, x: Tensor) -> Tensor:
    h = x.float()
    v = adaptive(h)
    return ((torch.round(h / v) * v) @ (m.codes.float() * m.row.float()).T + m.bias).to(x.dtype)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@torch.no_grad()
def test_half_inputs_of_neurons_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    linear = nn.Linear(C, N)
    model = All(
        [
            Layer(upcast),
            Layer(half_weights).to(dtype),
            SpikeLinear.of(linear, 3.0, 16).to(dtype),
            SpikeLinear.of(linear),
        ]
    )
    x = rows().clamp(-999, 999).to(dtype)
    results, spikes = compiled(model, x)
    artifact = spikingbrain.export(model, {"main": spikingbrain.Entry((x,))}, tmp_path / "m.sbrain")
    for found in (spikes, artifact.manifest["entries"]["main"]["spikes"]):
        assert [s["reason"] for s in found] == ["counts of an adaptive threshold times integers"] * 4
    exported = spikingbrain.load(artifact).main(x)
    for y, other, wanted in zip(results, exported, model(x), strict=True):
        assert y.dtype == dtype
        step = (
            2 * torch.finfo(dtype).eps * float(wanted.abs().max())
        )  # a last bit of float32 may round either way
        torch.testing.assert_close(y, wanted, rtol=0, atol=step)
        np.testing.assert_allclose(other.astype(np.float32), wanted.float(), rtol=0, atol=step)


# Training


class Round(torch.autograd.Function):
    """A straight-through estimator that halves the gradient, so that it is told from others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


class Spike(torch.autograd.Function):
    """A whole neuron, whose gradient stops where counts saturate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        v = adaptive(x)
        ctx.save_for_backward(x, v)
        return torch.round(x / v).clamp(-7, 7) * v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, v = ctx.saved_tensors
        return torch.where((x / v).abs() <= 7, gradient, 0.0)


class Whole(torch.autograd.Function):
    """The product, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        v = adaptive(x)
        return F.linear(torch.round(x / v) * v, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, 1).T @ x.flatten(0, 1)


def rounding_function(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x)
    return F.linear(Round.apply(x / v) * v, Round.apply(m.weight / m.row) * m.row, m.bias)


def spiking_function(m: Layer, x: Tensor) -> Tensor:
    return F.linear(Spike.apply(x), m.rounded(), m.bias)


def saturated_training(m: Layer, x: Tensor) -> Tensor:
    v = adaptive(x).detach()
    told = torch.round(x / v).clamp(-7, 7) * v
    return F.linear(x + (told - x).detach(), m.rounded(), m.bias)


def static_training(m: Layer, x: Tensor) -> Tensor:
    q = x / 0.21
    return F.linear(((q.round() - q).detach() + q) * 0.21, m.rounded(), m.bias)


def whole_function(m: Layer, x: Tensor) -> Tensor:
    return Whole.apply(x, m.rounded()) + m.bias


@pytest.mark.parametrize(
    "form",
    [rounding_function, spiking_function, saturated_training, static_training, whole_function],
    ids=lambda f: f.__name__,
)
def test_gradients_are_eagers(form: Call) -> None:
    torch._dynamo.reset()
    x, model = rows().clamp(-9, 9), Layer(form)

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        return [y.detach(), *(t.grad.clone() for t in (leaf, model.weight, model.bias) if t.grad is not None)]

    with report.collect_found() as found:
        got = gradients(torch.compile(model, backend="spikingbrain"))
    if form is whole_function:
        assert [s.status for s in found.spikes] == ["float"]
        assert "inside an autograd.Function" in found.spikes[0].reason
    else:
        assert [s.status for s in found.spikes] == ["raised"], found.spikes
    wanted = gradients(model)
    assert len(got) == len(wanted)
    for actual, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))
