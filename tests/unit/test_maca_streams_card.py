"""Several streams on a pretended card, which runs what is put into them as late and in as odd an order as events allow."""

# ruff: noqa: F811

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch_mlir")

from pretended_card import ORDER, RECORDS, Runtime
from test_maca import compile_text, load, needs_cxx
from test_maca_device import card, clean, pretended_torch, runtimes  # noqa: F401
from test_maca_streams import kernels, module_text, two_chains

from spikingbrain.backend_maca.backend import MacaBackend
from spikingbrain.backend_maca.run import driver
from spikingbrain.errors import SpikingBrainError

pytestmark = needs_cxx
GIVEN = [
    [np.random.default_rng(n + m).standard_normal(100).astype(np.float32) for n in (0, 9)] for m in (0, 1)
]


@pytest.fixture(scope="module")
def code() -> Any:
    text = module_text(["tensor<?xf32>"] * 2, "tensor<?xf32>", two_chains, kernels)
    return compile_text(text, target="maca", streams=2)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wanted(code: Any) -> list[Any]:
    plan = {**json.loads(code["plan.json"]), "target": "maca-emulator"}
    program = load({**code, "plan.json": json.dumps(plan).encode()})
    return [program.call("main", given)[0] for given in GIVEN]


def on_card(code: Any) -> Any:
    return MacaBackend().load({n: memoryview(c) for n, c in code.items()}, {"device": "maca"}, {})


def called(program: Any, calls: int = 6) -> list[Any]:
    """Returns the results of calls with two inputs in turn, each from the same memory, so that the later ones are graphs."""
    buffers = [[program.to_device(x) for x in given] for given in GIVEN]
    return [program.to_host(program.call("main", buffers[n % 2])[0]) for n in range(calls)]


def are(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return all(np.array_equal(x, wanted[n % 2]) for n, x in enumerate(found))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("records", [0, 1])
def test_every_order_gives_the_bits_of_the_emulator(
    code: Any,
    wanted: Any,
    card: Runtime,
    order: int,
    records: int,
) -> None:
    card.set(ORDER, order)
    card.set(RECORDS, records)
    program = on_card(code)
    graphs, waits = card.graphs, card.waits
    assert are(called(program), wanted)
    assert (card.graphs > graphs) == bool(records)
    assert card.waits > waits


def test_streams_and_events_are_used_again(code: Any, wanted: Any, card: Runtime) -> None:
    assert are(called(on_card(code)), wanted)
    streams, events = card.streams, card.events
    assert are(called(on_card(code)), wanted)
    assert (card.streams, card.events) == (streams, events)


@pytest.mark.parametrize("records", [0, 1])
def test_a_wait_that_is_missing_shows(code: Any, wanted: Any, card: Runtime, records: int) -> None:
    card.set(RECORDS, records)
    plan = json.loads(code["plan.json"])
    steps = plan["entries"]["main"]["launches"]
    for number, wait in [(n, w) for n, s in enumerate(steps) for w in s.get("after", ())]:
        broken = copy.deepcopy(plan)
        broken["entries"]["main"]["launches"][number]["after"].remove(wait)
        program = on_card({**code, "plan.json": json.dumps(broken).encode()})
        shown = []
        for order in (1, 2, 2, 2):
            card.set(ORDER, order)
            try:
                shown.append(not are(called(program), wanted))
            except SpikingBrainError:
                shown.append(True)
        assert any(shown), (number, wait)


def test_streams_begin_and_end_in_that_of_torch(
    code: Any,
    wanted: Any,
    card: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = driver.open_driver("maca")
    fake, _, streams = pretended_torch(opened)
    monkeypatch.setitem(sys.modules, "torch", fake)
    program, told = on_card(code), []
    wait, record = opened.wait, opened.record
    monkeypatch.setattr(opened, "record", lambda event, stream: (told.append(stream), record(event, stream)))
    monkeypatch.setattr(opened, "wait", lambda stream, event: (told.append(stream), wait(stream, event)))
    card.set(ORDER, 1)
    for _ in range(2):
        told.clear()
        assert are(called(program, 2), wanted)
        assert told[0] == told[-1] == streams[0]
        assert len(set(told)) == 2
        streams.reverse()  # the default stream


def test_a_launch_that_fails_is_told_and_nothing_stays_behind(
    code: Any,
    wanted: Any,
    card: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, opened = on_card(code), driver.open_driver("maca")
    launch, seen = opened.launch, []

    def failing(*arguments: Any) -> None:
        seen.append(arguments)
        if len(seen) == 5:
            raise driver.DeviceError("no", why="told")
        launch(*arguments)

    monkeypatch.setattr(opened, "launch", failing)
    with pytest.raises(driver.DeviceError, match="kernel 'update' cannot be launched"):
        called(program)
    assert are(called(program), wanted)


def test_the_pretended_card_checks_events(card: Runtime) -> None:
    opened = driver.open_driver("maca")
    one, other, event = opened.new_stream(), opened.new_stream(), opened.new_event(timed=False)
    with pytest.raises(driver.DeviceError, match="mcStreamWaitEvent failed"):
        opened.wait(one, event)  # nobody has recorded it
    opened.begin_capture(one)
    opened.record(event, one)
    opened.wait(other, event)
    with pytest.raises(driver.DeviceError, match=r"ErrorStreamCaptureUnjoined \(904\)"):
        opened.end_capture(one)
    opened.begin_capture(one)
    opened.record(event, one)
    opened.wait(other, event)
    opened.record(event, other)
    opened.wait(one, event)
    opened.destroy_graph(opened.end_capture(one))
    with pytest.raises(driver.DeviceError, match="mcStreamWaitEvent failed"):
        opened.wait(one, event)  # it stands for a place in what was recorded
    for stream in (one, other):
        opened.destroy_stream(stream)
