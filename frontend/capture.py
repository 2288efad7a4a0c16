"""Ahead-of-time capture: a PyTorch module and its entry points become one MLIR module and a table of weights."""

from __future__ import annotations

import contextlib
import inspect
import logging
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch_mlir import ir

from spikingbrain.errors import CompileError, ShapeError, SourceLine, UnsupportedOp
from spikingbrain.frontend.checks import check
from spikingbrain.frontend.importer import Importer
from spikingbrain.frontend.initial import initial_values
from spikingbrain.frontend.normalise import normalise
from spikingbrain.frontend.recurrences.exporting import Exported, export_program
from spikingbrain.frontend.spikes.finite import Watch

aten = torch.ops.aten


@dataclass(frozen=True)
class Entry:
    """One entry point of an artifact: example arguments for the model's forward, and which sizes may vary.

    The state given to the first entry is the state before the first call, which the artifact keeps; those given to others
    only tell shapes.

    Attributes:
        args: positional arguments; tensors give shape and dtype, other values become constants.
        kwargs: keyword arguments, likewise.
        dynamic_shapes: as in ``torch.export``: by parameter name, a mapping from dimension to ``torch.export.Dim``.
            For a container (such as the state), one mapping may stand for all its tensors.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Mapping[str, Any] | None = None


@dataclass
class Capture:
    """What the frontend hands on.

    Attributes:
        module: torch-dialect IR as text, with the user's source lines as locations.
        entries: the manifest's description of each entry point.
        state: the manifest's description of the state's tensors, empty without one.
        blocks: of the state's tensors that do not begin with one value everywhere, the part that holds others.
        weights: the model's tensors by name, not copied.
    """

    module: str
    entries: dict[str, Any]
    state: list[dict[str, Any]]
    blocks: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


_TENSOR = object()  # stands for a tensor among an entry's leaves; None is a value of its own


class _Flat(nn.Module):
    """The model as a function of flat tensors: inputs, then state; returning outputs, then the new state."""

    def __init__(self, model: nn.Module, call: _Call):
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        args, kwargs = self._call.rebuild(tensors)
        result = self.model(*args, **kwargs)
        state: Any = ()
        if self._call.state_name is not None:
            if not isinstance(result, tuple) or len(result) < 2:
                raise CompileError(
                    f"entry {self._call.name!r} does not return its state",
                    why=f"forward must return (outputs, {self._call.state_name})",
                )
            *outputs, state = result
            result = outputs
        new_state, spec = pytree.tree_flatten(state)
        if self._call.state_name is not None and spec != self._call.state_spec:
            raise CompileError(
                f"entry {self._call.name!r} returns a state of another structure than it takes", why=f"{spec}"
            )
        outputs = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
        for leaf in outputs:
            if not isinstance(leaf, torch.Tensor):
                raise CompileError(
                    f"entry {self._call.name!r} returns {leaf!r}, which is no tensor",
                    hint="return tensors, or containers of tensors",
                )
        return [*outputs, *new_state]


def _require(model: object, entries: object) -> None:
    """Raises CompileError for what is neither a module nor entry points by name."""
    if not isinstance(model, nn.Module):
        raise CompileError(
            f"a {type(model).__name__} is no model", hint="a torch.nn.Module that calls it in its forward"
        )
    if not isinstance(entries, Mapping) or not entries:
        what = (
            "no entry points"
            if isinstance(entries, Mapping)
            else f"entry points in a {type(entries).__name__}"
        )
        raise CompileError(what, hint="entries={'main': Entry((example,))}")
    for name, entry in entries.items():
        if not (isinstance(entry, Entry) and isinstance(entry.args, (tuple, list))):
            wrong = entry.args if isinstance(entry, Entry) else entry
            raise CompileError(
                f"entry {name!r} has its arguments in a {type(wrong).__name__}", hint="Entry((example, ...))"
            )


class _Call:
    """Flattens one entry's arguments: which leaves are tensors, which belong to the state."""

    def __init__(self, model: nn.Module, name: str, entry: Entry, state: str | None):
        self.name, self.state_name = name, state
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*entry.args, **entry.kwargs)
        except TypeError as error:
            raise CompileError(
                f"entry {name!r} does not fit the model's forward{signature}", why=str(error)
            ) from None
        self._bound = bound
        self._arguments: dict[str, Any] = dict(bound.arguments)
        if state is not None and state not in self._arguments:
            raise CompileError(
                f"entry {name!r} has no argument {state!r}, which was named as the state",
                hint=f"arguments are {', '.join(self._arguments)}",
            )
        shapes = entry.dynamic_shapes or {}
        if not isinstance(shapes, Mapping):
            raise ShapeError(
                f"dynamic_shapes of entry {name!r} is a {type(shapes).__name__}",
                hint="{'x': {0: Dim('B', max=64)}}: by argument, then by axis",
            )
        unknown = set(shapes) - set(self._arguments)
        if unknown:
            raise ShapeError(
                f"dynamic_shapes of entry {name!r} names {', '.join(sorted(unknown))}",
                why=f"the arguments are {', '.join(self._arguments)}",
            )
        order = [n for n in self._arguments if n != state] + ([state] if state else [])
        self._slots: list[tuple[str, Any, list[Any]]] = []  # (argument, tree spec, leaves)
        self.tensors: list[torch.Tensor] = []
        self.names: list[str] = []
        self.dims: list[Any] = []
        self.inputs = 0
        self.state_spec: Any = None
        for n in order:
            value = self._arguments[n]
            paths, spec = pytree.tree_flatten_with_path(value)
            dims = _leaf_shapes(value, shapes.get(n), n)
            leaves = []
            for (path, leaf), dim in zip(paths, dims, strict=True):
                is_tensor = isinstance(leaf, torch.Tensor)
                leaves.append(_TENSOR if is_tensor else leaf)
                if is_tensor:
                    # torch.export takes one tensor given twice for one argument
                    self.tensors.append(leaf.clone() if any(leaf is t for t in self.tensors) else leaf)
                    absent = [a for a in dim if not 0 <= a < leaf.ndim] if isinstance(dim, dict) else []
                    if absent:
                        raise ShapeError(
                            f"dynamic_shapes of entry {name!r}: {n}{pytree.keystr(path)} has no axis {absent[0]}",
                            why=f"its shape is {list(leaf.shape)}",
                        )
                    self.names.append(n + pytree.keystr(path) if n != state else _field_path(path) or n)
                    self.dims.append(dim)
            self._slots.append((n, spec, leaves))
            if n == state:
                self.state_spec = spec
            else:
                self.inputs = len(self.tensors)

    def rebuild(self, tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the positional and keyword arguments of forward with ``tensors`` in their places."""
        given = iter(tensors)
        for n, spec, leaves in self._slots:
            values = [next(given) if leaf is _TENSOR else leaf for leaf in leaves]
            self._bound.arguments[n] = pytree.tree_unflatten(values, spec)
        return self._bound.args, self._bound.kwargs


def capture(
    model: nn.Module,
    entries: Mapping[str, Entry],
    state: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
    check_finite: bool = False,
) -> Capture:
    """Exports every entry point and imports all of them into one module.

    Args:
        state: name of the parameter of forward that carries the state; forward then returns ``(*outputs, new_state)``.
        check_finite: let entry points return whether inputs of spiking layers are finite, between outputs and state.

    Raises CompileError (or ShapeError, UnsupportedOp) naming the entry and the user's line.
    """
    _require(model, entries)
    names = _WeightNames()
    importer = Importer(names.name)
    described: dict[str, Any] = {}
    layout: list[dict[str, Any]] = []
    blocks: dict[str, torch.Tensor] = {}
    donated: dict[str, list[int]] = {}
    for name, entry in entries.items():
        if not name.isidentifier():
            raise CompileError(f"entry point name {name!r} is not an identifier")
        progress(f"capture {name}")
        call = _Call(model, name, entry, state)
        exported = _export(model, call, Watch(len(call.tensors) - call.inputs) if check_finite else None)
        names.entry = name
        _import(importer, exported.program, call)
        described[name], state_fields = _describe(exported.program, call, len(exported.watched))
        described[name] |= {
            "recurrences": [r.to_dict() for r in exported.recurrences],
            "spikes": [s.to_dict() for s in exported.spikes],
            "experts": [e.to_dict() for e in exported.experts],
            "verified_lengths": exported.verified,
            "fixed_lengths": exported.fixed,
            "watched": [layer.to_dict() for layer in exported.watched],
        }
        donated[name] = list(range(call.inputs, len(call.tensors)))
        if len(described) == 1:
            layout, blocks = initial_values(state_fields, call.tensors[call.inputs :])
        elif [(f["name"], f["shape"]) for f in layout] != [(f["name"], f["shape"]) for f in state_fields]:
            raise CompileError(f"entry {name!r} has a state of another shape than the first entry")
    module = importer.module
    with module.context:
        i64 = ir.IntegerType.get_signless(64)
        for op in module.body.operations:
            function = (
                op.operation.attributes["sym_name"].value if "sym_name" in op.operation.attributes else ""
            )
            if function in donated:
                op.operation.attributes["spikingbrain.donated"] = ir.ArrayAttr.get(
                    [ir.IntegerAttr.get(i64, i) for i in donated[function]]
                )
        text: str = module.operation.get_asm(enable_debug_info=True)
    return Capture(text, described, layout, blocks, names.tensors)


class _WeightNames:
    """Gives each tensor of the model one name, also where two parameters share it."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.entry = ""
        self._by_identity: dict[Any, str] = {}

    def name(self, target: str, value: torch.Tensor) -> str:
        value = value.detach()
        identity = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype, value.device)
        if value.numel() and identity in self._by_identity:
            return self._by_identity[identity]
        own = target.removeprefix("model.")
        if own in self.tensors:  # constants made by tracing have the same names in every entry
            own = f"{self.entry}.{own}"
        self.tensors[own] = value
        self._by_identity[identity] = own
        return own


def _export(model: nn.Module, call: _Call, watch: Watch | None) -> Exported:
    try:
        with _torch_logs_no_errors():
            exported = export_program(_Flat(model, call), call.tensors, call.dims, call.name, watch)
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(
            f"torch.export cannot capture entry {call.name!r}",
            where=_user_line(error),
            why=_first_lines(str(error)),
            hint="the same error appears with torch.export.export(model, args); its documentation lists remedies",
        ) from error
    check(exported.program, call.name)
    return exported


@contextlib.contextmanager
def _torch_logs_no_errors() -> Iterator[None]:
    """Keeps torch from logging an op's error with its own stack: it is raised too, and told here with the user's line."""
    log, silence = logging.getLogger("torch._subclasses.fake_tensor"), lambda _: False
    log.addFilter(silence)
    try:
        yield
    finally:
        log.removeFilter(silence)


def _import(importer: Importer, program: torch.export.ExportedProgram, call: _Call) -> None:
    normalise(program.graph)
    try:
        importer.add(program, call.name)
    except NotImplementedError as error:
        raise UnsupportedOp(f"entry {call.name!r} cannot be imported", why=str(error)) from error


def _describe(
    program: torch.export.ExportedProgram, call: _Call, watched: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    nodes = [placeholders[name] for name in program.graph_signature.user_inputs]
    symbols: dict[str, str] = {}
    for node, dims in zip(nodes, call.dims, strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                declared = dims.get(axis) if isinstance(dims, dict) else None
                given = getattr(declared, "__name__", None)
                symbols.setdefault(str(size), given or f"d{len(symbols)}")

    def spec(name: str, value: torch.Tensor) -> dict[str, Any]:
        shape = [int(s) if isinstance(s, int) else symbols.get(str(s), str(s)) for s in value.shape]
        return {"name": name, "shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}

    inputs = [spec(n, node.meta["val"]) for n, node in zip(call.names, nodes, strict=True)]
    results = [n.meta["val"] for n in program.graph.output_node().args[0]]
    state_count = len(call.tensors) - call.inputs
    outputs = [spec(f"output{i}", v) for i, v in enumerate(results[: len(results) - state_count - watched])]
    shared = _shares_state(program.graph, nodes[call.inputs :], len(outputs))
    for output, flag in zip(outputs, shared, strict=True):
        output["shares_state"] = flag
    fields = inputs[call.inputs :]
    for before, after in zip(fields, results[len(results) - state_count :], strict=True):
        if spec("", after)["shape"] != before["shape"]:
            raise ShapeError(
                f"entry {call.name!r} changes the shape of its state tensor {before['name']}",
                why=f"from {before['shape']} to {spec('', after)['shape']}; compiled state is updated in place",
                hint="preallocate it with a bounded size",
            )
        if (dtype := spec("", after)["dtype"]) != before["dtype"]:
            raise ShapeError(
                f"entry {call.name!r} changes the type of its state tensor {before['name']}",
                why=f"from {before['dtype']} to {dtype}; compiled state is updated in place",
                hint=f"return it with .to(torch.{before['dtype']}), or begin with a state of {dtype}",
            )
    ranges = {}
    for symbol, range_ in program.range_constraints.items():
        if str(symbol) in symbols:
            high = int(range_.upper) if range_.upper.is_finite and int(range_.upper) < 2**62 else None
            ranges[symbols[str(symbol)]] = [int(range_.lower), high]
    entry = {
        "inputs": inputs[: call.inputs],
        "outputs": outputs,
        "ranges": ranges,
        "uses_state": state_count > 0,
    }
    return entry, fields


# Ops whose result may be their first argument's memory.
_MAY_SHARE = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.to.dtype,
    operator.getitem,
}


def _shares_state(graph: torch.fx.Graph, state: list[torch.fx.Node], outputs: int) -> list[bool]:
    """Returns which outputs may be the memory of a state tensor, before or after the call.

    The next call overwrites that memory, so such outputs are copied when they are handed out.
    """

    def origin(node: torch.fx.Node) -> torch.fx.Node:
        while node.op == "call_function" and node.target in _MAY_SHARE:
            node = node.args[0]
        return node

    results = [origin(n) for n in graph.output_node().args[0]]
    if len(set(results[outputs:])) < len(results[outputs:]):
        raise CompileError(
            "two tensors of the new state are one and the same",
            why="compiled state is updated in place, so each tensor needs memory of its own",
            hint="keep it once, and read it where it is needed",
        )
    held = {*state, *results[outputs:]}
    return [node in held for node in results[:outputs]]


def _leaf_shapes(value: Any, spec: Any, name: str) -> list[Any]:
    """Returns the dynamic dimensions of each leaf of ``value`` from a spec of the same or a coarser structure."""
    leaves = pytree.tree_leaves(value)
    if spec is None or isinstance(value, torch.Tensor):
        return [spec] * len(leaves) if isinstance(value, torch.Tensor) else [None] * len(leaves)
    if isinstance(spec, dict) and all(isinstance(k, int) for k in spec):
        return [dict(spec) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    children, _ = pytree.tree_flatten(value, is_leaf=lambda x: x is not value)
    if isinstance(spec, dict):
        keys = list(value) if isinstance(value, dict) else list(getattr(value, "__dataclass_fields__", {}))
        parts = [spec.get(k) for k in keys]
    elif isinstance(spec, (list, tuple)):
        parts = list(spec)
    else:
        parts = pytree.tree_flatten(spec, is_leaf=lambda x: x is not spec)[0]
    if len(parts) != len(children):
        raise ShapeError(f"dynamic_shapes of {name!r} has {len(parts)} parts for {len(children)} values")
    return [
        dim for child, part in zip(children, parts, strict=True) for dim in _leaf_shapes(child, part, name)
    ]


def _field_path(path: Any) -> str:
    return (
        pytree.keystr(path).replace("][", ".").replace("[", ".").replace("]", "").replace("'", "").lstrip(".")
    )


def _user_line(error: BaseException) -> SourceLine | None:
    """Returns the innermost line of the traceback that is in the user's model, not in torch or this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        inside = frame.filename.replace("\\", "/")
        if "/torch/" not in inside and "/frontend/" not in inside and not inside.startswith("<"):
            return SourceLine(frame.filename, frame.lineno or 0)
    return None


def _first_lines(text: str, count: int = 3) -> str:
    return " ".join(line.strip() for line in text.strip().splitlines()[:count] if line.strip())[:600]
