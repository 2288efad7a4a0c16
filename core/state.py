"""State that lives across calls: the torch-free twin of a model's state dataclass.

Its tensors stay in device buffers that calls update in place. A state can be reset, forked, saved and loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain.artifact import numpy_dtype
from spikingbrain.errors import CallError
from spikingbrain.files import write_atomically

Array = np.ndarray[Any, Any]


class State:
    """The state of one conversation (or a batch of them).

    Attributes:
        sizes: values of the dynamic dimensions of the state, e.g. ``{"B": 2}``.
    """

    def __init__(
        self,
        executable: Any,
        layout: Sequence[Mapping[str, Any]],
        batch: int | None = None,
        blocks: Mapping[str, Array] | None = None,
    ):
        self._executable, self._layout, self._blocks = executable, layout, blocks or {}
        names = {d for field in layout for d in field["shape"] if isinstance(d, str)}
        if len(names) > 1:
            raise CallError(f"the state has several dynamic dimensions: {', '.join(sorted(names))}")
        if names and batch is None:
            raise CallError("the batch size of the state is dynamic", hint="program.new_state(batch=1)")
        if batch is not None and (batch < 1 or (batch > 1 and not names)):
            why = "a state holds one conversation or more" if batch < 1 else "it was fixed when compiled"
            raise CallError(f"a state of batch size {batch}", why=why, hint="program.new_state()")
        self.sizes: dict[str, int] = {name: int(batch or 0) for name in names}
        self._lock, self._busy = threading.Lock(), False
        self._buffers: list[Any] | None = [self._executable.to_device(self._initial(f)) for f in layout]

    def _initial(self, field: Mapping[str, Any]) -> Array:
        shape: list[int] = [self.sizes[d] if isinstance(d, str) else d for d in field["shape"]]
        value = np.full(shape, field["fill"], numpy_dtype(field["dtype"]))
        if "block" in field:
            block = self._blocks[field["name"]]
            sizes = zip(field["block"], block.shape, field["shape"], strict=True)
            # along a dynamic dimension the block holds for each entry
            value[tuple(slice(None) if isinstance(d, str) else slice(a, a + n) for a, n, d in sizes)] = block
        return value

    def take(self) -> list[Any]:
        """Hands the buffers to a call; until ``give`` or ``lose`` the state cannot be used elsewhere."""
        with self._lock:
            self._refuse_if_busy()
            if self._buffers is None:
                raise CallError(
                    "this state was lost when a call failed", hint="reset() it, or restore() a snapshot"
                )
            buffers, self._buffers, self._busy = self._buffers, None, True
        return buffers

    def give(self, buffers: list[Any]) -> None:
        """Takes the buffers back after a call."""
        with self._lock:
            self._buffers, self._busy = buffers, False

    def lose(self) -> None:
        """Notes that a call failed halfway: its buffers may hold anything."""
        with self._lock:
            self._busy = False

    def _refuse_if_busy(self) -> None:
        if self._busy:
            raise CallError(
                "this state is in use by another call", hint="fork() it for a second conversation"
            )

    def _replace(self, buffers: list[Any]) -> None:
        with self._lock:
            self._refuse_if_busy()
            self._buffers = buffers

    def reset(self) -> None:
        """Goes back to the state before the first token."""
        self._replace([self._executable.to_device(self._initial(f)) for f in self._layout])

    def field(self, name: str) -> Array:
        """Returns a copy of one tensor by its field path; raises KeyError for an unknown one."""
        if name not in self:
            raise KeyError(name)
        place = [f["name"] for f in self._layout].index(name)
        buffers = self.take()
        try:
            return np.array(self._executable.to_host(buffers[place]))
        finally:
            self.give(buffers)

    def __contains__(self, name: str) -> bool:
        return any(f["name"] == name for f in self._layout)

    def snapshot(self) -> dict[str, Array]:
        """Returns a copy of every tensor by its field path."""
        buffers = self.take()
        try:
            return {
                f["name"]: np.array(self._executable.to_host(b))
                for f, b in zip(self._layout, buffers, strict=True)
            }
        finally:
            self.give(buffers)

    def restore(self, snapshot: Mapping[str, Array]) -> None:
        """Takes over a snapshot of a state of the same layout; raises CallError if it does not fit."""
        buffers = []
        for field in self._layout:
            array = snapshot.get(field["name"])
            shape = tuple(self.sizes.get(d, d) if isinstance(d, str) else d for d in field["shape"])
            if array is None or array.shape != shape or array.dtype != numpy_dtype(field["dtype"]):
                got = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
                raise CallError(
                    f"the snapshot does not fit: {field['name']} is {got}, expected {field['dtype']}{list(shape)}"
                )
            buffers.append(self._executable.to_device(np.array(array)))
        self._replace(buffers)

    def fork(self) -> State:
        """Returns an independent copy."""
        copy = object.__new__(State)
        copy._executable, copy._layout, copy._blocks = self._executable, self._layout, self._blocks
        copy.sizes = dict(self.sizes)
        copy._lock, copy._busy, copy._buffers = threading.Lock(), False, None
        copy.restore(self.snapshot())
        return copy

    def save(self, path: str | Path) -> None:
        """Writes the state to a safetensors file (bfloat16 as its bits); raises CallError where it cannot be written."""
        from safetensors.numpy import save

        bits = {n: a.view(np.uint16) if a.dtype.name == "bfloat16" else a for n, a in self.snapshot().items()}
        data = save(bits)
        try:
            write_atomically(Path(path), data)
        except OSError as error:
            raise CallError(
                f"the state cannot be saved as {path}", why=error.strerror or str(error)
            ) from error

    def load(self, path: str | Path) -> None:
        """Reads what ``save`` wrote; raises CallError if it is not there, or belongs to another layout or batch size."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            bits = load(Path(path).read_bytes())
        except SafetensorError as error:
            raise CallError(f"{path} is not a saved state", why=str(error)) from error
        except OSError as error:
            raise CallError(
                f"there is no saved state to read at {path}", why=error.strerror or str(error)
            ) from error
        for field in self._layout:
            if field["dtype"] == "bfloat16" and (array := bits.get(field["name"])) is not None:
                bits[field["name"]] = array.view(numpy_dtype("bfloat16"))
        self.restore(bits)

    def fits(self, executable: Any, layout: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether a program with this layout can take the state."""
        mine, theirs = (getattr(e, "device", None) for e in (self._executable, executable))
        return type(executable) is type(self._executable) and mine == theirs and layout == self._layout
