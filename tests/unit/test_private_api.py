"""Private API of pinned packages that this compiler relies on; a failure here after an upgrade names the module to mend."""

from __future__ import annotations

import inspect

import pytest


def test_importer_of_torch_mlir() -> None:
    """frontend/importer.py overrides these methods and reads these fields."""
    from torch_mlir.extras.fx_importer import FxImporter, FxImporterHooks, GraphNodeImporter, InputInfo

    overridden = inspect.signature(GraphNodeImporter._import_torch_op_overload)
    assert list(overridden.parameters) == ["self", "loc", "node", "concrete_target"]
    for method in ("bind_node_value", "resolve_node_value", "_import_hop", "_unpack_node_result_types"):
        assert callable(getattr(GraphNodeImporter, method))
    assert list(inspect.signature(FxImporterHooks.resolve_input).parameters) == [
        "self",
        "gni",
        "value",
        "info",
    ]
    assert {"context", "hooks", "graph_node_importer_cls"} <= set(
        inspect.signature(FxImporter.__init__).parameters
    )
    assert {"input_spec", "ir_type"} <= set(InputInfo.__dataclass_fields__)


def test_dialect_extension_of_torch_mlir() -> None:
    """passes/dialect.py is defined through it, backends print ops that its context does not know."""
    from torch_mlir import ir
    from torch_mlir.dialects import ext

    assert issubclass(ext.DialectAlreadyLoadedError, RuntimeError) and hasattr(ext, "Pure")
    context = ir.Context()
    context.allow_unregistered_dialects = True
    with context:
        assert str(ir.Type.parse("!stream.binding")) == "!stream.binding"


def test_pipelines_of_torch_mlir() -> None:
    """passes/lower_torch.py runs these two without their final check."""
    from torch_mlir.passmanager import PassManager

    from spikingbrain.passes.context import new_context
    from spikingbrain.passes.lower_torch import _DROPPED, _PIPELINES

    with new_context():
        texts = [str(PassManager.parse(f"builtin.module({name})")) for name in _PIPELINES]
    assert _DROPPED.search(texts[-1]) is not None


def test_runtime_of_iree() -> None:
    """backend_iree/runtime.py calls these."""
    rt = pytest.importorskip("iree.runtime")
    for name in ("VmContext", "VmInstance", "VmModule", "VmVariantList", "HalBufferView", "ParameterIndex"):
        assert hasattr(rt, name)
    assert callable(rt.ParameterIndex.add_buffer) and callable(rt.VmModule.copy_buffer)
    assert callable(rt.create_io_parameters_module) and callable(rt.create_hal_module)


def test_export_of_torch() -> None:
    """frontend/capture.py keeps these ops whole and names dimensions through the graph's symbols."""
    import torch

    for op in ("linear", "scaled_dot_product_attention", "_assert_tensor_metadata"):
        assert hasattr(torch.ops.aten, op)
    assert "strict" in inspect.signature(torch.export.export).parameters
