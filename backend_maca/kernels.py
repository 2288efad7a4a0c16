"""From linear algebra on tensors to kernels of the ``gpu`` dialect.

Upstream passes decide where results live (one-shot bufferization), fold views into index arithmetic and
outline the kernels. The kernels themselves are built here: upstream maps one loop to one grid axis, at most
three and without collapsing them, and knows no reduction over a wave. There are two forms:

- *thread*: one thread per result element, reduced axes in loops; any rank, the grid is a flat count;
- *wave*: one wave of 64 lanes per result element, for one long reduced axis (GEMV, norms, row maxima); lanes
  stride over the axis and combine by an xor butterfly.

No thread leaves early: out-of-range threads are predicated off, and collectives run with the whole wave.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import affine, arith, cf, gpu, memref, scf
from torch_mlir.passmanager import PassManager

from spikingbrain.errors import PassFailed, SourceLine, UnsupportedOp
from spikingbrain.passes import dialect, parameters

WAVE = 64
BLOCK = 256  # four waves; 1024 is the machine's limit, smaller blocks leave it room to overlap them
WAVE_FORM_FROM = 2 * WAVE  # a shorter reduced axis of known length stays in one thread

# What a wave can combine with one 4-byte shuffle, with the value that changes nothing.
COMBINERS: dict[str, float] = {
    "arith.addf": 0.0,
    "arith.addi": 0,
    "arith.maximumf": -inf,
    "arith.maxnumf": -inf,
    "arith.minimumf": inf,
    "arith.minnumf": inf,
}
SHUFFLED_TYPES = ("f32", "i32")

BUFFERIZE = (
    "one-shot-bufferize{bufferize-function-boundaries function-boundary-type-conversion=identity-layout-map}",
    "func.func(linalg-generalize-named-ops)",  # padding becomes linalg.map only now
    "canonicalize",
    "cse",
)
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


def source_of(location: ir.Location) -> SourceLine | str:
    """Returns the innermost line of the user's own code behind a location, or else a text that says where."""
    lines: list[SourceLine] = []

    def collect(node: Any) -> None:
        if isinstance(node, ir.FileLineColLoc):
            lines.append(SourceLine(node.filename, node.start_line))
        elif isinstance(node, ir.NameLoc):
            collect(node.child_loc)
        elif isinstance(node, ir.CallSiteLoc):
            collect(node.callee)
            collect(node.caller)
        elif isinstance(node, ir.FusedLoc):
            for part in node.locations:
                collect(part)

    collect(location)
    foreign = ("<", "-", "torch/")  # generated code, the module's own text, the tracer
    own = [s for s in lines if not s.file.startswith(foreign) and "site-packages" not in s.file]
    if own:
        return own[0]
    return f"line {lines[0].line} of the module" if lines else "an unknown place"


def place_of(op: ir.Operation) -> SourceLine | str:
    """Returns the user's line of an op, or of the closest op around it that has one."""
    where = source_of(op.location)
    parent = op.operation.parent
    if isinstance(where, SourceLine) or parent is None or parent.operation.name == "gpu.module":
        return where
    return place_of(parent)


def nested(root: ir.Operation) -> list[ir.Operation]:
    """Returns the operations inside an operation, outer ones first."""
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        found.append(op.operation)
        return ir.WalkResult.ADVANCE

    root.walk(visit, ir.WalkOrder.PRE_ORDER)
    return found[1:]


def parse(text: str, context: ir.Context) -> ir.Module:
    """Parses a module, with errors of our own kind."""
    try:
        return ir.Module.parse(text, context)
    except ir.MLIRError as error:
        unknown = re.search(r"not found for custom op '([\w.]+)'", str(error))
        if unknown:
            raise UnsupportedOp(f"'{unknown[1]}' has no kernel for MetaX GPUs") from error
        raise PassFailed("the module does not parse", why=str(error)) from error


def run_passes(module: ir.Module, passes: Sequence[str]) -> None:
    """Runs upstream passes one by one, so that a failure names the pass."""
    for name in passes:
        try:
            PassManager.parse(f"builtin.module({name})").run(module.operation)
        except ir.MLIRError as error:
            where = source_of(error.error_diagnostics[0].location) if error.error_diagnostics else None
            raise PassFailed(f"pass '{name}' failed", where=where, why=str(error)) from error


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


def bufferize(text: str) -> str:
    """Puts tensors into buffers; weights and constant tensors become trailing arguments of the entries.

    An argument attribute says what it holds: ``spikingbrain.weight`` (the key) or ``spikingbrain.constant``
    (the elements). Arguments are never written. Every linalg op gets a location that names it.
    """
    with dialect.load() as context:
        module = parse(text, context)
        for op in nested(module.operation):
            if op.name.startswith("spikingbrain") and op.name != "spikingbrain.parameter":
                raise UnsupportedOp(
                    f"'{op.name}' has no kernel for MetaX GPUs",
                    where=source_of(op.location),
                    hint="lower it to linalg before this backend",
                )
            if op.name.startswith(("tm_tensor.", "scf.")) and not _in_body(op):
                raise UnsupportedOp(
                    f"'{op.name}' has no kernel for MetaX GPUs",
                    where=source_of(op.location),
                    why="it runs step by step: sorting, running sums and loops over time have no kernels here yet",
                )
            if op.name.startswith("linalg.") and len(op.regions):
                op.location = ir.Location.name(_label(op), op.location)
        for function in _functions(module):
            _take_arguments(function)
            _copy_reshaped_slices(function)
        run_passes(module, ("func.func(linalg-generalize-named-ops)", *BUFFERIZE))
        return str(module.operation.get_asm(enable_debug_info=True))


def build_kernels(text: str) -> str:
    """Replaces every linalg op on buffers by a kernel and its launch."""
    with dialect.load() as context:
        module = parse(text, context)
        names: dict[str, int] = {}
        for function in _functions(module):
            for view in list(function.regions[0].blocks[0].operations):
                op = view.operation
                if op.name == "memref.copy":
                    _build_copy(op, names)
                elif op.name == "linalg.generic":
                    _build_generic(op, names)
        run_passes(module, FOLD_VIEWS)
        _resolve_metadata(module)
        run_passes(module, OUTLINE)
        return str(module.operation.get_asm(enable_debug_info=True))


def _functions(module: ir.Module) -> list[ir.Operation]:
    found = [view.operation for view in module.body.operations if view.operation.name == "func.func"]
    return [f for f in found if len(f.regions[0].blocks)]


def _in_body(op: ir.Operation) -> bool:
    """Returns whether an op belongs to what a linalg op computes for one element."""
    parent = op.parent
    while parent is not None and not parent.operation.name.startswith("linalg."):
        parent = parent.operation.parent
    return parent is not None


def _label(op: ir.Operation) -> str:
    """Returns the op's name, a generic one with what it computes: ``linalg.generic mulf, addf``."""
    if op.name != "linalg.generic":
        return str(op.name)
    steps = [o.operation.name.partition(".")[2] for o in op.regions[0].blocks[0].operations][:-1]
    return "linalg.generic " + (", ".join(steps[:4]) + (", ..." if len(steps) > 4 else "") or "copy")


def _take_arguments(function: ir.Operation) -> None:
    """Turns the weights and constant tensors in a function's body into arguments."""
    view, entry = function.opview, function.regions[0].blocks[0]
    attributes = [ir.DictAttr(a) for a in view.arg_attrs] if "arg_attrs" in function.attributes else []
    attributes = attributes or [ir.DictAttr.get({}) for _ in entry.arguments]
    weights: dict[str, ir.Value] = {}
    for op in [v.operation for v in entry.operations]:
        if op.name == "spikingbrain.parameter":
            key, kind = parameters.stored(op).key, "spikingbrain.weight"
            note: ir.Attribute = ir.StringAttr.get(key)
        elif op.name == "arith.constant" and isinstance(op.results[0].type, ir.RankedTensorType):
            key, kind, note = str(op), "spikingbrain.constant", op.attributes["value"]
            if not isinstance(note, ir.DenseElementsAttr) or "bf16" in str(note.type):
                raise UnsupportedOp(
                    f"a constant of type {op.results[0].type} cannot be stored",
                    where=source_of(op.location),
                    why="only 'dense' elements can be read here, and not as bf16",
                    hint="make it a spikingbrain.parameter",
                )
        else:
            continue
        if key not in weights:
            weights[key] = entry.add_argument(op.results[0].type, op.location)
            attributes.append(ir.DictAttr.get({kind: note}))
        op.results[0].replace_all_uses_with(weights[key])
        op.erase()
    results = view.function_type.value.results
    function.attributes["function_type"] = ir.TypeAttr.get(
        ir.FunctionType.get([a.type for a in entry.arguments], results)
    )
    readonly = {"bufferization.writable": ir.BoolAttr.get(False)}
    merged = [{**{named.name: named.attr for named in a}, **readonly} for a in attributes]
    view.arg_attrs = [ir.DictAttr.get(a) for a in merged]


def _copy_reshaped_slices(function: ir.Operation) -> None:
    """Gives slices that are reshaped a buffer of their own.

    Other slices become index arithmetic of the kernels that read them. A reshape of a slice, such as the split into
    heads of one part of a joint projection, cannot: between kernels only whole buffers change their shape.
    """
    for op in nested(function):
        if op.name not in ("tensor.expand_shape", "tensor.collapse_shape"):
            continue
        source = op.operands[0]
        if (
            not isinstance(source.owner, ir.Operation | ir.OpView)
            or source.owner.name != "tensor.extract_slice"
        ):
            continue
        segments = ir.DenseI32ArrayAttr.get([0, 1, 0])
        with ir.InsertionPoint(op), op.location:
            copy = ir.Operation.create(
                "bufferization.alloc_tensor", [source.type], [source], {"operandSegmentSizes": segments}
            )
        op.operands[0] = copy.result


# Small words for index arithmetic.


def _index(value: int) -> ir.Value:
    return arith.constant(ir.IndexType.get(), value)


def _size(buffer: ir.Value, axis: int) -> ir.Value:
    """Returns the size of an axis; canonicalization folds it where it is known."""
    return memref.dim(buffer, _index(axis))


def _product(sizes: Sequence[ir.Value]) -> ir.Value:
    total = _index(1)
    for size in sizes:
        total = arith.muli(total, size)
    return total


def _split(flat: ir.Value, sizes: Sequence[ir.Value]) -> list[ir.Value]:
    """Returns the row-major coordinates of a flat index."""
    coordinates: list[ir.Value] = []
    for axis, size in reversed(list(enumerate(sizes))):
        coordinates.insert(0, arith.remsi(flat, size) if axis else flat)
        flat = arith.divsi(flat, size) if axis else flat
    return coordinates


def _less(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def _launch(
    op: ir.Operation,
    kind: str,
    names: dict[str, int],
    count: ir.Value,
    each: int,
    body: Callable[[ir.Value, ir.Value], None],
) -> None:
    """Emits a launch with one block per ``each`` elements; ``body(block, thread)`` fills it."""
    one = _index(1)
    grid = arith.ceildivsi(count, _index(each))
    launch = gpu.LaunchOp((grid, one, one), (_index(BLOCK), one, one))
    number = names[kind] = names.get(kind, -1) + 1
    launch.attributes["module"] = ir.FlatSymbolRefAttr.get("kernels")
    launch.attributes["function"] = ir.FlatSymbolRefAttr.get(f"{kind}_{number}")
    block = launch.regions[0].blocks[0]
    with ir.InsertionPoint(block):
        body(block.arguments[0], block.arguments[3])
        gpu.terminator()
    op.erase()


def _build_copy(op: ir.Operation, names: dict[str, int]) -> None:
    source, target = op.operands
    with ir.InsertionPoint(op), ir.Location.name("copy", op.location):
        axes = range(ir.MemRefType(target.type).rank)
        count = _product([_size(target, axis) for axis in axes])

        def body(block: ir.Value, thread: ir.Value) -> None:
            def element(at: list[ir.Value]) -> None:
                memref.store(memref.load(source, at), target, at)

            _for_each(block, thread, [_size(target, axis) for axis in axes], element)

        _launch(op, "copy", names, count, BLOCK, body)


def _for_each(
    block: ir.Value, thread: ir.Value, sizes: list[ir.Value], element: Callable[[list[ir.Value]], None]
) -> None:
    """Emits the thread form: ``element`` at the coordinates of this thread, when it is in range."""
    flat = arith.addi(arith.muli(block, _index(BLOCK)), thread)
    inside = scf.IfOp(_less(flat, _product(sizes)))
    with ir.InsertionPoint(inside.then_block):
        element(_split(flat, sizes))
        scf.yield_([])


class _Generic:
    """A ``linalg.generic`` on buffers, read once."""

    def __init__(self, op: ir.Operation):
        self.op = op
        self.maps = [ir.AffineMapAttr(a).value for a in op.attributes["indexing_maps"]]
        self.parallel = ["parallel" in str(a) for a in op.attributes["iterator_types"]]
        self.inputs_count = op.attributes["operandSegmentSizes"][0]
        self.operands = list(op.operands)
        self.body = op.regions[0].blocks[0]
        self.outputs = self.operands[self.inputs_count :]
        *_, self.terminator = (v.operation for v in self.body.operations)
        if not all(isinstance(v.type, ir.MemRefType) for v in self.outputs):
            raise UnsupportedOp("a linalg op without buffers", where=source_of(op.location))
        self.places = self._find_places()

    def _find_places(self) -> list[list[tuple[ir.Value, int]]]:
        """Returns for every loop the (buffer, axis) pairs whose size is its length."""
        places: list[list[tuple[ir.Value, int]]] = [[] for _ in self.parallel]
        for value, affine_map in zip(self.operands, self.maps, strict=True):
            for axis, expression in enumerate(affine_map.results):
                if isinstance(expression, ir.AffineDimExpr):
                    places[expression.position].append((value, axis))
        if not all(places):
            raise UnsupportedOp("a loop whose length no operand tells", where=source_of(self.op.location))
        return places

    def sizes(self, *, parallel: bool) -> list[ir.Value]:
        """Returns the lengths of the parallel, or of the reduced, loops."""
        return [
            _size(*p[0]) for p, wanted in zip(self.places, self.parallel, strict=True) if wanted is parallel
        ]

    def check_sizes(self) -> None:
        """Emits a check for every loop that operands could disagree about; known sizes fold away."""
        label = self.op.location.name_str if isinstance(self.op.location, ir.NameLoc) else self.op.name
        for (first, axis), *rest in self.places:
            for other, other_axis in rest:
                same = arith.cmpi(arith.CmpIPredicate.eq, _size(first, axis), _size(other, other_axis))
                cf.assert_(same, f"sizes of the operands of {label} differ, at {source_of(self.op.location)}")

    def coordinates(self, parallel: list[ir.Value], reduced: list[ir.Value]) -> list[ir.Value]:
        """Returns the values of all loops in the op's order."""
        left, right = iter(parallel), iter(reduced)
        return [next(left) if p else next(right) for p in self.parallel]

    def _at(self, number: int, loops: list[ir.Value]) -> list[ir.Value]:
        whole = self.maps[number]
        single = [ir.AffineMap.get(whole.n_dims, 0, [e]) for e in whole.results]
        return [affine.apply(m, loops) for m in single]

    def load(self, number: int, loops: list[ir.Value]) -> ir.Value:
        """Loads the element of an operand at these loop values; a scalar operand is its own element."""
        value = self.operands[number]
        return memref.load(value, self._at(number, loops)) if isinstance(value.type, ir.MemRefType) else value

    def store(self, values: Sequence[ir.Value], loops: list[ir.Value]) -> None:
        """Stores one element of every output."""
        for number, value in enumerate(values, self.inputs_count):
            memref.store(value, self.operands[number], self._at(number, loops))

    def initial(self, loops: list[ir.Value]) -> list[ir.Value]:
        """Loads what the outputs hold; outputs that the body does not read are not loaded."""
        used = [bool(list(a.uses)) for a in list(self.body.arguments)[self.inputs_count :]]
        return [self.load(n, loops) if u else None for n, u in enumerate(used, self.inputs_count)]

    def compute(self, loops: list[ir.Value], outputs: Sequence[ir.Value]) -> list[ir.Value]:
        """Copies the body here for these loop values and values of the outputs; returns what it yields."""
        arguments = list(self.body.arguments)
        known = dict(zip(arguments[self.inputs_count :], outputs, strict=True))
        for number, argument in enumerate(arguments[: self.inputs_count]):
            if list(argument.uses):
                known[argument] = self.load(number, loops)
        for view in self.body.operations:
            op = view.operation
            if op.name == "linalg.yield":
                return [known.get(v, v) for v in op.operands]
            if op.name == "linalg.index":
                known[op.results[0]] = loops[op.attributes["dim"].value]
                continue
            copy = op.clone().operation
            _rename(copy, known)
            known.update(zip(op.results, copy.results, strict=True))
        raise AssertionError("a linalg body ends in linalg.yield")

    def wave_combiner(self) -> ir.Operation | None:
        """Returns the op that reduces, when a wave can share the work of it."""
        reduced = [p for p, is_parallel in zip(self.places, self.parallel, strict=True) if not is_parallel]
        if len(reduced) != 1 or len(self.outputs) != 1:
            return None
        length = ir.MemRefType(reduced[0][0][0].type).shape[reduced[0][0][1]]
        last = self.terminator.operands[0].owner
        accumulator = list(self.body.arguments)[-1]
        if (
            isinstance(last, ir.Block)
            or last.name not in COMBINERS
            or list(last.operands).count(accumulator) != 1
        ):
            return None
        short = length != ir.ShapedType.get_dynamic_size() and length < WAVE_FORM_FROM
        shuffles = str(accumulator.type) in SHUFFLED_TYPES and len(list(accumulator.uses)) == 1
        return None if short or not shuffles else last.operation


def _rename(root: ir.Operation, known: dict[ir.Value, ir.Value]) -> None:
    """Replaces the operands of an op and of everything nested in it."""
    for op in [root, *nested(root)]:
        for i, value in enumerate(op.operands):
            if value in known:
                op.operands[i] = known[value]


def _build_generic(op: ir.Operation, names: dict[str, int]) -> None:
    generic = _Generic(op)
    combiner = generic.wave_combiner()
    steps = [v.operation.name for v in generic.body.operations][:-1]
    kind = "_".join(s.rpartition(".")[2] for s in steps[-3:]) or "fill"
    with ir.InsertionPoint(op), op.location:
        generic.check_sizes()
        count = _product(generic.sizes(parallel=True))
        if combiner is None:
            _launch(op, kind, names, count, BLOCK, lambda b, t: _thread_form(generic, b, t))
        else:
            form = lambda b, t: _wave_form(generic, combiner, b, t)  # noqa: E731
            _launch(op, f"wave_{kind}", names, count, BLOCK // WAVE, form)


def _thread_form(generic: _Generic, block: ir.Value, thread: ir.Value) -> None:
    """One thread computes one element of the outputs; reduced loops run inside it, sums in registers."""

    def element(at: list[ir.Value]) -> None:
        def loop(sizes: list[ir.Value], reduced: list[ir.Value], values: list[ir.Value]) -> list[ir.Value]:
            if not sizes:
                return generic.compute(generic.coordinates(at, reduced), values)
            inner = scf.ForOp(_index(0), sizes[0], _index(1), values)
            with ir.InsertionPoint(inner.body):
                scf.yield_(loop(sizes[1:], [*reduced, inner.induction_variable], list(inner.inner_iter_args)))
            return list(inner.results)

        reduced_sizes = generic.sizes(parallel=False)
        first = generic.coordinates(at, [_index(0)] * len(reduced_sizes))  # outputs do not depend on them
        generic.store(loop(reduced_sizes, [], generic.initial(first)), first)

    _for_each(block, thread, generic.sizes(parallel=True), element)


def _wave_form(generic: _Generic, combiner: ir.Operation, block: ir.Value, thread: ir.Value) -> None:
    """One wave computes one element: lanes stride over the reduced axis, then a butterfly combines them."""
    sizes, (length,) = generic.sizes(parallel=True), generic.sizes(parallel=False)
    lane = arith.remsi(thread, _index(WAVE))
    flat = arith.addi(arith.muli(block, _index(BLOCK // WAVE)), arith.divsi(thread, _index(WAVE)))
    inside = _less(flat, _product(sizes))
    at = _split(flat, sizes)
    output = generic.outputs[0]
    kind = ir.MemRefType(output.type).element_type
    identity = COMBINERS[combiner.name]
    neutral = arith.constant(kind, identity if isinstance(kind, ir.F32Type) else int(identity))

    def combine(a: ir.Value, b: ir.Value) -> ir.Value:
        copy = combiner.clone().operation
        copy.operands[0], copy.operands[1] = a, b
        return copy.results[0]

    loop = scf.ForOp(lane, arith.select(inside, length, _index(0)), _index(WAVE), [neutral])
    with ir.InsertionPoint(loop.body):
        scf.yield_(generic.compute(generic.coordinates(at, [loop.induction_variable]), loop.inner_iter_args))
    total = loop.results[0]
    i32 = ir.IntegerType.get_signless(32)
    xor = ir.Attribute.parse("#gpu<shuffle_mode xor>")
    distance = WAVE // 2
    while distance:
        shuffle = gpu.ShuffleOp(total, arith.constant(i32, distance), arith.constant(i32, WAVE), xor)
        total = combine(total, shuffle.results[0])
        distance //= 2
    writes = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.eq, lane, _index(0)))
    only = scf.IfOp(writes)
    with ir.InsertionPoint(only.then_block):
        first = generic.coordinates(at, [_index(0)])
        generic.store([combine(generic.load(generic.inputs_count, first), total)], first)
        scf.yield_([])
