"""Reading masks: every spelling of a known rule is recognised, every lookalike refused with its reason.

All masks of a test go through one export, as results of one function.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch_mlir import ir

from spikingbrain.frontend.capture import Entry, capture
from spikingbrain.passes.context import new_context
from spikingbrain.passes.visibility import NotShown, Visibility, analyse

BATCH, QUERIES, KEYS = 2, 3, 5
Mask = Callable[[Tensor, Tensor], Tensor]  # of query positions [B, 1, T, 1] and key positions [B, 1, 1, S]

# name -> (window, sinks, mask)
RECOGNISED: dict[str, tuple[int, int, Mask]] = {
    "causal": (0, 0, lambda i, j: (j >= 0) & (j <= i)),
    "other order": (0, 0, lambda i, j: (j <= i) & (j >= 0)),
    "turned round": (0, 0, lambda i, j: (i >= j) & (j > -1)),
    "strict with an offset": (0, 0, lambda i, j: (j >= 0) & (j < i + 1)),
    "offset of the key": (0, 0, lambda i, j: (j + 3 >= 3) & (j - 2 <= i - 2)),
    "said twice": (0, 0, lambda i, j: (j >= 0) & (j <= i) & (j < i + 1) & (j > -1)),
    "logical_and": (0, 0, lambda i, j: torch.logical_and(j >= 0, j <= i)),
    "window": (8, 0, lambda i, j: (j >= 0) & (j <= i) & (j > i - 8)),
    "loose window": (8, 0, lambda i, j: (j >= 0) & (j <= i) & (j >= i - 7)),
    "window turned round": (8, 0, lambda i, j: (j >= 0) & (i >= j) & (i < j + 8)),
    "window of one": (1, 0, lambda i, j: (j >= 0) & (j <= i) & (j >= i)),
    "sinks": (8, 2, lambda i, j: (j >= 0) & (j <= i) & ((j > i - 8) | (j < 2))),
    "sinks first": (8, 2, lambda i, j: ((j <= 1) | (i - 8 < j)) & (j <= i) & (j >= 0)),
    "logical_or": (8, 2, lambda i, j: torch.logical_or(j > i - 8, j < 2) & (j <= i) & (j >= 0)),
    "distributed": (8, 2, lambda i, j: (j >= 0) & (((j <= i) & (j > i - 8)) | ((j <= i) & (j < 2)))),
    "all in both": (8, 2, lambda i, j: ((j >= 0) & (j <= i) & (j > i - 8)) | ((j >= 0) & (j <= i) & (j < 2))),
    "sinks below zero": (8, 0, lambda i, j: (j >= 0) & (j <= i) & ((j > i - 8) | (j < -3))),
    "keys expanded over queries": (0, 0, lambda i, j: (j >= 0).expand(-1, -1, QUERIES, -1) & (j <= i)),
    "expanded over heads": (0, 0, lambda i, j: ((j >= 0) & (j <= i)).expand(-1, 4, -1, -1)),
}

OTHER_FORM = "the mask holds a condition of another form"

# name -> (reason, mask)
REFUSED: dict[str, tuple[str, Mask]] = {
    "window on the wrong side": (OTHER_FORM, lambda i, j: (j >= 0) & (j <= i) & (j < i - 8)),
    "strictly causal": (OTHER_FORM, lambda i, j: (j >= 0) & (j < i)),
    "one token ahead": (OTHER_FORM, lambda i, j: (j >= 0) & (j <= i + 1)),
    "prefix for all": (OTHER_FORM, lambda i, j: (j >= 0) & ((j <= i) | (j < 2))),
    "sinks outside the window only": (
        OTHER_FORM,
        lambda i, j: (j >= 0) & (j <= i) & ((j > i - 8) | (j >= 2)),
    ),
    "keys from one on": (OTHER_FORM, lambda i, j: (j >= 1) & (j <= i)),
    "empty slots": (
        "the mask does not exclude negative key positions (empty cache slots): add key >= 0",
        lambda i, j: j <= i,
    ),
    "empty slots as sinks": (
        "the mask does not exclude negative key positions (empty cache slots): add key >= 0",
        lambda i, j: (j <= i) & ((j > i - 8) | (j < 2)),
    ),
    "anti-causal": ("the mask lets a token see later ones", lambda i, j: (j >= 0) & (j >= i)),
    "two windows": (
        "the mask holds two windows",
        lambda i, j: (j >= 0) & (j <= i) & (j > i - 8) & (j > i - 4),
    ),
    "two windows, one with sinks": (
        "the mask holds two windows",
        lambda i, j: (j >= 0) & (j <= i) & (j > i - 4) & ((j > i - 8) | (j < 2)),
    ),
    "alternative windows": (
        "the mask repeats a bound within one alternative",
        lambda i, j: (j >= 0) & (j <= i) & ((j > i - 8) | (j > i - 4)),
    ),
    "empty window": ("the window is empty", lambda i, j: (j >= 0) & (j <= i) & ((j > i) | (j < 2))),
    "keys only": ("the mask does not compare key positions with query positions", lambda i, j: j >= 0),
    "a fraction": (
        "a position is not an int64 tensor",
        lambda i, j: (j >= 0.5) & (j <= i),
    ),
    "bound on the query": (
        "a query's position is compared with a constant",
        lambda i, j: (j >= 0) & (j <= i) & (i >= 3),
    ),
    "key with key": (
        "a comparison is not between a key's and a query's position",
        lambda i, j: (j >= 0) & (j <= i) & (j <= j + 1),
    ),
    "int32": ("a position is not an int64 tensor", lambda i, j: (j >= 0) & (j.int() <= i.int())),
    "floats": ("a position is not an int64 tensor", lambda i, j: (j >= 0) & (j.float() <= i.float())),
    "every second key": (
        "the mask is computed with torch.aten.eq.Scalar",
        lambda i, j: (j >= 0) & (j <= i) & ((i - j).remainder(2) == 0),
    ),
    "additive": (
        "the mask is computed with torch.aten.where",
        lambda i, j: torch.where((j >= 0) & (j <= i), 0.0, -1e9),
    ),
    "negated": ("the mask is computed with torch.aten.bitwise_not", lambda i, j: ~((j < 0) | (j > i))),
}


# The same for masks of positions as they come, [B, T] and [B, S].
RECOGNISED_FLAT: dict[str, Mask] = {
    "axis of heads last": lambda i, j: ((j[:, None] >= 0) & (j[:, None] <= i[:, :, None]))[:, None],
    "axes of keys late": lambda i, j: (j >= 0)[:, None, None] & (j[:, None, None] <= i[:, None, :, None]),
    "axes counted from the end": lambda i, j: (
        (j.unsqueeze(-2).unsqueeze(-3) >= 0) & (j.unsqueeze(-2).unsqueeze(1) <= i.unsqueeze(-1).unsqueeze(-3))
    ),
}
REFUSED_FLAT: dict[str, tuple[str, Mask]] = {
    "rank 3 lies along heads": (
        "a position does not lie along the query or the key axis",
        lambda i, j: (j[:, None] >= 0) & (j[:, None] <= i[:, :, None]),
    ),
    "rank 2 without a batch": (
        "a position does not lie along the query or the key axis",
        lambda i, j: (j[:1] >= 0) & (j[:1] <= i[0, :, None]),
    ),
    "one row for all queries": (
        "a comparison is not between a key's and a query's position",
        lambda i, j: ((j >= 0) & (j <= j + 1))[:, None, None] & (j[:, None, None] <= i[:, None, :, None]),
    ),
    "one row": ("the mask is not [..., T, S]", lambda i, j: j[0] >= 0),
}


def read(masks: Mapping[str, Mask], *more: Tensor, flat: bool = False) -> dict[str, Visibility | str]:
    """Returns the analysis of each mask, or the reason of its refusal; ``more`` are further inputs."""

    class Masks(nn.Module):
        def forward(self, i: Tensor, j: Tensor, more: Any) -> list[Tensor]:
            if not flat:
                i, j = i[:, None, :, None], j[:, None, None, :]
            return [mask(i, j, *more) for mask in masks.values()]

    positions = (torch.zeros(BATCH, n, dtype=torch.int64) for n in (QUERIES, KEYS))
    text = capture(Masks(), {"main": Entry((*positions, list(more)))}).module
    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        function = next(iter(module.body.operations))
        *_, terminator = function.regions[0].blocks[0].operations
        found: dict[str, Visibility | str] = {}
        for name, value in zip(masks, terminator.operation.operands, strict=True):
            found[name] = attempt(value)
            if isinstance(rule := found[name], Visibility):
                arguments = list(function.regions[0].blocks[0].arguments)
                assert (rule.query_positions, rule.key_positions) == (arguments[0], arguments[1]), name
        return found


def attempt(mask: ir.Value) -> Visibility | str:
    try:
        return analyse(mask)
    except NotShown as reason:
        return str(reason)


def test_spellings() -> None:
    found = read({name: mask for name, (_, _, mask) in RECOGNISED.items()})
    for name, (window, sinks, _) in RECOGNISED.items():
        rule = found[name]
        assert isinstance(rule, Visibility), f"{name}: {rule}"
        assert (rule.window, rule.sinks) == (window, sinks), name


def test_lookalikes() -> None:
    found = read({name: mask for name, (_, mask) in REFUSED.items()})
    for name, (reason, _) in REFUSED.items():
        assert str(found[name]).startswith(reason), name


def test_flat_positions() -> None:
    for name, rule in read(RECOGNISED_FLAT, flat=True).items():
        assert isinstance(rule, Visibility), f"{name}: {rule}"
        assert (rule.window, rule.sinks) == (0, 0), name
    found = read({name: mask for name, (_, mask) in REFUSED_FLAT.items()}, flat=True)
    assert found == {name: reason for name, (reason, _) in REFUSED_FLAT.items()}


def test_masks_with_other_inputs() -> None:
    """The masks that mention more than the two position tensors."""
    masks: dict[str, Any] = {
        "given": lambda i, j, key, query, switch, mask: mask,
        "or unrelated": lambda i, j, key, query, switch, mask: (
            ((j >= 0) & (j <= i)) | switch[:, None, None, None]
        ),
        "two keys": lambda i, j, key, query, switch, mask: (key[:, None, None] >= 0) & (j <= i),
        "two queries": lambda i, j, key, query, switch, mask: (
            (j >= 0) & (j <= i) & (j > query[:, None, :, None] - 8)
        ),
    }
    found = read(
        masks,
        torch.zeros(BATCH, KEYS, dtype=torch.int64),
        torch.zeros(BATCH, QUERIES, dtype=torch.int64),
        torch.zeros(BATCH, dtype=torch.bool),
        torch.zeros(BATCH, 1, QUERIES, KEYS, dtype=torch.bool),
    )
    assert found == {
        "given": "the mask is an input of the model",
        "or unrelated": "the mask is an input of the model",
        "two keys": "the mask mentions two different key positions",
        "two queries": "the mask mentions two different query positions",
    }


def shown(window: int, sinks: int, i: Tensor, j: Tensor) -> Tensor:
    """The rule as ``spikingbrain.attention`` documents it, on [..., T, 1] and [..., 1, S]."""
    return (j >= 0) & (j <= i) & ((j > i - window) | (j < sinks) if window else torch.tensor(True))


class Emitted:
    """A tensor of torch-dialect IR that takes the operators of a torch tensor; thousands of masks in a second."""

    def __init__(self, value: ir.Value, sizes: tuple[int, ...]):
        self.value, self.sizes = value, sizes

    def _emit(self, name: str, other: Emitted | int, element: str, *more: int) -> Emitted:
        integer = ir.Type.parse("!torch.int")

        def constant(n: int) -> ir.Value:
            attribute = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), n)
            return ir.Operation.create(
                "torch.constant.int", [integer], attributes={"value": attribute}
            ).result

        sizes = self.sizes
        if isinstance(other, Emitted):
            sizes = tuple(max(a, b) for a, b in zip(sizes, other.sizes, strict=True))
            operands, overload = [self.value, other.value], "Tensor"
        else:
            operands, overload = [self.value, constant(other)], "Scalar"
        operands += [constant(n) for n in more]
        result = ir.Type.parse(f"!torch.vtensor<[{','.join(map(str, sizes))}],{element}>")
        return Emitted(ir.Operation.create(f"torch.aten.{name}.{overload}", [result], operands).result, sizes)

    def __ge__(self, other: Emitted | int) -> Emitted:
        return self._emit("ge", other, "i1")

    def __gt__(self, other: Emitted | int) -> Emitted:
        return self._emit("gt", other, "i1")

    def __le__(self, other: Emitted | int) -> Emitted:
        return self._emit("le", other, "i1")

    def __lt__(self, other: Emitted | int) -> Emitted:
        return self._emit("lt", other, "i1")

    def __and__(self, other: Emitted) -> Emitted:
        return self._emit("bitwise_and", other, "i1")

    def __or__(self, other: Emitted) -> Emitted:
        return self._emit("bitwise_or", other, "i1")

    def __add__(self, other: int) -> Emitted:
        return self._emit("add", other, "si64", 1)

    def __sub__(self, other: int) -> Emitted:
        return self._emit("sub", other, "si64", 1)


def random_mask(rng: random.Random) -> Callable[[Any, Any], Any]:
    """A random formula of comparisons, near enough to the known forms that many are accepted."""

    def atom(kind: str) -> Mask:
        n, form = rng.choice([-1, 0, 0, 0, 1, 2]), rng.randrange(4)
        if kind == "key":
            return [lambda i, j: j >= n, lambda i, j: j > n, lambda i, j: j + 1 <= n, lambda i, j: j < n][
                form
            ]
        forms = [
            lambda i, j: j <= i + n,
            lambda i, j: i - n > j,
            lambda i, j: j + n >= i - 4,
            lambda i, j: i < j + 3 + n,
        ]
        return forms[form]  # type: ignore[return-value]

    def either(a: Mask, b: Mask) -> Mask:
        return lambda i, j: a(i, j) | b(i, j)

    parts = [rng.choice([lambda i, j: j <= i, lambda i, j: i + 1 > j, atom("distance")])]
    parts.append(rng.choice([lambda i, j: j >= 0, lambda i, j: j > -1, atom("key")]))
    for _ in range(rng.choice([0, 1, 1, 2])):
        parts.append(
            rng.choice(
                [atom("distance"), either(atom("distance"), atom("key")), either(parts[0], atom("key"))]
            )
        )
    rng.shuffle(parts)
    if rng.random() < 0.3:  # the whole in both alternatives
        more = atom(rng.choice(["key", "distance"]))
        return lambda i, j: conjunction(parts, i, j) | (conjunction(parts, i, j) & more(i, j))
    return lambda i, j: conjunction(parts, i, j)


def conjunction(parts: list[Mask], i: Any, j: Any) -> Any:
    result = parts[0](i, j)
    for part in parts[1:]:
        result = result & part(i, j)
    return result


POSITIONS = """
func.func @masks(%i: !torch.vtensor<[2,3],si64>, %j: !torch.vtensor<[2,5],si64>) {
  %1 = torch.constant.int 1
  %2 = torch.constant.int 2
  %3 = torch.constant.int 3
  %i1 = torch.aten.unsqueeze %i, %1 : !torch.vtensor<[2,3],si64>, !torch.int -> !torch.vtensor<[2,1,3],si64>
  %j1 = torch.aten.unsqueeze %j, %1 : !torch.vtensor<[2,5],si64>, !torch.int -> !torch.vtensor<[2,1,5],si64>
  %query = torch.aten.unsqueeze %i1, %3 : !torch.vtensor<[2,1,3],si64>, !torch.int -> !torch.vtensor<[2,1,3,1],si64>
  %key = torch.aten.unsqueeze %j1, %2 : !torch.vtensor<[2,1,5],si64>, !torch.int -> !torch.vtensor<[2,1,1,5],si64>
  return
}
"""


def test_accepted_formulas_mean_what_was_read() -> None:
    """Whatever the analysis accepts must equal the mask on every pair of positions."""
    rng = random.Random(0)
    i, j = torch.arange(-2, 12)[:, None], torch.arange(-3, 13)[None]
    rules: list[tuple[int, int]] = []
    with new_context(), ir.Location.unknown():
        module = ir.Module.parse(POSITIONS)
        body = next(iter(module.body.operations)).regions[0].blocks[0]
        *_, query, key, terminator = [op.operation for op in body.operations]
        positions = Emitted(query.result, (2, 1, 3, 1)), Emitted(key.result, (2, 1, 1, 5))
        for number in range(1500):
            mask = random_mask(rng)
            with ir.InsertionPoint(terminator):
                rule = attempt(mask(*positions).value)
            if isinstance(rule, Visibility):
                rules.append((rule.window, rule.sinks))
                assert torch.equal(mask(i, j), shown(rule.window, rule.sinks, i, j)), (number, rule)
    assert len(rules) > 150 and len(set(rules)) > 10
