"""An associative scan, marked by ``frontend/ops/associative_scan.py``, written anew as a plain ``scan``: a loop as any other.

Only those leaves are carried that something reads. The loop begins with neutral elements where the algebra shows some, else with
the first element. What is not associative, or may not become a loop, is left as torch would have traced it: a tree.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.associative_scan import generic_associative_scan
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

import spikingbrain.frontend.ops.associative_scan  # noqa: F401  (registers the mark)
from spikingbrain.frontend.checks import user_line
from spikingbrain.frontend.recurrences.adapter import adapt
from spikingbrain.frontend.recurrences.emit import Emitter, NotEmitted
from spikingbrain.frontend.recurrences.functional import NotFunctional, functionalise
from spikingbrain.frontend.recurrences.hops import (
    NotALoop,
    loop_of_scan,
    refuse_autocast,
    scans,
    with_numbers,
)
from spikingbrain.frontend.recurrences.linear import item
from spikingbrain.frontend.recurrences.positions import tensor_of
from spikingbrain.frontend.recurrences.report import RecurrenceReport
from spikingbrain.passes.recurrence.classify import classify
from spikingbrain.passes.recurrence.neutral import neutral_elements
from spikingbrain.passes.recurrence.normalise import normalise

aten = torch.ops.aten
_MARKS = (torch.ops.spikingbrain.first_or_combined, torch.ops.spikingbrain.first_or_combined.default)
_DENSE = {"memory_format": torch.contiguous_format}


def associative_scans(module: fx.GraphModule) -> list[fx.Node]:
    """Returns the calls of ``scan`` in a graph that stand for associative scans."""
    return [n for n in scans(module.graph) if _is_marked(_body_of(module, n))]


def raise_associative_scans(
    module: fx.GraphModule, emit: Emitter, keep_detach: bool
) -> list[RecurrenceReport]:
    """Puts a plain ``scan`` in the place of each that can be one; returns a report of each that cannot."""
    left = []
    for number, node in enumerate(associative_scans(module)):
        try:
            refuse_autocast(node)
            found = _Found.of(module, node)
            _refuse_unless_associative(found.combination, found.leaves)
            emit.trace = node.meta.get("stack_trace")
            _put_in_place(module, found, emit, f"_associative_scan_{number}", keep_detach)
        except (NotALoop, NotEmitted, NotFunctional) as why:
            where = str(user_line(node) or "")
            left.append(RecurrenceReport("unrolled", "", where, f"an associative_scan; {why}"))
    return left


def leave_as_written(module: fx.GraphModule) -> None:
    """Lets every associative scan that is still marked be the tree that torch makes of it, when autograd traces the graph."""
    for node in associative_scans(module):
        body, _, (_, *xs), outside = node.args
        combination = _combination_of(_body_of(module, node))
        name = f"{body.target}_combination"
        module.add_submodule(name, combination)
        with module.graph.inserting_before(node):
            attribute = module.graph.get_attr(name)
            tree = module.graph.call_function(as_tree, (attribute, list(xs), list(outside)))
        tree.meta = dict(node.meta)
        node.replace_all_uses_with(tree)
        module.graph.erase_node(node)
    module.recompile()


def as_tree(
    combination: Callable[..., Any], xs: Sequence[Tensor], outside: Sequence[Any]
) -> tuple[Tensor, ...]:
    """Returns the last and all results of an associative scan over the first axis, in torch's order of combining."""
    axes = (0,) * (2 * len(xs)) + (None,) * len(outside)
    function = torch.vmap(combination, in_dims=axes)
    joined = generic_associative_scan(function, list(xs), 0, tuple(outside))  # type: ignore[no-untyped-call]
    return (*(y[-1] for y in joined), *joined)


# The combination


def _body_of(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    found = getattr(module, str(node.args[0].target))
    assert isinstance(found, fx.GraphModule)
    return found


def _is_marked(body: fx.GraphModule) -> bool:
    return any(n.target in _MARKS for n in body.graph.nodes)


def _combination_of(body: fx.GraphModule) -> fx.GraphModule:
    """Returns what a step makes of two elements and what is read whole, the first element being none of its business."""
    graph = fx.Graph()
    new: dict[fx.Node, Any] = {}
    results = pytree.tree_leaves(body.graph.output_node().args[0])
    leaves = len(results) // 2
    for i, node in enumerate(body.graph.nodes):
        if node.op == "placeholder" and i == leaves:  # whether it is the first step
            continue
        if node.target in _MARKS:
            new[node] = new[node.args[2]]
        elif node.op == "output":
            graph.output([new[r] for r in results[leaves:]])
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
    return fx.GraphModule(body, graph, class_name="Combination")


@dataclass
class _Found:
    """An associative scan.

    Attributes:
        combination: of ATen ops; it takes left elements, right elements, and what is read whole.
        sequences, outside: the nodes that these come from, time first.
        joined: for each leaf that something reads, its results.
    """

    node: fx.Node
    combination: fx.GraphModule
    sequences: list[fx.Node]
    outside: list[fx.Node]
    joined: dict[int, fx.Node]

    @staticmethod
    def of(module: fx.GraphModule, node: fx.Node) -> _Found:
        _, _, (_, *sequences), outside = node.args
        if any(type(s) is not int for n in sequences for s in _value(n).shape):
            raise NotALoop("its length or another size is a symbol")
        combination = _combination_of(_body_of(module, node))
        numbers = {i: n for i, n in enumerate(outside, 2 * len(sequences)) if type(n) in (int, float)}
        combination = with_numbers(combination, numbers)
        outside = [n for n in outside if type(n) not in (int, float)]
        if not all(isinstance(n, fx.Node) and isinstance(_value(n), Tensor) for n in outside):
            raise NotALoop("it closes over symbols")
        if any("example_value" in n.meta for n in combination.graph.nodes):  # as Dynamo writes it
            combination = functionalise(combination)
        leaves = len(sequences)
        alive: dict[fx.Node, bool] = {}
        joined = {}
        for user in node.users:
            if user.target is not operator.getitem or user.args[1] < leaves:
                if user.users:
                    raise NotALoop("its results are used as one")
            elif _is_alive(user, alive):
                joined[user.args[1] - leaves] = user
        return _Found(node, combination, list(sequences), list(outside), joined)

    @property
    def leaves(self) -> int:
        return len(self.sequences)


def _value(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _is_alive(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Tells whether anything that the graph returns, or that must stay in it, reads a value."""
    if node not in known:
        stays = node.op == "output" or (bool(node.meta.get("opaque")) and node.target is not operator.getitem)
        known[node] = stays or any(_is_alive(user, known) for user in node.users)
    return known[node]


# Whether it is one


def _refuse_unless_associative(combination: fx.GraphModule, leaves: int) -> None:
    """Raises NotALoop where random elements show that the order of combining matters, beyond rounding.

    torch's documentation asks for a function that is associative, and a tree of combinations is what it computes. A function
    that is not gives other numbers in a loop.
    """
    given = [n.meta["val"] for n in combination.graph.find_nodes(op="placeholder")]
    generator = torch.Generator().manual_seed(0)
    with unset_fake_temporarily(), torch.no_grad():
        for scale in _SCALES:
            xs = [_drawn([_TRIED, *x.shape], x.dtype, scale, generator) for x in given[leaves : 2 * leaves]]
            outside = [_drawn(x.shape, x.dtype, scale, generator) for x in given[2 * leaves :]]
            try:
                tree = as_tree(combination, xs, outside)[leaves:]
                loop = _in_turn(combination, xs, outside)
            except (RuntimeError, IndexError, ValueError) as error:
                raise NotALoop(f"its function cannot be tried on random numbers: {error}") from None
            for x, y in zip(tree, loop, strict=True):
                if not _agree(x, y):
                    raise NotALoop(
                        "its function is not associative: the order of combining random numbers matters"
                    )


_TRIED = 11  # elements: an odd number at several levels of the tree
_SCALES = (1.0, 4.0)
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def _drawn(shape: Sequence[int], dtype: torch.dtype, scale: float, generator: torch.Generator) -> Tensor:
    if dtype == torch.bool or not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else 4, tuple(shape), generator=generator).to(dtype)
    return (scale * torch.randn(tuple(shape), generator=generator)).to(dtype)


def _in_turn(combination: fx.GraphModule, xs: Sequence[Tensor], outside: Sequence[Tensor]) -> list[Tensor]:
    steps = [tuple(x[0] for x in xs)]
    for t in range(1, len(xs[0])):
        steps.append(tuple(combination(*steps[-1], *(x[t] for x in xs), *outside)))
    return [torch.stack(ys) for ys in zip(*steps, strict=True)]


def _agree(x: Tensor, y: Tensor) -> bool:
    """Whether two results are the same up to rounding, each step's against its largest number."""
    if x.dtype not in _ROUNDING:
        return torch.equal(x, y)
    bound = _ROUNDING[x.dtype]
    x, y = x.flatten(1).double(), y.flatten(1).double()
    finite = x.isfinite()
    if not torch.equal(finite, y.isfinite()) or not finite.any():
        return False
    size = x.where(finite, 0).abs().amax(1, keepdim=True)
    return bool(((x - y).abs() <= bound * size)[finite].all())


# The loop


def _put_in_place(module: fx.GraphModule, found: _Found, emit: Emitter, name: str, keep_detach: bool) -> None:
    graph, node = module.graph, found.node
    if not found.joined:
        raise NotALoop("nothing reads it")
    before = set(graph.nodes)
    with graph.inserting_before(node):
        try:
            results = _loop(module, found, emit, name, keep_detach)
        except NotALoop:
            for made in reversed([n for n in graph.nodes if n not in before]):
                graph.erase_node(made)
            raise
    for leaf, joined in found.joined.items():
        joined.replace_all_uses_with(results[leaf])
    _erase(node)


def _erase(node: fx.Node) -> None:
    """Removes a node and what is computed from it, none of which is wanted."""
    wanted = {node}
    for n in node.graph.nodes:
        if wanted.intersection(n.all_input_nodes):
            wanted.add(n)
    for n in reversed([n for n in node.graph.nodes if n in wanted]):
        node.graph.erase_node(n)


def _loop(
    module: fx.GraphModule, found: _Found, emit: Emitter, name: str, keep_detach: bool
) -> dict[int, fx.Node]:
    """Emits the scan; returns the results of each leaf that something reads."""
    length = tensor_of(found.sequences[0]).shape[0]
    if length == 1:
        return {leaf: found.sequences[leaf] for leaf in found.joined}
    step = _Step(found.combination, found.leaves, found.joined)
    module.add_submodule(name, step.module)
    sequences = [found.sequences[i] for i in step.tokens]
    outside = [found.outside[i] for i in step.outside]
    neutral = step.neutral(keep_detach)
    if neutral is None:
        start = [emit.op(aten.select.int, found.sequences[i], 0, 0) for i in step.carried]
        start = [emit.op(aten.clone.default, x, **_DENSE) for x in start]
        sequences = [emit.op(aten.slice.Tensor, x, 0, 1, length) for x in sequences]
    else:
        likes = [tensor_of(found.sequences[i]) for i in step.carried]
        start = [
            emit.op(aten.full.default, list(x.shape[1:]), e, dtype=x.dtype)
            for x, e in zip(likes, neutral, strict=True)
        ]
    call = _call(emit, step.module, name, start, sequences, outside)
    verdict = classify(loop_of_scan(module, call, keep_detach))
    if verdict.status != "raised" and any(tensor_of(x).dtype in _COARSE for x in start):
        raise NotALoop("rounded at each step of a loop, its elements would lose more than in a tree")
    if verdict.status == "loop" and keep_detach:
        raise NotALoop(
            f"for training it stays a tree, whose gradient torch knows for all sizes; {verdict.reason}"
        )
    joined = {i: item(emit, call, len(start) + step.carried.index(i)) for i in found.joined}
    if neutral is not None:
        return joined
    firsts = {i: emit.op(aten.slice.Tensor, found.sequences[i], 0, 0, 1) for i in joined}
    return {i: emit.op(aten.cat.default, [firsts[i], joined[i]]) for i in joined}


_COARSE = (torch.float16, torch.bfloat16)


class _Step:
    """One step of the loop: the combination as far as it is needed, its results both handed on and joined.

    Attributes:
        carried, tokens: the leaves whose left and whose right elements it takes.
        outside: which of what is read whole it takes.
    """

    def __init__(self, combination: fx.GraphModule, leaves: int, wanted: Iterable[int]):
        given = list(combination.graph.find_nodes(op="placeholder"))
        results = pytree.tree_leaves(combination.graph.output_node().args[0])
        needed: set[fx.Node] = set()
        carried, todo = set(wanted), list(wanted)
        while todo:
            needed |= _sources(results[todo.pop()])
            todo += [i for i in range(leaves) if given[i] in needed and i not in carried]
            carried.update(todo)
        self.carried = sorted(carried)
        self.tokens = [i for i in range(leaves) if given[leaves + i] in needed] or self.carried[:1]
        self.outside = [i for i, n in enumerate(given[2 * leaves :]) if n in needed]
        arguments = [given[i] for i in self.carried] + [given[leaves + i] for i in self.tokens]
        arguments += [given[2 * leaves + i] for i in self.outside]
        self._results = [results[i] for i in self.carried]
        self.module = self._written(combination, arguments, needed)

    def _written(
        self, combination: fx.GraphModule, arguments: Sequence[fx.Node], needed: set[fx.Node]
    ) -> fx.GraphModule:
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        rest = [n for n in combination.graph.nodes if n in needed and n.op != "placeholder"]
        for node in [*arguments, *rest]:
            new[node] = graph.node_copy(node, new.__getitem__)
            new[node].meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace", "opaque")}
        # memory of their own, laid out like the initial values, which ``scan`` asks for
        copies = []
        for _ in range(2):
            for result in self._results:
                copies.append(graph.call_function(aten.clone.default, (new[result],), _DENSE))
                copies[-1].meta["val"] = result.meta["val"]
        graph.output(copies)
        return fx.GraphModule(combination, graph, class_name="Step")

    def neutral(self, keep_detach: bool) -> tuple[float, ...] | None:
        """Returns neutral elements of the leaves that are carried; None where there are none to be seen."""
        if not set(self.carried) <= set(self.tokens):
            return None
        neutral, values = adapt(self.module, keep_detach)
        count = len(self.carried)
        results = pytree.tree_leaves(self.module.graph.output_node().args[0])[:count]
        given = list(self.module.graph.find_nodes(op="placeholder"))
        right = [given[count + self.tokens.index(i)] for i in self.carried]
        neutral.outputs = [values[n] for n in (*given[:count], *right, *results)]
        found = normalise(neutral).outputs
        return neutral_elements(found[:count], found[count : 2 * count], found[2 * count :])


def _sources(result: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = [result]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return seen


def _call(
    emit: Emitter,
    step: fx.GraphModule,
    name: str,
    start: Sequence[fx.Node],
    sequences: Sequence[fx.Node],
    outside: Sequence[fx.Node],
) -> fx.Node:
    call = emit.graph.call_function(
        torch.ops.higher_order.scan,
        (emit.graph.get_attr(name), list(start), list(sequences), list(outside)),
    )
    last = tuple(tensor_of(x) for x in start)
    with emit.faking():
        steps = tensor_of(sequences[0]).shape[0]
        call.meta["val"] = (*last, *(x.new_empty([steps, *x.shape]) for x in last))
    if emit.trace:
        call.meta["stack_trace"] = emit.trace
    return call
