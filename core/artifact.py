"""The artifact: one file that holds code, weights and everything needed to run them.

A zip archive whose members are stored uncompressed, so that weights are mapped, never copied. ``docs/artifact.md``
draws the format as a byte map and says which versions read which.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spikingbrain.errors import ArtifactError, CorruptArtifact, NewerFormat

FORMAT_VERSION = 1
ALIGNMENT = 64  # of members and tensors: zero-copy import into the IREE runtime needs it
BLOCK = 16 << 20  # weights are hashed in blocks of this size
_READ = 1 << 20
MANIFEST, WEIGHTS, REPORT, TOKENIZER = "manifest.json", "weights.safetensors", "report.json", "tokenizer.json"
STATE = "state.safetensors"
CODE = "code/"

Array = np.ndarray[Any, Any]
DTYPES = {
    "f64": ("F64", "float64"),
    "f32": ("F32", "float32"),
    "f16": ("F16", "float16"),
    "bf16": ("BF16", "bfloat16"),
    "i64": ("I64", "int64"),
    "i32": ("I32", "int32"),
    "i16": ("I16", "int16"),
    "i8": ("I8", "int8"),
    "i1": ("BOOL", "bool"),
}  # MLIR's name -> safetensors' name, numpy's name
_FROM_SAFETENSORS = {st: name for st, name in DTYPES.values()}
_ELEMENTS = {name: element for element, (_, name) in DTYPES.items()}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Returns the numpy dtype called ``name``; bfloat16 comes from ml_dtypes where installed, else as uint16 bits."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype(np.uint16)
    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


@dataclass(frozen=True)
class TensorHeader:
    """A tensor of the weights member before its bytes exist."""

    key: str
    shape: tuple[int, ...]
    element: str  # MLIR's name

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(DTYPES[self.element][1]).itemsize


class _Hashing:
    """Passes bytes on to a file while hashing them, whole and by blocks."""

    def __init__(self, sink: Any):
        self._sink, self._block, self._filled = sink, hashlib.sha256(), 0
        self.whole, self.blocks, self.size = hashlib.sha256(), [], 0  # type: ignore[var-annotated]

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._sink.write(view)
        self.size += len(view)
        while len(view):
            part = view[: BLOCK - self._filled]
            self._block.update(part)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._close_block()
            view = view[len(part) :]

    def _close_block(self) -> None:
        self.blocks.append(self._block.hexdigest())
        self._block, self._filled = hashlib.sha256(), 0

    def finish(self) -> list[str]:
        if self._filled:
            self._close_block()
        return self.blocks


def write(
    path: Path,
    manifest: Mapping[str, Any],
    code: Mapping[str, bytes],
    tensors: Iterable[TensorHeader],
    content: Callable[[TensorHeader], Array],
    extra: Mapping[str, bytes],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes an artifact to a temporary name beside ``path`` and renames it.

    Args:
        manifest: what `Artifact.manifest` shall hold; ``format`` and ``members`` are added here.
        code: members below ``code/``.
        tensors: every stored tensor; ``content`` is called once for each, one at a time, so that the peak memory is one tensor.
        extra: further members (tokenizer, report).
        progress: called with bytes of weights written and their total.
    """
    path = Path(path)
    check_writable(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent or ".", prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            members: dict[str, Any] = {}
            for name, data in [*((CODE + n, d) for n, d in code.items()), *extra.items()]:
                with archive.open(_aligned(archive, name), "w") as sink:
                    sink.write(data)
                members[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            with archive.open(_aligned(archive, WEIGHTS), "w", force_zip64=True) as sink:
                hashing = _Hashing(sink)
                _write_safetensors(hashing, list(tensors), content, progress)
                members[WEIGHTS] = {"size": hashing.size, "block": BLOCK, "blocks": hashing.finish()}
            complete = {"format": FORMAT_VERSION, **manifest, "members": members}
            archive.writestr(_aligned(archive, MANIFEST), json.dumps(complete, indent=1))
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def pack(arrays: Mapping[str, Array]) -> bytes:
    """Returns tensors as a member of the same form as the weights', for a few of them."""
    headers = [TensorHeader(key, array.shape, _ELEMENTS[array.dtype.name]) for key, array in arrays.items()]
    sink = io.BytesIO()
    _write_safetensors(sink, headers, lambda header: arrays[header.key], None)
    return sink.getvalue()


def cannot_write(path: Path, error: OSError) -> ArtifactError:
    """Returns the error to raise where writing ``path`` failed, on a full disk for one."""
    hint = "set SPIKINGBRAIN_CACHE to another folder" if cache_folder() in path.parents else ""
    return ArtifactError(f"cannot write {path}", why=error.strerror or str(error), hint=hint)


def check_writable(path: Path) -> None:
    """Raises ArtifactError if no file can be written at ``path``: better before a long compile than after it."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise ArtifactError(
            f"cannot write {path}", why=f"there is no folder {folder}", hint=f"mkdir -p {folder}"
        )
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder" if Path(path).is_dir() else f"{folder} may not be written to"
        raise ArtifactError(f"cannot write {path}", why=why)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _aligned(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Returns the header of a member whose content starts at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # equal input makes equal files
    info.external_attr = 0o644 << 16
    zip64 = 20 if name == WEIGHTS else 0  # the extra field that force_zip64 adds
    start = (archive.fp.tell() if archive.fp else 0) + 30 + len(name.encode()) + zip64 + 4
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)
    return info


def _write_safetensors(
    sink: _Hashing | io.BytesIO,
    tensors: list[TensorHeader],
    content: Callable[[TensorHeader], Array],
    progress: Callable[[int, int], None] | None,
) -> None:
    header: dict[str, Any] = {}
    padded: list[tuple[TensorHeader | None, int]] = []
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.key] = {
            "dtype": DTYPES[tensor.element][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        padded.append((tensor, tensor.nbytes))
        offset = end
        if gap := -end % ALIGNMENT:  # the format allows no holes, so a gap is a tensor too
            header[f"__padding_{len(padded)}"] = {
                "dtype": "U8",
                "shape": [gap],
                "data_offsets": [end, end + gap],
            }
            padded.append((None, gap))
            offset = end + gap
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    sink.write(struct.pack("<Q", len(text)))
    sink.write(text)
    done = 0
    for stored, size in padded:
        if stored is None:
            sink.write(bytes(size))
        else:
            array = np.asarray(content(stored), order="C")  # ascontiguousarray would give a scalar an axis
            if array.shape != stored.shape or array.nbytes != size:
                raise ArtifactError(
                    f"stored tensor {stored.key!r} came out as {array.shape}, declared {stored.shape}"
                )
            sink.write(array.reshape(-1).view(np.uint8).data)
        done += size
        if progress:
            progress(done, offset)


class Artifact:
    """An artifact opened for reading. Checks the manifest and the code always, the weights when asked."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ArtifactError(
                f"no artifact at {self.path}", hint="spikingbrain compile MODEL -o FILE makes one"
            )
        self._file: BinaryIO = open(self.path, "rb")  # noqa: SIM115  (closed with the mapping)
        try:
            with zipfile.ZipFile(self._file) as archive:
                self._infos = {i.filename: i for i in archive.infolist()}
                self.manifest = self._read_manifest(archive)
        except (
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            EOFError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:
            self._file.close()
            raise CorruptArtifact(
                f"{self.path} is not a complete artifact", why=str(error), hint="copy or compile it again"
            ) from error
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._check_members()

    def _read_manifest(self, archive: zipfile.ZipFile) -> dict[str, Any]:
        if MANIFEST not in self._infos:
            raise CorruptArtifact(f"{self.path} has no {MANIFEST}", hint="it is a zip file, but no artifact")
        manifest: dict[str, Any] = json.loads(archive.read(MANIFEST))  # zip checks its CRC
        if manifest.get("format", 0) > FORMAT_VERSION:
            raise NewerFormat(
                f"{self.path} has format {manifest['format']}, this version reads up to {FORMAT_VERSION}",
                hint="pip install --upgrade spikingbrain",
            )
        if "members" not in manifest:
            raise CorruptArtifact(
                f"{self.path} has no list of members", hint="it is a zip file, but no artifact"
            )
        return manifest

    def _check_members(self) -> None:
        for name, facts in self.manifest["members"].items():
            if name not in self._infos:
                raise CorruptArtifact(f"{self.path} lacks the member {name}", hint="copy or compile it again")
            if self._infos[name].file_size != facts["size"]:
                raise CorruptArtifact(
                    f"{self.path}: {name} has {self._infos[name].file_size} bytes, not {facts['size']}"
                )
            if name != WEIGHTS and hashlib.sha256(self.member(name)).hexdigest() != facts["sha256"]:
                raise CorruptArtifact(
                    f"{self.path}: {name} is damaged", why="its SHA-256 differs from the manifest's"
                )

    def member(self, name: str) -> memoryview:
        """Returns the mapped bytes of a member."""
        start, end = self._span(name)
        return memoryview(self._map)[start:end]

    def _span(self, name: str) -> tuple[int, int]:
        """Returns where a member's content begins and ends in the file."""
        info = self._infos[name]
        local = info.header_offset
        if local + 30 > len(self._map):
            raise CorruptArtifact(
                f"{self.path}: {name} lies outside the file", hint="copy or compile it again"
            )
        name_length, extra_length = struct.unpack_from("<HH", self._map, local + 26)
        start = local + 30 + name_length + extra_length
        return start, start + info.file_size

    @property
    def targets(self) -> list[dict[str, Any]]:
        """The targets that there is code for, in the order in which they are tried."""
        return [self.manifest["target"], *self.manifest.get("further_targets", [])]

    @property
    def code(self) -> dict[str, memoryview]:
        """The code for the first target, by the names of its members."""
        return self.code_for(self.manifest.get("target", {}))

    def code_for(self, target: Mapping[str, Any]) -> dict[str, memoryview]:
        """Returns the code for one of ``targets``, by the names of its members."""
        folder = CODE + target.get("folder", "")
        names = [n[len(folder) :] for n in self.manifest["members"] if n.startswith(folder)]
        return {n: self.member(folder + n) for n in names if "/" not in n}

    def has(self, name: str) -> bool:
        return name in self.manifest["members"]

    def weights(self) -> dict[str, Array]:
        """Returns the stored tensors by key, mapped read-only."""
        return self._tensors(WEIGHTS)

    def state_blocks(self) -> dict[str, Array]:
        """Returns what fresh states hold besides their fill values, by the state's field names, mapped read-only."""
        return self._tensors(STATE) if self.has(STATE) else {}

    def _tensors(self, member: str) -> dict[str, Array]:
        data = self.member(member)
        (length,) = struct.unpack_from("<Q", data, 0)
        header = json.loads(bytes(data[8 : 8 + length]))
        base = 8 + length
        arrays: dict[str, Array] = {}
        for key, entry in header.items():
            if key.startswith("__"):
                continue
            begin, end = entry["data_offsets"]
            dtype = numpy_dtype(_FROM_SAFETENSORS[entry["dtype"]])
            arrays[key] = np.frombuffer(data[base + begin : base + end], dtype).reshape(entry["shape"])
        return arrays

    def verify_weights(self, force: bool = False) -> bool:
        """Checks the hashes of the weights; returns False when an earlier check of the same file was trusted.

        A passed check leaves a stamp of the file's size, time and inode in the user's cache.
        """
        stamp, state = _stamp_path(self.path), _file_state(self.path)
        if not force and stamp.is_file() and stamp.read_text() == state:
            return False
        facts = self.manifest["members"][WEIGHTS]
        start, end = self._span(WEIGHTS)

        def intact(i: int) -> bool:
            # read piece by piece, not mapped: pages touched through the mapping would stay in this process
            digest, at = hashlib.sha256(), start + i * facts["block"]
            stop = min(at + facts["block"], end)
            while at < stop:
                piece = os.pread(self._file.fileno(), min(_READ, stop - at), at)
                if not piece:
                    return False
                digest.update(piece)
                at += len(piece)
            return bool(digest.hexdigest() == facts["blocks"][i])

        with ThreadPoolExecutor() as threads:  # reading and hashing release the interpreter
            for i, fine in enumerate(threads.map(intact, range(len(facts["blocks"])))):
                if not fine:
                    first = i * facts["block"]
                    last = min(first + facts["block"], facts["size"])
                    raise CorruptArtifact(
                        f"{self.path}: the weights are damaged in block {i}",
                        why=f"the SHA-256 of bytes {first} to {last} differs",
                        hint="copy or compile it again",
                    )
        try:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(state)
        except OSError:
            pass  # a read-only home only costs the check next time
        return True


def cache_folder() -> Path:
    """Returns the folder for caches: ``$SPIKINGBRAIN_CACHE``, else below the user's XDG cache."""
    if own := os.environ.get("SPIKINGBRAIN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikingbrain"


def _stamp_path(path: Path) -> Path:
    return cache_folder() / "verified" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]


def _file_state(path: Path) -> str:
    s = path.stat()
    return f"{s.st_size} {s.st_mtime_ns} {s.st_ino}"
