"""What becomes of the rows that a token has sent to experts: weighted, cast, and added up into one row for the token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch_mlir import ir
from torch_mlir.dialects import arith

from spikingbrain.passes import torch_ir
from spikingbrain.passes.elementwise import (
    VIEWS,
    Applied,
    Element,
    Expressions,
    Linear,
    elements,
    emit,
    is_sum,
    node_text,
)
from spikingbrain.passes.kernels.builders import add, get, index, mul
from spikingbrain.passes.scan_axes import GENERIC, inputs_of, iterators, maps_of


@dataclass(frozen=True)
class Combination:
    """A sum over the experts of each token, of scalar ops on the element that a projection computes and on others.

    Attributes:
        end: the op whose result it is.
        sizes: of tokens, along several axes; of experts for each; of columns.
        reads: the other elements, at linear forms of these places.
    """

    end: ir.Operation
    node: Applied
    sizes: list[int]
    reads: list[Element]

    @property
    def each(self) -> int:
        """Returns how many rows a token has."""
        return self.sizes[-2]

    @property
    def sources(self) -> list[ir.Value]:
        """Returns the tensors that are read, each once."""
        return list({element.value: None for element in self.reads})

    @property
    def type(self) -> ir.Type:
        """Returns the type in which is added."""
        return ir.RankedTensorType(self.end.results[0].type).element_type

    @property
    def digest(self) -> str:
        known = {(e.value, e.place): n for n, e in enumerate(self.reads)}
        places = [(self.sources.index(e.value), e.place, str(e.value.type)) for e in self.reads]
        text = f"{node_text(self.node, known)} {places} {self.sizes} {self.type}"
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def summand(
        self,
        buffers: Sequence[ir.Value],
        token: ir.Value,
        number: ir.Value,
        column: ir.Value,
        value: ir.Value,
    ) -> ir.Value:
        """Emits what expert ``number`` of a token adds, where its projection gives ``value``."""
        at: list[ir.Value] = [number, column]
        for size in reversed(self.sizes[:-2]):
            at.insert(0, arith.remsi(token, index(size)))
            token = arith.divsi(token, index(size))
        read = {}
        for element in self.reads:
            buffer = buffers[self.sources.index(element.value)]
            read[element.value, element.place] = get(buffer, [_at(form, at) for form in element.place])
        return emit(self.node, [value], read)


def _at(form: Linear, at: Sequence[ir.Value]) -> ir.Value:
    total = index(form.constant)
    for factor, place in zip(form.factors, at, strict=True):
        if factor:
            total = add(total, mul(place, factor))
    return total


def find(op: ir.Operation) -> Combination | None:
    """Returns what a projection's rows ``[R, O]`` are combined to, if nothing else reads them."""
    (rows,) = _users(op.results[0]) or [None]
    if rows is None or rows.name != "tensor.expand_shape":
        return None
    given = rows.results[0]
    sizes = list(ir.RankedTensorType(given.type).shape)
    if min(sizes) < 0 or len(sizes) < 3 or sizes[-1] != ir.RankedTensorType(op.results[0].type).shape[1]:
        return None
    inside: list[ir.Operation] = []
    (end,) = _users(given) or [None]
    while end is not None and end.name == GENERIC and "reduction" not in iterators(end):
        inside.append(end)
        (end,) = _users(end.results[0]) or [None]
    if end is None or end.name != GENERIC or not is_sum(end) or len(inputs_of(end)) != 1:
        return None
    summed, result = maps_of(end)
    kept = [d for d in range(len(sizes)) if d != len(sizes) - 2]
    dims = [ir.AffineDimExpr(e).position for e in summed.results if isinstance(e, ir.AffineDimExpr)]
    if len(dims) != len(sizes) or [i for i, kind in enumerate(iterators(end)) if kind == "reduction"] != [
        dims[-2]
    ]:
        return None
    left = [ir.AffineDimExpr(e).position for e in result.results if isinstance(e, ir.AffineDimExpr)]
    if left != [dims[d] for d in kept]:
        return None
    casts = [op for chained in inside for op in _casts(chained)]
    given_here = Expressions(sizes, [*inside, *casts], given=given, after_given=inside)
    value = given_here.at(inputs_of(end)[0], given_here.here())
    if value is None:
        return None
    node = Applied(end, [value])
    return Combination(end, node, sizes, elements(node))


def _casts(op: ir.Operation) -> list[ir.Operation]:
    """Returns the ops that only change the type of what an op, and nothing else, reads."""
    found = []
    for value in inputs_of(op):
        while (made := torch_ir.defining(value)) is not None and made.name in VIEWS and _users(value):
            value = made.operands[0]
        if made is not None and made.name == GENERIC and _users(value):
            body = [o.operation.name for o in made.regions[0].blocks[0].operations]
            if body in (["arith.truncf", "linalg.yield"], ["arith.extf", "linalg.yield"]):
                found.append(made)
    return found


def _users(value: ir.Value) -> list[ir.Operation]:
    """Returns the one op that reads a value, or none where there are several."""
    users = [use.owner.operation for use in value.uses]
    return users if len(users) == 1 else []
