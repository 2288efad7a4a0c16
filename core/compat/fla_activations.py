"""`fla.modules.activations` and `fla.modules.feature_map` in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sigmoid(x: Tensor) -> Tensor:
    return x.sigmoid()


def logsigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    return F.logsigmoid(x) / temperature


def swish(x: Tensor) -> Tensor:
    return F.silu(x)


def sqrelu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def fast_gelu_impl(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(y + bias, approximate="tanh")


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(swiglu(x, y), weight, bias)


ACT2FN: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "sigmoid": sigmoid,
    "logsigmoid": logsigmoid,
    "silu": swish,
    "swish": swish,
    "sqrelu": sqrelu,
    "gelu": fast_gelu_impl,
    "bias_gelu": bias_gelu,
}


class ReLUFeatureMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class SquaredReLUFeatureMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sqrelu(x)


class GELUFeatureMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fast_gelu_impl(x)


class SwishFeatureMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return swish(x)


class SigmoidFeatureMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


class HedgehogFeatureMap(nn.Module):
    """softmax(2 [Wx, -Wx]); W begins as the identity."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * self.layer(x)
        return torch.cat((y, -y), -1).softmax(-1)


class T2RFeatureMap(nn.Module):
    """relu(Wx)."""

    def __init__(self, head_dim: int, dot_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim if dot_dim is None else dot_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class HadamardFeatureMap(nn.Module):
    """W1 x * W2 x."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(head_dim, head_dim), nn.Linear(head_dim, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer1(x) * self.layer2(x)
        return y


class DPFPFeatureMap(nn.Module):
    """With y = relu([x, -x]): y times itself rolled by 1 to nu channels."""

    def __init__(self, head_dim: int, nu: int = 4):
        super().__init__()
        self.nu = nu

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(torch.cat((x, -x), -1))
        return torch.cat([y * y.roll(shift, -1) for shift in range(1, self.nu + 1)], -1)


class TaylorFeatureMap(nn.Module):
    """Features whose product is 1 + s + s^2 / 2 of the scaled score s = x . y / sqrt(D)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        root = math.sqrt(self.head_dim)
        row, column = torch.triu_indices(self.head_dim, self.head_dim, 1, device=x.device)
        squares, mixed = x.square() / (root * math.sqrt(2)), x[..., row] * x[..., column] / root
        return torch.cat((torch.ones_like(x[..., :1]), x / math.sqrt(root), squares, mixed), -1)
