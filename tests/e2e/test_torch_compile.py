"""torch.compile(backend="spikingbrain") against eager: what users' programs do beyond plain layers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close as assert_tensors_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikingbrain.frontend.dynamo.report import GraphReport, collect


def assert_close(actual: Any, expected: Any, what: str) -> None:
    """Compares tensors, or sequences of them in which None stands for itself."""
    if isinstance(expected, Tensor):
        assert_tensors_close(actual, expected, what)
        return
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), f"{what} {i}"
        if e is not None:
            assert_close(a, e, f"{what} {i}")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(function: Any, **options: Any) -> Any:
    dynamic = options.pop("dynamic", False)
    return torch.compile(function, backend="spikingbrain", dynamic=dynamic, options=options or None)


def gradients(
    function: Callable[..., Tensor], *inputs: Any, parameters: Any = ()
) -> tuple[Any, list[Tensor]]:
    """Returns the result and the gradients with respect to float inputs and parameters."""
    leaves = [
        i.detach().clone().requires_grad_(i.is_floating_point()) if isinstance(i, Tensor) else i
        for i in inputs
    ]
    result = function(*leaves)
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad] + list(parameters)
    loss = result.float().square().mean()
    return result.detach(), list(torch.autograd.grad(loss, wanted, allow_unused=True))


def check(function: Any, *inputs: Any, training: bool = True, **options: Any) -> list[GraphReport]:
    """Compares results and gradients with eager's, and that inputs are left alone; returns what was compiled."""
    before = [i.clone() if isinstance(i, Tensor) else i for i in inputs]
    fast = compiled(function, **options)
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    with collect() as reports:
        with torch.no_grad():
            assert_close(fast(*inputs), function(*inputs), "result")
        if training:
            expected, expected_gradients = gradients(function, *inputs, parameters=parameters)
            actual, actual_gradients = gradients(fast, *inputs, parameters=parameters)
            assert_close(actual, expected, "result in training")
            assert_close(actual_gradients, expected_gradients, "gradient")
    for given, kept in zip(inputs, before, strict=True):
        assert not isinstance(given, Tensor) or torch.equal(given, kept), "an input was overwritten"
    assert any(r.count("compiled") for r in reports), "nothing was compiled"
    return reports


class Mlp(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Grouped heads; causal, over a window, or bidirectional."""

    def __init__(self, kind: str, width: int = 32) -> None:
        super().__init__()
        self.kind, self.heads, self.groups = kind, 4, 2
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, self.groups, -1).permute(2, 0, 3, 1, 4)
        mask = None
        if self.kind == "window":
            t = torch.arange(length)
            mask = (t[:, None] >= t) & (t[:, None] - t < 4)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.kind == "causal", enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class TopTwoExperts(nn.Module):
    def __init__(self, width: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / 4)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        best, index = scores.topk(2, dim=-1)
        gates = torch.zeros_like(scores).scatter(-1, index, best / best.sum(-1, keepdim=True))
        hidden = F.silu(torch.einsum("btd,edh->bteh", x, self.up))
        return torch.einsum("bteh,ehd,bte->btd", hidden, self.down, gates)


class LossOfTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16, padding_idx=0), nn.Linear(16, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(F.rms_norm(self.embedding(tokens), (16,)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)[None]


def test_mlp() -> None:
    check(Mlp(), torch.randn(2, 7, 32))


@pytest.mark.parametrize("kind", ["causal", "window", "full"])
def test_attention(kind: str) -> None:
    check(Attention(kind), torch.randn(2, 9, 32))


def test_experts() -> None:
    check(TopTwoExperts(), torch.randn(2, 5, 16))


def test_embedding_and_cross_entropy() -> None:
    check(LossOfTokens(), torch.randint(0, 50, (3, 11)))


@pytest.mark.slow
def test_convolutions() -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv1d(16, 8, 1))
    check(model, torch.randn(2, 8, 13))
    images = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8).eval(), nn.ReLU(), nn.MaxPool2d(2))
    check(images, torch.randn(2, 3, 17, 17))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float64, torch.float16))],
)
def test_element_types(dtype: torch.dtype) -> None:
    model = Mlp().to(dtype)
    x = torch.randn(2, 7, 32, dtype=dtype)
    check(model, x)
    assert compiled(model)(x).dtype == dtype


def test_integers() -> None:
    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (
            x // 3 + y,
            (x % 5) * -y,
            x.to(torch.int8) >> 1,
            (x > y).sum(),
            x.abs().clamp(max=7).to(torch.uint8),
        )

    x, y = torch.randint(-99, 99, (4, 33)), torch.randint(1, 9, (4, 33))
    check(step, x, y, training=False)


@pytest.mark.slow
def test_several_dynamic_sizes() -> None:
    model = nn.Sequential(Mlp(), Attention("causal"), Mlp())
    fast = compiled(model, dynamic=True)
    with collect() as reports:
        for batch, length in [(2, 7), (3, 5), (4, 16), (5, 3)]:
            x = torch.randn(batch, length, 32)
            with torch.no_grad():
                assert_close(fast(x), model(x), f"{batch} x {length}")
            expected, expected_gradients = gradients(model, x, parameters=model.parameters())
            actual, actual_gradients = gradients(fast, x, parameters=model.parameters())
            assert_close(actual, expected, "result")
            assert_close(actual_gradients, expected_gradients, f"gradients at {batch} x {length}")
    assert [r.kind for r in reports].count("inference") == 1, "compiled again for another size"
    assert all(r.count("compiled") for r in reports)


@pytest.mark.slow
def test_dynamic_embedding_gradient() -> None:
    model = LossOfTokens()
    fast = compiled(model, dynamic=True)
    for batch, length in [(2, 7), (3, 5), (4, 16)]:
        tokens = torch.randint(0, 50, (batch, length))
        (a, ga), (e, ge) = (gradients(f, tokens, parameters=model.parameters()) for f in (fast, model))
        assert_close([a, *ga], [e, *ge], f"{batch} x {length}")


def test_buffers_are_updated() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            self.count += 1
            return torch.tanh(x - self.mean) * 2

    plain, fast = Counter(), Counter()
    called = compiled(fast)
    for _ in range(3):
        x = torch.randn(4, 8)
        assert_close(called(x), plain(x), "result")
    assert_close(fast.mean, plain.mean, "buffer")
    assert fast.count == 3


def test_an_argument_written_in_place() -> None:
    def write(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(y.sigmoid()).add_(1)
        return x.exp().sum(-1)

    y = torch.randn(3, 5)
    a, b = torch.ones(3, 5), torch.ones(3, 5)
    assert_close(compiled(write)(a, y), write(b, y), "result")
    assert_close(a, b, "argument")


def test_batch_norm_in_training() -> None:
    plain = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU())
    other = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU())
    other.load_state_dict(plain.state_dict())
    fast = compiled(other)
    for _ in range(3):
        x = torch.randn(6, 8)
        (e, ge), (a, ga) = (
            gradients(plain, x, parameters=plain.parameters()),
            gradients(fast, x, parameters=other.parameters()),
        )
        # the gradient of the bias before the norm is zero in exact arithmetic
        assert_close([a, *ga[:2], *ga[3:]], [e, *ge[:2], *ge[3:]], "step")
        assert_tensors_close(ga[2], ge[2], "gradient of the bias", scale=1)
    assert_close(list(other.buffers()), list(plain.buffers()), "statistics")


def test_activation_checkpointing() -> None:
    block = Mlp()

    def model(x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(block, x, use_reentrant=False)
        return x

    x = torch.randn(2, 7, 32)
    fast = compiled(model)
    (e, ge), (a, ga) = (gradients(f, x, parameters=block.parameters()) for f in (model, fast))
    assert_close([a, *ga], [e, *ge], "checkpointed")


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool) -> None:
    model = nn.Sequential(Mlp(), Mlp())

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float()

    x = torch.randn(2, 7, 32)
    if training:
        (e, ge), (a, ga) = (gradients(f, x, parameters=model.parameters()) for f in (run, compiled(run)))
        scale = max(g.abs().max() for g in ge)
        assert all((g - h).abs().max() < 2e-2 * scale for g, h in zip(ga, ge, strict=True))
    else:
        with torch.no_grad():
            a, e = compiled(run)(x), run(x)
    assert (a - e).abs().max() < 2e-2 * e.abs().max()


class _Sign(torch.autograd.Function):
    """A spike with a straight-through gradient, scaled so that a lost definition shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 3 / (1 + x.abs()).square()


def test_autograd_function() -> None:
    layer = nn.Linear(8, 8)
    check(lambda x: _Sign.apply(layer(x)) * x.cos(), torch.randn(5, 8))


def test_no_grad_region_and_detach() -> None:
    def model(x: Tensor) -> Tensor:
        y = x.sin() * x
        with torch.no_grad():
            scale = y.abs().mean() + 1
        return y / scale + (y * 2).detach() * x.exp()

    check(model, torch.randn(5, 8))


@pytest.mark.parametrize("training", [False, True])
def test_dropout_obeys_the_seed(training: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.4), nn.GELU(), nn.Linear(32, 8)).train()
    x, fast = torch.randn(4, 8), compiled(model)
    results = []
    for function in (model, fast, fast):
        torch.manual_seed(7)
        results.append(
            gradients(function, x, parameters=model.parameters()) if training else (function(x).detach(), [])
        )
    for a, ga in results[1:]:
        assert_close([a, *ga], [results[0][0], *results[0][1]], "the same seed")
    assert not torch.equal(fast(x), fast(x))


@pytest.mark.slow
def test_layouts() -> None:
    """Transposed, channels-last, sliced and expanded inputs; results have eager's strides."""

    def model(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = (x * 2 + y.exp()).sin()
        return z, z.transpose(0, 1) + 1

    base = torch.randn(6, 4, 10)
    inputs = [
        (base.transpose(0, 2), base.transpose(0, 2)),
        (base[:, 1:3], base[:, :1].expand(6, 2, 10)),
        (base[::2, :, 1:], base[1::2, :, :-1]),
        (base.permute(1, 2, 0), torch.randn(())),
    ]
    for x, y in inputs:
        torch._dynamo.reset()
        check(lambda a, b: model(a, b)[0], x, y)
        with torch.no_grad():
            for a, e in zip(compiled(model)(x, y), model(x, y), strict=True):
                assert_close(a, e, "layout")
                assert a.stride() == e.stride()


def test_views_of_results() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = (x * 3).tanh() + 1
        return y, y[:, 1:], y.t(), y.view(-1), x[0], x

    x = torch.randn(4, 6)
    with torch.no_grad():
        for a, e in zip(compiled(model)(x), model(x), strict=True):
            assert_close(a, e, "view")
            assert a.stride() == e.stride()


def test_results_outlive_later_calls() -> None:
    fast = compiled(lambda x: (x * 2).sin() + 1)
    inputs = [torch.full((64,), float(i)) for i in range(20)]
    results = [fast(x) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        assert_close(y, (x * 2).sin() + 1, "an earlier result")


@pytest.mark.parametrize("library", [True, False])
def test_results_share_no_memory(library: bool) -> None:
    """What the compiler knows to be a copy is still the caller's own."""

    def model(x: Tensor) -> tuple[Tensor, ...]:
        y = (x * 2).sin() + 1
        return y, y.clone(), y.clone().view(-1), x.clone(), x.view(-1).clone().view(5, 3), x * 1

    x = torch.randn(3, 5)
    fast = compiled(model, library=library)
    for _ in range(2):
        results = fast(x)
        memory = [t.data_ptr() for t in (x, *results)]
        assert len(set(memory)) == len(memory)
        assert_close(results, model(x), "result")


@pytest.mark.parametrize("index", [10, 10**9, -1])
@pytest.mark.parametrize("training", [False, True])
def test_an_index_outside_raises(index: int, training: bool) -> None:
    table = nn.Embedding(10, 4).requires_grad_(training)
    fast = compiled(lambda i: (table(i) * 2).sin() + 1, library=False)
    with pytest.raises(IndexError, match="out of range"):
        fast(torch.tensor([[1, index]]))


def test_the_imaginary_part_of_a_conjugate() -> None:
    def model(z: Tensor) -> Tensor:
        v = z.conj().imag
        return (v * 2 + v.sin()).exp()

    z = torch.randn(4, 4, dtype=torch.complex64)
    assert_close(compiled(model)(z), model(z), "result")


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_changed_parameters_are_noticed() -> None:
    model, x = Frozen().requires_grad_(False), torch.randn(3, 16)
    fast = compiled(model)

    def same(what: str) -> None:
        assert_close(fast(x), model(x), what)

    same("fresh")
    model.a.weight.mul_(2)
    same("written in place")
    model.load_state_dict(Frozen().state_dict())
    same("loaded")
    model.b.weight = nn.Parameter(torch.randn(16, 32), requires_grad=False)
    same("replaced")
    model.a.weight.data = torch.randn(32, 16)
    same("new memory")
    model.to(torch.float64).to(torch.float32)
    same("converted and back")


def test_refresh_after_writes_that_leave_no_trace() -> None:
    from spikingbrain.frontend.dynamo.weights import refresh

    model, x = Frozen().requires_grad_(False), torch.randn(3, 16)
    fast = compiled(model)
    fast(x)
    model.a.weight.data.mul_(3)
    refresh()
    assert_close(fast(x), model(x), "refreshed")


def test_two_threads_compile_and_call() -> None:
    models = [Mlp(32), Mlp(48)]
    inputs = [torch.randn(2, 7, 32), torch.randn(2, 7, 48)]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                fast = compiled(models[i])
                for _ in range(20):
                    assert_close(fast(inputs[i]), models[i](inputs[i]), f"thread {i}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_graph_breaks_and_data_dependent_branches() -> None:
    def model(x: Tensor) -> Tensor:
        y = x.sin() * 2 + x
        if y.sum() > 0:
            return y.exp() + y.cos()
        return y * float(y.mean().item()) + y.cos()

    for sign in (1, -1):
        x = sign * torch.rand(8)
        assert_close(compiled(model)(x), model(x), "branch")


def test_constants_and_numbers() -> None:
    table = torch.arange(5.0)

    def model(x: Tensor, scale: float, flag: bool) -> Tensor:
        y = x * scale + table + torch.tensor([1.0, 2, 3, 4, 5])
        return y.sin() + 1 if flag else y.cos()

    fast = compiled(model)
    x = torch.randn(3, 5)
    for scale in (0.5, 2.0, 3.25):
        assert_close(fast(x, scale, True), model(x, scale, True), f"{scale}")


def test_double_precision_stays_double() -> None:
    x = torch.randn(64, dtype=torch.float64)
    y = compiled(lambda v: (v * 1.1 + 0.3) * v - v / 3)(x)
    assert_close(y, (x * 1.1 + 0.3) * x - x / 3, "float64")


def test_lstm() -> None:
    lstm = nn.LSTM(8, 12, batch_first=True)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert_close(compiled(lstm)(x)[0], lstm(x)[0], "lstm")


def test_vmap_and_functional_gradients() -> None:
    weight = torch.randn(6, 6)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return ((x @ w).tanh() * 2 + 1).square().mean()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    x = torch.randn(4, 3, 6)
    assert_close(compiled(per_sample)(weight, x), per_sample(weight, x), "per-sample gradients")
