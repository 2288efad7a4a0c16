"""A counted ``while_loop`` written anew as torch's ``scan``: from there on it goes the way of one."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.recurrences.accesses import Access
from spikingbrain.frontend.recurrences.counted import WHILE_LOOP, Counted, counted_loop
from spikingbrain.frontend.recurrences.emit import Emitter, NotEmitted
from spikingbrain.frontend.recurrences.hops import NotALoop
from spikingbrain.frontend.recurrences.linear import item
from spikingbrain.frontend.recurrences.positions import Position, tensor_of
from spikingbrain.frontend.recurrences.report import RecurrenceReport

aten = torch.ops.aten
DENSE = {"memory_format": torch.contiguous_format}


def raise_counted_loops(module: fx.GraphModule, emit: Emitter, keep_detach: bool) -> list[RecurrenceReport]:
    """Puts a ``scan`` in the place of each ``while_loop`` that counts its steps; returns a report of each that stays."""
    left = []
    for number, node in enumerate(module.graph.find_nodes(op="call_function", target=WHILE_LOOP)):
        try:
            loop = counted_loop(module, node, keep_detach)
            _refuse_other_uses(node, loop)
            step = _Step(loop)
        except (NotALoop, NotEmitted) as why:
            left.append(RecurrenceReport("unrolled", "", str(user_line(node) or ""), f"a while_loop; {why}"))
            continue
        emit.trace = node.meta.get("stack_trace")
        with module.graph.inserting_before(node):
            _put_in_place(module, node, loop, step, emit, f"_counted_loop_{number}")
    return left


def _refuse_other_uses(node: fx.Node, loop: Counted) -> None:
    for user in node.users:
        if user.target is not operator.getitem:
            raise NotALoop("its results are used as one")
        if user.users and not isinstance(loop.outer[user.args[1]], fx.Node):
            raise NotALoop("a number that it carries is used after it")


class _Step:
    """The body of the scan: states, tokens and what is read whole go in; states and the values of one step come out."""

    def __init__(self, loop: Counted):
        self.loop = loop
        self.emit = Emitter(fx.Graph(), loop.mode)
        self.new: dict[fx.Node, Any] = {}
        self.tokens: dict[Any, tuple[Access | Position, fx.Node]] = {}
        self.whole: list[int] = []
        results = [loop.results[i] for i in loop.states]
        results += [place.source for place in loop.written.values()]
        if not all(isinstance(r, fx.Node) for r in results):
            raise NotALoop("it carries a number that is no counter")
        self._place_arguments(needed := _needed(loop, results))
        for node in needed:
            if node not in self.new:
                self.new[node] = self._copy(node)
        values = [self.new[loop.results[i]] for i in loop.states]
        values += [self._fitted(loop.given[i], place) for i, place in loop.written.items()]
        # memory of their own, laid out like the initial values, which ``scan`` asks for
        self.emit.graph.output([self.emit.op(aten.clone.default, v, **DENSE) for v in values])
        self.module = fx.GraphModule(loop.step, self.emit.graph, class_name="Step")

    def _place_arguments(self, needed: list[fx.Node]) -> None:
        loop = self.loop
        for i in loop.states:
            self.new[loop.given[i]] = self._argument(tensor_of(loop.given[i]))
        for node in needed:
            if node in loop.reads or isinstance(loop.known.get(node), Position):
                self._token(node)
        if not self.tokens:
            self._counter(Position(1, 0), torch.int64)
        for i in sorted(loop.kept):
            if loop.given[i] in needed:
                self.new[loop.given[i]] = self._argument(tensor_of(loop.given[i]))
                self.whole.append(i)

    def _argument(self, like: torch.Tensor) -> fx.Node:
        node = self.emit.graph.placeholder(f"x{len(self.emit.graph.nodes)}")
        node.meta["val"] = like
        return node

    def _token(self, node: fx.Node) -> None:
        place = self.loop.reads.get(node)
        if place is None:
            if not isinstance(node.meta["val"], torch.Tensor):
                raise NotALoop("its counter is an argument of an op that is no read and no write")
            position = self.loop.known[node]
            assert isinstance(position, Position)
            self._counter(position, tensor_of(node).dtype)
            return
        key = (place.tensor, place.dim, place.position, place.width)
        if key not in self.tokens:
            with self.emit.faking():
                like = tensor_of(place.tensor).new_empty(place.shape())
            self.tokens[key] = place, self._argument(like)

    def _counter(self, position: Position, dtype: torch.dtype) -> None:
        if (position, dtype) not in self.tokens:
            with self.emit.faking():
                like = torch.empty((), dtype=dtype)
            self.tokens[position, dtype] = position, self._argument(like)

    def _copy(self, node: fx.Node) -> Any:
        if place := self.loop.reads.get(node):
            token = self.tokens[place.tensor, place.dim, place.position, place.width][1]
            shape = [size if type(size) is int else place.width for size in tensor_of(node).shape]
            return self._shaped(token, shape, place.dim)
        position = self.loop.known.get(node)
        if isinstance(position, Position):
            like = tensor_of(node)
            return self.emit.op(aten.expand.default, self.tokens[position, like.dtype][1], list(like.shape))
        if node.op == "get_attr":
            return self._constant(node)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.new.__getitem__)
        if node.target is aten.sym_size.int:
            return tensor_of(args[0]).shape[args[1]]
        # tokens may lie otherwise in memory
        target = aten.reshape.default if node.target is aten.view.default else node.target
        return self.emit.op(target, *args, **kwargs)

    def _constant(self, node: fx.Node) -> fx.Node:
        held = getattr(self.loop.step, str(node.target))
        held = getattr(held, "constant", None) if type(held) is not torch.Tensor else held
        if not isinstance(held, torch.Tensor):
            raise NotALoop("a loop or a branch inside it")
        return self.emit.constant(held)

    def _fitted(self, output: fx.Node, place: Access) -> fx.Node:
        """Returns what one step writes, in the shape of the place that it is written to."""
        assert place.source is not None
        node, dtype = self.new[place.source], tensor_of(output).dtype
        if tuple(tensor_of(node).shape) != place.expanded:
            node = self.emit.op(aten.expand.default, node, list(place.expanded))
        node = self._shaped(node, place.shape(), place.dim)
        return node if tensor_of(node).dtype == dtype else self.emit.op(aten.to.dtype, node, dtype)

    def _shaped(self, node: fx.Node, shape: list[int], dim: int) -> fx.Node:
        """Gives a token or a written value the shape it has elsewhere: with or without ``dim``, as a rule."""
        now = list(tensor_of(node).shape)
        if now == shape:
            return node
        if [*now[:dim], 1, *now[dim:]] == shape:
            return self.emit.op(aten.unsqueeze.default, node, dim)
        if [*shape[:dim], 1, *shape[dim:]] == now:
            return self.emit.op(aten.squeeze.dim, node, dim)
        return self.emit.op(aten.reshape.default, node, shape)


def _needed(loop: Counted, results: list[fx.Node]) -> list[fx.Node]:
    """Returns the nodes that results take, down to tokens, in order."""
    seen: set[fx.Node] = set()
    todo = list(results)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            known = node in loop.reads or isinstance(loop.known.get(node), Position)
            todo += () if known else node.all_input_nodes
    return [n for n in loop.step.graph.nodes if n in seen]


def _put_in_place(
    module: fx.GraphModule, node: fx.Node, loop: Counted, step: _Step, emit: Emitter, name: str
) -> None:
    module.add_submodule(name, step.module)
    initial = [emit.op(aten.clone.default, loop.outer[i], **DENSE) for i in loop.states]
    sequences = [_sequence(emit, loop, place, tensor_of(x).dtype) for place, x in step.tokens.values()]
    whole = [loop.outer[i] for i in step.whole]
    call = emit.graph.call_function(
        torch.ops.higher_order.scan, (emit.graph.get_attr(name), initial, sequences, whole)
    )
    with emit.faking():
        slices = [tensor_of(n).select(0, 0) for n in sequences]
        values = step.module(*map(tensor_of, initial), *slices, *map(tensor_of, whole))
        carried, joined = values[: len(initial)], values[len(initial) :]
        call.meta["val"] = (*carried, *(y.new_empty([loop.steps, *y.shape]) for y in joined))
    if emit.trace:
        call.meta["stack_trace"] = emit.trace

    for user in list(node.users):
        if user.users:
            user.replace_all_uses_with(_result(emit, loop, call, user.args[1]))
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _result(emit: Emitter, loop: Counted, call: fx.Node, index: int) -> fx.Node:
    """Returns what a carried value is after the loop, whose scan is ``call``."""
    before = loop.outer[index]
    if index in loop.kept:
        return emit.op(aten.clone.default, before)
    if index in loop.counters:
        counter = loop.counters[index]
        return emit.op(aten.full_like.default, before, counter.stride * loop.steps + counter.offset)
    place = [*loop.states, *loop.written].index(index)
    made = item(emit, call, place)
    return made if index in loop.states else _written(emit, loop, index, made)


def _sequence(emit: Emitter, loop: Counted, token: Access | Position, dtype: torch.dtype) -> fx.Node:
    """Returns a token of all steps, time first."""
    if isinstance(token, Position):
        first, stride = token.offset, token.stride
        return emit.op(aten.arange.start_step, first, first + stride * loop.steps, stride, dtype=dtype)
    source = loop.outer[loop.given.index(token.tensor)]
    source = _part(emit, source, loop, token)
    dim = token.dim
    if token.width > 1:
        source = emit.op(aten.unflatten.int, source, dim, [loop.steps, token.width])
    if token.position.stride < 0:
        source = emit.op(aten.flip.default, source, [dim])
    return emit.op(aten.movedim.int, source, dim, 0) if dim else source


def _part(emit: Emitter, source: fx.Node, loop: Counted, place: Access) -> fx.Node:
    window = _window(loop, place)
    if window == (0, tensor_of(source).shape[place.dim], 1):
        return source
    return emit.op(aten.slice.Tensor, source, place.dim, *window)


def _window(loop: Counted, place: Access) -> tuple[int, int, int]:
    """Returns first, end and stride of all that the steps read or write."""
    low, high = place.position.range(loop.steps)
    return low, high + place.width, 1 if place.width > 1 else abs(place.position.stride)


def _written(emit: Emitter, loop: Counted, index: int, joined: fx.Node) -> fx.Node:
    """Returns an output after all writes, from what they write, time first."""
    place, before = loop.written[index], loop.outer[index]
    dim = place.dim
    if place.position.stride < 0:
        joined = emit.op(aten.flip.default, joined, [0])
    if dim:
        joined = emit.op(aten.movedim.int, joined, 0, dim)
    if place.width > 1:
        joined = emit.op(aten.flatten.using_ints, joined, dim, dim + 1)
    window = _window(loop, place)
    if window == (0, tensor_of(before).shape[dim], 1):
        return joined
    return emit.op(aten.slice_scatter.default, before, joined, dim, *window)
