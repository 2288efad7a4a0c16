"""A card that is not there: a runtime in C that runs kernels built for the emulator, and an mxcc that builds them so."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from spikingbrain.backend_maca import mxcc
from spikingbrain.backend_maca.run import probe
from spikingbrain.backend_maca.run.emulate import build

SOURCE = Path(__file__).with_name("fake_runtime.c")
DEVICES, MEMORY, TAKES_ADDRESSES, PACKED_END, RECORDS, ORDER, CURRENT = range(7)
DEFAULTS = {DEVICES: 1, MEMORY: 1 << 28, TAKES_ADDRESSES: 1, PACKED_END: -1, RECORDS: 1, ORDER: 0, CURRENT: 0}
SHOWN = '__attribute__((visibility("default")))'
MXCC = f"""#!{sys.executable}
import sys
if sys.argv[1:] == ["--version"]:
    print("mxcc version 1.0.0, pretended")
    sys.exit(0)
expected = "-offload-arch=xcore1000 -device-obj -O3 -ffp-contract=off kernels.maca -o kernels.mcbin".split()
assert sys.argv[1:] == expected, sys.argv
sys.path.insert(0, {str(SOURCE.parent)!r})
from pretended_card import native
open("kernels.mcbin", "wb").write(native(open("kernels.maca").read()))
"""
NVCC = f"""#!{sys.executable}
import sys
if sys.argv[1:] == ["--version"]:
    print("nvcc, pretended")
    sys.exit(0)
assert "-arch=sm_90" in sys.argv and "-fmad=false" in sys.argv, sys.argv
sys.path.insert(0, {str(SOURCE.parent)!r})
from pretended_card import native
from spikingbrain.errors import SpikingBrainError
try:
    code = native(open("kernels.cu").read())
except SpikingBrainError as error:
    sys.exit(str(error))
open("kernels.cubin", "wb").write(code)
"""


def native(source: str) -> bytes:
    """Returns what the pretended card loads: kernels for the emulator, and of each the number of its parameters."""
    names = re.findall(r"__launch_bounds__\(\d+\)\s+(\w+)\(", source)
    names = list(probe.KERNELS) if "probe_ballot" in source else names
    told = "template <class... A> constexpr int count(void (*)(A...)) { return sizeof...(A); }\n"
    told += "".join(f'extern "C" {{ {SHOWN} int sb_count_{name} = count({name}); }}\n' for name in names)
    return build(f"{source}\n{told}", names).read_bytes()


class Runtime:
    """The compiled runtime; ``set`` changes its behaviour, ``count`` tells what was asked of it."""

    def __init__(self, folder: Path, name: str, *flags: str):
        self.path = folder / name
        command = ["gcc", "-shared", "-fPIC", "-w", *flags, str(SOURCE), "-o", str(self.path), "-ldl"]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(self.path))
        self._library.fake_count.restype = self._library.fake_get.restype = ctypes.c_int64

    def set(self, what: int, value: int) -> None:
        self._library.fake_set(what, ctypes.c_int64(value))

    def get(self, what: int) -> int:
        return int(self._library.fake_get(what))

    def reset(self) -> None:
        for what, value in DEFAULTS.items():
            self.set(what, value)
        self._library.fake_reset()

    @property
    def launches(self) -> int:
        return int(self._library.fake_count(0))

    @property
    def graphs(self) -> int:
        return int(self._library.fake_count(1))

    @property
    def modules(self) -> int:
        return int(self._library.fake_count(4))

    @property
    def streams(self) -> int:
        return int(self._library.fake_count(5))

    @property
    def events(self) -> int:
        return int(self._library.fake_count(6))

    @property
    def waits(self) -> int:
        """Returns how often a stream was told to wait for an event."""
        return int(self._library.fake_count(7))

    @property
    def bytes(self) -> int:
        return int(self._library.fake_count(3))


def install_mxcc(root: Path, monkeypatch: Any) -> None:
    """Puts the pretended mxcc into a folder and names that in ``MACA_PATH``."""
    compiler = mxcc.compiler_of(root)
    if not compiler.exists():
        compiler.parent.mkdir(parents=True)
        compiler.write_text(MXCC)
        compiler.chmod(0o755)
    monkeypatch.setenv("MACA_PATH", str(root))
