"""One call of a torch function as ATen ops, traced once per kind of call and then replayed.

A loop of a thousand steps makes the same dozen calls a thousand times. Tracing each kind once costs milliseconds; tracing
all of them would cost as much as everything else that torch does with the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from spikingbrain.frontend.checks import draws_random_numbers

aten = torch.ops.aten


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor argument, or an earlier result, in a recorded call."""

    index: int


@dataclass
class _Step:
    target: Any
    args: Any
    kwargs: Any
    value: Any
    flat: bool


@dataclass
class _Recording:
    """The ATen ops of one kind of call; places count the arguments first, then the steps. ``result`` is a tree of places."""

    steps: list[_Step]
    result: Any


class Expander:
    """Emits calls into an FX graph as ATen ops, with ``meta["val"]`` on each node."""

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode | None) -> None:
        self.graph = graph
        self.mode = mode
        self._known: dict[Any, _Recording | None] = {}
        self._pieces: dict[Any, torch.Tensor] = {}
        self._kinds: dict[int, tuple[Any, Any]] = {}

    def piece(self, target: Any, node: fx.Node, rest: tuple[Any, ...], meta: dict[str, Any]) -> fx.Node:
        """Emits ``select``, ``slice`` or ``unsqueeze`` of a node, whose result is known without tracing it."""
        value = node.meta.get("val")
        kind = self._kind(node)
        lengths = rest
        if target is aten.select.int:
            lengths = rest[:1]
        elif target is aten.slice.Tensor:
            dim, start, stop, step = rest
            lengths = (dim, max(0, -(-(stop - start) // step)), step)
        key = (target, kind, lengths)
        if key not in self._pieces:
            with self.mode or contextlib.nullcontext(), torch.no_grad():
                self._pieces[key] = target(value, *rest)
        made = self.graph.call_function(target, (node, *rest))
        made.meta = {**meta, "val": self._pieces[key]}
        return made

    def replaced(
        self, target: Any, base: fx.Node, piece: fx.Node, rest: tuple[Any, ...], meta: dict[str, Any]
    ) -> fx.Node:
        """Emits ``select_scatter`` or ``slice_scatter``: ``base`` with a piece in another's place."""
        made = self.graph.call_function(target, (base, piece, *rest))
        value = base.meta["val"]
        if not value.is_contiguous():
            key = (target, self._kind(base))
            if key not in self._pieces:
                with self.mode or contextlib.nullcontext(), torch.no_grad():
                    self._pieces[key] = target(value, piece.meta["val"], *rest)
            value = self._pieces[key]
        made.meta = {**meta, "val": value}
        return made

    def call(
        self, function: Callable[..., Any], args: Any, kwargs: Any, meta: dict[str, Any], name: Any = None
    ) -> Any:
        """Emits ``function(*args, **kwargs)``, nodes among the arguments standing for their values.

        Returns the node, or tree of nodes, of its result. Raises NotExpandable where the call is not a composition of
        functional, deterministic ATen ops on tensors of known sizes.
        """
        spec: Any
        if not kwargs and not any(isinstance(x, (list, tuple, dict)) for x in args):
            leaves, spec = list(args), None  # the common case, without the cost of trees
        else:
            leaves, spec = pytree.tree_flatten((args, kwargs))
        nodes = [x for x in leaves if isinstance(x, fx.Node)]
        key: Any
        try:
            key = (
                name or function,
                spec,
                tuple(self._kind(x) if isinstance(x, fx.Node) else (type(x), x) for x in leaves),
            )
            known = key in self._known
        except TypeError:  # an argument that is not hashable
            key, known = None, False
        if known:
            recording = self._known[key]
        else:
            tree = pytree.tree_flatten((args, kwargs))
            recording = self._record(function, *tree, [n.meta.get("val") for n in nodes])
            if key is not None:
                self._known[key] = recording
        if recording is None:
            raise NotExpandable(str(name or function))
        return self._replay(recording, nodes, meta)

    def _kind(self, node: fx.Node) -> Any:
        """Returns what a recording depends on of an argument; values are shared by many nodes."""
        value = node.meta.get("val")
        found = self._kinds.get(id(value))
        if found is None:
            found = self._kinds[id(value)] = (_kind(value), value)
        return found[0]

    def _replay(self, recording: _Recording, nodes: Sequence[fx.Node], meta: dict[str, Any]) -> Any:
        made: list[Any] = list(nodes)
        pick = lambda x: made[x.index] if isinstance(x, _Place) else x  # noqa: E731
        for step in recording.steps:
            if step.flat:
                args, kwargs = tuple(map(pick, step.args)), {}
            else:
                args, kwargs = pytree.tree_map(pick, (step.args, step.kwargs))
            node = self.graph.call_function(step.target, args, kwargs)
            node.meta = {**meta, "val": step.value}
            made.append(node)
        if isinstance(recording.result, _Place):
            return made[recording.result.index]
        return pytree.tree_map(pick, recording.result)

    def _record(
        self, function: Callable[..., Any], leaves: Sequence[Any], spec: Any, values: Sequence[Any]
    ) -> _Recording | None:
        if any(not isinstance(v, FakeTensor) for v in values) or any(
            isinstance(x, torch.SymInt) for x in leaves
        ):
            return None
        places = [i for i, x in enumerate(leaves) if isinstance(x, fx.Node)]

        def run(*tensors: torch.Tensor) -> Any:
            filled = list(leaves)
            for i, t in zip(places, tensors, strict=True):
                filled[i] = t
            args, kwargs = pytree.tree_unflatten(filled, spec)
            return function(*args, **kwargs)

        try:
            with self.mode or contextlib.nullcontext():
                traced = make_fx(run, pre_dispatch=True)(*[v.detach() for v in values])
        except Exception:  # whatever stops torch: the call stays as it is, and torch runs it
            return None
        return _transcribe(traced.graph)


class NotExpandable(Exception):
    """Raised where a call is left as it is."""


def _kind(value: Any) -> Any:
    """Returns what a recording depends on of an argument."""
    if not isinstance(value, torch.Tensor):
        raise NotExpandable("an argument that is no tensor")
    if not static(value):
        raise NotExpandable("sizes that are symbols")
    return (tuple(value.shape), value.stride(), value.dtype, value.device)


def static(value: torch.Tensor) -> bool:
    """Tells whether all sizes are numbers."""
    return not any(isinstance(s, torch.SymInt) for s in value.shape)


def _transcribe(graph: fx.Graph) -> _Recording | None:
    """Returns the recording of a traced call, None where it holds anything but functional ATen ops."""
    number: dict[fx.Node, int] = {}
    steps: list[_Step] = []
    put = lambda x: _Place(number[x]) if isinstance(x, fx.Node) else x  # noqa: E731
    for node in graph.nodes:
        if node.op == "output":
            return _Recording(steps, pytree.tree_map(put, node.args[0]))
        if node.op != "placeholder":
            if not _plain(node):
                return None
            args, kwargs = pytree.tree_map(put, (tuple(node.args), dict(node.kwargs)))
            flat = not kwargs and not any(isinstance(a, (list, tuple, dict)) for a in args)
            steps.append(_Step(node.target, args, kwargs, node.meta.get("val"), flat))
        number[node] = len(number)
    return None


def _plain(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    return not node.target._schema.is_mutable and not draws_random_numbers(node)
