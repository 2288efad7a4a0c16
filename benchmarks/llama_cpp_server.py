"""Runs llama.cpp for a benchmark: one thread, told what to time by lines of JSON. `llama_cpp_peer.py` starts it.

    PYTHON llama_cpp_server.py '{"name": "model.gguf", ...}' CAPACITY [f16|f16-flash|q8_0-flash]

A line ``[name, "prefill", tokens]`` times those tokens from an empty cache; ``[name, "decode", depth, times]`` times single
tokens behind ``depth`` cached ones. A deep cache is not computed: it gets the rows of a short one again and again, in
llama.cpp's own format of saved states. The answer is seconds of this thread.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import thread_time
from typing import Any

import llama_cpp
import numpy as np

BATCH, SEED_CELLS = 512, 64
CACHES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
FLASH = {True: llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, False: llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}


class Model:
    def __init__(self, file: str, capacity: int, cache: str):
        self.model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = capacity, BATCH, BATCH
        params.n_threads = params.n_threads_batch = 1
        kind, _, flash = cache.partition("-")
        params.type_k = params.type_v = CACHES[kind]
        params.flash_attn_type = FLASH[bool(flash)]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.depth = 0

    def eval(self, tokens: list[int]) -> float:
        start = thread_time()
        for i in range(0, len(tokens), BATCH):
            piece = tokens[i : i + BATCH]
            held = (llama_cpp.llama_token * len(piece))(*piece)  # the batch only points to it
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(held, len(piece))):
                raise SystemExit("llama.cpp failed to decode")
        llama_cpp.llama_get_logits(self.context)  # waits until they are there
        self.depth += len(tokens)
        return thread_time() - start

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        self.depth = 0

    def go_to(self, depth: int) -> None:
        """Makes the cache hold ``depth`` tokens."""
        self.clear()
        if depth <= SEED_CELLS:
            if depth:
                self.eval([17] * depth)
            return
        self.eval(list(range(1, SEED_CELLS + 1)))
        with tempfile.TemporaryDirectory() as folder:
            seed, deep = Path(folder) / "seed", Path(folder) / "deep"
            llama_cpp.llama_state_seq_save_file(self.context, str(seed).encode(), 0, None, 0)
            with deep.open("wb") as file:
                for piece in _repeat(seed.read_bytes(), depth):
                    file.write(piece)
            self.clear()
            tokens, count = (llama_cpp.llama_token * 1)(), ctypes.c_size_t()
            if not llama_cpp.llama_state_seq_load_file(
                self.context, str(deep).encode(), 0, tokens, 1, ctypes.byref(count)
            ):
                raise SystemExit("llama.cpp does not take the cache")
        self.depth = depth


def _repeat(state: bytes, depth: int) -> Iterator[bytes]:
    """Yields a saved state of SEED_CELLS tokens with its rows repeated to ``depth`` tokens."""
    place = 0

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal place
        values = struct.unpack_from(layout, state, place)
        place += struct.calcsize(layout)
        return values

    def repeated(cell: int) -> Iterator[bytes]:
        """Takes the cells of one row, ``cell`` bytes each."""
        nonlocal place
        cells = state[place : place + cell * SEED_CELLS]
        place += len(cells)
        for at in range(0, depth, SEED_CELLS):
            yield cells[: cell * (depth - at)]

    *head, streams, cells = take("<5I")  # three words of a file without tokens
    if (streams, cells) != (1, SEED_CELLS):
        raise SystemExit(f"a saved state of another format: {streams} streams, {cells} cells")
    place += cells * 12
    yield struct.pack("<5I", *head, 1, depth)
    cell = [np.arange(depth), np.ones(depth), np.zeros(depth)]  # position, number of sequences, the sequence
    yield np.stack(cell, 1).astype("<i4").tobytes()
    transposed, layers = take("<II")
    yield struct.pack("<II", transposed, layers)
    for number in range(2 * layers):  # keys of all layers, then values
        if number >= layers and transposed:
            kind, size, rows = take("<iII")
            yield struct.pack("<iII", kind, size, rows)
            for _ in range(rows):
                yield from repeated(size)
        else:
            kind, size = take("<iQ")
            yield struct.pack("<iQ", kind, size)
            yield from repeated(size)
    if place != len(state):
        raise SystemExit(f"a saved state of another format: {len(state) - place} bytes are left")


def main() -> None:
    files, capacity, cache = json.loads(sys.argv[1]), int(sys.argv[2]), (sys.argv[3:] or ["f16"])[0]
    models = {name: Model(file, capacity, cache) for name, file in files.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        name, what, *rest = json.loads(line)
        model = models[name]
        if what == "prefill":
            model.clear()
            seconds = [model.eval(rest[0])]
        else:
            depth, times = rest
            if not depth <= model.depth <= depth + 64:
                model.go_to(depth)
            seconds = [model.eval([17]) for _ in range(times)]
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
