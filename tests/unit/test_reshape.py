"""Reshapes with several dynamic dimensions: the grouping of symbolic shapes, and numbers end to end.

Every view of the end-to-end test is one output of a single artifact, called at several sizes, one included.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import spikingbrain
from spikingbrain.frontend.capture import Entry, capture
from spikingbrain.frontend.reshape import Run, group, is_ambiguous

ATOMS = (2, 3, 4)  # the static sizes that follow the dynamic ones of the tensor that is viewed
View = Callable[[Tensor], Tensor]


def views_by_hand() -> dict[str, View]:
    """The reshapes that models make, of x: [B, T, S, 2, 3, 4]."""
    return {
        "rows": lambda x: x[:, :, 0].reshape(x.shape[0], x.shape[1], 24).reshape(-1, 24),
        "rows and back": lambda x: (x.reshape(-1, 24) * 2).reshape(x.shape[0], x.shape[1], x.shape[2], 24),
        "back with -1": lambda x: (x[:, :, 0].reshape(-1, 24) * 2).reshape(x.shape[0], -1, 24),
        "flat": lambda x: x.flatten(),
        "heads": lambda x: x.reshape(x.shape[0], x.shape[1], x.shape[2], 6, 4).transpose(1, 3).reshape(-1, 4),
        "transposed then flat": lambda x: x[:, :, 0, 0, 0].transpose(0, 1).reshape(-1),
        "transposed then rows": lambda x: x[:, :, 0].transpose(0, 1).reshape(-1, 24),
        "an axis more": lambda x: x[..., 0, 0, 0].reshape(x.shape[0], x.shape[1], x.shape[2], 1),
        "an axis before": lambda x: x[..., 0, 0, 0].reshape(1, x.shape[0], x.shape[1], x.shape[2]),
        "ones between": lambda x: x[:, :, 0, 0, 0].reshape(x.shape[0], 1, x.shape[1], 1, 4),
        "ones away": lambda x: x[:, :1, :1, :1, 0, 0].reshape(x.shape[0]),
        "two and two": lambda x: x.reshape(x.shape[0] * x.shape[1], x.shape[2] * 2, 12),
        "cut elsewhere": lambda x: x.reshape(x.shape[0] * x.shape[1] * 2, x.shape[2] * 12),
    }


def random_view(rng: random.Random) -> View:
    """From one random grouping of B, T, S, 2, 3, 4 to another, with ones put in, one size perhaps -1."""
    dynamic = rng.randrange(4)

    def grouping() -> tuple[list[tuple[int, int]], int]:
        cuts = sorted({0, 6, *rng.sample(range(1, 6), rng.randrange(6))})
        groups = list(pairwise(cuts))
        for _ in range(rng.choice([0, 0, 1, 2])):
            groups.insert(rng.randrange(len(groups) + 1), (0, 0))
        return groups, rng.choice([-1, *range(len(groups))])

    first, second = grouping(), grouping()

    def view(x: Tensor) -> Tensor:
        for axis in range(dynamic, 3):  # the others are static here
            x = x.narrow(axis, 0, 1)
        atoms = x.shape
        for groups, unknown in (first, second):
            sizes = [prod(atoms[a:b]) for a, b in groups]
            x = x.reshape([-1 if n == unknown else s for n, s in enumerate(sizes)]) + 1
        return x

    return view


VIEWS = {**views_by_hand(), **{f"random {n}": random_view(random.Random(n)) for n in range(30)}}


class Views(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [view(x) for view in VIEWS.values()]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> spikingbrain.Program:
    dims = {axis: torch.export.Dim(name, min=1, max=64) for axis, name in enumerate("bts")}
    entry = Entry((torch.zeros(2, 3, 5, *ATOMS),), dynamic_shapes={"x": dims})
    path = tmp_path_factory.mktemp("views") / "views.sb"
    return spikingbrain.load(spikingbrain.export(Views(), {"main": entry}, path, target="cpu"))


@pytest.mark.parametrize("sizes", [(2, 3, 5), (1, 1, 1), (1, 4, 2), (4, 1, 2), (3, 2, 1), (7, 6, 3)])
def test_views_equal_eager(program: spikingbrain.Program, sizes: tuple[int, ...]) -> None:
    x = torch.arange(prod(sizes) * prod(ATOMS), dtype=torch.float32).reshape(*sizes, *ATOMS)
    for name, result, wanted in zip(VIEWS, program.main(x), Views()(x), strict=True):
        np.testing.assert_array_equal(result, wanted.numpy(), err_msg=name)


def test_no_such_view_is_left_to_upstream() -> None:
    """Each of the importer's own reshapes stands as collapse and expand in the captured module."""

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.reshape(-1, 32) * 2).reshape(x.shape[0], x.shape[1], 32)

    dims = {axis: torch.export.Dim(name, min=1, max=64) for axis, name in enumerate("bt")}
    text = capture(One(), {"main": Entry((torch.zeros(2, 3, 32),), dynamic_shapes={"x": dims})}).module
    assert "torch.aten.view" not in text
    assert text.count("tensor.collapse_shape") == text.count("tensor.expand_shape") == 1


def test_time_cut_into_chunks() -> None:
    """A time that is declared as a multiple of four is cut without a guess."""

    class Chunks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], x.shape[1] // 4, 4, 8)

    dims = {0: torch.export.Dim("b", min=1, max=64), 1: 4 * torch.export.Dim("chunks", min=1, max=16)}
    text = capture(Chunks(), {"main": Entry((torch.zeros(2, 12, 8),), dynamic_shapes={"x": dims})}).module
    assert "tensor.expand_shape" in text and "torch.aten.view" not in text


def test_time_padded_to_chunks(fresh_dynamo: None) -> None:
    """torch knows the chunks' length, the number 8, as the expression s // (s // 8)."""

    def chunks(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 8)).exp()
        return padded.reshape(x.shape[0], -1, 8, x.shape[2]).transpose(2, 3) * 1.5

    compiled = torch.compile(chunks, backend="spikingbrain", dynamic=True, options={"strict": True})
    for steps in (11, 16, 18):
        x = torch.randn(2, steps, 4)
        torch.testing.assert_close(compiled(x), chunks(x))


@pytest.fixture
def symbols() -> dict[str, Any]:
    """Symbolic sizes as an exported graph has them."""
    environment = ShapeEnv()
    return {name: environment.create_unbacked_symint() for name in "bt"}


def test_groups(symbols: dict[str, Any]) -> None:
    b, t = symbols["b"], symbols["t"]
    assert group([b, t, 32], [b * t, 32]) == [Run((0, 1), (0,)), Run((2,), (1,))]
    assert group([b * t, 32], [b, t, 4, 8]) == [Run((0,), (0, 1)), Run((1,), (2, 3))]
    assert group([b, t, 4], [b, t, 4]) == [Run((0,), (0,)), Run((1,), (1,)), Run((2,), (2,))]
    assert group([b, t], [t, b]) == [Run((0, 1), (0, 1))]
    assert group([b, 6, t], [b * 2, 3 * t]) == [Run((0, 1, 2), (0, 1))]
    assert group([b, t], [b, t, 1]) == [Run((0,), (0,)), Run((1,), (1,)), Run((), (2,))]
    assert group([1, b], [b]) == [Run((0, 1), (0,))]


def test_group_of_sizes_made_by_division(symbols: dict[str, Any]) -> None:
    """Algebra does not show that (t // 2) * 2 is t; all dimensions are then one run."""
    b, t = symbols["b"], symbols["t"]
    assert group([b, t, 4], [b, t // 2, 8]) == [Run((0, 1, 2), (0, 1, 2))]


def test_group_refuses_other_counts() -> None:
    with pytest.raises(ValueError, match=r"cannot view \[4, 6\] as \[5, 5\]"):
        group([4, 6], [5, 5])


def test_is_ambiguous(symbols: dict[str, Any]) -> None:
    b, t = symbols["b"], symbols["t"]
    assert is_ambiguous([b, t, 32], [b * t, 32])
    assert is_ambiguous([b * t, 32], [b, t, 32])
    assert not is_ambiguous([b, 4, 8], [b, 32])
    assert not is_ambiguous([2, 3], [6])
