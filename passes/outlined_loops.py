"""Keeps the bodies of time loops where torch-mlir's pipelines lower them: in functions.

The pipelines crash on torch ops inside an op that they do not know. While they run, a loop has no region, only the name of a
function that holds its body over builtin tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch_mlir import ir
from torch_mlir.dialects import func

from spikingbrain.errors import UnsupportedOp
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import source_line
from spikingbrain.passes.casts import from_builtin, to_builtin

_LOOP, _OUTLINED, _YIELD = (
    f"spikingbrain_control.{name}" for name in ("time_loop", "outlined_time_loop", "yield")
)
_MADE_ANEW = ("torch.prim.ListConstruct", "arith.constant")
# Numbers of torch that a body may close over, and the builtin type each is handed in as.
_NUMBERS = {"!torch.int": "i64", "!torch.float": "f64", "!torch.bool": "i1"}


@contextlib.contextmanager
def outlined_loops(module: ir.Module) -> Iterator[None]:
    """Moves the body of every time loop to a function for as long as the context lasts."""
    for number, op in enumerate(reversed(torch_ir.operations(module, _LOOP))):  # inner loops first
        _outline(module, op, f"spikingbrain_loop_body_{number}")
    yield
    while outlined := torch_ir.operations(module, _OUTLINED):
        for op in outlined:
            _restore(module, op)


def _outline(module: ir.Module, op: ir.Operation, name: str) -> None:
    block = op.regions[0].blocks[0]
    _recreate(op)
    captured = _captured(op)
    count = len(block.arguments)
    with ir.InsertionPoint(op), op.location:
        handed = [_handed_in(v) for v in captured]
        terminator = block.operations[len(block.operations) - 1].operation
        types = [a.type for a in block.arguments] + [v.type for v in handed]
        results = [v.type for v in terminator.operands]
        with ir.InsertionPoint(module.body):
            function = func.FuncOp(name, (types, results), visibility="private")
        entry = function.add_entry_block()
        with ir.InsertionPoint(entry):
            for value, argument in zip(captured, list(entry.arguments)[count:], strict=True):
                _replace_inside(op, value, _taken_out(argument, value.type))
            end = func.ReturnOp([]).operation
        for old, new in zip(block.arguments, entry.arguments, strict=False):
            old.replace_all_uses_with(new)
        for inner in [o.operation for o in block.operations][:-1]:
            inner.move_before(end)
        with ir.InsertionPoint(end):
            func.ReturnOp(list(terminator.operands))
        end.erase()
        attributes = {n: op.attributes[n] for n in op.attributes}
        attributes["body"] = ir.FlatSymbolRefAttr.get(name)
        attributes["captured"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), len(handed))
        made = ir.Operation.create(
            _OUTLINED, [r.type for r in op.results], [*op.operands, *handed], attributes
        )
    for old_result, new_result in zip(op.results, made.results, strict=True):
        old_result.replace_all_uses_with(new_result)
    op.erase()


def _restore(module: ir.Module, op: ir.Operation) -> None:
    name = ir.FlatSymbolRefAttr(op.attributes["body"]).value
    function = ir.SymbolTable(module.operation)[name].operation
    entry = function.regions[0].blocks[0]
    *inner, terminator = [o.operation for o in entry.operations]
    own = len(op.operands) - op.attributes["captured"].value
    attributes = {n: op.attributes[n] for n in op.attributes if n not in ("body", "captured")}
    with ir.InsertionPoint(op), op.location:
        made = ir.Operation.create(
            _LOOP, [r.type for r in op.results], list(op.operands)[:own], attributes, regions=1
        )
        types = [a.type for a in list(entry.arguments)[:own]]
        block = made.regions[0].blocks.append(*types, arg_locs=[op.location] * own)
        for old, new in zip(entry.arguments, [*block.arguments, *list(op.operands)[own:]], strict=True):
            old.replace_all_uses_with(new)
        with ir.InsertionPoint(block):
            end = ir.Operation.create(_YIELD, operands=list(terminator.operands))
        for moved in inner:
            moved.move_before(end)
    for old_result, new_result in zip(op.results, made.results, strict=True):
        old_result.replace_all_uses_with(new_result)
    op.erase()
    function.erase()


def _captured(op: ir.Operation) -> list[ir.Value]:
    """Returns the values from outside that the body of ``op`` uses, each once."""
    inside: set[ir.Value] = set()
    used: dict[ir.Value, None] = {}

    def visit(inner: ir.Operation) -> ir.WalkResult:
        inner = inner.operation
        if inner != op:
            used.update(dict.fromkeys(inner.operands))
            inside.update(inner.results)
        for region in inner.regions:
            for block in region.blocks:
                inside.update(block.arguments)
        return ir.WalkResult.ADVANCE

    op.walk(visit, ir.WalkOrder.PRE_ORDER)
    return [v for v in used if v not in inside]


def _replace_inside(op: ir.Operation, old: ir.Value, new: ir.Value) -> None:
    """Replaces the uses of ``old`` in the body of ``op``."""
    for use in list(old.uses):
        owner = parent = use.owner
        while parent is not None and parent != op:
            parent = parent.parent
        if parent is not None and owner != op:
            owner.operands[use.operand_number] = new


def _recreate(op: ir.Operation) -> None:
    """Makes constants and lists that the body of ``op`` closes over anew inside it."""
    block = op.regions[0].blocks[0]
    while found := [v for v in _captured(op) if _is_recreated(v)]:
        for value in found:
            definition = torch_ir.defining(value)
            assert definition is not None
            with ir.InsertionPoint.at_block_begin(block):
                _replace_inside(op, value, definition.clone().results[0])


def _is_recreated(value: ir.Value) -> bool:
    """Returns whether a value is a constant, or a list: what is made anew in the body."""
    op = torch_ir.defining(value)
    return op is not None and (op.name.startswith("torch.constant.") or op.name in _MADE_ANEW)


def _handed_in(value: ir.Value) -> ir.Value:
    """Returns a value as one of a builtin type."""
    text = str(value.type)
    if text.startswith("!torch.vtensor"):
        return to_builtin(value)
    if text in _NUMBERS:
        name = _NUMBERS[text]
        return ir.Operation.create(f"torch_c.to_{name}", [ir.Type.parse(name)], [value]).result
    if text.startswith("!torch"):
        raise UnsupportedOp(f"a loop over time closes over a {text}", where=source_line(value.location))
    return value


def _taken_out(argument: ir.Value, type_: ir.Type) -> ir.Value:
    """Undoes ``_handed_in``."""
    text = str(type_)
    if text.startswith("!torch.vtensor"):
        return from_builtin(argument, type_)
    if text in _NUMBERS:
        return ir.Operation.create(f"torch_c.from_{_NUMBERS[text]}", [type_], [argument]).result
    return argument
