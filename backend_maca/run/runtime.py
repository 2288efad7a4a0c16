"""Follows launch plans: checks arguments, computes sizes, gives buffers memory, and lets a machine run the steps."""

from __future__ import annotations

import base64
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spikingbrain.artifact import numpy_dtype
from spikingbrain.backend_maca.plan.intervals import Interval, intervals
from spikingbrain.backend_maca.plan.plan import FORMAT
from spikingbrain.backend_maca.plan.resolve import Read, Resolver, number, resolve, some_steps, storage
from spikingbrain.backend_maca.plan.steps import Launch, Product, Steps
from spikingbrain.backend_maca.run.machine import Buffer, Emulator, Machine
from spikingbrain.errors import CallError, CorruptArtifact, NewerFormat, TargetError

Array = np.ndarray[Any, Any]
KEPT_SHAPES = 64  # of each entry point: shapes of arguments whose steps are kept


def emulated(source: str, plan: Mapping[str, Any], weights: Mapping[str, Array], order: str = "") -> Program:
    """Returns a program on the emulator; ``SPIKINGBRAIN_EMULATOR_ORDER`` is the order of threads unless given."""
    check_format(plan)
    order = order or os.environ.get("SPIKINGBRAIN_EMULATOR_ORDER", "forward")
    return Program(plan, weights, Emulator(source, sorted(plan["kernels"]), order))


def check_format(plan: Mapping[str, Any]) -> None:
    """Raises NewerFormat for a plan of a later version, TargetError for one of an earlier version."""
    found = plan.get("format", FORMAT + 1)
    if found > FORMAT:
        raise NewerFormat("the launch plan is of a later format", why=f"this package reads up to {FORMAT}")
    if found < FORMAT:
        raise TargetError(
            "the launch plan is of an earlier format",
            why=f"it is {found}, this package reads {FORMAT}; plans for MetaX GPUs are not kept readable yet",
            hint="export the model again",
        )


class Program:
    """A plan with its weights on a machine: the ``Executable`` of this backend."""

    def __init__(self, plan: Mapping[str, Any], weights: Mapping[str, Array], machine: Machine):
        check_format(plan)
        self.plan, self.machine = plan, machine
        self.to_device = machine.to_device
        self.borrow, self.lend = machine.borrow, machine.lend
        self._kept: dict[str, Buffer] = {}
        self.fixed = {name: self._fixed(entry, weights) for name, entry in plan["entries"].items()}
        self._intervals = {name: intervals(entry) for name, entry in plan["entries"].items()}
        self._static = {name: entry["static"] for name, entry in plan["entries"].items()}
        self._written = {
            name: {i for i, buffer in enumerate(entry["buffers"]) if buffer.get("donated")}
            for name, entry in plan["entries"].items()
        }
        self._steps: dict[str, dict[Any, Steps]] = {name: {} for name in plan["entries"]}

    def to_host(self, buffer: Buffer) -> Array:
        """Copies a buffer to the host; bfloat16, whose bits machines keep, in numpy's type for it where there is one."""
        array = self.machine.to_host(buffer)
        return array.view(numpy_dtype("bfloat16")) if array.dtype == np.uint16 else array

    @property
    def kernels(self) -> Any:
        """Returns the emulator's kernels."""
        return self.machine.kernels  # type: ignore[attr-defined]

    @property
    def device(self) -> Any:
        """Returns what programs that may share buffers have in common."""
        return self.machine.device

    def function(self, entry: str) -> Callable[[Sequence[Buffer]], list[Buffer]]:
        """Returns an entry point as a function."""
        return functools.partial(self.call, entry)

    def call(self, entry: str, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Runs an entry point; the sizes of all arguments are checked first."""
        if entry not in self.plan["entries"]:
            raise CallError(f"no entry point '{entry}'", hint=f"one of {', '.join(self.plan['entries'])}")
        plan, machine = self.plan["entries"][entry], self.machine
        inputs = [i for i, b in enumerate(plan["buffers"]) if b["role"] == "input"]
        if len(arguments) != len(inputs):
            raise CallError(f"'{entry}' takes {len(inputs)} arguments, got {len(arguments)}")
        buffers = dict(self.fixed[entry])
        for position, (i, argument) in enumerate(zip(inputs, arguments, strict=True)):
            what = f"argument {position} of '{entry}'"
            if not isinstance(argument, machine.buffer_type):
                raise CallError(f"{what} is a {type(argument).__name__}", hint=machine.hint)
            _check(argument, plan["buffers"][i], what)
            argument = machine.argument(argument)
            if argument.dtype == np.uint8:  # code knows integers without a sign
                argument = machine.part(argument, 0, np.dtype(np.int8), argument.shape)
            buffers[i] = argument
        self._require_own_memory(entry, inputs, buffers)
        shapes = {i: tuple(buffers[i].shape) for i in inputs}
        if self._static[entry]:
            steps = self._resolved(entry, shapes)
            self._run(steps, plan, buffers)
            outputs = steps.outputs
        else:
            outputs = self._run_reading(entry, shapes, buffers)
        return [self._view(buffers[i], shape) for i, shape in outputs]

    def _require_own_memory(self, entry: str, inputs: Sequence[int], buffers: Mapping[int, Buffer]) -> None:
        """Raises CallError where what a call writes, the state, is also another argument."""
        written = self._written[entry]
        if not written:
            return
        spans = sorted((*self.machine.span(buffers[i]), i) for i in inputs)
        widest = (0, 0, -1)
        for span in spans:
            start, end, i = span
            if start < min(end, widest[1]) and (i in written or widest[2] in written):
                one, other = sorted((inputs.index(i), inputs.index(widest[2])))
                raise CallError(
                    f"arguments {one} and {other} of '{entry}' share memory",
                    why="a call updates its state in place",
                    hint="pass a copy of one of them; a state forks: state.fork()",
                )
            widest = max(widest, span, key=lambda s: s[1])

    def _run(
        self, steps: Steps, plan: Mapping[str, Any], buffers: dict[int, Buffer], memory: Buffer | None = None
    ) -> None:
        """Gives buffers that are new in some steps memory, those of a workspace in ``memory``, and runs the steps."""
        places, spread = steps.workspace.offsets if steps.workspace else {}, self.machine.spread
        if steps.workspace and memory is None:
            memory = self._memory(steps.workspace.size)
        for i, shape in steps.temporaries.items():
            dtype = storage(plan["buffers"][i]["dtype"])
            if i in places:
                buffers[i] = self.machine.part(memory, spread * places[i], dtype, shape)
            else:
                buffers[i] = self.machine.unwritten(dtype, shape)
        self.machine.run(steps, buffers)

    def _memory(self, size: int) -> Buffer:
        """Returns memory for a workspace."""
        return self.machine.unwritten(np.dtype(np.uint8), (self.machine.spread * size,))

    def _view(self, buffer: Buffer, shape: Sequence[int]) -> Buffer:
        """Returns the beginning of a buffer in another shape."""
        return self.machine.part(buffer, 0, buffer.dtype, shape)

    def _resolved(self, entry: str, shapes: Mapping[int, tuple[int, ...]]) -> Steps:
        """Returns what to do for arguments of these shapes; raises CallError if they do not fit together."""
        kept, key = self._steps[entry], tuple(shapes.values())
        steps = kept.get(key)
        if steps is None:
            steps = resolve(self.plan, entry, shapes)
            if len(kept) >= KEPT_SHAPES:
                kept.clear()  # another thread may look up its own at this moment
            kept[key] = steps
        return steps

    def _run_reading(
        self, entry: str, shapes: Mapping[int, tuple[int, ...]], buffers: dict[int, Buffer]
    ) -> Sequence[tuple[int, tuple[int, ...]]]:
        """Runs steps up to each element that the host reads, then goes on with it; returns the results' places.

        One workspace serves all intervals, as large as the largest one whose sizes do not depend on data; any other that
        needs more memory gets a larger one.
        """
        resolver, plan = Resolver(self.plan, entry, shapes), self.plan["entries"][entry]
        known = [i for i in self._intervals[entry] if i.is_known]
        walk, found = resolver.steps(self._intervals[entry]), None
        space, memory = None, None
        size = max((resolver.workspace(interval).size for interval in known), default=0)
        while True:
            steps: list[Launch | Product] = []
            try:
                step = walk.send(found)
                while not isinstance(step, Read | Interval):
                    if grown := resolver.note(step):
                        made = some_steps(resolver, steps, set(buffers), workspace=space)
                        self._run(made, plan, buffers, memory)
                        steps = []
                        for i in grown:
                            buffers.pop(i, None)
                    steps.append(step)
                    step = next(walk)
            except StopIteration:
                made = some_steps(resolver, steps, set(buffers), last=True, workspace=space)
                self._run(made, plan, buffers, memory)
                return made.outputs
            made = some_steps(resolver, steps, set(buffers), workspace=space)
            self._run(made, plan, buffers, memory)
            if isinstance(step, Interval):
                for i in space.offsets if space else ():
                    buffers.pop(i, None)
                space, found = resolver.workspace(step), None
                if memory is None or space.size > size:
                    memory, size = None, max(size, space.size)  # what there was is free
                    memory = self._memory(size)
                continue
            element = self.machine.to_host(self._view(buffers[step.buffer], step.shape))[step.at]
            found = number(element, plan["buffers"][step.buffer]["dtype"])

    def _fixed(self, entry: Mapping[str, Any], weights: Mapping[str, Array]) -> dict[int, Buffer]:
        """Returns the buffers that no call changes: weights and constants."""
        fixed: dict[int, Buffer] = {}
        for i, record in enumerate(entry["buffers"]):
            if record["role"] == "weight":
                key = record["key"]
                if key not in weights:
                    raise CorruptArtifact(f"the weight '{key}' is missing")
                _check(weights[key], record, f"weight '{key}'")
                if key not in self._kept:
                    self._kept[key] = self.machine.keep(weights[key])
                fixed[i] = self._kept[key]
            elif record["role"] == "constant":
                values = np.frombuffer(base64.b64decode(record["data"]), storage(record["dtype"]))
                shape = record["shape"]  # a single value stands for all
                fixed[i] = self.machine.keep(
                    np.full(shape, values[0]) if values.size == 1 else values.reshape(shape)
                )
        return fixed


def _check(buffer: Buffer, record: Mapping[str, Any], what: str) -> None:
    """Raises CallError unless a buffer has the declared type and shape."""
    wanted = [size if isinstance(size, int) else "?" for size in record["shape"]]
    shape = list(buffer.shape)
    if len(wanted) != len(shape) or any(w not in ("?", n) for w, n in zip(wanted, shape, strict=True)):
        raise CallError(f"{what} has shape {shape}, declared {wanted}")
    same = (record["dtype"], "uint8" if record["dtype"] == "int8" else "")
    if str(buffer.dtype) not in same and buffer.dtype != storage(record["dtype"]):
        raise CallError(f"{what} is {buffer.dtype}, declared {record['dtype']}")
