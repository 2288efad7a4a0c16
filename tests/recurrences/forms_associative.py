"""torch's associative_scan: pairs (a, b) of a linear recurrence, sums, maxima, logarithms, matrices; one not associative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import associative_scan
from written import form, negative

Pair = tuple[Tensor, Tensor]


def composed(left: Pair, right: Pair) -> Pair:
    """Returns the step h -> a h + b that is both steps in turn."""
    (a1, b1), (a2, b2) = left, right
    return a1 * a2, a2 * b1 + b2


@form("HGRN", "torch associative_scan", "x:TBD a:TBD:factor", "linear_scan")
def associative_hgrn(x: Tensor, a: Tensor) -> Tensor:
    return associative_scan(composed, (a, x), dim=0, combine_mode="generic")[1]


@form("RG-LRU", "torch associative_scan, backwards", "x:BTD a:BTD:log", "linear_scan")
def associative_rg_lru(x: Tensor, a: Tensor) -> Tensor:
    x = x * torch.sqrt(1.0001 - (2 * a).exp())
    return associative_scan(composed, (a.exp(), x), dim=1, reverse=True, combine_mode="generic")[1]


@form("RG-LRU", "torch associative_scan, initial state", "x:BTD a:BTD:factor h:BD", "linear_scan")
def associative_initial_state(x: Tensor, a: Tensor, h: Tensor) -> Tensor:
    """Needs the products of all decays, too."""
    decays, states = associative_scan(composed, (a, x), dim=1, combine_mode="generic")
    return states + decays * h[:, None]


@form("minGRU", "torch associative_scan of logarithms, logaddexp", "x:BTD:positive a:BTD:log", "pointwise")
def associative_logarithms(x: Tensor, a: Tensor) -> Tensor:
    def combine(left: Pair, right: Pair) -> Pair:
        return left[0] + right[0], torch.logaddexp(right[0] + left[1], right[1])

    return associative_scan(combine, (a, x.log()), dim=1, combine_mode="generic")[1].exp()


@form(
    "Mamba",
    "torch associative_scan, read afterwards",
    "x:BTD dt:BTD:positive a:DN:rate b:BTN c:BTN",
    "linear_scan",
)
def associative_mamba(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    decay = (dt[..., None] * a).exp()
    update = (dt * x)[..., None] * b[:, :, None]
    states = associative_scan(composed, (decay, update), dim=1, combine_mode="generic")[1]
    return torch.einsum("btdn,btn->btd", states, c)


@form("running maximum", "torch associative_scan", "x:BTD", "pointwise")
def associative_maximum(x: Tensor) -> Tensor:
    return associative_scan(torch.maximum, x, dim=1, combine_mode="generic")


@form(
    "matrix products",
    "torch associative_scan, without gradients",
    "a:TBNN",
    "loop",
    gradients=False,
    longest=64,
)
def associative_matrices(a: Tensor) -> Tensor:
    return associative_scan(lambda left, right: right @ left, a, dim=0, combine_mode="generic")


@negative(
    "leaky integrator",
    "torch associative_scan of a function that is not associative",
    "x:BTD",
    export="has size 64 along axis 1, expected 11",
)
def associative_in_name(x: Tensor) -> Tensor:
    return associative_scan(lambda left, right: 0.9 * left + right, x, dim=1, combine_mode="generic")
