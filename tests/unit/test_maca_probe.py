"""The probe of devices, on the emulator: it passes, each of its probes can fail, and a failure turns something off."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikingbrain.backend_maca import backend, toolchains
from spikingbrain.backend_maca.run import emulate, probe
from spikingbrain.backend_maca.run.driver import DeviceError
from spikingbrain.tools import cli, doctor

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(probe, "_file", lambda: tmp_path / "maca" / "probe.json")
    probe.hand_scheduled.cache_clear()
    yield
    probe.hand_scheduled.cache_clear()


def test_the_emulator_does_what_is_assumed() -> None:
    findings = probe.run(probe.emulated())
    assert [f.name for f in findings] == list(probe.PROBES)
    assert all(f.passed and not f.found for f in findings)


SIXTEEN = """
extern "C" __global__ void __launch_bounds__(1024) sixteen(int32_t* __restrict__ out) {
  SB_SIXTEEN_WAVES();
  const int32_t thread = threadIdx.x;
  int32_t sum = thread;
  for (int32_t round = 0; round < thread / 64; ++round) {
    sum = sum * 3 + __shfl_xor_sync(SB_FULL_WAVE, sum, 32, 64);
    sum += (int32_t)(__ballot_sync(SB_FULL_WAVE, sum & 1) >> 31) & 3;
  }
  out[thread] = sum;
}
"""


def by_two_warps(folder: Path) -> probe.Launcher:
    """Returns a launcher of the probe as nvcc sees it, on threads of the CPU that form warps of 32 lanes."""
    include = [f"-I{toolchains.ROOT / toolchains.CUDA}", f"-I{Path(__file__).parent / 'stand_ins' / 'cuda'}"]
    launchers = "".join(
        f'extern "C" void run_{name}(unsigned threads, void** arguments) {{ cuda::launch({name}, threads, arguments); }}\n'
        for name in (*probe.KERNELS, "sixteen")
    )
    (folder / "probe.cpp").write_text(probe.SOURCE.read_text() + SIXTEEN + launchers)
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-ffp-contract=off", "-pthread"]
    command = [emulate.compiler(), *flags, *include, folder / "probe.cpp", "-o", folder / "probe.so"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "probe.so"))

    def launch(kernel: str, threads: int, shared_bytes: int, arguments: Sequence[Any]) -> None:
        values = [ctypes.c_int64(a if isinstance(a, int) else a.ctypes.data) for a in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        library[f"run_{kernel}"](ctypes.c_uint(threads), addresses)

    return launch


def test_waves_that_are_made_of_two_warps_do_what_is_assumed(tmp_path: Path) -> None:
    launch = by_two_warps(tmp_path)
    assert [f.found for f in probe.run(launch)] == [""] * len(probe.PROBES)
    found, wanted = np.zeros(1024, np.int32), np.arange(1024)
    launch("sixteen", 1024, 0, [found])
    for number, wave in enumerate(
        wanted.reshape(16, 64)
    ):  # each wave exchanges values as often as its number says
        for _ in range(number):
            wave[:] = wave * 3 + wave[np.arange(64) ^ 32]
            wave += (wave[31] & 1) + 2 * (wave[32] & 1)
    np.testing.assert_array_equal(found, wanted.astype(np.int32))


# What a device might do instead: probe that notices -> text and replacement, what is found.
OTHERWISE = {
    "votes of 64 lanes": ("(int64_t)__ballot", "(uint32_t)__ballot", "thread 0 sees 0x0000000049249249"),
    "shuffles over 64 lanes": (
        "(int32_t)distance, 64)", "(int32_t)distance, 32)", "at distance 32, lane 0 gets the value of 0",
    ),
    "matrix instruction, i8": (
        "mma_16x16x16i8(x[row * 4 + quarter], y[row * 4 + quarter]",
        "mma_16x16x16i8(y[row * 4 + quarter], x[row * 4 + quarter]", "the result is transposed",
    ),
    "matrix instruction, f32": (
        "probe_f32, __builtin_mxc_mma_16x16x4f32, float)",
        "probe_f32, [](auto x, auto y, auto d) { d[0] += 1; return __builtin_mxc_mma_16x16x4f32(x, y, d); }, float)",
        "64 of 256 sums differ; row 0, column 0:",
    ),
    "rounding to 16 bits": (
        "brain[i] = __float2bfloat16(x[i])", "brain[i].bits = *(const uint32_t*)&x[i] >> 16", "to bf16 gives 0x",
    ),
    "products and sums are not fused": (
        "x[thread] * x[thread] + y[thread]", "fmaf(x[thread], x[thread], y[thread])", "of 64 results are fused",
    ),
    "64 KiB of shared memory": ("memory[i] =", "memory[i % 8192] =", "16384 of 16384 words differ"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong_device() -> list[probe.Finding]:
    """What the probe finds on a machine that does all of it otherwise."""
    source = probe.SOURCE.read_text()
    for old, new, _ in OTHERWISE.values():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return probe.run(probe.emulated(source))


@pytest.mark.parametrize("name", OTHERWISE)
def test_each_probe_notices(name: str, wrong_device: list[probe.Finding]) -> None:
    (finding,) = [f for f in wrong_device if f.name == name]
    assert not finding.passed
    assert OTHERWISE[name][2] in finding.found


def test_a_failure_turns_a_feature_off_and_warns(
    wrong_device: list[probe.Finding], caplog: pytest.LogCaptureFixture
) -> None:
    def wave_kernels() -> dict[str, bool]:
        return {s.target.name: s.target.wave_kernels for s in backend.MacaBackend().targets()}

    assert probe.kept() is None
    assert all(wave_kernels().values())
    record = probe.Record("a card", "digest", None, tuple(wrong_device))
    probe.keep(record)
    assert [name for name, on in wave_kernels().items() if not on] == ["maca"]
    assert probe.kept() == record
    assert "a card failed the probe of: votes of 64 lanes, matrix instruction, i8" in caplog.text
    assert "kernels scheduled by hand are off" in caplog.text
    harmless = tuple(f for f in wrong_device if "off" not in f.consequence)
    probe.keep(probe.Record("a card", "digest", None, harmless))
    assert harmless and all(wave_kernels().values())


class Card:
    """A device whose memory is the process's, on the emulator; it takes arguments by one convention only."""

    def __init__(self, convention: int | None):
        self.convention, self.held = convention, {}
        self.modules = self.streams = 0
        self.kernels = emulate.Kernels(emulate.build(probe.SOURCE.read_text(), probe.KERNELS))

    def here(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def load(self, image: bytes) -> int:
        assert image == b"native"
        self.modules += 1
        return 1

    def unload(self, module: int) -> None:
        self.modules -= 1

    def new_stream(self) -> int:
        self.streams += 1
        return 2

    def destroy_stream(self, stream: int) -> None:
        self.streams -= 1

    def function(self, module: int, name: str) -> str:
        return name

    def device_name(self) -> str:
        return "C550"

    def allocate(self, size: int) -> int:
        memory = np.zeros(size + 64, np.uint8)
        address: int = (memory.ctypes.data + 63) // 64 * 64
        self.held[address] = memory
        return address

    def free(self, address: int) -> None:
        del self.held[address]

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

    download = upload

    def launch(
        self,
        function: str,
        grid: Any,
        block: Any,
        shared: int,
        stream: int,
        values: Sequence[int],
        convention: Any,
    ) -> None:
        if convention != self.convention:
            raise DeviceError("mcModuleLaunchKernel failed on the card")
        pointers = [ctypes.c_void_p(v) if v in self.held else ctypes.c_int64(v) for v in values]
        self.kernels.launch(function, grid, block, shared, pointers)


@pytest.mark.parametrize("convention", [None, 0, 3])
def test_a_device_is_probed_through_its_driver(convention: int | None) -> None:
    card: Any = Card(convention)
    assert probe.convention_of(card, b"native") == convention
    with probe.on_device(card, b"native", convention) as launch:
        assert all(f.passed for f in probe.run(launch))
    assert not card.held  # all memory was given back
    assert not card.modules
    assert not card.streams


def test_a_device_that_runs_nothing_is_an_error() -> None:
    card: Any = Card(17)
    with pytest.raises(DeviceError, match="no kernel of the probe runs on the card"):
        probe.convention_of(card, b"native")


def test_a_device_is_probed_once_until_it_changes(
    monkeypatch: pytest.MonkeyPatch, wrong_device: list[probe.Finding], caplog: pytest.LogCaptureFixture
) -> None:
    runs = []

    def run(launch: probe.Launcher) -> list[probe.Finding]:
        runs.append(launch)
        return probe_run(launch) if len(runs) < 4 else wrong_device

    probe_run = probe.run
    monkeypatch.setattr(probe, "run", run)
    card: Any = Card(None)
    for _ in range(2):
        assert probe.examine(card, b"native").convention is None
    assert len(runs) == 1
    assert probe.examine(Card(3), b"native").convention == 3  # type: ignore[arg-type]
    assert len(runs) == 2
    probe.examine(Card(3), b"native", anew=True)  # type: ignore[arg-type]
    assert len(runs) == 3
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    card.device_name = lambda: "C500"
    probe.examine(card, b"native")
    assert len(runs) == 4
    assert "C500, votes of 64 lanes: thread 0 sees 0x0000000049249249" in caplog.text


def test_doctor_tells_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MACA_PATH", raising=False)
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "ok  numpy: " in told
    assert "maca-emulator: compiles and runs here" in told
    assert "--  SDK: MACA_PATH is not set" in told and "try: where the SDK is installed" in told
    assert told.endswith("nothing is wrong\n")
    monkeypatch.setenv("MACA_PATH", "/nowhere")
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "!!  SDK: MACA_PATH is '/nowhere', but its compiler does not run" in told
    assert told.endswith("1 problem, marked !!\n")


def test_doctor_goes_on_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MACA_PATH", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    *_, last = doctor._metax(True)
    assert (last.status, last.what) == ("problem", "emulator")
    assert "'no-such-compiler' is needed" in last.found


def test_doctor_probes_a_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong_device: list[probe.Finding]
) -> None:
    from spikingbrain.backend_maca import mxcc
    from spikingbrain.backend_maca.run import driver

    monkeypatch.setattr(mxcc, "find", lambda: mxcc.Sdk(Path("/opt/maca"), "mxcc version 1.0.0\n"))
    monkeypatch.setattr(mxcc, "build", lambda source, sdk: b"native")
    monkeypatch.setattr(driver, "open_driver", lambda name: Card(None))
    assert not [line for line in doctor._metax(False) if line.status != "ok"]
    record = probe.kept()
    assert record and record.device == "C550" and all(f.passed for f in record.findings)
    monkeypatch.setattr(probe, "run", lambda launch: wrong_device)
    lines = [line for line in doctor._metax(False) if line.status == "problem"]
    assert lines[0].what == "C550, votes of 64 lanes"
    assert lines[0].found == "thread 0 sees 0x0000000049249249; kernels scheduled by hand are off"
