"""Hand-scheduled kernels: from a ``spikingbrain_control.launch`` on tensors to a ``gpu.launch_func`` on buffers.

Passes place such a kernel as a private function with the attribute ``spikingbrain.threads`` (threads in a block)
and arguments (three block ids, then memrefs); ``passes/dialect.py`` says what a launch of it holds. Upstream
bufferization does not know the launch, so ``open_launches`` gives it memory in words that bufferization knows, and
``outline_launches`` makes the function a kernel of the ``gpu`` dialect like those that are built from linalg.
"""

from __future__ import annotations

import re

from torch_mlir import ir
from torch_mlir.dialects import arith, bufferization, gpu, memref

from spikingbrain.backend_maca.lower.mlir import nested
from spikingbrain.errors import PassFailed
from spikingbrain.passes.dialect import MULTIPLIES, launch_inputs
from spikingbrain.passes.wave_kernels.builders import THREADS

LAUNCH = "spikingbrain_control.launch"
MODULE = "scheduled"  # the gpu.module that holds the kernels
GRID_RANK = 3


def open_launches(module: ir.Module) -> None:
    """Puts the operands of every launch into memory: inputs as buffers, results in new memory.

    A tied result is its input's buffer, written in place. Bufferization copies the input first where its old value
    is still read, which holds for inputs of the same launch too: tied buffers are asked for before the others.
    Inputs that are views with strides are copied, as kernels take contiguous memory.
    """
    for op in _launches(module):
        inputs = launch_inputs(op)
        tied = [a.value for a in op.attributes["tied"]]
        given = iter(list(op.operands)[GRID_RANK + len(inputs) :])
        buffers: dict[int, ir.Value] = {}
        with ir.InsertionPoint(op), op.location:
            for number in [*sorted({i for i in tied if i >= 0}), *range(len(inputs))]:
                if number not in buffers:
                    kind = _buffer_type(inputs[number])
                    read_only = None if number in tied else True
                    buffers[number] = bufferization.to_buffer(kind, inputs[number], read_only=read_only)
            fresh = []
            for i, result in zip(tied, op.results, strict=True):
                if i < 0:
                    kind = _buffer_type(result)
                    sizes = [next(given) for size in kind.shape if size == ir.ShapedType.get_dynamic_size()]
                    fresh.append(memref.alloc(kind, sizes, []))
            operands = [*list(op.operands)[:GRID_RANK], *(buffers[i] for i in range(len(inputs))), *fresh]
            kept = {n: op.attributes[n] for n in ("callee", MULTIPLIES) if n in op.attributes}
            ir.Operation.create(LAUNCH, [], operands, kept)
            made = iter(fresh)
            for i, old in zip(tied, op.results, strict=True):
                buffer = buffers[i] if i >= 0 else next(made)
                new = bufferization.to_tensor(old.type, buffer, restrict=True, writable=True)
                old.replace_all_uses_with(new)
        op.erase()


def outline_launches(module: ir.Module) -> None:
    """Makes every launched function a ``gpu.func`` and every launch on buffers a ``gpu.launch_func``.

    Each kernel's location names the kernel and the lines of the model that launch it.
    """
    launches: dict[str, list[ir.Operation]] = {}
    for op in _launches(module):
        launches.setdefault(ir.FlatSymbolRefAttr(op.attributes["callee"]).value, []).append(op)
    symbols = ir.SymbolTable(module.operation)
    built = [op for op in nested(module.operation) if op.name == "gpu.launch"]
    taken = {ir.FlatSymbolRefAttr(op.attributes["function"]).value for op in built}
    if launches:
        module.operation.attributes["gpu.container_module"] = ir.UnitAttr.get()
        with ir.Location.unknown(), ir.InsertionPoint.at_block_begin(module.body):
            home = gpu.GPUModuleOp(MODULE)
            body = home.bodyRegion.blocks.append()
    for name, places in launches.items():
        if name not in symbols or THREADS not in symbols[name].operation.attributes:
            raise PassFailed(f"'{name}' is launched and is no kernel", why=f"it needs '{THREADS}'")
        kernel = _build_kernel(symbols[name].operation, places, body, taken)
        for op in places:
            _check_operands(op, kernel)
            with ir.InsertionPoint(op), op.location:
                one, operands = arith.constant(ir.IndexType.get(), 1), list(op.operands)
                threads = arith.constant(
                    ir.IndexType.get(), next(iter(kernel.attributes["known_block_size"]))
                )
                path = [MODULE, kernel.opview.name.value]
                gpu.LaunchFuncOp(path, operands[:GRID_RANK], (threads, one, one), operands[GRID_RANK:])
            op.erase()
    for view in list(module.body.operations):
        if THREADS in view.operation.attributes or (launches and _is_declaration(view.operation)):
            view.operation.erase()


def _launches(module: ir.Module) -> list[ir.Operation]:
    return [op for op in nested(module.operation) if op.name == LAUNCH]


def _buffer_type(value: ir.Value) -> ir.MemRefType:
    kind = ir.RankedTensorType(value.type)
    return ir.MemRefType.get(kind.shape, kind.element_type)


def _is_declaration(op: ir.Operation) -> bool:
    return op.name == "func.func" and not len(op.regions[0].blocks)


def _build_kernel(
    function: ir.Operation, launches: list[ir.Operation], home: ir.Block, taken: set[str]
) -> ir.Operation:
    """Moves a function's body into a new kernel; declarations that it calls go along. ``taken`` are names of kernels."""
    name = re.sub(r"\W", "_", ir.StringAttr(function.attributes["sym_name"]).value)
    while name in taken:
        name += "_"
    taken.add(name)
    _copy_declarations(function, home)
    entry = function.regions[0].blocks[0]
    lines = ir.Location.fused([op.location for op in launches])
    with ir.InsertionPoint(home), ir.Location.name(name, lines):
        kinds = [a.type for a in list(entry.arguments)[GRID_RANK:]]
        threads = function.attributes[THREADS].value
        kernel = gpu.GPUFuncOp(
            ir.FunctionType.get(kinds, []), name, kernel=True, known_block_size=[threads, 1, 1]
        )
    entry.append_to(kernel.regions[0])
    *_, last = entry.operations
    with ir.InsertionPoint.at_block_begin(entry), last.location:
        for axis in "xyz":
            block = gpu.block_id(ir.Attribute.parse(f"#gpu<dim {axis}>"))
            entry.arguments[0].replace_all_uses_with(block)
            entry.erase_argument(0)
    with ir.InsertionPoint(last), last.location:
        gpu.return_([])
    last.operation.erase()
    return kernel.operation


def _copy_declarations(function: ir.Operation, home: ir.Block) -> None:
    """Copies the functions without a body that a kernel calls, the machine's own, beside it."""
    there = {ir.StringAttr(v.operation.attributes["sym_name"]).value for v in home.operations}
    outside = ir.SymbolTable(function.parent)

    for op in nested(function):
        callee = ir.FlatSymbolRefAttr(op.attributes["callee"]).value if op.name == "func.call" else ""
        if callee and callee not in there:
            there.add(callee)
            home.append(outside[callee].operation.clone())


def _check_operands(op: ir.Operation, kernel: ir.Operation) -> None:
    wanted = [a.type for a in kernel.regions[0].blocks[0].arguments]
    given = [v.type for v in list(op.operands)[GRID_RANK:]]
    if wanted != given:
        raise PassFailed(
            f"the launch of '{kernel.opview.name.value}' does not fit the kernel",
            why=f"it passes {', '.join(map(str, given))}; the kernel takes {', '.join(map(str, wanted))}",
        )
