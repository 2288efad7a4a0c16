"""What tests launch on the emulator: kept in files, or run on a card instead.

pytest --keep-launches FOLDER ...     # one file for each process; see run/launches.py
pytest --card maca-cuda ...           # nvcc and an NVIDIA card; maca with a MetaX card
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# They are about the emulator: what it catches, how it orders threads, where it is built; or pretend a card.
OF_THE_EMULATOR = ("test_maca_emulator.py", "test_maca_mxcc.py", "test_maca_device.py", "test_maca_probe.py")
FAULT = "KernelFault"  # in a test: it wants the emulator to catch something


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-launches", metavar="FOLDER", help="keep what tests launch on the MetaX emulator")
    parser.addoption("--card", metavar="TARGET", help="run on a card what tests launch on the MetaX emulator")


def pytest_configure(config: pytest.Config) -> None:
    folder, card = config.getoption("--keep-launches"), config.getoption("--card")
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if folder and runs_tests:
        config.pluginmanager.register(Keeper(Path(folder)))
    if card and runs_tests:
        config.pluginmanager.register(OnCard(card))  # registered later, it is called earlier


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--card"):
        left = [item for item in items if _is_of_the_emulator(item)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def _is_of_the_emulator(item: Any) -> bool:
    return item.path.name in OF_THE_EMULATOR or FAULT in inspect.getsource(item.function)


class _Seam:
    """Stands between the tests and the emulator: knows the source of each library that is built."""

    def pytest_sessionstart(self) -> None:
        from spikingbrain.backend_maca.run import emulate

        self.sources: dict[Path, str] = {}
        self.test = ""
        self._build, self.emulated = emulate.build, emulate.Kernels.launch
        build, seam = emulate._build, self

        def noted(text: str, library: Path, *rest: Any) -> None:
            seam.sources[library] = text.partition("\nSB_LAUNCHER(")[0]
            build(text, library, *rest)

        def launch(kernels: Any, *call: Any) -> None:
            seam.launch(kernels, *call)

        emulate._build = noted
        emulate.Kernels.launch = launch  # type: ignore[method-assign]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid

    def launch(self, kernels: Any, *call: Any) -> None:
        raise NotImplementedError


class Keeper(_Seam):
    """Writes down what is launched in the usual order of threads."""

    def __init__(self, folder: Path):
        from spikingbrain.backend_maca.run import launches

        self._largest = launches.LARGEST
        self._writer = launches.Writer(folder / f"{os.environ.get('PYTEST_XDIST_WORKER', 'launches')}.zip")

    def launch(self, kernels: Any, *call: Any) -> None:
        name, grid, block, shared_bytes, arguments = call
        source = self.sources.get(kernels.path, "")
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        sizes = (
            *grid,
            shared_bytes,
            [a.nbytes if isinstance(a, np.ndarray) else bytes(a) for a in arguments],
        )
        kept = (
            source
            and not any(f"/{name}::" in self.test for name in OF_THE_EMULATOR)
            and kernels.order == "forward"
            and sum(a.nbytes for a in arrays) <= self._largest
            and not _overlap(arrays)
            and self._writer.wants(source, name, sizes)
        )
        before = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments] if kept else []
        self.emulated(kernels, *call)  # a fault is the test's affair, and nothing to keep
        if kept:
            own: dict[Any, Any] = {}
            after = [own.setdefault(_place(a), a) if isinstance(a, np.ndarray) else a for a in arguments]
            self._writer.add(source, name, grid, int(np.prod(block)), shared_bytes, before, after, self.test)

    def pytest_sessionfinish(self) -> None:
        self._writer.close()


class OnCard(_Seam):
    """Runs on a card what would run on the emulator, from and to the host's memory."""

    def __init__(self, device: str):
        from spikingbrain.backend_maca.run import replay

        self._card = replay.Card(device)

    def launch(self, kernels: Any, *call: Any) -> None:
        name, grid, block, shared_bytes, arguments = call
        self._card.launch(
            self.sources[kernels.path], name, grid, int(np.prod(block)), shared_bytes, arguments
        )


def _place(array: Any) -> tuple[int, int]:
    return array.ctypes.data, array.nbytes


def _overlap(arrays: Sequence[Any]) -> bool:
    """Returns whether arrays share memory without being the same."""
    spans = sorted({(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays if a.nbytes})
    return any(one[1] > other[0] for one, other in itertools.pairwise(spans))
