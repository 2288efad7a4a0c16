"""The blockwise recurrences of models/ against the plain loops of models/reference/."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parents[1]))
from tolerances import assert_close
from torch import Tensor
from torch.utils import _pytree as pytree

from spikingbrain.models import recurrences
from spikingbrain.models.reference import recurrences as reference

B, H, K, V, M, D = 2, 3, 5, 4, 6, 7


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _gate(*shape: int) -> Tensor:
    """Returns logarithms of decays: most mild, some extreme."""
    g = F.logsigmoid(4 * _normal(*shape))
    kind = torch.rand(shape)
    return g.masked_fill(kind < 0.05, -torch.inf).masked_fill(kind > 0.9, 0.0) * torch.where(
        kind < 0.1, 200.0, 1.0
    )


def _qkv(T: int) -> dict[str, Tensor]:
    return {"q": _normal(B, T, H, K), "k": F.normalize(_normal(B, T, H, K), dim=-1), "v": _normal(B, T, H, V)}


@dataclass(frozen=True)
class Case:
    """How a function is called: float64 operands for T steps, a state, and arguments that are not tensors."""

    operands: Callable[[int], dict[str, Tensor]]
    state: Callable[[], Any] | None = lambda: _normal(B, H, K, V)
    options: tuple[tuple[str, Any], ...] = ()


def _rwkv(T: int) -> dict[str, Tensor]:
    x = _qkv(T)
    return {"r": x["q"], "k": x["k"], "v": x["v"], "w": _gate(B, T, H, K), "u": _normal(H, K)}


def _lru(T: int) -> dict[str, Tensor]:
    gates = {
        "input_gate": torch.rand(B, T, D).double(),
        "recurrence_gate": torch.rand(B, T, D).double() + 0.01,
    }
    return {"x": _normal(B, T, D), **gates, "parameter": _normal(D), "reset": torch.rand(B, T) < 0.1}


def _mamba(T: int) -> dict[str, Tensor]:
    steps = {"x": _normal(B, T, D), "dt": F.softplus(3 * _normal(B, T, D)), "a": -_normal(D, M).exp()}
    return {**steps, "b": _normal(B, T, M), "c": _normal(B, T, M), "d": _normal(D)}


def _ssd(T: int) -> dict[str, Tensor]:
    steps = {"x": _normal(B, T, 4, V), "dt": F.softplus(3 * _normal(B, T, 4)), "a": -_normal(4).exp()}
    return {**steps, "b": _normal(B, T, 2, K), "c": _normal(B, T, 2, K), "d": _normal(4)}


CASES: dict[str, Case] = {
    "linear_attention": Case(_qkv),
    "normalised_linear_attention": Case(
        lambda T: {n: x.abs() if n != "v" else x for n, x in _qkv(T).items()},
        lambda: (_normal(B, H, K, V), _normal(B, H, K).abs()),
    ),
    "gla": Case(lambda T: {**_qkv(T), "g": _gate(B, T, H, K)}),
    "simple_gla": Case(lambda T: {**_qkv(T), "g": _gate(B, T, H)}),
    "retention": Case(_qkv),
    "lightning_attention": Case(_qkv, options=(("layer", 1), ("layers", 4))),
    "ssd": Case(_ssd, lambda: _normal(B, 4, K, V)),
    "rwkv6": Case(_rwkv),
    "delta_rule": Case(lambda T: {**_qkv(T), "beta": torch.rand(B, T, H).double()}),
    "gated_delta_rule": Case(
        lambda T: {**_qkv(T), "g": _gate(B, T, H), "beta": torch.rand(B, T, H).double()}
    ),
    "kda": Case(lambda T: {**_qkv(T), "g": _gate(B, T, H, K), "beta": torch.rand(B, T, H).double()}),
    "gsa": Case(
        lambda T: {**_qkv(T), "s": _normal(B, T, H, M), "g": _gate(B, T, H, M)},
        lambda: (_normal(B, H, K, M), _normal(B, H, M, V)),
    ),
    "abc": Case(lambda T: {**_qkv(T), "s": _normal(B, T, H, M)}, None),
    "mlstm": Case(
        lambda T: {**_qkv(T), "i": 3 * _normal(B, T, H), "f": _gate(B, T, H)},
        lambda: (_normal(B, H, K, V), _normal(B, H, K), _normal(B, H)),
    ),
    "hgrn": Case(lambda T: {"x": _normal(B, T, D), "g": _gate(B, T, D)}, lambda: _normal(B, D)),
    "rg_lru": Case(_lru, lambda: _normal(B, D)),
    "mamba": Case(_mamba, lambda: _normal(B, D, M)),
}


def _call(name: str, operands: dict[str, Tensor], state: Any, **options: Any) -> Any:
    function, options = getattr(recurrences, name), {**dict(CASES[name].options), **options}
    if CASES[name].state is None:
        return function(**operands, **options)
    return function(**operands, initial_state=state, output_final_state=True, **options)


def _expected(name: str, operands: dict[str, Tensor], state: Any) -> Any:
    extra = {} if CASES[name].state is None else {"state": state}
    return getattr(reference, name)(**operands, **extra, **dict(CASES[name].options))


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(dtype) if _is_float(x) else x, values)


def _compare(actual: Any, expected: Any, what: str, dtype: torch.dtype, scale: float = 0.0) -> None:
    for number, (a, e) in enumerate(
        zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    ):
        assert_close(a, e.to(dtype), f"{what}, result {number}", scale)


@pytest.mark.parametrize("steps", [0, 1, 7, 130])
@pytest.mark.parametrize("name", CASES)
def test_float64_and_gradients(name: str, steps: int) -> None:
    torch.manual_seed(steps)
    case = CASES[name]
    operands = case.operands(steps)
    for state in (None, case.state() if case.state else None):

        def results(run: Callable[..., Any], state: Any = state) -> tuple[list[Tensor], list[Tensor]]:
            given, form = pytree.tree_flatten((operands, state))
            given = [x.clone().requires_grad_() if _is_float(x) else x for x in given]
            leaves = [x for x in given if _is_float(x)]
            out = pytree.tree_leaves(run(name, *pytree.tree_unflatten(given, form)))
            weighted = [
                (x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in out
            ]
            loss = sum(weighted) + sum(0 * x[x.isfinite()].sum() for x in leaves)
            return out, list(torch.autograd.grad(loss, leaves))

        (out, grads), (wanted, wanted_grads) = results(_call), results(_expected)
        _compare(out, wanted, name, torch.float64)
        _compare(grads, wanted_grads, f"gradients of {name}", torch.float64, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_narrower_dtypes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    operands, state = _cast((case.operands(150), case.state() if case.state else None), dtype)
    got = _call(name, operands, state)
    expected = _expected(name, *_cast((operands, state), torch.float64))
    outputs, states = (got, None) if case.state is None else got
    assert outputs.dtype == dtype
    assert all(x.dtype == torch.float32 for x in pytree.tree_leaves(states) if x is not None)
    for number, (a, e) in enumerate(zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True)):
        # Measured: 5e-7 of the largest element in float32.
        bound = 5e-6 if dtype == torch.float32 else 5e-2
        assert (a.double() - e).abs().max() <= bound * e.abs().max(), f"{name}, result {number}"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.state])
def test_any_split_of_the_text_gives_the_same(name: str) -> None:
    torch.manual_seed(1)
    case = CASES[name]
    assert case.state is not None
    operands, state, steps = case.operands(100), case.state(), 100

    def part(start: int, stop: int) -> dict[str, Tensor]:
        return {n: x[:, start:stop] if x.ndim > 1 and x.shape[1] == steps else x for n, x in operands.items()}

    whole, last = _call(name, operands, state)
    pieces = []
    for start, stop in ((0, 1), (1, 66), (66, 66), (66, 100)):
        piece, state = _call(name, part(start, stop), state)
        pieces.append(piece)
    _compare((torch.cat(pieces, 1), state), (whole, last), name, torch.float64)


@pytest.mark.parametrize("name", ["gla", "simple_gla", "linear_attention", "retention"])
def test_heads_in_groups_and_time_reversed(name: str) -> None:
    torch.manual_seed(2)
    operands = CASES[name].operands(70)
    operands["q"] = _normal(B, 70, 2 * H, K)
    o, last = _call(name, operands, None, reverse=True)
    turned = {n: x.flip(1) for n, x in operands.items()}
    for g in range(2):
        wanted, state = _expected(name, {**turned, "q": turned["q"][:, :, g::2]}, None)
        _compare((o[:, :, g::2].flip(1), last), (wanted, state), name, torch.float64)


def test_states_are_returned_when_asked_for() -> None:
    x = _qkv(5)
    assert recurrences.linear_attention(**x)[1] is None
    assert recurrences.normalised_linear_attention(**x)[1] is None
    assert recurrences.hgrn(_normal(B, 5, D), -_normal(B, 5, D).abs())[1] is None


def test_a_float32_gate_beside_bfloat16_keys_is_not_rounded() -> None:
    torch.manual_seed(3)
    operands = _cast(_qkv(100), torch.bfloat16)
    g = (-0.001 * torch.rand(B, 100, H, K)).float()
    o, last = recurrences.gla(**operands, g=g, output_final_state=True)
    _, wanted = reference.gla(**_cast(operands, torch.float64), g=g.double())
    assert o.dtype == torch.bfloat16
    assert last is not None
    assert_close(last, wanted.float(), "the last state")


@pytest.mark.parametrize("reset", ["none", "soft", "hard"])
@pytest.mark.parametrize("steps", [0, 1, 37])
def test_lif(reset: str, steps: int) -> None:
    torch.manual_seed(4)
    x, state = _normal(B, steps, D), _normal(B, D)
    for initial in (None, state):
        s, v = recurrences.lif(x, 0.75, 1.0, reset, initial_state=initial, output_final_state=True)
        wanted, last = reference.lif(x, 0.75, 1.0, reset, initial)
        assert torch.equal(s, wanted)
        assert v is not None
        assert_close(v, last, "the potential")


def test_lif_passes_gradients_through_spikes() -> None:
    x = torch.full((1, 3, 1), 0.5, dtype=torch.float64, requires_grad=True)
    s, _ = recurrences.lif(x, 1.0, 10.0, "soft", slope=2.0)
    (gradient,) = torch.autograd.grad(s[:, 0].sum(), x)
    slope = torch.tensor(2.0 * (0.5 - 10.0)).sigmoid()
    assert gradient[0, 0].item() == pytest.approx((2.0 * slope * (1 - slope)).item(), rel=1e-5)


def test_lif_names_an_unknown_reset() -> None:
    with pytest.raises(ValueError, match="unknown reset 'sometimes': one of none, soft, hard"):
        recurrences.lif(torch.zeros(1, 1, 1), 0.5, reset="sometimes")
