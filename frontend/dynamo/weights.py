"""Weights of frozen projections, packed once for all graphs that read them, and packed anew when they change."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spikingbrain.backend import Buffer, SharedMemory
from spikingbrain.errors import CallError
from spikingbrain.frontend.weights import as_numpy
from spikingbrain.passes import recipes

_epoch = [0]
_lock = threading.Lock()
_live: weakref.WeakSet[FrozenWeights] = weakref.WeakSet()
_packed: dict[Any, tuple[list[weakref.ref[torch.Tensor]], Any, Buffer]] = {}


def refresh() -> None:
    """Lets every compiled model read its weights anew at its next call.

    In-place ops, ``load_state_dict`` and new tensors are noticed without it. Writes through ``.data``, numpy or other
    memory sharing leave no trace that could be noticed: call this after them.
    """
    with _lock:
        _epoch[0] += 1
        _packed.clear()


def stamp(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns what changes when a tensor's memory is written by torch or replaced."""
    return (-1 if tensor.is_inference() else tensor._version, tensor.data_ptr())


class FrozenWeights:
    """The packed weights of one region, as buffers to append to its arguments."""

    def __init__(self, executable: SharedMemory, stored: Sequence[Mapping[str, Any]]):
        self._executable, self._stored = executable, stored
        self._held: tuple[torch.Tensor, ...] = ()
        self._stamps: list[tuple[int, int]] = []
        self._seen = -1
        self._buffers: list[Buffer] = []
        _live.add(self)

    def buffers(self, tensors: tuple[torch.Tensor, ...]) -> list[Buffer]:
        """Returns the packed buffers for the region's weight tensors, packing what is new or has changed."""
        if self._seen == _epoch[0] and len(tensors) == len(self._held):
            for tensor, held, old in zip(tensors, self._held, self._stamps):  # noqa: B905  (equal lengths; this is hot)
                if tensor is not held or old != stamp(tensor):
                    break
            else:
                return self._buffers
        epoch, stamps = _epoch[0], [stamp(t) for t in tensors]
        buffers = [self._pack(entry, tensors) for entry in self._stored]
        # another thread may look on: what it compares last is set last
        self._buffers, self._held, self._stamps = buffers, tensors, stamps
        self._seen = epoch
        return buffers

    def _pack(self, entry: Mapping[str, Any], tensors: tuple[torch.Tensor, ...]) -> Buffer:
        sources = [tensors[int(name[1:])] for name in entry["sources"]]
        key = (id(self._executable.device), tuple(map(id, sources)), tuple(entry["recipe"]))
        stamps = [stamp(t) for t in sources]
        with _lock:
            found = _packed.get(key)
            if found and found[1] == stamps and all(r() is t for r, t in zip(found[0], sources, strict=True)):
                return found[2]
            try:
                array = recipes.apply(entry["recipe"], [as_numpy(t) for t in sources])
            except ValueError as error:
                raise CallError(
                    "weights have changed so that the compiled code cannot hold them",
                    why=str(error),
                    hint="torch._dynamo.reset(), and call the compiled model again",
                ) from error
            buffer = self._executable.to_device(array)
            _packed[key] = (
                [weakref.ref(t, lambda _: _packed.pop(key, None)) for t in sources],
                stamps,
                buffer,
            )
            return buffer


@atexit.register
def _close() -> None:
    """Drops buffers before interpreter shutdown, where the runtime's binding would report them as leaked."""
    _packed.clear()
    for weights in list(_live):
        weights._buffers = []
