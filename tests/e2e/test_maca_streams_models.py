"""A small SpikingBrain on two streams gives the bits of one, in every order that the emulator tries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spikingbrain
from spikingbrain.backend_maca.run import emulate
from spikingbrain.models.spikingbrain import SpikingBrain, tiny_7b

pytestmark = pytest.mark.skipif(shutil.which(emulate.compiler()) is None, reason="no C++ compiler")


@pytest.mark.slow
def test_two_streams_give_the_bits_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = SpikingBrain(tiny_7b()).eval()
    tokens, state = torch.randint(0, 256, (1, 11)), model.initial_state(1, 16)
    length = torch.export.Dim("T", min=1, max=64)
    entries = {
        "prefill": spikingbrain.Entry((tokens, state), {"last_only": True}, {"tokens_BT": {1: length}}),
        "decode": spikingbrain.Entry((tokens[:, :1], state), {"last_only": True}),
    }
    made = {
        streams: spikingbrain.export(
            model,
            entries,
            tmp_path / f"{streams}.sbrain",
            state="state",
            target="maca-emulator",
            options={"streams": streams},
        )
        for streams in (1, 2)
    }

    def results(streams: int, order: str) -> list[Any]:
        monkeypatch.setenv("SPIKINGBRAIN_EMULATOR_ORDER", order)
        program = spikingbrain.load(made[streams])
        state = program.new_state()
        found = [program.prefill(tokens.numpy(), state=state)]
        found += [program.decode(tokens[:, i : i + 1].numpy(), state=state) for i in range(3)]
        return [*map(np.array, found), *state.snapshot().values()]

    figures = {n: json.loads(bytes(made[n].member("report.json")))["one_token"] for n in (1, 2)}
    for entry in entries:
        one, two = (figures[streams][entry] for streams in (1, 2))
        assert (one["streams"], two["streams"]) == (1, 2)
        assert two["waits"] > 0
        assert one["launches"] == two["launches"] > one["chain"]
    wanted = results(1, "forward")
    for order in emulate.ORDERS:
        for found, right in zip(results(2, order), wanted, strict=True):
            np.testing.assert_array_equal(found, right)
