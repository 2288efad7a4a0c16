"""The normal form of graphs: equal values are one, rearrangements are said in one way, chains of writes are joins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from recurrence_graphs import Evaluation, Traced
from test_recurrence_reroll import Function
from torch import Tensor

from spikingbrain.passes.recurrence.graph import Graph, Slot, Value
from spikingbrain.passes.recurrence.normalise import normalise


def ops(
    function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Counter[str]:
    """Returns the ops of the normal form, which computes the same; inputs left out."""
    traced = Traced(Function(function), [torch.randn(s).to(dtype) for s in shapes])
    for result, expected in zip(Evaluation(traced).outputs(), traced.expected, strict=True):
        assert torch.equal(result, expected)
    return Counter(v.op for v in traced.graph.values if v.op != "input")


def test_copies_and_casts_to_the_same_type_vanish() -> None:
    assert not ops(lambda x: x.clone().contiguous().float().to(torch.float32), (2, 3))


def test_casts_that_round_and_detach_stay() -> None:
    assert ops(lambda x: x.bfloat16().float().detach(), (2, 3)) == {"cast": 2, "detach": 1}


def test_equal_values_are_one() -> None:
    assert ops(lambda x: x.exp() + x.exp(), (2, 3)) == {"exp": 1, "add": 1}


def test_numbers_of_different_types_are_not_equal() -> None:
    x = Value("input", [], ("x",), (2,), "int64")
    graph = Graph([x])
    made = [graph.add(Value("mul", [x], (Slot(0), n), (2,), "int64")) for n in (1, 1.0, True, 0.0, -0.0)]
    graph.outputs = made
    assert len(normalise(graph).values) == 1 + len(made)


def test_every_slice_of_one_entry_is_a_select() -> None:
    def slices(x: Tensor) -> list[Tensor]:
        parts = [
            x[:, 2],
            x[:, 2:3].squeeze(1),
            x[:, -3],
            x.unbind(1)[2],
            x.split(1, 1)[2][:, 0],
            x[:, 1:][:, 1],
        ]
        return parts

    assert ops(slices, (2, 5, 3)) == {"select": 1}


def test_parts_of_split_chunk_and_slices_are_slices() -> None:
    def parts(x: Tensor) -> list[Tensor]:
        return [x[:, 2:4], x.split(2, 1)[1], x.chunk(3, 1)[1], x.split([2, 2, 1], 1)[1], x[:, 1:][:, 1:3]]

    assert ops(parts, (2, 5, 3)) == {"slice": 1}


def test_writes_of_all_entries_are_one_stack() -> None:
    def written(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in range(x.shape[1]):
            out[:, t] = x[:, t].exp()
        return out

    assert ops(written, (2, 5, 3)) == {"select": 5, "exp": 5, "stack": 1}


def test_writes_of_most_entries_take_the_rest_from_below() -> None:
    def written(x: Tensor) -> Tensor:
        out = x.neg()
        for t in range(1, x.shape[1]):
            out[:, t] = x[:, t].exp()
        return out

    assert ops(written, (2, 5, 3)) == {"neg": 1, "select": 5, "exp": 4, "stack": 1}


def test_one_write_stays_one() -> None:
    def written(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[:, 3] = y
        return x

    assert ops(written, (2, 50, 3), (2, 3)) == {"select_scatter": 1}


def test_windows_written_in_order_are_one_cat() -> None:
    def written(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(0, 7, 2):
            out[:, i : i + 2] = x[:, i : i + 2].exp()
        return out

    assert ops(written, (2, 7, 3)) == {"slice": 3, "select": 1, "unsqueeze": 1, "exp": 4, "cat": 1}


def test_the_last_write_to_a_place_counts() -> None:
    def written(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in (0, 1, 2, 3, 1):
            out[:, t] = out[:, t] + x[:, t].exp()
        return out

    assert ops(written, (2, 4, 3))["stack"] >= 1


def test_parts_of_entries_written_one_by_one() -> None:
    def written(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for t in range(x.shape[1]):
            for i in range(x.shape[2]):
                out[:, t, i] = x[:, t, i].exp()
        return out

    found = ops(written, (2, 4, 3, 2))
    assert found["stack"] == 5 and not found["select_scatter"]


def test_a_tensor_read_while_it_is_written() -> None:
    def written(x: Tensor) -> list[Tensor]:
        out, sums = torch.zeros_like(x), []
        for t in range(x.shape[1]):
            out[:, t] = x[:, t].exp()
            sums.append(out.sum(1))
        return [out, *sums]

    assert ops(written, (2, 5, 3))["sum"] == 5


def test_a_list_that_grows_by_cat_is_one_stack() -> None:
    def grown(x: Tensor) -> Tensor:
        out = x[:, :0]
        for t in range(x.shape[1]):
            out = torch.cat([out, x[:, t : t + 1].exp()], 1)
        return out

    found = ops(grown, (2, 5, 3))
    assert found["stack"] == 1 and not found["cat"]


def test_transpositions_are_permutations() -> None:
    assert ops(lambda x: [x.transpose(-1, -2), x.mT, x.permute(0, 2, 1), x.mT.mT.mT], (2, 5, 3)) == {
        "permute": 1
    }


def test_origins_are_the_values_stood_for() -> None:
    x = Value("input", [], ("x",), (2,), "float32")
    graph = Graph()
    graph.add(x)
    first, second = (graph.add(Value("exp", [x], (Slot(0),), (2,), "float32")) for _ in range(2))
    copy = graph.add(Value("clone", [second], (Slot(0),), (2,), "float32"))
    graph.outputs = [first, copy]
    made = normalise(graph).outputs
    assert made[0] is made[1]
    assert made[0].origin == (first, second, copy)
