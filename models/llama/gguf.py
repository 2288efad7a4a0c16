"""Weights of a Llama or Qwen2 from a GGUF file.

`GgufFile` reads the container, `entries` says how its tensors become ours, `load` builds the model.

From GGUF to our names, tensor by tensor:
  renamed         all, by the tables `MODEL` and `LAYER`
  un-interleaved  attn_q, attn_k of a Llama: see `unpair_rotary`
  tied            no `output.weight` in the file means that the head is the embedding
Everything is decoded to float32 and then cast.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from spikingbrain.models.errors import MissingPackage, WeightsError
from spikingbrain.models.llama.model import Llama, LlamaConfig

Array = npt.NDArray[Any]

ARCHITECTURES = ("llama", "qwen2")

# GGUF metadata: type number -> struct format; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, STRING, ARRAY = 6, 8, 9


class Encoding(NamedTuple):
    name: str
    block: int  # values per block
    bytes: int  # bytes per block


ENCODINGS = {
    0: Encoding("F32", 1, 4),
    1: Encoding("F16", 1, 2),
    2: Encoding("Q4_0", 32, 18),
    3: Encoding("Q4_1", 32, 20),
    8: Encoding("Q8_0", 32, 34),
    12: Encoding("Q4_K", 256, 144),
    14: Encoding("Q6_K", 256, 210),
    30: Encoding("BF16", 1, 2),
}


def load(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    *,
    window: int | None = None,
    sinks: int = 0,
) -> tuple[LlamaConfig, Llama]:
    """Returns the config and the model with its weights; `window` and `sinks` choose the attention."""
    file = GgufFile(path)
    config = read_config(file, window=window, sinks=sinks)
    with torch.device("meta"):
        model = Llama(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(file, config, shapes)

    weights = {}
    for entry in entries(config):
        weights[entry.target] = torch.from_numpy(entry.transform(file.read(entry.source), config)).to(dtype)
    model.load_state_dict(weights, assign=True)
    return config, model.eval()


def read_config(file: GgufFile, *, window: int | None = None, sinks: int = 0) -> LlamaConfig:
    """Returns the config that the metadata describes."""
    metadata = file.metadata
    if (kind := metadata.get("general.architecture")) not in ARCHITECTURES:
        raise WeightsError(
            f"architecture {kind!r} is not {' or '.join(map(repr, ARCHITECTURES))}",
            where=str(file.path),
            why="this loader knows the names and the layout of their weights only",
            hint="a GGUF file of one of these",
        )
    needed = [
        f"{kind}.block_count",
        f"{kind}.context_length",
        f"{kind}.embedding_length",
        f"{kind}.feed_forward_length",
        f"{kind}.attention.head_count",
        f"{kind}.attention.layer_norm_rms_epsilon",
    ]
    absent = [key for key in needed if not _is_positive(metadata.get(key))]
    absent += [] if "token_embd.weight" in file.tensors else ["tensor token_embd.weight"]
    if absent:
        raise WeightsError(
            f"the file does not say how large the model is: no {', '.join(absent)}",
            where=str(file.path),
            why="the file is incomplete, or holds only a part of a split model",
            hint="one unsplit GGUF file with its metadata",
        )
    width, heads = metadata[f"{kind}.embedding_length"], metadata[f"{kind}.attention.head_count"]
    head_size = metadata.get(f"{kind}.attention.key_length", width // heads)
    supported = {
        f"{kind}.attention.value_length": head_size,
        f"{kind}.rope.dimension_count": head_size,
        f"{kind}.rope.scaling.type": "none",
        f"{kind}.expert_count": 0,
    }
    for key, only in supported.items():
        if (value := metadata.get(key, only)) != only:
            raise WeightsError(
                f"{key} is {value!r}, and only {only!r} is supported",
                where=str(file.path),
                why="the model computes rotary embedding over whole heads, unscaled, and has no experts",
                hint="another model of the Llama family",
            )
    return LlamaConfig(
        vocabulary=file.tensors["token_embd.weight"].shape[0],
        width=width,
        layers=metadata[f"{kind}.block_count"],
        heads=heads,
        key_value_heads=metadata.get(f"{kind}.attention.head_count_kv", heads),
        head_size=head_size,
        feed_forward=metadata[f"{kind}.feed_forward_length"],
        context=metadata[f"{kind}.context_length"],
        rope_base=metadata.get(f"{kind}.rope.freq_base", 10_000.0),
        norm_eps=metadata[f"{kind}.attention.layer_norm_rms_epsilon"],
        tied_head="output.weight" not in file.tensors,
        window=window,
        sinks=sinks,
        qkv_bias=kind == "qwen2",
    )


def as_stored(weight: Array, config: LlamaConfig) -> Array:
    return weight


def unpair_rotary(weight: Array, config: LlamaConfig) -> Array:
    """Undoes the interleaving of the two rotary halves inside each head.

    GGUF stores the rows of a head as (0, D/2, 1, D/2 + 1, ...), which suits kernels that turn neighbouring
    values; the rotate-half form wants 0 .. D-1.
    """
    rows, width = weight.shape
    pairs = weight.reshape(rows // config.head_size, config.head_size // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, its name in the model, and what happens on the way."""

    source: str
    target: str
    transform: Callable[[Array, LlamaConfig], Array] = as_stored


MODEL = [
    Entry("token_embd.weight", "embedding.weight"),
    Entry("output_norm.weight", "norm.weight"),
]
HEAD = Entry("output.weight", "head.weight")
BIASES = [
    Entry("attn_q.bias", "attention.query.bias"),
    Entry("attn_k.bias", "attention.key.bias"),
    Entry("attn_v.bias", "attention.value.bias"),
]
LAYER = [
    Entry("attn_norm.weight", "attention_norm.weight"),
    Entry("attn_q.weight", "attention.query.weight", unpair_rotary),
    Entry("attn_k.weight", "attention.key.weight", unpair_rotary),
    Entry("attn_v.weight", "attention.value.weight"),
    Entry("attn_output.weight", "attention.output.weight"),
    Entry("ffn_norm.weight", "feed_forward_norm.weight"),
    Entry("ffn_gate.weight", "feed_forward.gate.weight"),
    Entry("ffn_up.weight", "feed_forward.up.weight"),
    Entry("ffn_down.weight", "feed_forward.down.weight"),
]


def entries(config: LlamaConfig) -> Iterator[Entry]:
    """Yields the table above for all layers of a model."""
    yield from MODEL
    if not config.tied_head:
        yield HEAD
    for i in range(config.layers):
        for entry in (*LAYER, *(BIASES if config.qkv_bias else [])):
            # Qwen2's files hold rotary halves one after the other, as they are computed.
            transform = as_stored if config.qkv_bias else entry.transform
            yield Entry(f"blk.{i}.{entry.source}", f"blocks.{i}.{entry.target}", transform)


def check_tensors(file: GgufFile, config: LlamaConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises one error that lists every tensor that is missing, superfluous, misshapen or unreadable."""
    found = dict(file.tensors)
    problems = []
    for entry in entries(config):
        tensor = found.pop(entry.source, None)
        if tensor is None:
            problems.append(f"{entry.source}: missing")
            continue
        if tensor.shape != shapes[entry.target]:
            wanted = f"the model has {list(shapes[entry.target])}"
            problems.append(f"{entry.source}: has shape {list(tensor.shape)}, {wanted}")
        if (problem := file.problem(entry.source)) is not None:
            problems.append(f"{entry.source}: {problem}")
    problems += [f"{name}: not part of the model" for name in found]
    if problems:
        raise WeightsError(
            "the tensors of the file do not fit the model:\n    " + "\n    ".join(problems),
            where=str(file.path),
            why="the file is damaged, or its model differs from a plain Llama or Qwen2",
            hint=f"a plain Llama or Qwen2 without rope tables, in {', '.join(e.name for e in ENCODINGS.values())}",
        )


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]  # outermost dimension first, as in torch
    encoding: int
    start: int  # bytes from the start of the file


class GgufFile:
    """A GGUF container: metadata at once, tensors on demand from a memory map.

    `gguf.GGUFReader` makes numpy objects for every string of the vocabulary, which takes seconds; this walks
    over the header once. The decoding of quantised blocks is left to the `gguf` package.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if not self._size:
                raise self._damaged("the file is empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError) as error:
            raise self._damaged(f"the header ends or turns into nonsense at byte {self._at}") from error

    def read(self, name: str) -> Array:
        """Returns a tensor in float32, decoded, in memory of its own."""
        info = self.tensors[name]
        encoding = ENCODINGS[info.encoding]
        *rows, columns = info.shape
        row_bytes = columns // encoding.block * encoding.bytes
        stored = np.frombuffer(self._map, np.uint8, math.prod(rows) * row_bytes, info.start)
        decoded: Array = _dequantize(stored.reshape(*rows, row_bytes), info.encoding)
        return np.array(decoded, dtype=np.float32).reshape(info.shape)

    def problem(self, name: str) -> str | None:
        """Returns why a tensor cannot be read, None when it can."""
        info = self.tensors[name]
        encoding = ENCODINGS.get(info.encoding)
        if encoding is None:
            return f"is of the unsupported encoding {_encoding_name(info.encoding)}"
        if info.shape[-1] % encoding.block:
            return f"has rows of {info.shape[-1]} values, and {encoding.name} has blocks of {encoding.block}"
        end = info.start + math.prod(info.shape) // encoding.block * encoding.bytes
        if end > self._size:
            return f"ends at byte {end}, and the file has {self._size}"
        return None

    def _read_header(self) -> None:
        if self._map[:4] != b"GGUF":
            raise self._damaged(f"it starts with {self._map[:4]!r} instead of b'GGUF'")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise WeightsError(
                f"GGUF version {version if version & 0xFFFF else 'of the other byte order'} is not supported",
                where=str(self.path),
                why="versions 2 and 3 in little-endian order are",
                hint="converting the model with a current tool",
            )
        tensors, fields = self._scalar("Q"), self._scalar("Q")
        for _ in range(fields):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        stored = []
        for _ in range(tensors):
            name = self._string()
            shape = [self._scalar("Q") for _ in range(self._scalar("I"))]
            stored.append((name, tuple(reversed(shape)) or (1,), self._scalar("I"), self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"its alignment is {alignment!r}")
        data = -(-self._at // alignment) * alignment
        for name, shape_, encoding, offset in stored:
            self.tensors[name] = TensorInfo(shape_, encoding, data + offset)

    def _scalar(self, format: str) -> Any:
        (value,) = struct.unpack_from("<" + format, self._map, self._at)
        self._at += struct.calcsize("<" + format)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if self._at + length > self._size:
            raise self._damaged(f"a text of {length} bytes at byte {self._at} passes its end")
        self._at += length
        return self._map[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, length = self._scalar("I"), self._scalar("Q")
            if item == STRING:
                return [self._string() for _ in range(length)]
            if item in SCALARS and length * struct.calcsize(SCALARS[item]) <= self._size:
                values = struct.unpack_from(f"<{length}{SCALARS[item]}", self._map, self._at)
                self._at += struct.calcsize(f"<{length}{SCALARS[item]}")
                return list(values)
        if kind == FLOAT32:
            # The shortest decimal that denotes it: 1e-5, not 9.99999974737875e-06.
            return float(str(np.float32(self._scalar("f"))))
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        raise self._damaged(f"a metadata value of unknown type at byte {self._at}")

    def _damaged(self, why: str) -> WeightsError:
        return WeightsError(
            "the file cannot be read as GGUF",
            where=str(self.path),
            why=why,
            hint="fetching the file again, and comparing its size and checksum",
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingPackage(
            "weights in GGUF files need the package gguf",
            why=str(error),
            hint="pip install gguf==0.19.0",
        ) from error
    return gguf


def _dequantize(stored: Array, encoding: int) -> Array:
    gguf = _gguf()
    decoded: Array = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(encoding))
    return decoded


def _encoding_name(encoding: int) -> str:
    try:
        name: str = _gguf().GGMLQuantizationType(encoding).name
    except (MissingPackage, ValueError):
        name = f"number {encoding}"
    return name
