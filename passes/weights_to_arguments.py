"""weights-to-arguments: stored weights become the last arguments of the functions that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import parameters, torch_ir
from spikingbrain.passes.base import PassContext

MARK = "spikingbrain.weight_arguments"


@dataclass(frozen=True)
class WeightsToArguments:
    """Gives a function marked ``spikingbrain.weight_arguments`` its weights as arguments instead of ``parameter`` ops.

    The caller then holds the weights, so that functions of equal layers are one. In and out: our dialect on builtin
    tensors. Which weight stands for which argument, in order, is noted in the context.
    """

    name: ClassVar[str] = "weights-to-arguments"

    def run(self, module: ir.Module, context: PassContext) -> None:
        for op in module.body.operations:
            function = op.operation
            if function.name == "func.func" and MARK in function.attributes:
                del function.attributes[MARK]
                name = function.attributes["sym_name"].value
                context.weight_arguments[name] = _lift(function)


def _lift(function: ir.Operation) -> list[parameters.StoredTensor]:
    block = function.regions[0].blocks[0]
    lifted: dict[str, tuple[parameters.StoredTensor, ir.Value]] = {}
    for op in torch_ir.operations_in(function, "spikingbrain.parameter"):
        stored = parameters.stored(op)
        if stored.key not in lifted:
            lifted[stored.key] = stored, block.add_argument(op.results[0].type, op.location)
        op.results[0].replace_all_uses_with(lifted[stored.key][1])
        op.erase()
    old = ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value)
    types = [a.type for a in block.arguments]
    function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(types, list(old.results)))
    return [stored for stored, _ in lifted.values()]
