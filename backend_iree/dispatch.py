"""Turns kernel launches into IREE executables and dispatches.

Passes describe a hand-scheduled kernel as a private function over memrefs and call it with
``spikingbrain_control.launch`` (see ``passes/dialect.py``). Stock iree-compile accepts such a function as the
body of a ``stream.executable`` called by ``flow.dispatch``. torch-mlir's context does not know those ops, so
they are made in generic form as IREE 3.13 spells them; iree-compile verifies them when it reads the module.
"""

from __future__ import annotations

from torch_mlir import ir
from torch_mlir.dialects import arith, func, tensor

from spikingbrain.passes.dialect import launch_inputs

LAUNCH = "spikingbrain_control.launch"
GRID_RANK = 3


def wrap_kernels(module: ir.Module) -> None:
    """Rewrites every launch of ``module`` in place; afterwards no launch and no launched function remains.

    Each launched function becomes one executable of the same name, whichever number of launches share it.
    Raises ValueError when a launch names no function of the module or the function breaks the contract.
    """
    launches: list[ir.Operation] = []

    def collect(op: ir.Operation) -> ir.WalkResult:
        if op.name == LAUNCH:
            launches.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    kernels = {op.name.value: op for op in module.body.operations if isinstance(op, func.FuncOp)}
    tied_of: dict[str, list[int]] = {}
    with module.context, ir.Location.unknown():
        for launch in launches:
            name = ir.FlatSymbolRefAttr(launch.attributes["callee"]).value
            if name not in kernels:
                raise ValueError(f"launch of '{name}', which is not a function of the module")
            tied = [attribute.value for attribute in launch.attributes["tied"]]
            if tied != tied_of.setdefault(name, tied):
                raise ValueError(f"launches of '{name}' tie different results: {tied_of[name]} and {tied}")
            _check_contract(kernels[name], launch, tied)
        for launch in launches:
            name = ir.FlatSymbolRefAttr(launch.attributes["callee"]).value
            if name in kernels:
                _build_executable(kernels.pop(name), len(launch_inputs(launch)))
            _replace_launch(launch, name, tied_of[name])


def _check_contract(kernel: func.FuncOp, launch: ir.Operation, tied: list[int]) -> None:
    name = kernel.name.value
    if len(kernel.body.blocks) != 1:
        raise ValueError(f"kernel '{name}' must have a body of one block")
    fresh = [result for i, result in zip(tied, launch.results, strict=True) if i < 0]
    tensors = [ir.RankedTensorType(value.type) for value in [*launch_inputs(launch), *fresh]]
    expected = [ir.IndexType.get()] * GRID_RANK + [
        ir.MemRefType.get(t.shape, t.element_type) for t in tensors
    ]
    if kernel.type.inputs != expected or kernel.type.results:
        raise ValueError(
            f"kernel '{name}' is of type {kernel.type}, its launch asks for"
            f" ({', '.join(map(str, expected))}) -> ()"
        )


def _dynamic_axes(shaped: ir.Type) -> list[int]:
    shaped = ir.ShapedType(shaped)
    return [axis for axis in range(shaped.rank) if shaped.is_dynamic_dim(axis)]


def _build_executable(kernel: func.FuncOp, inputs: int) -> None:
    """Replaces a kernel function by an executable of the same name, which takes its body."""
    symbol = ir.FlatSymbolRefAttr.get(kernel.name.value)
    name, private, public = (ir.StringAttr.get(s) for s in (symbol.value, "private", "public"))
    index = ir.IndexType.get()
    with ir.InsertionPoint(kernel), kernel.operation.location:
        executable = ir.Operation.create(
            "stream.executable", attributes={"sym_name": name, "sym_visibility": private}, regions=1
        )
        with ir.InsertionPoint(executable.regions[0].blocks.append()):
            export = ir.Operation.create(
                "stream.executable.export",
                attributes={"sym_name": name, "sym_visibility": public, "function_ref": symbol},
                regions=1,
            )
            grid = export.regions[0].blocks.append(*[index] * GRID_RANK)
            with ir.InsertionPoint(grid):
                ir.Operation.create("stream.return", operands=list(grid.arguments))
            inner = ir.Operation.create("builtin.module", regions=1)
            ir.Operation.create("stream.executable.end")
        with ir.InsertionPoint(inner.regions[0].blocks.append()):
            _build_entry_point(kernel, inputs)
    kernel.operation.erase()


def _build_entry_point(kernel: func.FuncOp, inputs: int) -> None:
    """Builds the exported function: a binding per input, an index per dynamic size, a binding per result.

    IREE asks for operands (tensors and scalars) before results. Sizes are passed once per tensor even where
    two are equal, as launches that share the kernel may differ in that.
    """
    binding, index = ir.Type.parse("!stream.binding"), ir.IndexType.get()
    old = kernel.body.blocks[0]
    memrefs = list(old.arguments)[GRID_RANK:]
    axes = [_dynamic_axes(memref.type) for memref in memrefs]
    scalars = sum(map(len, axes))
    types = [binding] * inputs + [index] * scalars + [binding] * (len(memrefs) - inputs)
    entry = func.FuncOp(kernel.name.value, (types, []))
    new = entry.add_entry_block()
    arguments = list(new.arguments)
    bindings = arguments[:inputs] + arguments[inputs + scalars :]
    sizes = iter(arguments[inputs : inputs + scalars])
    with ir.InsertionPoint(new):
        zero = arith.ConstantOp(index, 0).result
        for axis in range(GRID_RANK):
            workgroup = ir.Operation.create(
                "stream.dispatch.workgroup.id",
                results=[index],
                attributes={"dimension": ir.IntegerAttr.get(index, axis)},
            )
            old.arguments[axis].replace_all_uses_with(workgroup.result)
        for memref, source, dynamic in zip(memrefs, bindings, axes, strict=True):
            subspan = ir.Operation.create(
                "stream.binding.subspan",
                operands=[source, zero, *(next(sizes) for _ in dynamic)],
                results=[memref.type],
            )
            memref.replace_all_uses_with(subspan.result)
    for op in list(old.operations):
        op.operation.detach_from_parent()
        new.append(op)


def _replace_launch(launch: ir.Operation, name: str, tied: list[int]) -> None:
    """Replaces one launch by a dispatch: grid, input tensors and all sizes, result sizes."""
    inputs = launch_inputs(launch)
    grid = list(launch.operands)[:GRID_RANK]
    given_sizes = iter(list(launch.operands)[GRID_RANK + len(inputs) :])
    index = ir.IndexType.get()
    with ir.InsertionPoint(launch), launch.location:
        input_sizes = [
            [
                tensor.DimOp(value, arith.ConstantOp(index, axis).result).result
                for axis in _dynamic_axes(value.type)
            ]
            for value in inputs
        ]
        result_sizes = [
            input_sizes[i] if i >= 0 else [next(given_sizes) for _ in _dynamic_axes(result.type)]
            for i, result in zip(tied, launch.results, strict=True)
        ]
        fresh_sizes = [s for i, sizes in zip(tied, result_sizes, strict=True) if i < 0 for s in sizes]
        arguments = [*inputs, *(s for sizes in input_sizes for s in sizes), *fresh_sizes]
        argument_sizes = [s for sizes in input_sizes for s in sizes]
        dispatch_sizes = [s for sizes in result_sizes for s in sizes]
        dispatch = ir.Operation.create(
            "flow.dispatch",
            results=[result.type for result in launch.results],
            operands=[*grid, *arguments, *argument_sizes, *dispatch_sizes],
            attributes={
                "entry_points": ir.ArrayAttr.get([ir.SymbolRefAttr.get([name, name])]),
                "operandSegmentSizes": ir.DenseI32ArrayAttr.get(
                    [GRID_RANK, len(arguments), len(argument_sizes), len(dispatch_sizes)]
                ),
                "tied_operands": ir.ArrayAttr.get([ir.IntegerAttr.get(index, i) for i in tied]),
            },
        )
    for old, new in zip(launch.results, dispatch.results, strict=True):
        old.replace_all_uses_with(new)
    launch.erase()
