"""Runs llama.cpp for a benchmark: one thread, told what to time by lines of JSON. `llama_cpp_peer.py` starts it.

    PYTHON llama_cpp_server.py '{"name": "model.gguf", ...}' CAPACITY [f16|q8_0]

A line ``[name, "prefill", tokens]`` times those tokens from an empty cache; ``[name, "decode", depth, times]`` times single
tokens behind ``depth`` cached ones. A deep cache is not computed: it gets the rows of a short one again and again, in
llama.cpp's own format of saved states. The answer is seconds of this thread.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from time import thread_time
from typing import Any

import llama_cpp
import numpy as np

BATCH, SEED_CELLS = 512, 64
CACHES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}


class Model:
    def __init__(self, file: str, capacity: int, cache: str):
        self.model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = capacity, BATCH, BATCH
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = CACHES[cache]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
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
        size = llama_cpp.llama_state_seq_get_size(self.context, 0)
        held = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self.context, held, size, 0)
        deep = np.frombuffer(_repeat(bytes(held), depth), np.uint8)
        self.clear()
        pointer = deep.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not llama_cpp.llama_state_seq_set_data(self.context, pointer, len(deep), 0):
            raise SystemExit("llama.cpp does not take the cache")
        self.depth = depth


def _repeat(state: bytes, depth: int) -> bytearray:
    """Returns a saved state of SEED_CELLS tokens with its rows repeated to ``depth`` tokens."""
    place, made = 0, bytearray()

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal place
        values = struct.unpack_from(layout, state, place)
        place += struct.calcsize(layout)
        return values

    *head, streams, cells = take("<4I")
    if (streams, cells) != (1, SEED_CELLS):
        raise SystemExit(f"a saved state of another format: {streams} streams, {cells} cells")
    place += cells * 12
    made += struct.pack("<4I", *head, 1, depth)
    cell = [np.arange(depth), np.ones(depth), np.zeros(depth)]  # position, number of sequences, the sequence
    made += np.stack(cell, 1).astype("<i4").tobytes()
    transposed, layers = take("<II")
    if transposed:
        raise SystemExit("a saved state of another format: values are transposed")
    made += struct.pack("<II", transposed, layers)
    for _ in range(2 * layers):  # keys of all layers, then values
        kind, row = take("<iQ")
        rows = state[place : place + row * cells]
        place += row * cells
        made += struct.pack("<iQ", kind, row) + (rows * (depth // cells + 1))[: row * depth]
    if place != len(state):
        raise SystemExit(f"a saved state of another format: {len(state) - place} bytes are left")
    return made


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
