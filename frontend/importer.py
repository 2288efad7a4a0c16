"""FX graph to torch-dialect IR: the one module that touches torch-mlir's importer (private API, pinned version)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch_mlir import ir
from torch_mlir.extras.fx_importer import FxImporter, FxImporterHooks, GraphNodeImporter, InputInfo

from spikingbrain.frontend import reshape
from spikingbrain.passes.casts import builtin_type, from_builtin, to_builtin, to_index, vtensor_type
from spikingbrain.passes.context import new_context

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


class NodeImporter(GraphNodeImporter):  # type: ignore[misc]
    """Adds what upstream imports wrongly (reshapes of several dynamic dimensions) or not at all (scan)."""

    def _import_torch_op_overload(self, loc: ir.Location, node: torch.fx.Node, concrete_target: Any = None) -> None:
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
                else:
                    known.append(None)
            value = reshape.emit(plain, runs, known)
            self.bind_node_value(node, from_builtin(value, self._cc.node_val_to_type(node)))
        return True

    def _import_hop_scan(self, loc: ir.Location, node: torch.fx.Node, hop: Any) -> None:
        """Imports ``torch._higher_order_ops.scan`` as a ``time_loop`` whose body is inlined by calls."""
        body_ref, init, xs, additional = node.args
        body = getattr(node.graph.owning_module, body_ref.target)
        callee = self.fx_importer._graph_module_to_func_name[id(body)]
        with loc:
            values = [self.resolve_node_value(n) for n in [*init, *xs]]
            closed = [self.resolve_node_value(n) for n in additional]
            plain = [to_builtin(v) for v in values]
            torch_results = self._unpack_node_result_types_of(node)
            builtin_results = [builtin_type(t) for t in torch_results]
            loop = ir.Operation.create(
                "spikingbrain_control.time_loop",
                builtin_results,
                plain,
                {
                    "carried": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), len(init)),
                    "reverse": ir.BoolAttr.get(False),
                },
                regions=1,
            )
            slices = [v.type for v in plain[: len(init)]] + [_slice_type(v.type) for v in plain[len(init) :]]
            block = loop.regions[0].blocks.append(*slices)
            with ir.InsertionPoint(block):
                operands = [from_builtin(a) for a in block.arguments] + closed
                yielded = builtin_results[: len(init)] + [_slice_type(t) for t in builtin_results[len(init) :]]
                call = ir.Operation.create(
                    "func.call",
                    [vtensor_type(t) for t in yielded],
                    operands,
                    {"callee": ir.FlatSymbolRefAttr.get(callee)},
                )
                ir.Operation.create("spikingbrain_control.yield", operands=[to_builtin(r) for r in call.results])
            self._multi_result_nodes.add(node)
            for i, (result, wanted) in enumerate(zip(loop.results, torch_results, strict=True)):
                self.bind_node_value(node, from_builtin(result, wanted), i)

    def _unpack_node_result_types_of(self, node: torch.fx.Node) -> list[ir.Type]:
        return [self._cc.tensor_to_vtensor_type(v) if not v.shape else self._cc.value_info_to_type(v) for v in node.meta["val"]]


def _slice_type(tensor: ir.Type) -> ir.Type:
    ranked = ir.RankedTensorType(tensor)
    return ir.RankedTensorType.get(ranked.shape[1:], ranked.element_type)


class _Parameters(FxImporterHooks):  # type: ignore[misc]
    """Turns every parameter, buffer and lifted constant into a named ``spikingbrain.parameter``."""

    def __init__(self, name_of: Callable[[str, Any], str]):
        self._name_of = name_of

    def resolve_input(self, gni: GraphNodeImporter, value: Any, info: InputInfo) -> ir.Value:
        if info.mutable_producer_node_name is not None:
            raise NotImplementedError(f"buffer {info.input_spec.target!r} is changed by the model")
        name = self._name_of(info.input_spec.target, value)
        shape, element = list(value.shape), gni._cc.dtype_to_type(value.dtype)
        text = str(element)
        signless = ir.Type.parse(text.lstrip("su")) if text[:2] in ("si", "ui") else element
        parameter = ir.Operation.create(
            "spikingbrain.parameter",
            [ir.RankedTensorType.get(shape, signless)],
            attributes={"sources": ir.ArrayAttr.get([ir.StringAttr.get(name)]), "recipe": ir.ArrayAttr.get([])},
        )
        return from_builtin(parameter.result, info.ir_type)


class Importer:
    """Collects exported programs as functions of one module."""

    def __init__(self, name_of: Callable[[str, Any], str]):
        self.context = new_context()
        self._fx = FxImporter(context=self.context, hooks=_Parameters(name_of), graph_node_importer_cls=NodeImporter)

    def add(self, program: torch.export.ExportedProgram, name: str) -> None:
        """Imports ``program`` as the public function ``name``."""
        self._fx.import_program(program, func_name=name)

    @property
    def module(self) -> ir.Module:
        return self._fx.module
