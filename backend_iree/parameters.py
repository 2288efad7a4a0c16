"""Stored weights as IREE globals: one per tensor of the artifact, shared by all entry points."""

from __future__ import annotations

from torch_mlir import ir

from spikingbrain.backend_iree import SCOPE
from spikingbrain.passes import parameters, torch_ir


def emit_globals(module: ir.Module) -> None:
    """Replaces every ``spikingbrain.parameter`` by a load of a named external global.

    The globals are immutable and external, so that the runtime maps them and never copies.
    """
    symbols: dict[str, str] = {}
    for op in torch_ir.operations(module, "spikingbrain.parameter"):
        stored = parameters.stored(op)
        type_ = op.results[0].type
        with op.location:
            symbol = symbols.get(stored.key)
            if symbol is None:
                symbol = symbols[stored.key] = f"weight_{len(symbols)}"
                with ir.InsertionPoint.at_block_begin(module.body):
                    ir.Operation.create(
                        "util.global",
                        attributes={
                            "sym_name": ir.StringAttr.get(symbol),
                            "sym_visibility": ir.StringAttr.get("private"),
                            "type": ir.TypeAttr.get(type_),
                            "initial_value": ir.Attribute.parse(
                                f'#stream.parameter.named<"{SCOPE}"::"{stored.key}"> : {type_}'
                            ),
                        },
                    )
            with ir.InsertionPoint(op):
                load = ir.Operation.create(
                    "util.global.load",
                    [type_],
                    attributes={"global": ir.FlatSymbolRefAttr.get(symbol)},
                )
        op.results[0].replace_all_uses_with(load.result)
        op.erase()


def protect_arguments(module: ir.Module) -> None:
    """Keeps the caller's buffers intact, except those of donated arguments.

    IREE writes into an argument's storage when its last use is an update, and does not count its being returned as a use. A
    late use makes it copy instead; it is given to each argument that is not donated (function attribute
    ``spikingbrain.donated``), and to those that are returned as they came in.
    """
    for op in module.body.operations:
        function = op.operation
        if function.name != "func.func" or not function.regions[0].blocks:
            continue
        if "spikingbrain.donated" not in function.attributes:
            continue  # a kernel or a helper, not an entry point
        donated = {a.value for a in function.attributes["spikingbrain.donated"]}
        block = function.regions[0].blocks[0]
        terminator = block.operations[len(block.operations) - 1]
        returned = [_viewed(value) for value in terminator.operands]
        kept = [
            a
            for i, a in enumerate(block.arguments)
            if isinstance(a.type, ir.RankedTensorType) and (i not in donated or a in returned)
        ]
        with ir.InsertionPoint(terminator), function.location:
            for argument in kept:
                ir.Operation.create("util.optimization_barrier", [argument.type], [argument])
        del function.attributes["spikingbrain.donated"]


_VIEWS = ("tensor.expand_shape", "tensor.collapse_shape", "tensor.cast", "tensor.extract_slice")


def _viewed(value: ir.Value) -> ir.Value:
    """Returns the value whose memory ``value`` shows."""
    while not isinstance(value.owner, ir.Block) and value.owner.operation.name in _VIEWS:
        value = value.owner.operation.operands[0]
    return value
