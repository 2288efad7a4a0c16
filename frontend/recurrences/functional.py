"""A Dynamo graph as ATen ops in single assignment form: what the analysis of recurrences reads.

Dynamo writes down torch functions and methods, in-place writes included. Here each becomes ATen ops; a write into a tensor that
the graph itself made becomes a new value, which later readers get. What cannot be expressed so (higher-order ops, changes
of the gradient mode, random numbers, writes into arguments) is copied as it is and stays where it is in the order, so that
the new graph computes what the old one did, gradients included.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from spikingbrain.frontend.recurrences.expand import Expander, NotExpandable

aten = torch.ops.aten


class NotFunctional(Exception):
    """Raised where a graph writes in a way that is not rewritten; says what and where."""

    def __init__(self, why: str, node: fx.Node):
        super().__init__(why)
        self.node = node


# In-place operators and the functions that compute what they write.
_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.imatmul: operator.matmul,
}


def _copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return source.to(target.dtype).expand(target.shape)


def _filled(target: torch.Tensor, value: Any) -> torch.Tensor:
    return torch.full_like(target, value)


def _put(target: torch.Tensor, places: list[torch.Tensor], source: Any) -> torch.Tensor:
    value = source if isinstance(source, torch.Tensor) else target.new_full((), source)
    return target.index_put(tuple(places), value.to(target.dtype))


def _zeroed(target: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(target)


_METHODS: dict[str, Callable[..., Any]] = {"copy_": _copied, "fill_": _filled, "zero_": _zeroed}

# From a tensor to a view of it: ops, each with its arguments after the tensor.
_Way = list[tuple[Any, tuple[Any, ...]]]

_MODES = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)


@dataclass
class _Memory:
    """One storage that the graph made: the node that holds it whole, and the nodes that are views into it.

    ``views[n]`` is the way from the whole to n: (op, arguments after the tensor) pairs; None where it is not known.
    """

    whole: list[fx.Node]
    views: dict[fx.Node, _Way | None] = field(default_factory=dict)


def functionalise(module: fx.GraphModule) -> fx.GraphModule:
    """Returns a module that computes the same, of ATen ops without in-place writes wherever that can be shown.

    Its nodes carry ``meta["val"]`` (a fake tensor) and the user's stack trace; nodes copied as they are have
    ``meta["opaque"]``. Raises NotFunctional where views of a tensor are read after it was written in place, or where
    values belong to a transform.
    """
    refuse_transforms(module.graph)
    return _Functionaliser(module).run()


def refuse_transforms(graph: fx.Graph) -> None:
    """Raises NotFunctional where values are what only a transform of torch.func knows, such as a row inside vmap."""
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise NotFunctional("inside a transform of torch.func", node)


class _Functionaliser:
    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.graph = fx.Graph()
        examples = [n.meta.get("example_value") for n in module.graph.nodes]
        self.expander = Expander(
            self.graph, next((v.fake_mode for v in examples if isinstance(v, FakeTensor)), None)
        )
        self.new: dict[fx.Node, Any] = {}
        self.position = {n: i for i, n in enumerate(module.graph.nodes)}
        self.last_use = {n: max((self.position[u] for u in n.users), default=-1) for n in module.graph.nodes}
        self.memory: dict[int, _Memory] = {}
        self.written = _written_arguments(module.graph)
        self.mode_changed = 0

    def run(self) -> fx.GraphModule:
        for node in self.module.graph.nodes:
            self._convert(node)
        with _use_lazy_graph_module(True):  # its code is not needed before recurrences are raised
            return _make_graph_module(self.module, self.graph)

    def _convert(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr", "output"):
            self._copy(node, opaque=False)
            return
        name = str(getattr(node.target, "__name__", node.target))
        if name in _MODES:
            self._copy(node)
            self.mode_changed += {"_enter_autocast": 1, "_exit_autocast": -1}.get(name, 0)
            if name == "_set_grad_enabled":
                self.mode_changed += -1 if node.args[0] == torch.is_grad_enabled() else 1
            return
        if name == "autograd_function_apply" and not self.mode_changed:
            self._copy(node, opaque=False)
            return
        if self.mode_changed or isinstance(node.target, torch._ops.HigherOrderOperator):
            self._refuse_write(node, name)
            self._copy(node)
            return
        if node.target is operator.getitem and self._index(node):
            return
        if node.target is operator.setitem:
            self._set(node)
            return
        if node.target in _OPERATORS:
            self._write(node, _OPERATORS[node.target], node.args, node.kwargs)
            return
        if node.op == "call_method" and name.endswith("_") and not name.endswith("__"):
            function = _METHODS.get(name) or (lambda t, *a, **k: getattr(t, name[:-1])(*a, **k))
            self._write(node, function, node.args, node.kwargs, name)
            return
        if node.op == "call_method":
            method: str = name
            function = lambda t, *a, **k: getattr(t, method)(*a, **k)  # noqa: E731
            self._expand(node, function, ("method", method))
            return
        if node.op == "call_function" and "out" not in node.kwargs:
            self._expand(node, node.target, None)
            return
        self._refuse_write(node, name)
        self._copy(node)

    # Nodes that stay, and nodes that become ATen ops

    def _copy(self, node: fx.Node, opaque: bool = True) -> None:
        made = self.graph.node_copy(node, lambda n: self.new[n])
        made.meta = dict(node.meta)
        value = node.meta.get("example_value")
        if value is not None:
            made.meta["val"] = value
        if opaque:
            made.meta["opaque"] = True
        self.new[node] = made

    def _expand(self, node: fx.Node, function: Callable[..., Any], name: Any) -> None:
        args, kwargs = self._renamed((tuple(node.args), dict(node.kwargs)))
        try:
            self.new[node] = self.expander.call(function, args, kwargs, self._meta(node), name)
        except NotExpandable:
            self._refuse_write(node, str(name or function))
            self._copy(node)
            return
        self._remember(node)

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        """Returns the metadata of what a node becomes; reads before and after a write from outside are not the same value."""
        found = {k: node.meta[k] for k in ("stack_trace", "nn_module_stack", "custom") if node.meta.get(k)}
        return found | ({"opaque": True} if _storage(node) in self.written else {})

    def _renamed(self, tree: Any) -> Any:
        return fx.node.map_arg(tree, lambda n: self.new[n])

    def _refuse_write(self, node: fx.Node, name: str) -> None:
        """Raises NotFunctional where an op that stays as it is may write into a tensor that the graph made."""
        writes = name.endswith("_") and not name.endswith("__")
        target = node.args[0] if node.args else None
        if writes and isinstance(target, fx.Node) and _storage(target) in self.memory:
            raise NotFunctional(f"{name} writes in place", node)

    # Which node is a view of which

    def _remember(self, node: fx.Node, way: tuple[fx.Node, _Way] | None = None) -> None:
        """Notes that a converted node holds a storage of the graph's own, or is a view into one."""
        if not isinstance(node.meta.get("example_value"), torch.Tensor):
            return
        storage = _storage(node)
        held = self.memory.get(storage)
        sources = [n for n in node.all_input_nodes if _storage(n) == storage]
        if not sources:
            if held is None:
                self.memory[storage] = _Memory([node])
            return
        if held is None:  # a view into an argument
            return
        source = sources[0]
        steps: _Way | None = None
        if way and way[0] is source:
            steps = way[1]
        if source in held.whole:
            held.views[node] = steps
        elif source in held.views:
            before = held.views[source]
            held.views[node] = None if before is None or steps is None else [*before, *steps]

    # Indexing

    def _index(self, node: fx.Node) -> bool:
        """Converts ``x[...]`` with integers, slices, None and Ellipsis; returns False where it is anything else."""
        source, index = node.args
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("example_value"), torch.Tensor):
            picked = self.new.get(source) if isinstance(source, fx.Node) else None
            if not isinstance(index, int) or picked is None:
                return False
            if isinstance(picked, (list, tuple)):
                self.new[node] = picked[index]
            elif not picked.meta.get("opaque") and isinstance(picked.meta.get("val"), (list, tuple)):
                self._copy(node, opaque=False)
            else:
                return False
            self._remember(node)
            return True
        steps = _steps(index, source.meta["example_value"])
        if steps is None:
            return False
        made = self.new[source]
        try:
            for op, rest in steps:
                made = self.expander.piece(op, made, rest, self._meta(node))
        except NotExpandable:
            return False
        self.new[node] = made
        self._remember(node, (source, steps))
        return True

    # In-place writes

    def _write(
        self, node: fx.Node, function: Callable[..., Any], args: Any, kwargs: Any, name: str | None = None
    ) -> None:
        target = args[0]
        value = target.meta.get("example_value") if isinstance(target, fx.Node) else None
        if not isinstance(value, torch.Tensor):  # numbers: `n += 1`
            self._copy(node)
            return
        if _storage(target) not in self.memory:
            self._copy(node)
            return
        new_args, new_kwargs = self._renamed((tuple(args), dict(kwargs)))
        dtype, shape = value.dtype, tuple(value.shape)

        def written(*a: Any, **k: Any) -> torch.Tensor:
            result: torch.Tensor = function(*a, **k)
            return result if result.dtype == dtype else result.to(dtype)

        try:
            made = self.expander.call(
                written, new_args, new_kwargs, self._meta(node), ("write", name or node.target, dtype)
            )
        except NotExpandable:
            raise NotFunctional(f"{name or node.target} writes in place", node) from None
        if tuple(made.meta["val"].shape) != shape:
            raise NotFunctional("a write in place changes the shape", node)
        self._store(node, target, made)
        self.new[node] = self.new[target]
        self._alias(node, target)

    def _set(self, node: fx.Node) -> None:
        target, index, source = node.args
        value = target.meta["example_value"]
        if _storage(target) not in self.memory:
            self._copy(node)
            return
        steps = _steps(index, value)
        if steps is None:
            places = list(index) if isinstance(index, tuple) else [index]
            if not all(
                isinstance(i, fx.Node) and isinstance(i.meta.get("example_value"), torch.Tensor)
                for i in places
            ):
                raise NotFunctional("a write by an index that is a symbol, or a tensor among others", node)
            self._write(node, _put, (target, places, source), {}, "index_put_")
            return
        view = self.new[target]
        try:
            for op, rest in steps:
                view = self.expander.piece(op, view, rest, self._meta(node))
            place = view.meta["val"]
            dtype, shape = place.dtype, tuple(place.shape)

            def fitted(x: Any) -> torch.Tensor:
                t = x if isinstance(x, torch.Tensor) else torch.full(shape, x, dtype=dtype)
                while t.dim() > len(shape):
                    t = t.squeeze(0)
                return t.to(dtype).expand(shape)

            new_source = self._renamed(source)
            if not (isinstance(new_source, fx.Node) and _same(new_source, dtype, shape)):
                new_source = self.expander.call(
                    fitted, (new_source,), {}, self._meta(node), ("fit", dtype, shape)
                )
            made = self._scattered(self.new[target], steps, new_source, self._meta(node))
        except NotExpandable as stop:
            raise NotFunctional(
                f"a write that cannot be expressed without side effects: {stop}", node
            ) from None
        self._store(node, target, made)
        self.new[node] = self.new[target]
        self._alias(node, target)

    def _alias(self, node: fx.Node, target: fx.Node) -> None:
        """Notes that an in-place op's result is its target."""
        held = self.memory[_storage(target)]
        if target in held.whole:
            held.whole.append(node)
        else:
            held.views[node] = held.views.get(target)

    def _store(self, node: fx.Node, target: fx.Node, made: fx.Node) -> None:
        """Lets ``made`` be the target's value from here on, in the whole of which it may be a part."""
        held = self.memory[_storage(target)]
        way = [] if target in held.whole else held.views.get(target)
        if way is None:
            raise NotFunctional("a write into a view that is no slice", node)
        whole = made if not way else self._placed(node, self.new[held.whole[0]], way, made)
        for alias in held.whole:
            self.new[alias] = whole
        for view, there in held.views.items():
            if there == way:
                self.new[view] = made
            elif self.last_use[view] > self.position[node]:
                if there is None:
                    raise NotFunctional("a view of the tensor is read after a write into it", node)
                piece = whole
                for op, rest in there:
                    piece = self.expander.piece(op, piece, rest, self._meta(node))
                self.new[view] = piece

    def _placed(self, node: fx.Node, base: fx.Node, way: _Way, piece: fx.Node) -> fx.Node:
        try:
            return self._scattered(base, way, piece, self._meta(node))
        except NotExpandable as stop:
            raise NotFunctional(f"a write into a view: {stop}", node) from None

    def _scattered(
        self,
        base: fx.Node,
        steps: _Way,
        piece: fx.Node,
        meta: dict[str, Any],
    ) -> fx.Node:
        """Returns ``base`` with ``piece`` in the place that ``steps`` lead to."""
        if not steps:
            return piece
        (op, rest), *further = steps
        inner = piece
        if further:
            inside = self.expander.piece(op, base, rest, meta)
            inner = self._scattered(inside, further, piece, meta)
        made: fx.Node
        if op is aten.select.int:
            made = self.expander.replaced(aten.select_scatter.default, base, inner, rest, meta)
        elif op is aten.slice.Tensor:
            made = self.expander.replaced(aten.slice_scatter.default, base, inner, rest, meta)
        elif op is aten.unsqueeze.default:
            made = self.expander.call(aten.squeeze.dim, (inner, *rest), {}, meta)
        else:
            raise NotExpandable(str(op))
        return made


def _written_arguments(graph: fx.Graph) -> set[int]:
    """Returns the storages of arguments and attributes that some op may write in place."""
    given = {_storage(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")} - {0}
    found = set()
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        writes = name.endswith("_") and not name.endswith("__")
        if writes or node.target in _OPERATORS or node.target is operator.setitem:
            targets = list(node.args[:1])
        else:
            targets = [node.kwargs.get("out")]
        found |= {_storage(n) for n in targets if isinstance(n, fx.Node)} & given
    return found


def _storage(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else 0


def _same(node: fx.Node, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == dtype and tuple(value.shape) == shape


def _steps(index: Any, value: torch.Tensor) -> _Way | None:
    """Returns the ATen ops of ``x[index]``, each with its arguments after x; None for indices that are tensors or symbols."""
    parts = list(index) if isinstance(index, tuple) else [index]
    for part in parts:
        numbers = [part.start, part.stop, part.step] if isinstance(part, slice) else [part]
        if not all(n is None or n is Ellipsis or type(n) is int for n in numbers):
            return None
    taken = sum(1 for p in parts if p is not None and p is not Ellipsis)
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    steps: _Way = []
    dim = 0
    sizes = list(value.shape)
    axis = 0  # in the source
    for part in parts:
        if part is None:
            steps.append((aten.unsqueeze.default, (dim,)))
            dim += 1
        elif part is Ellipsis:
            skipped = value.dim() - taken
            dim, axis = dim + skipped, axis + skipped
        elif isinstance(part, slice):
            size = sizes[axis]
            if part != slice(None) and not (type(size) is int and part.indices(size) == (0, size, 1)):
                if type(size) is not int:
                    return None
                start, stop, step = part.indices(size)
                steps.append((aten.slice.Tensor, (dim, start, max(start, stop), step)))
            dim, axis = dim + 1, axis + 1
        else:
            if type(sizes[axis]) is not int:
                return None
            steps.append((aten.select.int, (dim, part % sizes[axis] if sizes[axis] else part)))
            axis += 1
    return steps
