"""From linear algebra on buffers to kernels of the ``gpu`` dialect.

Upstream passes fold views into index arithmetic and outline the kernels. The kernels themselves are built here:
upstream maps one loop to one grid axis, at most three and without collapsing them, and knows no reduction over a
wave. The forms that a kernel can have are in ``forms.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch_mlir import ir
from torch_mlir.dialects import arith, linalg, memref

from spikingbrain.backend_maca.lower import products, rows
from spikingbrain.backend_maca.lower.expand import expand
from spikingbrain.backend_maca.lower.forms import for_each, launch, thread_form, wave_form
from spikingbrain.backend_maca.lower.generic import BLOCK, WAVE, Generic, fill_before
from spikingbrain.backend_maca.lower.index import index, negated, product, size
from spikingbrain.backend_maca.lower.launches import GRID_RANK, LAUNCH, outline_launches
from spikingbrain.backend_maca.lower.mlir import functions, host_ops, nested, parse, run_passes
from spikingbrain.backend_maca.lower.row_form import row_form
from spikingbrain.passes import dialect
from spikingbrain.passes.dialect import MULTIPLIES

FOLD_VIEWS = ("func.func(fold-memref-alias-ops)", "canonicalize")
OUTLINE = (
    "canonicalize",
    "cse",
    "func.func(gpu-launch-sink-index-computations)",
    "gpu-kernel-outlining",
    "lower-affine",
    "gpu.module(gpu.func(arith-expand))",
    "gpu.module(gpu.func(arith-emulate-unsupported-floats{source-types=bf16,f16 target-type=f32}))",
    "gpu.module(gpu.func(math-expand-ops{ops=fpowi}))",
    "gpu.module(gpu.func(math-extend-to-supported-types{target-type=f32}))",
    "canonicalize",
    "cse",
)


def build_kernels(text: str, choice: Mapping[str, str]) -> str:
    """Replaces every linalg op on buffers by a kernel and its launch, or a matrix product by a call of the library.

    ``choice`` names who provides products: "own" or "mcblas" for "linear" and "matmul".
    """
    with dialect.load() as context:
        module = parse(text, context)
        with ir.Location.unknown():
            expand(module)
        names: dict[str, int] = {}
        for function in functions(module):
            if choice["matmul"] == "mcblas":
                for op in host_ops(function):
                    if op.name == "linalg.generic":
                        _build_product(op, names)
            for op in host_ops(function):
                if op.name == "memref.copy":
                    _as_generic(op)
                elif op.name == LAUNCH and MULTIPLIES in op.attributes and choice["linear"] == "mcblas":
                    _build_linear(op, names)
            for op in host_ops(function):
                if op.name == "linalg.generic" and "reduction" in str(op.attributes["iterator_types"]):
                    Generic(op).fold_fill()
            for block in _host_blocks(function):
                for group in rows.groups(block):
                    _build_group(group, names)
        run_passes(module, FOLD_VIEWS)
        _resolve_metadata(module)
        outline_launches(module)
        run_passes(module, OUTLINE)
        return str(module.operation.get_asm(enable_debug_info=True))


def _resolve_metadata(module: ir.Module) -> None:
    """Replaces what folded views ask of a contiguous buffer (its sizes and strides) by ``memref.dim`` and products."""
    for op in list(nested(module.operation)):
        if op.name != "memref.extract_strided_metadata":
            continue
        buffer, rank = op.operands[0], ir.MemRefType(op.operands[0].type).rank
        if ir.MemRefType(buffer.type).affine_map != ir.AffineMap.get_identity(rank):
            continue  # the verifier will name it
        with ir.InsertionPoint(op), op.location:
            index = ir.IndexType.get()
            axes = [arith.ConstantOp(index, axis).result for axis in range(rank)]
            sizes = [memref.DimOp(buffer, axis).result for axis in axes]
            strides = [arith.ConstantOp(index, 1).result]
            for size in reversed(sizes[1:]):
                strides.insert(0, arith.MulIOp(strides[0], size).result)
            offset = arith.ConstantOp(index, 0).result
        for old, new in zip(list(op.results)[1:], [offset, *sizes, *strides[:rank]], strict=True):
            old.replace_all_uses_with(new)
        if not list(op.results[0].uses):
            op.erase()


def _build_product(op: ir.Operation, names: dict[str, int]) -> None:
    """Replaces a large matrix product by a call; where that depends on sizes, a kernel stays for the small ones."""
    with ir.InsertionPoint(op), op.location:
        generic = Generic(op)
        found = products.of_generic(generic)
        large = found.is_large() if found and found.has_form() else False
        if found is None or large is False:
            return
        generic.check_sizes()
        fill, start = fill_before(op, found.result) or (None, None)
        if start is not None and start.value != 0:
            fill = None
        found.emit(large, adds=fill is None)
    if large is not True:
        _build_generic(op, names, unless=large)
        return
    op.erase()
    if fill is not None:
        fill.erase()


def _build_linear(op: ir.Operation, names: dict[str, int]) -> None:
    """Replaces the launch of a projection's kernel by a call where the product is large; both stay where that depends."""
    grid, buffers = list(op.operands)[:GRID_RANK], list(op.operands)[GRID_RANK:]
    with ir.InsertionPoint(op), op.location:
        found = products.of_launch(op, buffers[:-1], buffers[-1])
        large = found.is_large()
        if large is False:
            return
        small = False if large is True else negated(large)
        for addend in buffers[2:-1]:
            _build_copy(memref.CopyOp(addend, found.result).operation, names, unless=small)
        found.emit(large, adds=len(buffers) > 3)
        if large is True:
            op.erase()
        else:
            op.operands[0] = arith.select(large, index(0), grid[0])


def _build_copy(op: ir.Operation, names: dict[str, int], unless: bool | ir.Value = False) -> None:
    source, target = op.operands
    with ir.InsertionPoint(op), ir.Location.name("copy", op.location):
        axes = range(ir.MemRefType(target.type).rank)
        count = product([size(target, axis) for axis in axes])

        def body(block: ir.Value, thread: ir.Value) -> None:
            def element(at: list[ir.Value]) -> None:
                memref.store(memref.load(source, at), target, at)

            for_each(block, thread, [size(target, axis) for axis in axes], element)

        launch(op, "copy", names, count, BLOCK, body, unless)


def _as_generic(op: ir.Operation) -> None:
    """Replaces a copy by a ``linalg.generic``."""
    source, target = op.operands
    kind = ir.MemRefType(target.type)
    identity = ir.AffineMapAttr.get(ir.AffineMap.get_identity(kind.rank))
    parallel = ir.Attribute.parse("#linalg.iterator_type<parallel>")
    with ir.InsertionPoint(op), ir.Location.name("copy", op.location):
        maps, iterators = ir.ArrayAttr.get([identity] * 2), ir.ArrayAttr.get([parallel] * kind.rank)
        made = linalg.GenericOp([], [source], [target], maps, iterators)
        block = made.regions[0].blocks.append(*[ir.MemRefType(v.type).element_type for v in (source, target)])
        with ir.InsertionPoint(block):
            linalg.YieldOp([block.arguments[0]])
    op.erase()


def _host_blocks(function: ir.Operation) -> list[ir.Block]:
    """Returns the blocks whose ops run between kernels."""
    around = [function, *(op for op in host_ops(function) if op.name in ("scf.for", "scf.if", "scf.while"))]
    return [region.blocks[0] for op in around for region in op.regions if len(region.blocks)]


def _build_group(group: rows.Group, names: dict[str, int]) -> None:
    """Replaces ops by one kernel: by rows, or for a single op in a form that fills the machine."""
    ops = [member.generic.op for member in group.members]
    if len(ops) == 1:
        _build_generic(ops[0], names)
        return
    last = ops[-1]
    lines = ir.Location.fused([op.location for op in ops])
    with ir.InsertionPoint(last), lines:
        for member in group.members:
            member.generic.check_sizes()
        outer = group.members[0].outer(group.choice)
        count = product(group.members[0].generic.sizes(parallel=True)[:outer])
        form = lambda b, t: row_form(group, count, b, t)  # noqa: E731
        launch(last, "rows", names, count, group.each, form, threads=group.threads)
    for op in ops[:-1]:
        op.erase()


def _build_generic(op: ir.Operation, names: dict[str, int], unless: bool | ir.Value = False) -> None:
    generic = Generic(op)
    combiner = generic.wave_combiner()
    steps = [v.operation.name for v in generic.body.operations][:-1]
    kind = "_".join(s.rpartition(".")[2] for s in steps[-3:])
    kind = kind or ("copy" if generic.inputs_count else "fill")
    with ir.InsertionPoint(op), op.location:
        generic.check_sizes()
        count = product(generic.sizes(parallel=True))
        if combiner is None:
            launch(op, kind, names, count, BLOCK, lambda b, t: thread_form(generic, b, t), unless)
        else:
            form = lambda b, t: wave_form(generic, combiner, b, t)  # noqa: E731
            launch(op, f"wave_{kind}", names, count, BLOCK // WAVE, form, unless)
