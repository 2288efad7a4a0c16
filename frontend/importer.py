"""FX graph to torch-dialect IR: the one module that touches torch-mlir's importer (private API, pinned version)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch_mlir import ir
from torch_mlir.dialects import arith
from torch_mlir.extras.fx_importer import FxImporter, FxImporterHooks, GraphNodeImporter, InputInfo

from spikingbrain.frontend import reshape
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin, to_index
from spikingbrain.passes.context import new_context

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


class NodeImporter(GraphNodeImporter):  # type: ignore[misc]
    """Adds what upstream imports wrongly (reshapes of several dynamic dimensions) or not at all (scan)."""

    def _import_torch_op_overload(
        self, loc: ir.Location, node: torch.fx.Node, concrete_target: Any = None
    ) -> None:
        if node.target in _VIEWS and concrete_target is None and self._import_view(loc, node):
            return
        super()._import_torch_op_overload(loc, node, concrete_target)

    def _import_view(self, loc: ir.Location, node: torch.fx.Node) -> bool:
        source, sizes = node.args[0], node.args[1]
        shape, result = source.meta["val"].shape, node.meta["val"].shape
        if not reshape.is_ambiguous(shape, result):
            return False
        runs = reshape.group(shape, result)
        with loc:
            plain = to_builtin(self.resolve_node_value(source))
            known: list[int | ir.Value | None] = []
            for size, actual in zip(sizes, result, strict=True):
                if isinstance(actual, int):
                    known.append(actual)
                elif isinstance(size, torch.fx.Node):
                    known.append(to_index(self.resolve_node_value(size)))
                elif size >= 0:  # a number that torch knows as an expression: chunks of 8 as s // (s // 8)
                    index = ir.IndexType.get()
                    known.append(arith.ConstantOp(index, ir.IntegerAttr.get(index, size)).result)
                else:
                    known.append(None)
            value = reshape.emit(plain, runs, known)
            self.bind_node_value(node, from_builtin(value, self._cc.node_val_to_type(node)))
        return True

    def _import_hop_scan(self, loc: ir.Location, node: torch.fx.Node, hop: Any) -> None:
        """Imports ``torch._higher_order_ops.scan`` as a ``time_loop`` that holds the body itself.

        The body sees what it closes over directly. Reversed scans arrive as flips around the op.
        """
        body_ref, init, scanned, closed_over = node.args
        results = [v for v in node.meta["val"]]
        body = getattr(node.graph.owning_module, body_ref.target)
        name = self.fx_importer._graph_module_to_func_name[id(body)]
        function = self.fx_importer.symbol_table[name].operation.clone(ip=False)
        with loc:
            plain = [to_builtin(self.resolve_node_value(n)) for n in [*init, *scanned]]
            outer = [self._import_argument(loc, value) for value in closed_over]
            wanted = [self._cc.value_info_to_type(v) for v in results]
            attributes = {
                "carried": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), len(init)),
                "reverse": ir.BoolAttr.get(False),
            }
            loop = ir.Operation.create(
                "spikingbrain_control.time_loop",
                [builtin_type(t) for t in wanted],
                plain,
                attributes,
                regions=1,
            )
            types = [v.type for v in plain[: len(init)]] + [_slice_type(v.type) for v in plain[len(init) :]]
            block = loop.regions[0].blocks.append(*types, arg_locs=[loc] * len(types))
            with ir.InsertionPoint(block):
                arguments = [from_builtin(a) for a in block.arguments] + outer
                yielded = _move_body(function, block, arguments)
                ir.Operation.create("spikingbrain_control.yield", operands=[to_builtin(v) for v in yielded])
            self._multi_result_nodes.add(node)
            for i, (result, type_) in enumerate(zip(loop.results, wanted, strict=True)):
                self.bind_node_value(node, from_builtin(result, type_), i)


def _move_body(function: ir.Operation, block: ir.Block, arguments: list[ir.Value]) -> list[ir.Value]:
    """Moves the ops of ``function`` to the end of ``block``; returns the values it returned."""
    source = function.regions[0].blocks[0]
    for old, new in zip(source.arguments, arguments, strict=True):
        old.replace_all_uses_with(new)
    *ops, terminator = [op.operation for op in source.operations]
    last = block.operations[len(block.operations) - 1].operation
    for op in ops:
        op.move_after(last)
        last = op
    return list(terminator.operands)


def _slice_type(tensor: ir.Type) -> ir.Type:
    ranked = ir.RankedTensorType(tensor)
    return ir.RankedTensorType.get(ranked.shape[1:], ranked.element_type)


class _Parameters(FxImporterHooks):  # type: ignore[misc]
    """Turns every parameter, buffer and lifted constant into a named ``spikingbrain.parameter``."""

    def __init__(self, name_of: Callable[[str, Any], str]):
        self._name_of = name_of

    def resolve_input(self, gni: GraphNodeImporter, value: Any, info: InputInfo) -> ir.Value:
        name = self._name_of(info.input_spec.target, value)
        shape, element = list(value.shape), gni._cc.dtype_to_type(value.dtype)
        text = str(element)
        signless = ir.Type.parse(text.lstrip("su")) if text[:2] in ("si", "ui") else element
        parameter = ir.Operation.create(
            "spikingbrain.parameter",
            [ir.RankedTensorType.get(shape, signless)],
            attributes={
                "sources": ir.ArrayAttr.get([ir.StringAttr.get(name)]),
                "recipe": ir.ArrayAttr.get([]),
            },
        )
        return from_builtin(parameter.result, info.ir_type)


class _RegionWeights(FxImporterHooks):  # type: ignore[misc]
    """Turns the attributes of a region's graph module, its packed weights, into ``spikingbrain.parameter``s."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}

    def resolve_literal(
        self, gni: GraphNodeImporter, literal: Any, info: InputInfo | None
    ) -> ir.Value | None:
        name = self.names.get(id(literal))
        if name is None:
            return None
        type_ = gni._cc.tensor_to_vtensor_type(literal)
        parameter = ir.Operation.create(
            "spikingbrain.parameter",
            [builtin_type(type_)],
            attributes={
                "sources": ir.ArrayAttr.get([ir.StringAttr.get(name)]),
                "recipe": ir.ArrayAttr.get([]),
            },
        )
        return from_builtin(parameter.result, type_)


class GraphImporter:
    """Collects graphs without state as functions of one module; their weights will be arguments."""

    def __init__(self) -> None:
        self.context = new_context()
        self._hooks = _RegionWeights()
        self._modules: list[torch.fx.GraphModule] = []  # upstream names things by id(): keep them alive
        with _root_logger_kept():
            self._fx = FxImporter(
                context=self.context, hooks=self._hooks, graph_node_importer_cls=NodeImporter
            )

    def add_graph(self, module: torch.fx.GraphModule, name: str) -> None:
        """Imports a graph as the public function ``name``; tensors among the module's attributes are its weights."""
        self._modules.append(module)
        for node in module.graph.find_nodes(op="get_attr"):
            self._hooks.names[id(getattr(module, node.target))] = node.target
        function = self._fx.import_graph_module(module, func_name=name)
        with self.context:
            function.attributes["spikingbrain.donated"] = ir.ArrayAttr.get([])
            function.attributes["spikingbrain.weight_arguments"] = ir.UnitAttr.get()

    @property
    def module(self) -> ir.Module:
        return self._fx.module


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Keeps upstream's ``logging.debug`` from giving the root logger a handler, which would defeat the user's own set-up.

    Can go when torch_mlir.extras.fx_importer logs through a logger of its own.
    """
    root, stand_in = logging.getLogger(), logging.NullHandler()
    root.addHandler(stand_in)
    try:
        yield
    finally:
        root.removeHandler(stand_in)


def _name_outputs(program: torch.export.ExportedProgram) -> None:
    """Lets the signature name the nodes that the graph returns, where rewrites have put others in their place."""
    returned = program.graph.output_node().args[0]
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(node, torch.fx.Node):
            spec.arg.name = node.name


class Importer:
    """Collects exported programs as functions of one module."""

    def __init__(self, name_of: Callable[[str, Any], str]):
        self.context = new_context()
        self._programs: list[
            torch.export.ExportedProgram
        ] = []  # upstream names subgraphs by id(): keep them alive
        with _root_logger_kept():
            self._fx = FxImporter(
                context=self.context, hooks=_Parameters(name_of), graph_node_importer_cls=NodeImporter
            )

    def add(self, program: torch.export.ExportedProgram, name: str) -> None:
        """Imports ``program`` as the public function ``name``."""
        self._programs.append(program)
        _name_outputs(program)
        self._fx.import_program(program, func_name=name)

    @property
    def module(self) -> ir.Module:
        return self._fx.module
