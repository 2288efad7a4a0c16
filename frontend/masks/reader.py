"""Reads the value of a mask off the graph that makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from spikingbrain.frontend.masks.rules import RULES
from spikingbrain.frontend.masks.values import (
    Added,
    Affine,
    Condition,
    Data,
    NotShown,
    Number,
    Value,
    shape_of,
)


def is_written(node: fx.Node) -> bool:
    """Returns whether a tensor may be written in place, so that it is another at a later place in the graph."""
    return any(n.meta.get("opaque") for n in (node, *node.users))


class Reader:
    """Reads the values of a functional graph of ATen ops at known sizes."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Value] = {}

    def condition(self, node: fx.Node) -> Condition:
        """Returns where a mask, boolean or to be added, lets a query see a key. Raises NotShown."""
        value = self.value(node)
        if isinstance(value, Condition):
            return value
        if isinstance(value, Added):
            return value.seen
        if isinstance(value, Number) and value.value == 0:
            return Condition(value.shape, frozenset())
        raise NotShown("the mask holds numbers that are neither 0 nor far below")

    def value(self, node: fx.Node) -> Value:
        if node not in self._known:
            try:
                self._known[node] = self._read(node)
            except NotShown:
                value = node.meta.get("val")
                if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
                    raise
                if is_written(node):
                    raise NotShown("the mask depends on data that may be written in place") from None
                shape = shape_of(node)
                axes = [None if n == 1 else d - len(shape) for d, n in enumerate(shape)]
                self._known[node] = Affine(shape, (0,) * len(shape), 0, ((Data(node, tuple(axes)), 1),))
        return self._known[node]

    def _read(self, node: fx.Node) -> Value:
        if node.op != "call_function":
            raise NotShown(
                "the mask depends on data"
                if node.op == "placeholder"
                else "the mask is a tensor of the model"
            )
        rule = RULES.get(node.target) if not node.meta.get("opaque") else None
        if rule is None:
            raise NotShown(f"the mask is made with {node.target}")
        try:
            return rule(self, node, *node.args, **node.kwargs)
        except (TypeError, ValueError, IndexError) as error:  # arguments that its rule does not know
            raise NotShown(f"the mask is made with a form of {node.target} that is not read") from error

    def either(self, given: Any) -> Any:
        """Returns the value of a node, a number as it is."""
        return self.value(given) if isinstance(given, fx.Node) else given
