"""thread-state: a kernel that reads a cache hands it on to the kernel that writes it, so that the write is in place."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir

from spikingbrain.passes import dialect, torch_ir
from spikingbrain.passes.base import PassContext

_LAUNCH = "spikingbrain_control.launch"


@dataclass(frozen=True)
class ThreadState:
    """Makes the value that an in-place launch updates have no other reader.

    In and out: kernel launches. Where the updated value has one other reader, a launch in front of it, the reader gets a result
    tied to that input, and the update takes this result. Without it IREE copies the whole cache in every call: it
    elides a copy before an update only where the update is the value's only use. All launches of a kernel are changed
    alike or not at all.
    """

    name: ClassVar[str] = "thread-state"

    def run(self, module: ir.Module, context: PassContext) -> None:
        launches = torch_ir.operations(module, _LAUNCH)
        order = {hash(op): i for i, op in enumerate(launches)}
        updates: dict[int, dict[int, ir.Operation]] = defaultdict(dict)  # reader -> {its input: the update}
        readers: dict[str, list[ir.Operation]] = defaultdict(list)
        for op in launches:
            readers[_callee(op)].append(op)
            for index in (a.value for a in op.attributes["tied"]):
                if index < 0:
                    continue
                value = dialect.launch_inputs(op)[index]
                users = [use.owner.operation for use in value.uses]
                others = [
                    user for user in users if user != op and user.name != "tensor.dim"
                ]  # reads no element
                if len(others) != 1 or order.get(hash(others[0]), len(order)) > order[hash(op)]:
                    continue
                (reader,) = others
                places = [i for i, v in enumerate(dialect.launch_inputs(reader)) if v == value]
                if reader.block == op.block and len(places) == 1:
                    updates[hash(reader)][places[0]] = op
        for calls in readers.values():
            wanted = sorted(updates[hash(calls[0])])
            if not wanted or any(sorted(updates[hash(op)]) != wanted for op in calls):
                continue
            for op in calls:
                _thread(op, wanted, updates[hash(op)])
                context.record(self, "threaded", op, f"{len(wanted)} caches")
                op.erase()


def _callee(op: ir.Operation) -> str:
    name: str = op.attributes["callee"].value
    return name


def _thread(op: ir.Operation, places: list[int], updates: dict[int, ir.Operation]) -> None:
    inputs = dialect.launch_inputs(op)
    tied = [*op.attributes["tied"], *(ir.IntegerAttr.get(ir.IntegerType.get_signless(64), i) for i in places)]
    with ir.InsertionPoint(op), op.location:
        launch = ir.Operation.create(
            _LAUNCH,
            [r.type for r in op.results] + [inputs[i].type for i in places],
            list(op.operands),
            {"callee": op.attributes["callee"], "tied": ir.ArrayAttr.get(tied)},
        )
    fresh = list(launch.results)
    for old, new in zip(op.results, fresh, strict=False):
        old.replace_all_uses_with(new)
    for place, threaded in zip(places, fresh[len(op.results) :], strict=True):
        update = updates[place]
        for i, operand in enumerate(update.operands):
            if operand == inputs[place]:
                update.operands[i] = threaded
