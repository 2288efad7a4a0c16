"""From tensors to buffers: upstream's one-shot bufferization decides where results live."""

from __future__ import annotations

from collections.abc import Mapping

from torch_mlir import ir

from spikingbrain.backend_maca.lower import constants
from spikingbrain.backend_maca.lower.launches import LAUNCH, open_launches
from spikingbrain.backend_maca.lower.mlir import functions, nested, parse, run_passes, source_of
from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes import dialect, parameters

BUFFERIZE = (
    "one-shot-bufferize{bufferize-function-boundaries function-boundary-type-conversion=identity-layout-map}",
    "func.func(linalg-generalize-named-ops)",  # padding becomes linalg.map only now
    "canonicalize",
    "cse",
)


def bufferize(text: str) -> str:
    """Puts tensors into buffers; weights and constant tensors become trailing arguments of the entries.

    An argument attribute says what it holds: ``spikingbrain.weight`` (the key) or ``spikingbrain.constant``
    (the elements). Of the arguments, only those are written that the function's attribute ``spikingbrain.donated`` lists, the
    state: it is updated in place.
    """
    with dialect.load() as context:
        module, resources = parse(text, context), constants.blobs(text)
        for op in [op for function in functions(module) for op in nested(function)]:
            if op.name.startswith("spikingbrain") and op.name not in ("spikingbrain.parameter", LAUNCH):
                raise UnsupportedOp(
                    f"'{op.name}' has no kernel for MetaX GPUs",
                    where=source_of(op.location),
                    hint="lower it to linalg before this backend",
                )
            if op.name.startswith("tm_tensor.") and not _in_body(op):
                raise UnsupportedOp(
                    f"'{op.name}' has no kernel for MetaX GPUs",
                    where=source_of(op.location),
                    why="of this dialect, sorts, running sums and scatters have kernels here",
                )
        for function in functions(module):
            _take_arguments(function, resources)
            _copy_reshaped_slices(function)
            _own_memory(function)
        run_passes(module, ("func.func(linalg-generalize-named-ops)",))
        # only now: a pattern rewriter would fold what this writes before bufferization has seen it
        open_launches(module)
        run_passes(module, BUFFERIZE)
        return str(module.operation.get_asm(enable_debug_info=True))


def _in_body(op: ir.Operation) -> bool:
    """Returns whether an op belongs to what a linalg op computes for one element."""
    parent = op.parent
    while parent is not None and not parent.operation.name.startswith("linalg."):
        parent = parent.operation.parent
    return parent is not None


def _take_arguments(function: ir.Operation, resources: Mapping[str, str]) -> None:
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
            key, kind = str(op), "spikingbrain.constant"
            found = constants.dense(op.attributes["value"], resources)
            if found is None:
                raise UnsupportedOp(
                    f"a constant of type {op.results[0].type} cannot be stored",
                    where=source_of(op.location),
                    why="its elements cannot be read here",
                    hint="make it a parameter or buffer of the model",
                )
            note = found
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
    donated = {a.value for a in function.attributes.get("spikingbrain.donated", ())}
    *_, end = entry.operations
    returned = [_viewed(value) for value in end.operation.operands]
    merged = []
    for number, (argument, a) in enumerate(zip(entry.arguments, attributes, strict=True)):
        writable = number in donated and argument not in returned  # what is returned as it came in stays so
        mine = {named.name: named.attr for named in a}
        mine["bufferization.writable"] = ir.BoolAttr.get(writable)
        if writable:
            mine["spikingbrain.state"] = ir.UnitAttr.get()
        merged.append(ir.DictAttr.get(mine))
    view.arg_attrs = merged


def _viewed(value: ir.Value) -> ir.Value:
    """Returns the tensor that reshapes and slices look at."""
    names = ("tensor.expand_shape", "tensor.collapse_shape", "tensor.cast", "tensor.extract_slice")
    while not isinstance(value.owner, ir.Block) and value.owner.operation.name in names:
        value = value.owner.operation.operands[0]
    return value


def _own_memory(function: ir.Operation) -> None:
    """Gives each linalg op that starts from an empty tensor one of its own: by lifetimes, the plan shares their memory."""
    for op in nested(function):
        uses = list(op.results[0].uses) if op.name == "tensor.empty" else []
        for use in uses[1:]:
            user = use.owner.operation
            if user.name.startswith("linalg."):
                with ir.InsertionPoint(op):
                    user.operands[use.operand_number] = op.clone().results[0]


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
