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

    @staticmethod
    def from_manifest(name: str, entry: Mapping[str, Any]) -> EntrySpec:
        def specs(key: str) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(t["name"], tuple(t["shape"]), t["dtype"], t.get("shares_state", False))
                for t in entry[key]
            )

        ranges = {d: (low, high) for d, (low, high) in entry["ranges"].items()}
        return EntrySpec(name, specs("inputs"), specs("outputs"), ranges, entry["uses_state"])


class Program:
    """A loaded artifact. Entry points are attributes: ``program.prefill(tokens, state=state)``."""

    def __init__(self, manifest: Mapping[str, Any], executable: Executable, artifact: Artifact | None = None):
        self.manifest = manifest
        self.executable, self.artifact = executable, artifact
        self.entries = {name: EntrySpec.from_manifest(name, e) for name, e in manifest["entries"].items()}
        self._state_layout = manifest.get("state", [])

    def new_state(self, batch: int | None = None) -> State:
        """Returns a fresh state. ``batch`` is needed when the artifact leaves the batch dynamic."""
        if not self._state_layout:
            raise CallError("this program has no state", hint="call its entry points without one")
        return State(self.executable, self._state_layout, batch)

    def call(self, entry: str, *arguments: Any, state: State | None = None) -> list[Array]:
        """Runs an entry point and returns its results as host arrays; ``state`` is updated.

        Arguments are numpy arrays or anything that speaks DLPack, and must have the declared types and shapes.
        """
        spec = self.entries.get(entry)
        if spec is None:
            raise CallError(f"no entry point {entry!r}", hint=f"one of {', '.join(self.entries)}")
        if spec.uses_state != (state is not None):
            what = "needs a state" if spec.uses_state else "takes no state"
            raise CallError(f"entry point {entry!r} {what}", hint="program.new_state() makes one")
        if state is not None and not state.fits(self.executable, self._state_layout):
            raise CallError(
                f"entry point {entry!r} got a state of another program", hint="program.new_state() makes one"
            )
        arrays = [_as_array(a) for a in arguments]
        _check(spec, arrays, state)
        to_device = self.executable.to_device
        buffers = [to_device(a) for a in arrays]
        if state is None:
            results = self.executable.call(entry, buffers)
        else:
            held = state.take()
            try:
                results = self.executable.call(entry, [*buffers, *held])
            except BaseException:
                state.lose()
                raise
            count = len(spec.outputs)
            state.give(results[count:])
            results = results[:count]
        to_host = self.executable.to_host
        return [
            to_host(r).copy() if output.shares_state else to_host(r)
            for r, output in zip(results, spec.outputs, strict=True)
        ]

    def generate(self, prompt: str, max_tokens: int = 128, **options: Any) -> Iterator[str]:
        """Yields the continuation of ``prompt`` piece by piece; options are those of ``generate.generate``."""
        from spikingbrain.generate import generate

        return generate(self, prompt, max_tokens, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.__dict__.get("entries", {}):
            raise AttributeError(name)

        def run(*arguments: Any, state: State | None = None) -> Any:
            results = self.call(name, *arguments, state=state)
            return results[0] if len(results) == 1 else results

        return run


def _as_array(argument: Any) -> Array:
    if isinstance(argument, np.ndarray):
        return argument
    if hasattr(argument, "__dlpack__"):
        if getattr(argument, "requires_grad", False):
            argument = argument.detach()
        if str(argument.dtype) == "torch.bfloat16":  # numpy's DLPack does not know it: pass the bits
            bits: Array = argument.view(sys.modules["torch"].int16).numpy()
            return bits.view(numpy_dtype("bfloat16"))
        return np.from_dlpack(argument)
    return np.asarray(argument)


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
