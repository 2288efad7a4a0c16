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


def test_autograd_cache_of_torch() -> None:
    """frontend/dynamo/aot_cache.py stores graphs in it, under a key that holds an attribute of the graph module."""
    import torch
    from torch import fx
    from torch._functorch import config
    from torch._functorch._aot_autograd import autograd_cache, schemas
    from torch._inductor.output_code import OutputCode

    for setting in ("enable_autograd_cache", "bundled_autograd_cache", "force_non_lazy_backward_lowering"):
        assert isinstance(getattr(config, setting), bool)
    compiler = inspect.signature(schemas.SerializableAOTDispatchCompiler)
    assert list(compiler.parameters) == ["output_code_ty", "compiler_fn"]
    methods = {
        "post_compile": ["self", "example_inputs", "constants", "graph_kwargs"],
        "prepare_for_serialization": ["self"],
        "set_triton_bundle": ["self", "triton_bundle"],
    }
    for name, parameters in methods.items():
        assert list(inspect.signature(getattr(OutputCode, name)).parameters) == parameters
    assert "pre_save" in inspect.getsource(autograd_cache.AOTAutogradCache.save)
    assert issubclass(autograd_cache.BypassAOTAutogradCache, Exception)

    def key(word: str) -> str:
        module = fx.GraphModule(torch.nn.Module(), fx.symbolic_trace(lambda x: x + 1).graph)
        module._spikingbrain_key = word  # type: ignore[assignment]
        return str(autograd_cache.AOTAutogradCachePickler(module).get_hash(module))

    assert key("a") == key("a") != key("b")


def test_dynamo_of_torch() -> None:
    """frontend/dynamo takes AOTAutograd, its partitioner, its list of parameters and FX's code generator."""
    import torch
    from torch._C import _from_dlpack, _to_dlpack
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.schemas import ViewAndMutationMeta
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext
    from torch.fx.graph import _BoxedCodeGen, _custom_builtins

    assert callable(aot_autograd) and callable(min_cut_rematerialization_partition)
    assert "static_input_indices" in ViewAndMutationMeta.__dataclass_fields__
    assert TracingContext.try_get() is None
    assert issubclass(_BoxedCodeGen, torch.fx.graph.CodeGen)
    assert all(hasattr(builtin, "obj") for builtin in _custom_builtins.values())
    tensor = torch.arange(3)
    assert torch.equal(_from_dlpack(_to_dlpack(tensor)), tensor)


def test_custom_ops_of_torch() -> None:
    """frontend/dynamo/on_device.py runs an op's eager body where a kernel refuses."""
    from spikingbrain.frontend.ops import linear_scan

    assert list(inspect.signature(linear_scan._init_fn).parameters)[:2] == ["decay", "update"]
    assert next(iter(inspect.signature(linear_scan.register_kernel).parameters)) == "device_types"


def test_keys_of_torchs_dispatcher() -> None:
    """Inside an op autograd records nothing; backend_maca/triton/vendor.py takes it in again."""
    import torch

    def gradient(x):  # type: ignore[no-untyped-def]
        included = torch._C._dispatch_tls_local_include_set()
        excluded = torch._C._dispatch_tls_local_exclude_set()
        autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            assert not (x * 2).requires_grad
            with torch._C._ForceDispatchKeyGuard(included, excluded - autograd):
                return torch.autograd.grad((x * x).sum(), x)[0]

    op = torch.library.custom_op(
        "spikingbrain_test::gradient", gradient, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    assert op(torch.tensor([3.0])).tolist() == [6.0]
