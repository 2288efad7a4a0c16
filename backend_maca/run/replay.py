"""Runs kept launches on a card and compares the memory that each leaves with the emulator's.

    python -m spikingbrain.backend_maca.run.replay FILE ... --device maca-cuda --seconds 240 -o results.json

Kernels run in a process of their own: one that hangs or faults costs that launch and the start of another process. Their
sources are compiled ahead by as many compilers as there are cores. Whole numbers must be equal; floats may differ where the
card's `exp` and its kin do, which ``BOUNDS`` limits. What was found is in the file at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikingbrain import files
from spikingbrain.backend_maca.run import emulate, images
from spikingbrain.backend_maca.run.driver import DeviceError, open_driver
from spikingbrain.backend_maca.run.launches import Launch, Launches, kernels, scalar
from spikingbrain.errors import SpikingBrainError

# Of the largest entry of the array; 16 bits of an unknown kind are bfloat16.
BOUNDS = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "uint16": 8e-3}
GUARD, MARK = 256, 0xA5  # bytes before and behind each array on the card, and what they hold
PATIENCE = 60.0  # seconds for one launch, the loading of its module included
STARTS = 40  # of processes that run kernels

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Outcome:
    """What came of one launch.

    Attributes:
        status: ``"equal"`` bit for bit, ``"near"`` within BOUNDS, ``"different"`` or ``"failed"``.
        error: the largest difference, over the largest entry of its array.
        why: what differs or failed.
    """

    kernel: str
    test: str
    status: str
    error: float = 0.0
    why: str = ""


class Card:
    """Launches kernels on a card from and to the host's memory."""

    def __init__(self, device: str):
        self._driver = open_driver(device)
        self._modules: dict[str, tuple[int, int | None]] = {}
        with self._driver.here():
            self._stream = self._driver.new_stream()

    def launch(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
    ) -> None:
        """Runs a kernel; arguments are numpy arrays, which it may write, and ctypes values.

        Raises DeviceError where the card fails, or where the kernel wrote beside an array.
        """
        driver = self._driver
        with driver.here():
            module, convention = self._module(source)
            function = driver.function(module, kernel)
            own: dict[tuple[int, int], int] = {}
            values, widths = [], []
            try:
                for argument in arguments:
                    if not isinstance(argument, np.ndarray):
                        values.append(int.from_bytes(bytes(argument), "little"))
                        widths.append(ctypes.sizeof(argument))
                        continue
                    place = (argument.ctypes.data, argument.nbytes)
                    if place not in own:
                        own[place] = driver.allocate(argument.nbytes + 2 * GUARD)
                        driver.fill(own[place], MARK, argument.nbytes + 2 * GUARD, self._stream)
                        if argument.nbytes:
                            driver.upload(own[place] + GUARD, *place, self._stream)
                    values.append(own[place] + GUARD)
                    widths.append(8)
                driver.launch(
                    function, grid, (threads, 1, 1), shared_bytes, self._stream, values, convention, widths
                )
                for (address, size), at in own.items():
                    found = np.empty(size + 2 * GUARD, np.uint8)
                    driver.download(found.ctypes.data, at, found.nbytes, self._stream)
                    if (found[:GUARD] != MARK).any() or (found[size + GUARD :] != MARK).any():
                        raise DeviceError(f"'{kernel}' wrote beside an array of {size} bytes")
                    ctypes.memmove(address, found[GUARD:].ctypes.data, size)
            finally:
                for at in own.values():
                    driver.free(at)

    def _module(self, source: str) -> tuple[int, int | None]:
        if source not in self._modules:
            code = {"kernels.maca": memoryview(source.encode())}
            convention = images.convention(self._driver, code)
            self._modules[source] = self._driver.load(images.image_of(self._driver, code)), convention
        return self._modules[source]


class _Emulated:
    """The emulator in place of a card, to try this module itself."""

    def launch(
        self, source: str, kernel: str, grid: Any, threads: int, shared_bytes: int, arguments: Any
    ) -> None:
        library = emulate.build(source, kernels(source))
        emulate.Kernels(library).launch(kernel, grid, (threads, 1, 1), shared_bytes, arguments)


def machine(device: str) -> Card | _Emulated:
    return _Emulated() if device == "maca-emulator" else Card(device)


def run(launch: Launch, of: Launches, on: Card | _Emulated) -> Outcome:
    """Runs one launch. Raises SpikingBrainError where it cannot be run."""
    arguments: list[Any] = []
    for argument in launch.arguments:
        if argument.bytes:
            arguments.append(scalar(argument.bytes))
        else:
            arguments.append(arguments[argument.same] if argument.same >= 0 else of.array(argument.before))
    on.launch(of.source(launch), launch.kernel, launch.grid, launch.threads, launch.shared_bytes, arguments)
    worst, status, why = 0.0, "equal", ""
    for position, (argument, found) in enumerate(zip(launch.arguments, arguments, strict=True)):
        if not argument.after:
            continue
        wanted = of.array(argument.after)
        if found.tobytes() == wanted.tobytes():
            continue
        error, bound = difference(found, wanted), BOUNDS.get(str(wanted.dtype), 0.0)
        status = "different" if error > bound or status == "different" else "near"
        worst = max(worst, error)
        if error > bound:
            why = (
                f"argument {position}, {wanted.dtype} {list(wanted.shape)}: {error:.1e} of the largest entry"
            )
    return Outcome(launch.kernel, launch.test, status, worst, why)


def difference(found: Array, wanted: Array) -> float:
    """Returns the largest difference over the largest entry, infinite for whole numbers and what is not finite."""
    if wanted.dtype == np.uint16:
        found, wanted = ((a.astype(np.uint32) << 16).view(np.float32) for a in (found, wanted))
    if wanted.dtype.kind != "f":
        return 0.0 if np.array_equal(found, wanted) else float("inf")
    finite = np.isfinite(wanted)
    if (
        not np.array_equal(found[~finite], wanted[~finite], equal_nan=True)
        or not np.isfinite(found[finite]).all()
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    apart = np.abs(found[finite].astype(np.float64) - wanted[finite]).max()
    return float(apart / max(float(np.abs(wanted[finite].astype(np.float64)).max()), 1e-30))


# The process that runs kernels: numbers of launches come in, outcomes go out.


def serve(paths: Sequence[Path], device: str) -> None:
    of = Launches(paths)
    on = machine(device)
    print("ready", flush=True)
    for line in sys.stdin:
        launch = of[int(line)]
        try:
            outcome = run(launch, of, on)
        except SpikingBrainError as error:
            outcome = Outcome(launch.kernel, launch.test, "failed", why=str(error))
        print(json.dumps(asdict(outcome)), flush=True)
        if outcome.status == "failed":
            return  # a fault of the card stays with the process


class _Server:
    """A process that runs kernels, usable until it fails."""

    def __init__(self, paths: Sequence[Path], device: str):
        command = [sys.executable, "-m", __spec__.name, *map(str, paths), "--device", device, "--serve"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._note, daemon=True).start()
        self.usable = self._line(PATIENCE).startswith("ready")

    def ask(self, number: int, patience: float) -> dict[str, Any]:
        """Returns the outcome of a launch, with ``why`` alone where there is none."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        line = self._line(patience)
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            self.usable = found["status"] != "failed"
            return found
        self.usable, code = False, self._process.poll()
        if code is None:
            return {"why": f"no answer in {patience:.0f} s"}
        return {"why": f"the process ended ({code}): {self.said()}"}

    def said(self) -> str:
        """Returns the end of what the process has told of errors."""
        return "".join(self._said)[-1000:].strip()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self, patience: float) -> str:
        try:
            return self._lines.get(timeout=patience)
        except queue.Empty:
            return ""

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._process.wait()
        self._lines.put("")

    def _note(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._said.append(line)


# The process that asks.


def replay(
    paths: Sequence[Path],
    device: str,
    seconds: float,
    keep: Callable[[dict[str, Any]], None],
    after: int = 0,
    patience: float = PATIENCE,
) -> dict[str, Any]:
    """Runs launches until all are done or the time is over; ``keep`` gets what was found so far, now and then.

    Args:
        after: how many launches an earlier run has done.
        patience: seconds for one launch.
    """
    until, of = time.monotonic() + seconds, Launches(paths)
    outcomes: list[dict[str, Any]] = []
    servers: list[_Server] = []
    built, kept_at, why = _building(of, device, after, until), time.monotonic(), ""

    def outcome(number: int, left: float) -> dict[str, Any]:
        launch = of[number]
        try:
            built[launch.source].result(timeout=left)
        except SpikingBrainError as error:
            return asdict(Outcome(launch.kernel, launch.test, "failed", why=str(error)))
        if not servers or not servers[-1].usable:
            if len(servers) == STARTS:
                raise _OutOfOrder(f"{STARTS} processes failed")
            servers.append(_Server(paths, device))
            if not servers[-1].usable:
                raise _OutOfOrder(servers[-1].said() or "the process does not start")
        found = servers[-1].ask(number, min(patience, left))
        if servers[-1].usable:
            return found
        servers[-1].close()
        return {**asdict(Outcome(launch.kernel, launch.test, "failed")), **found}

    try:
        for number in range(after, len(of)):
            left = until - time.monotonic()
            if left <= 0:
                break
            outcomes.append(outcome(number, left))
            if time.monotonic() - kept_at > 2:
                keep(_summary(of, outcomes, after, device))
                kept_at = time.monotonic()
    except FutureTimeout:
        pass  # a compiler took all the time that was left
    except _OutOfOrder as error:
        why = str(error)
    finally:
        for server in servers:
            server.close()
        for future in built.values():
            future.cancel()
    summary = _summary(of, outcomes, after, device) | ({"why": why} if why else {})
    keep(summary)
    return summary


class _OutOfOrder(Exception):
    """No launch can be run any more."""


def _building(of: Launches, device: str, after: int, until: float) -> dict[str, Future[None]]:
    """Starts to compile all sources, in their order."""
    driver = None if device == "maca-emulator" else open_driver(device)
    pool = ThreadPoolExecutor(os.cpu_count())

    def build(launch: Launch) -> None:
        if time.monotonic() > until:
            return
        source = of.source(launch)
        if driver is None:
            emulate.build(source, kernels(source))
        else:
            images.image_of(driver, {"kernels.maca": memoryview(source.encode())})

    futures: dict[str, Future[None]] = {}
    for launch in of[after:]:
        if launch.source not in futures:
            futures[launch.source] = pool.submit(build, launch)
    pool.shutdown(wait=False)
    return futures


def _summary(of: Launches, outcomes: Sequence[dict[str, Any]], after: int, device: str) -> dict[str, Any]:
    done = after + len(outcomes)
    bad = [o for o in outcomes if o["status"] in ("different", "failed")]
    return {
        "device": device,
        "done": done,
        "all": len(of),
        "counts": dict(Counter(o["status"] for o in outcomes)),
        "kernels": len({(o["kernel"], o["test"]) for o in outcomes}),
        "largest_error": max((o["error"] for o in outcomes if o["status"] == "near"), default=0.0),
        "bad": bad,
        "not_run": sorted({launch.test for launch in of[done:]} - {o["test"] for o in outcomes}),
    }


def lines(summary: dict[str, Any]) -> Iterator[str]:
    """Returns what a reader wants to know, the bad first."""
    for outcome in summary["bad"]:
        yield f"{outcome['status']}: {outcome['kernel']} of {outcome['test']}: {outcome['why']}"
    if "why" in summary:
        yield f"kernels cannot be run on {summary['device']}: {summary['why']}"
    counts = ", ".join(f"{count} {status}" for status, count in sorted(summary["counts"].items()))
    yield f"{summary['done']} of {summary['all']} launches on {summary['device']}: {counts or 'none'}"
    if summary["not_run"]:
        yield f"not run: launches of {len(summary['not_run'])} tests"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="launches that tests kept")
    parser.add_argument(
        "--device", default="maca", choices=["maca", "maca-cuda", "maca-emulator"], help="where to run them"
    )
    parser.add_argument("--seconds", type=float, default=1e6, help="when to stop")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for one launch")
    parser.add_argument("--after", type=int, default=0, help="how many launches an earlier run has done")
    parser.add_argument("-o", "--output", type=Path, help="a file for the results, in JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.files, given.device)
        return 0

    def keep(summary: dict[str, Any]) -> None:
        if given.output:
            files.write_atomically(given.output, json.dumps(summary, indent=1).encode())

    try:
        summary = replay(given.files, given.device, given.seconds, keep, given.after, given.patience)
    except (SpikingBrainError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines(summary)))
    return 1 if summary["bad"] or "why" in summary else 0


if __name__ == "__main__":
    sys.exit(main())
