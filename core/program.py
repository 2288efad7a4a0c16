"""Compiled programs: entry points, their arguments, the state that lives across calls."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spikingbrain.artifact import Artifact, numpy_dtype
from spikingbrain.backend import Executable
from spikingbrain.errors import CallError
from spikingbrain.finite import WatchedLayer, require_finite
from spikingbrain.memory import check_state
from spikingbrain.state import State

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor argument or result; a size is a number or the name of a dynamic dimension."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    shares_state: bool = False  # its memory may be the state's, which the next call overwrites

    @functools.cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        return numpy_dtype(self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class EntrySpec:
    """An entry point: its arguments and results without the state, and the ranges of its dynamic dimensions."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    uses_state: bool
    watched: tuple[WatchedLayer, ...] = ()  # whose inputs' states follow the results

    @staticmethod
    def from_manifest(name: str, entry: Mapping[str, Any]) -> EntrySpec:
        def specs(key: str) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(t["name"], tuple(t["shape"]), t["dtype"], t.get("shares_state", False))
                for t in entry[key]
            )

        ranges = {d: (low, high) for d, (low, high) in entry["ranges"].items()}
        watched = tuple(WatchedLayer(**layer) for layer in entry.get("watched", ()))
        return EntrySpec(name, specs("inputs"), specs("outputs"), ranges, entry["uses_state"], watched)


class Program:
    """A loaded artifact. Entry points are attributes: ``program.prefill(tokens, state=state)``."""

    def __init__(
        self,
        manifest: Mapping[str, Any],
        executable: Executable,
        artifact: Artifact | None = None,
        check_memory: bool = False,
    ):
        self.manifest, self._check_memory = manifest, check_memory
        self.executable, self.artifact = executable, artifact
        self.entries = {name: EntrySpec.from_manifest(name, e) for name, e in manifest["entries"].items()}
        self._state_layout = manifest.get("state", [])
        self._state_blocks = artifact.state_blocks() if artifact else {}
        self._points = {n: EntryPoint(s, executable, self._state_layout) for n, s in self.entries.items()}
        for name, point in self._points.items():
            if not hasattr(self, name):  # one called like a method is reached by call()
                setattr(self, name, point)

    def new_state(self, batch: int | None = None) -> State:
        """Returns a fresh state. ``batch`` is needed when the artifact leaves the batch dynamic.

        Raises OutOfMemory where a large one needs clearly more memory than is available.
        """
        if not self._state_layout:
            raise CallError("this program has no state", hint="call its entry points without one")
        if self._check_memory:
            check_state(self._state_layout, batch or 1)
        return State(self.executable, self._state_layout, batch, self._state_blocks)

    def call(self, entry: str, *arguments: Any, state: State | None = None) -> list[Array]:
        """Runs an entry point and returns its results as host arrays; ``state`` is updated.

        Arguments are numpy arrays or anything that speaks DLPack, and must have the declared types and shapes.
        """
        point = self._points.get(entry)
        if point is None:
            raise CallError(f"no entry point {entry!r}", hint=f"one of {', '.join(self.entries)}")
        return point.run(arguments, state)

    def generate(self, prompt: str, max_tokens: int = 128, **options: Any) -> Iterator[str]:
        """Yields the continuation of ``prompt`` piece by piece; options are those of ``generate.generate``."""
        from spikingbrain.generate import generate

        return generate(self, prompt, max_tokens, **options)

    def generate_batch(self, prompts: Sequence[str], max_tokens: int = 128, **options: Any) -> list[str]:
        """Returns the continuation of each prompt; options are those of ``generate.generate_batch``."""
        from spikingbrain.generate import generate_batch

        return generate_batch(self, prompts, max_tokens, **options)

    def __getattr__(self, name: str) -> EntryPoint:
        known = ", ".join(self.__dict__.get("entries", ()))
        raise AttributeError(f"the program has no entry point {name!r}; it has {known}", name=name, obj=self)


class EntryPoint:
    """One entry point of a loaded program; call it with its arguments and, where it uses one, ``state=``.

    It keeps what each call needs at hand: a call of a small program is dominated by what happens here.
    """

    def __init__(self, spec: EntrySpec, executable: Executable, state_layout: list[Any]):
        self.spec, self._executable, self._state_layout = spec, executable, state_layout
        self._expected = [(t.numpy_dtype, t.shape) for t in spec.inputs]
        self._results = [t.numpy_dtype for t in spec.outputs]
        self._copied = [i for i, t in enumerate(spec.outputs) if t.shares_state]

    def __call__(self, *arguments: Any, state: State | None = None) -> Any:
        """Returns the result, or the list of results where there are several."""
        results = self.run(arguments, state)
        return results[0] if len(results) == 1 else results

    def run(self, arguments: Sequence[Any], state: State | None) -> list[Array]:
        spec, executable = self.spec, self._executable
        if spec.uses_state != (state is not None):
            what = "needs a state" if spec.uses_state else "takes no state"
            raise CallError(f"entry point {spec.name!r} {what}", hint="program.new_state() makes one")
        if state is not None and not isinstance(state, State):
            raise CallError(
                f"entry point {spec.name!r} got a {type(state).__name__} as its state",
                hint="program.new_state() makes one; its restore() takes arrays",
            )
        if state is not None and not state.fits(executable, self._state_layout):
            raise CallError(
                f"entry point {spec.name!r} got a state of another program",
                hint="program.new_state() makes one",
            )
        arrays = list(map(_as_array, arguments))
        if [(a.dtype, a.shape) for a in arrays] != self._expected:
            _check(spec, arrays, state)
        to_device, to_host = executable.to_device, executable.to_host
        buffers = list(map(to_device, arrays))
        if state is None:
            results = executable.call(spec.name, buffers)
        else:
            held = state.take()
            try:
                results = executable.call(spec.name, [*buffers, *held])
            except BaseException:
                state.lose()
                raise
            count = len(spec.outputs) + len(spec.watched)
            state.give(results[count:])
            results = results[:count]
        arrays = list(map(to_host, results))
        if spec.watched:
            count = len(spec.outputs)
            require_finite(spec.watched, arrays[count:])
            arrays = arrays[:count]
        for i, dtype in enumerate(self._results):
            if arrays[i].dtype != dtype:  # compiled code knows no uint8, some machines no bfloat16
                arrays[i] = arrays[i].view(dtype)
        for i in self._copied:
            arrays[i] = arrays[i].copy()
        return arrays


def _as_array(argument: Any) -> Array:
    if isinstance(argument, np.ndarray):
        return argument
    try:
        if not hasattr(argument, "__dlpack__"):
            return np.asarray(argument)
        if getattr(argument, "requires_grad", False):
            argument = argument.detach()
        if str(argument.dtype) == "torch.bfloat16":  # numpy's DLPack does not know it: pass the bits
            bits: Array = argument.view(sys.modules["torch"].int16).numpy()
            return bits.view(numpy_dtype("bfloat16"))
        return np.from_dlpack(argument)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:  # on another device, sparse, ragged
        raise CallError(
            f"a {type(argument).__name__} cannot be given to a program",
            why=str(error),
            hint="a dense array in the CPU's memory, such as tensor.to_dense().cpu()",
        ) from error


def _check(spec: EntrySpec, arrays: Sequence[Array], state: State | None) -> None:
    if len(arrays) != len(spec.inputs):
        raise CallError(
            f"{spec.name} takes {len(spec.inputs)} arguments, got {len(arrays)}",
            hint="; ".join(map(str, spec.inputs)),
        )
    sizes: dict[str, int] = dict(state.sizes) if state else {}
    for expected, array in zip(spec.inputs, arrays, strict=True):
        if array.dtype != expected.numpy_dtype:
            raise CallError(f"{spec.name}: {expected.name} is {array.dtype}, expected {expected}")
        if array.shape == expected.shape:
            continue
        if array.ndim != len(expected.shape):
            raise CallError(f"{spec.name}: {expected.name} has shape {array.shape}, expected {expected}")
        for axis, (size, wanted) in enumerate(zip(array.shape, expected.shape, strict=True)):
            if isinstance(wanted, str):
                low, high = spec.ranges.get(wanted, (0, None))
                if size < low or (high is not None and size > high):
                    raise CallError(
                        f"{spec.name}: {expected.name} has {wanted} = {size}",
                        why=f"it was compiled for {low} to {'any' if high is None else high}",
                    )
                wanted = sizes.setdefault(wanted, size)
            if size != wanted:
                raise CallError(
                    f"{spec.name}: {expected.name} has size {size} along axis {axis}, expected {wanted}",
                    where=str(expected),
                )
