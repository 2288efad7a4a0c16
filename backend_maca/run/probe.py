"""The probe of a device: small kernels with known results, for all that this package assumes and nobody documents.

Each probe that fails turns a feature off. The results are kept beside the compile cache; ``spikingbrain doctor`` runs
the probe anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spikingbrain import files
from spikingbrain.artifact import cache_folder
from spikingbrain.backend_maca.run.driver import CONVENTIONS, DeviceError, Driver
from spikingbrain.errors import SpikingBrainError

log = logging.getLogger(__name__)
SOURCE = Path(__file__).parent / "probe.maca"
KERNELS = tuple(
    f"probe_{name}"
    for name in ["ballot", "shuffle", "i8", "f16", "bf16", "f32", "rounding", "contraction", "shared"]
)
SHARED_BYTES = 64 << 10
Array = np.ndarray[Any, Any]


class Launcher(Protocol):
    """Runs a kernel of the probe; arguments are arrays, which it may write, and integers."""

    def __call__(
        self, kernel: str, threads: int, shared_bytes: int, arguments: Sequence[Array | int]
    ) -> None: ...


@dataclass(frozen=True)
class Finding:
    """The outcome of one probe.

    Attributes:
        name: what was probed.
        passed: whether the device does what is assumed.
        found: what it does instead, empty if it passed.
        consequence: what is turned off, or no longer promised, if it did not.
    """

    name: str
    passed: bool
    found: str
    consequence: str


def run(launch: Launcher) -> list[Finding]:
    """Runs all probes; one that faults has not passed."""
    return [_judge(name, probe, consequence, launch) for name, (probe, consequence) in PROBES.items()]


def _judge(name: str, probe: Callable[[Launcher], str], consequence: str, launch: Launcher) -> Finding:
    try:
        found = probe(launch)
    except SpikingBrainError as error:
        found = str(error)
    return Finding(name, not found, found, consequence)


def _ballot(launch: Launcher) -> str:
    out = np.zeros(128, np.int64)
    launch("probe_ballot", 128, 0, [out])
    expected = sum(1 << lane for lane in range(0, 64, 3))
    wrong = out.view(np.uint64) != np.uint64(expected)
    return f"thread {wrong.argmax()} sees {out.view(np.uint64)[wrong][0]:#018x}" if wrong.any() else ""


def _shuffle(launch: Launcher) -> str:
    for distance in (32, 16, 8, 4, 2, 1):
        out = np.zeros(128, np.int64)
        launch("probe_shuffle", 128, 0, [out, distance])
        wrong = out != np.arange(128) ^ distance
        if wrong.any():
            return f"at distance {distance}, lane {wrong.argmax()} gets the value of {out[wrong][0]}"
    return ""


def _matrix(kernel: str) -> Callable[[Launcher], str]:
    def probe(launch: Launcher) -> str:
        whole = kernel == "probe_i8"
        k = 4 if kernel == "probe_f32" else 16
        row, column = np.indices((16, k))
        limit = 128 if whole else 8  # products and sums of floats stay exact
        x = (row * 37 + column * 11) % (2 * limit) - limit
        y = (row * 23 + column * 45 + 5) % (2 * limit) - limit
        start = np.arange(256).reshape(16, 16) % 13
        d = start.astype(np.int32 if whole else np.float32)
        launch(kernel, 64, 0, [_stored(x, kernel), _stored(y, kernel), d])
        expected = start + x @ y.T
        if np.array_equal(d, expected):
            return ""
        if np.array_equal(d, start + y @ x.T):
            return "the result is transposed"
        i, j = np.argwhere(d != expected)[0]
        return f"{(d != expected).sum()} of 256 sums differ; row {i}, column {j}: {d[i, j]}, expected {expected[i, j]}"

    return probe


def _stored(values: Array, kernel: str) -> Array:
    """Returns small whole numbers in the type that a matrix instruction reads."""
    if kernel == "probe_i8":
        return values.astype(np.int8)
    if kernel == "probe_bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if kernel == "probe_f16" else np.float32)


def _rounding(launch: Launcher) -> str:
    """Rounds values in the middle of two neighbours, just beside, and at the ends of the range."""
    base = np.array([1, 1.5, 3, 2.0**-10, 2.0**-20, 300, 65519, 65520, 3.0e38], np.float32)
    beside = np.array([0, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0x18000], np.uint32)
    positive = (base.view(np.uint32)[:, None] + beside).view(np.float32).ravel()
    x = np.concatenate([positive, -positive])
    brain, narrow = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint16)
    launch("probe_rounding", 64, 0, [x, brain, narrow, x.size])
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    for kind, got, right in [
        ("bf16", brain, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)),
        ("f16", narrow, expected),
    ]:
        wrong = got != right
        if wrong.any():
            return f"{x[wrong][0]!r} to {kind} gives {got[wrong][0]:#06x}, not {right[wrong][0]:#06x}"
    return ""


def _contraction(launch: Launcher) -> str:
    x = (1 + np.arange(64) * 2.0**-12).astype(np.float32)
    y = -(x * x)  # rounded: fused, the result is the error of the product instead of 0
    out = np.ones(64, np.float32)
    launch("probe_contraction", 64, 0, [x, y, out])
    return f"{(out != 0).sum()} of 64 results are fused" if out.any() else ""


def _shared(launch: Launcher) -> str:
    words = SHARED_BYTES // 4
    out = np.zeros(words, np.int32)
    launch("probe_shared", 256, SHARED_BYTES, [out, words])
    expected = (np.arange(words, dtype=np.int64)[::-1] ** 2).astype(np.int32)
    wrong = out != expected
    return f"{wrong.sum()} of {words} words differ" if wrong.any() else ""


NO_HAND_SCHEDULED = "kernels scheduled by hand are off"
# Name -> probe, what its failure means.
PROBES: dict[str, tuple[Callable[[Launcher], str], str]] = {
    "votes of 64 lanes": (_ballot, NO_HAND_SCHEDULED),
    "shuffles over 64 lanes": (_shuffle, "no kernel of this package gives right results"),
    "matrix instruction, i8": (_matrix("probe_i8"), NO_HAND_SCHEDULED),
    "matrix instruction, f16": (_matrix("probe_f16"), NO_HAND_SCHEDULED),
    "matrix instruction, bf16": (_matrix("probe_bf16"), NO_HAND_SCHEDULED),
    "matrix instruction, f32": (_matrix("probe_f32"), NO_HAND_SCHEDULED),
    "rounding to 16 bits": (
        _rounding,
        "results in bf16 and f16 may differ from the emulator's in the last place",
    ),
    "products and sums are not fused": (
        _contraction,
        "float results may differ from the emulator's in the last places",
    ),
    "64 KiB of shared memory": (_shared, NO_HAND_SCHEDULED),
}


def emulated(source: str = "") -> Launcher:
    """Returns a launcher on the emulator, which shows that the probe itself is right."""
    from spikingbrain.backend_maca.run.emulate import Kernels, build

    kernels = Kernels(build(source or SOURCE.read_text(), KERNELS))

    def launch(kernel: str, threads: int, shared_bytes: int, arguments: Sequence[Array | int]) -> None:
        values = [ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments]
        kernels.launch(kernel, (1, 1, 1), (threads, 1, 1), shared_bytes, values)

    return launch


@contextlib.contextmanager
def on_device(driver: Driver, image: bytes, convention: int | None) -> Iterator[Launcher]:
    """Gives a launcher on a device; ``image`` is the probe's native code, ``convention`` how arguments are passed."""
    with driver.here():
        module, stream = driver.load(image), driver.new_stream()

        def launch(kernel: str, threads: int, shared_bytes: int, arguments: Sequence[Array | int]) -> None:
            function = driver.function(module, kernel)
            arrays = [a for a in arguments if not isinstance(a, int)]
            places = [driver.allocate(a.nbytes) for a in arrays]
            try:
                for place, array in zip(places, arrays, strict=True):
                    driver.upload(place, array.ctypes.data, array.nbytes, stream)
                addresses = iter(places)
                values = [a if isinstance(a, int) else next(addresses) for a in arguments]
                driver.launch(function, (1, 1, 1), (threads, 1, 1), shared_bytes, stream, values, convention)
                for place, array in zip(places, arrays, strict=True):
                    driver.download(array.ctypes.data, place, array.nbytes, stream)
            finally:
                for place in places:
                    driver.free(place)

        try:
            yield launch
        finally:
            driver.destroy_stream(stream)
            driver.unload(module)


def convention_of(driver: Driver, image: bytes) -> int | None:
    """Returns the first way to pass arguments that works. Raises DeviceError when none does."""
    for convention in CONVENTIONS:
        try:
            with on_device(driver, image, convention) as launch:
                if not _shuffle(launch):
                    return convention
        except DeviceError as error:
            log.info("arguments by convention %s: %s", convention, error)
    raise DeviceError(
        "no kernel of the probe runs on the card",
        why="neither addresses of arguments nor packed ones are taken",
        hint="reset the card, then run spikingbrain doctor again",
    )


@dataclass(frozen=True)
class Record:
    """What is known of a device.

    Attributes:
        device: its name.
        image: a digest of the probe's native code.
        convention: how arguments are passed, see ``Driver.launch``.
        findings: the outcome of all probes.
    """

    device: str
    image: str
    convention: int | None
    findings: tuple[Finding, ...]


def examine(driver: Driver, image: bytes, *, anew: bool = False) -> Record:
    """Returns what is known of a device, and warns of each probe that it failed.

    The probe runs when the device is opened first, when its native code changes, when arguments are no longer taken
    the way they were, or ``anew``. Raises DeviceError where no kernel runs.
    """
    name, digest = driver.device_name(), hashlib.sha256(image).hexdigest()
    record = None if anew else kept()
    if record is None or (record.device, record.image) != (name, digest) or not _still(driver, image, record):
        convention = convention_of(driver, image)
        with on_device(driver, image, convention) as launch:
            record = Record(name, digest, convention, tuple(run(launch)))
        keep(record)
    for finding in record.findings:
        if not finding.passed:
            log.warning("%s, %s: %s; %s", name, finding.name, finding.found, finding.consequence)
    return record


def _still(driver: Driver, image: bytes, record: Record) -> bool:
    """Returns whether a device takes arguments as it is known to."""
    try:
        with on_device(driver, image, record.convention) as launch:
            found = _shuffle(launch)
    except DeviceError:
        return False
    return not found or not all(f.passed for f in record.findings)


def keep(record: Record) -> None:
    """Stores what is known of a device, for later processes."""
    files.keep(_file(), json.dumps(asdict(record), indent=1).encode())
    hand_scheduled.cache_clear()


def kept() -> Record | None:
    """Returns what is known of the device that was probed last, None if none was."""
    try:
        found: dict[str, Any] = json.loads(_file().read_text())
        return Record(**{**found, "findings": tuple(Finding(**f) for f in found["findings"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


@functools.cache
def hand_scheduled() -> bool:
    """Returns whether kernels scheduled by hand may be used on the device; warns, once, if its probe says no."""
    record = kept()
    findings = record.findings if record else ()
    failed = [f.name for f in findings if not f.passed and f.consequence == NO_HAND_SCHEDULED]
    if record and failed:
        log.warning("%s failed the probe of: %s; %s", record.device, ", ".join(failed), NO_HAND_SCHEDULED)
    return not failed


def _file() -> Path:
    return cache_folder() / "maca" / "probe.json"
