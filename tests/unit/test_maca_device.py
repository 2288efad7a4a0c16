"""Programs on a pretended card: the whole path through a runtime's C interface, against the same kernels on the emulator."""

from __future__ import annotations

import gc
import shutil
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pretended_card import (
    CURRENT,
    DEVICES,
    MEMORY,
    PACKED_END,
    RECORDS,
    TAKES_ADDRESSES,
    Runtime,
    install_mxcc,
    native,
)

pytest.importorskip("torch_mlir")

import spikingbrain
from spikingbrain.backend_maca import mxcc
from spikingbrain.backend_maca.backend import MacaBackend
from spikingbrain.backend_maca.run import blas, driver, emulate, images, probe
from spikingbrain.backend_maca.run import device as devices
from spikingbrain.errors import CallError, MissingDependency, OutOfMemory

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")


class Running(torch.nn.Module):
    """A projection less the mean of all that came so far."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 40), torch.nn.Linear(40, 8)

    def forward(self, x: Any, state: dict[str, Any]) -> Any:
        y = self.down(torch.relu(self.up(x)))
        total, count = state["total"] + y.sum(1), state["count"] + x.shape[1]
        return y - (total / count[:, None])[:, None], {"total": total, "count": count}


OWN = {"providers": "linear=own,matmul=own"}  # the pretended card has no matrix library


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runtime]:
    folder = tmp_path_factory.mktemp("runtimes")
    return {
        "mc": Runtime(folder, "libmcruntime.so", "-DPREFIX=mc"),
        "hc": Runtime(folder, "libhcruntime.so", "-DPREFIX=hc"),
        "old": Runtime(folder, "libmcold.so", "-DPREFIX=mc", "-DOLD"),
        "cuda": Runtime(folder, "libcuda.so.1", "-DCUDA"),
    }


@pytest.fixture
def clean(runtimes: dict[str, Runtime]) -> Iterator[None]:
    driver.open_driver.cache_clear()
    images._examined.cache_clear()
    yield
    for runtime in runtimes.values():
        runtime.reset()
    driver.open_driver.cache_clear()
    images._examined.cache_clear()


@pytest.fixture
def card(
    runtimes: dict[str, Runtime], clean: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> Runtime:
    """A MetaX card with its SDK, as far as this process can tell."""
    monkeypatch.setenv("SPIKINGBRAIN_MACA_RUNTIME", str(runtimes["mc"].path))
    install_mxcc(tmp_path_factory.mktemp("sdk"), monkeypatch)
    return runtimes["mc"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    model = Running().eval()
    length = torch.export.Dim("T", min=1, max=64)
    state = {"total": torch.zeros(2, 8), "count": torch.zeros(2, dtype=torch.int64)}
    entry = spikingbrain.Entry((torch.randn(2, 5, 8), state), dynamic_shapes={"x": {1: length}})
    path = tmp_path_factory.mktemp("model") / "running.sbrain"
    return spikingbrain.export(model, {"step": entry}, path, state="state", target="maca", options=OWN)


def program(exported: Any, device: str) -> Any:
    executable = MacaBackend().load(exported.code, {"device": device}, exported.weights())
    return spikingbrain.program.Program(exported.manifest, executable, exported)


def steps(loaded: Any, lengths: tuple[int, ...]) -> list[Any]:
    random, state = np.random.default_rng(1), loaded.new_state()
    outputs = [
        loaded.step(random.standard_normal((2, n, 8)).astype(np.float32), state=state) for n in lengths
    ]
    return [*outputs, *state.snapshot().values()]


LENGTHS = (9, *[1] * 9, 30, 1)


def test_the_card_and_the_emulator_agree_bit_for_bit(exported: Any, card: Runtime) -> None:
    on_card = program(exported, "maca")
    for found, wanted in zip(
        steps(on_card, LENGTHS), steps(program(exported, "maca-emulator"), LENGTHS), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_steps_that_come_again_are_launched_as_one_graph(exported: Any, card: Runtime) -> None:
    loaded = program(exported, "maca")
    x, state = np.ones((2, 1, 8), np.float32), loaded.new_state()
    card.reset()
    for _ in range(6):  # the state moves between two places
        loaded.step(x, state=state)
    launches, graphs = card.launches, card.graphs
    assert graphs > 0
    for _ in range(4):
        loaded.step(x, state=state)
    assert card.graphs == graphs + 4
    assert card.launches == launches
    np.testing.assert_array_equal(state.field("count"), [10, 10])


def test_a_runtime_that_cannot_record_is_told_of_once(
    exported: Any, card: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    card.set(RECORDS, 0)
    wanted = steps(program(exported, "maca-emulator"), LENGTHS)
    for found, right in zip(steps(program(exported, "maca"), LENGTHS), wanted, strict=True):
        np.testing.assert_array_equal(found, right)
    assert card.graphs == 0
    warnings = [r.getMessage() for r in caplog.records if "not recorded" in r.getMessage()]
    assert len(warnings) == 1
    assert "ErrorStreamCaptureUnsupported (800)" in warnings[0]


@pytest.mark.parametrize("end", driver.CONVENTIONS)
def test_arguments_go_the_way_that_the_probe_finds(exported: Any, card: Runtime, end: int | None) -> None:
    card.set(TAKES_ADDRESSES, int(end is None))
    card.set(PACKED_END, -1 if end is None else end)
    assert images.convention(driver.open_driver("maca"), exported.code) == end
    np.testing.assert_array_equal(
        steps(program(exported, "maca"), (3,))[0], steps(program(exported, "maca-emulator"), (3,))[0]
    )


def test_the_twin_with_another_prefix(
    exported: Any, runtimes: dict[str, Runtime], card: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKINGBRAIN_MACA_RUNTIME", str(runtimes["hc"].path))
    assert steps(program(exported, "maca"), (3,))[0].shape == (2, 3, 8)
    assert runtimes["hc"].launches > 0


def test_nvidia_cards_run_the_same_source(
    exported: Any, runtimes: dict[str, Runtime], clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.CudaDriver.__init__, "__defaults__", (str(runtimes["cuda"].path),))
    asked = []
    monkeypatch.setattr(images, "nvcc", lambda source, arch: asked.append(arch) or native(source))
    for found, right in zip(
        steps(program(exported, "maca-cuda"), LENGTHS),
        steps(program(exported, "maca-emulator"), LENGTHS),
        strict=True,
    ):
        np.testing.assert_array_equal(found, right)
    assert asked == ["sm_90"]
    assert runtimes["cuda"].graphs > 0


def test_memory_is_asked_for_once(exported: Any, card: Runtime) -> None:
    loaded = program(exported, "maca")
    state, x = loaded.new_state(), np.ones((2, 4, 8), np.float32)
    for _ in range(3):
        loaded.step(x, state=state)
    before = card.bytes
    for _ in range(5):
        loaded.step(x, state=state)
    assert card.bytes == before


def test_memory_that_others_need_is_given_back(card: Runtime) -> None:
    pool = devices.Pool(driver.open_driver("maca"))
    card.set(MEMORY, card.bytes + 3000)
    pool.free(pool.allocate(2048), 2048)
    assert pool.allocate(1024)  # fits only where the free block goes back
    with pytest.raises(OutOfMemory, match=r"ErrorMemoryAllocation \(2\): out of memory"):
        pool.allocate(1 << 20)


def test_tensors_cross_without_copies(exported: Any, card: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.MacaDriver, "device_type", 1)  # what torch of this process can hold
    executable = program(exported, "maca").executable
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        tensor = torch.ones(3, 5).to(dtype)
        buffer = executable.borrow(torch.utils.dlpack.to_dlpack(tensor))
        assert buffer.address == tensor.data_ptr()
        back = torch.utils.dlpack.from_dlpack(executable.lend(buffer))
        assert back.data_ptr() == tensor.data_ptr()
        assert back.dtype == dtype
        assert torch.equal(back, tensor)
    empty = executable.borrow(torch.utils.dlpack.to_dlpack(torch.ones(3, 0, 4).transpose(0, 2)))
    assert empty.shape == (4, 0, 3)
    with pytest.raises(ValueError, match="not contiguous"):
        executable.borrow(torch.utils.dlpack.to_dlpack(torch.ones(3, 4).T))


def test_lent_memory_lives_as_long_as_the_tensor(
    exported: Any, card: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.MacaDriver, "device_type", 1)
    executable = program(exported, "maca").executable
    freed: list[int] = []
    monkeypatch.setattr(executable.machine.memory, "free", lambda address, size: freed.append(address))
    buffer = executable.to_device(np.arange(4, dtype=np.float32))
    address = buffer.address
    tensor = torch.utils.dlpack.from_dlpack(executable.lend(buffer))
    unused = executable.lend(buffer)
    del buffer, unused
    assert address not in freed
    assert tensor.tolist() == [0, 1, 2, 3]
    del tensor
    assert address in freed


def pretended_torch(opened: driver.Driver) -> tuple[Any, dict[int, int], list[int]]:
    """Returns a torch with the card, the memory that it gave out, and its streams, of which the first is the current one."""
    taken: dict[int, int] = {}
    streams = [opened.new_stream(), 0]

    def allocate(size: int, ordinal: int) -> int:
        taken[address := opened.allocate(size)] = size
        return address

    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        current_stream=lambda ordinal: types.SimpleNamespace(cuda_stream=streams[0]),
        caching_allocator_alloc=allocate,
        caching_allocator_delete=lambda address: (opened.free(address), taken.pop(address)),
        OutOfMemoryError=RuntimeError,
    )
    return types.SimpleNamespace(cuda=cuda), taken, streams


def test_with_torch_on_the_card_its_allocator_and_stream_are_used(
    exported: Any, card: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, taken, streams = pretended_torch(driver.open_driver("maca"))
    monkeypatch.setitem(sys.modules, "torch", fake)
    loaded = program(exported, "maca")
    wanted = steps(program(exported, "maca-emulator"), LENGTHS)
    assert taken
    np.testing.assert_array_equal(steps(loaded, LENGTHS)[-3], wanted[-3])
    streams.reverse()  # the default stream cannot be recorded
    recorded = card.graphs
    np.testing.assert_array_equal(steps(loaded, LENGTHS)[-3], wanted[-3])
    assert card.graphs == recorded
    del loaded
    assert not taken


def test_torch_may_come_after_the_first_programs(
    exported: Any, card: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.MacaDriver, "device_type", 1)
    opened = driver.open_driver("maca")
    monkeypatch.delitem(sys.modules, "torch")
    one, other = (program(exported, "maca").executable for _ in range(2))
    arguments = [one.to_device(np.ones(shape, dtype)) for shape, dtype in ARGUMENTS]
    (wanted, *_) = one.call("step", arguments)
    before = one.machine.memory.stream()
    fake, taken, streams = pretended_torch(opened)
    monkeypatch.setitem(sys.modules, "torch", fake)
    waited: list[int] = []
    monkeypatch.setattr(opened, "synchronize", waited.append)
    one.borrow(torch.utils.dlpack.to_dlpack(torch.ones(2)))
    assert set(waited) == {before}  # what ran there is done before torch's stream goes on
    for executable in (one, other):
        assert executable.machine.memory.stream() == streams[0] != before
        (found, *_) = executable.call("step", arguments)
        assert found.address in taken
        np.testing.assert_array_equal(executable.to_host(found), executable.to_host(wanted))


@pytest.mark.parametrize("name", ["mc", "cuda"])
def test_the_card_that_a_process_works_with_stays_so(
    exported: Any, runtimes: dict[str, Runtime], card: Runtime, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runtime, device = runtimes[name], {"mc": "maca", "cuda": "maca-cuda"}[name]
    monkeypatch.setattr(driver.CudaDriver.__init__, "__defaults__", (str(runtimes["cuda"].path),))
    monkeypatch.setattr(images, "nvcc", lambda source, arch: native(source))
    runtime.set(CURRENT, 3)  # as after torch.cuda.set_device(3)
    found = steps(program(exported, device), LENGTHS)
    assert runtime.get(CURRENT) == 3
    assert runtime.graphs > 0
    runtime.set(CURRENT, 0)
    np.testing.assert_array_equal(found[0], steps(program(exported, "maca-emulator"), LENGTHS)[0])


def test_threads_may_share_a_card(exported: Any, card: Runtime) -> None:
    programs = [program(exported, "maca") for _ in range(2)]
    wanted, found = steps(program(exported, "maca-emulator"), LENGTHS), {}

    def work(number: int) -> None:
        found[number] = steps(programs[number % 2], LENGTHS)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for results in found.values():
        for mine, right in zip(results, wanted, strict=True):
            np.testing.assert_array_equal(mine, right)


def test_tensors_of_another_card_are_refused(
    exported: Any, card: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.MacaDriver, "device_type", 1)
    executable = program(exported, "maca").executable
    capsule = torch.utils.dlpack.to_dlpack(torch.ones(3))
    executable.machine.driver.ordinal = 1
    with pytest.raises(ValueError, match="this tensor is on device 0, the program on device 1"):
        executable.borrow(capsule)


def test_modules_and_streams_are_given_back(exported: Any, card: Runtime) -> None:
    program(exported, "maca")
    gc.collect()
    program(exported, "maca")
    modules, streams = card.modules, card.streams
    for _ in range(3):
        gc.collect()
        program(exported, "maca")
    assert (card.modules, card.streams) == (modules, streams)


def test_products_beyond_what_the_library_counts_are_refused() -> None:
    library = object.__new__(blas.Blas)
    step = {"sizes": [1 << 31, 1, 1], "leading": [1, 1, 1], "batch": 1}
    with pytest.raises(blas.BlasError, match="2147483648 x 1 by 1 x 1 cannot be asked for"):
        library.multiply(step, [0, 0, 0], int)


def test_a_kernel_that_fails_is_named_at_the_next_copy(exported: Any, card: Runtime) -> None:
    executable = program(exported, "maca").executable
    arguments = [executable.to_device(np.ones(shape, dtype)) for shape, dtype in ARGUMENTS]
    arguments[0].address += 1 << 40  # memory that is nobody's
    (result, *_) = executable.call("step", arguments)
    with pytest.raises(
        driver.DeviceError, match="mcMemcpyAsync failed on the card\n  because: ErrorLaunchFailure"
    ):
        executable.to_host(result)


ARGUMENTS = [((2, 5, 8), np.float32), ((2, 8), np.float32), ((2,), np.int64)]


def test_tensors_that_begin_anywhere_are_taken(exported: Any, card: Runtime) -> None:
    executable = program(exported, "maca").executable
    x, *others = [executable.to_device(np.ones(shape, dtype)) for shape, dtype in ARGUMENTS]
    wide = executable.to_device(np.ones(81, np.float32))
    moved = devices.DeviceArray(wide.owner, wide.address + 4, x.shape, x.dtype)
    taken = executable.machine.argument(moved)
    assert taken.address % 16 == 0
    assert executable.machine.argument(x) is x
    wanted, found = (executable.call("step", [first, *others])[0] for first in (x, moved))
    np.testing.assert_array_equal(executable.to_host(found), executable.to_host(wanted))


def test_programs_on_a_card_share_its_memory_and_stream(exported: Any, card: Runtime) -> None:
    one, other = (program(exported, "maca").executable for _ in range(2))
    assert one.device == other.device
    assert one.machine.memory is other.machine.memory


def test_memory_that_dies_while_memory_is_asked_for(card: Runtime) -> None:
    pool = devices.Pool(driver.open_driver("maca"))
    address = pool.allocate(512)
    with pool._lock:  # as a garbage collection inside
        pool.free(address, 512)
    assert pool.allocate(512) == address


def test_what_does_not_fit_is_refused(exported: Any, card: Runtime) -> None:
    executable = program(exported, "maca").executable
    with pytest.raises(CallError, match="argument 0 of 'step' is a ndarray\n  try: to_device"):
        executable.call("step", [np.ones(shape, dtype) for shape, dtype in ARGUMENTS])
    with pytest.raises(CallError, match="declared float32"):
        executable.call("step", [executable.to_device(np.ones(shape, np.int64)) for shape, _ in ARGUMENTS])


def test_a_machine_without_a_card(
    runtimes: dict[str, Runtime], clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKINGBRAIN_MACA_RUNTIME", "/nowhere/libmcruntime.so")
    with pytest.raises(MissingDependency, match=r"the runtime /nowhere/libmcruntime\.so does not load"):
        driver.open_driver("maca")
    monkeypatch.setenv("SPIKINGBRAIN_MACA_RUNTIME", str(runtimes["mc"].path))
    runtimes["mc"].set(DEVICES, 0)
    with pytest.raises(driver.DeviceError, match="there is no device 0"):
        driver.open_driver("maca")
    status = {s.target.name: s for s in MacaBackend().targets()}["maca"]
    assert status.compiles
    assert not status.runs
    runtimes["mc"].set(DEVICES, 1)
    status = {s.target.name: s for s in MacaBackend().targets()}["maca"]
    assert status.runs
    assert status.note.startswith("pretended card; ")


def test_an_old_runtime(
    exported: Any, runtimes: dict[str, Runtime], card: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKINGBRAIN_MACA_RUNTIME", str(runtimes["old"].path))
    with pytest.raises(MissingDependency, match="has no function mcModuleLaunchKernel"):
        steps(program(exported, "maca"), (1,))


def test_without_native_code_and_sdk(exported: Any, card: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MACA_PATH")
    with pytest.raises(MissingDependency, match="set MACA_PATH"):
        program(exported, "maca")


def test_an_artifact_with_native_code_needs_no_sdk(
    exported: Any, card: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"kernels": bytes(exported.code["kernels.maca"]), "probe": probe.SOURCE.read_bytes()}
    built = {f"{name}.{mxcc.ARCH}.mcbin": memoryview(native(text.decode())) for name, text in sources.items()}
    monkeypatch.delenv("MACA_PATH")
    card.set(TAKES_ADDRESSES, 0)
    card.set(PACKED_END, 3)
    code = {**exported.code, **built}
    executable = MacaBackend().load(code, {"device": "maca"}, exported.weights())
    executable.call("step", [executable.to_device(np.ones(shape, dtype)) for shape, dtype in ARGUMENTS])
    assert card.launches > 0


def test_kernels_that_the_card_would_run_wrongly_are_refused(
    exported: Any, card: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = bytes(exported.code["kernels.maca"]).decode()
    relied = next(name for name, word in images.USES.items() if word in source)
    spared = next(name for name, word in images.USES.items() if word not in source)

    def failing(name: str) -> Any:
        return lambda driver, image: probe.Record(
            "a card", "", None, (probe.Finding(name, False, "it was 3", "off"),)
        )

    monkeypatch.setattr(images, "_examined", failing(spared))
    program(exported, "maca")
    monkeypatch.setattr(images, "_examined", failing(relied))
    with pytest.raises(
        driver.DeviceError, match=f"this artifact rely on: {relied}\n  because: it was 3\n  try: export"
    ):
        program(exported, "maca")


def test_events_streams_and_fills(card: Runtime) -> None:
    opened = driver.open_driver("maca")
    stream, start, end = opened.new_stream(), opened.new_event(), opened.new_event()
    place = opened.allocate(64)
    opened.record(start, stream)
    opened.fill(place, 7, 64, stream)
    opened.copy(place + 32, place, 16, stream)
    opened.record(end, stream)
    opened.wait(stream, end)
    assert opened.milliseconds(start, end) == 0.5
    found = np.empty(64, np.uint8)
    opened.download(found.ctypes.data, place, 64, stream)
    assert (found == 7).all()
    opened.free(place)
    with pytest.raises(
        driver.DeviceError, match=r"mcFree failed on the card\n  because: ErrorInvalidValue \(1\)"
    ):
        opened.free(place)
    assert opened.memory()[1] == 1 << 28
