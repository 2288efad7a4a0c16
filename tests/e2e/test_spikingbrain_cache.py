"""SpikingBrain with keys and values in 8 and 16 bits, compiled: kernels read them as they lie, and logits are eager's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import spikingbrain
from spikingbrain.artifact import REPORT
from spikingbrain.models import cache
from spikingbrain.models.spikingbrain import LayerConfig, SpikingBrain, tiny_7b


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (torch.int8, torch.float32),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (torch.float16, torch.float32),
                (torch.bfloat16, torch.float32),
                (torch.int8, torch.bfloat16),
                (torch.float16, torch.bfloat16),
            )
        ),
    ],
    ids=str,
)
def test_equals_eager(kind: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SpikingBrain(replace(tiny_7b(), layers=(LayerConfig(softmax="window"),))).eval().to(dtype)
    tokens = torch.randint(0, model.config.vocabulary, (1, 30))
    state = model.initial_state(1, cache=kind)
    length = torch.export.Dim("T", min=1, max=64)
    entries = {
        "prefill": spikingbrain.Entry((tokens[:, :5], state), {}, {"tokens_BT": {1: length}}),
        "decode": spikingbrain.Entry((tokens[:, :1], state)),
    }
    spikingbrain.export(model, entries, tmp_path / "model.sbrain", state="state", dump=tmp_path)
    program = spikingbrain.load(tmp_path / "model.sbrain")
    records = json.loads(bytes(program.artifact.member(REPORT)))["records"]
    assert [r["reason"] for r in records if r["pass_name"] == "lower-attention"] == ["kernel"] * 2
    assert not [r for r in records if r["status"] == "refused"]
    [raised] = tmp_path.glob("*-raise-attention.mlir")
    ops = [line for line in raised.read_text().splitlines() if '"spikingbrain.attention"(' in line]
    rows = {torch.int8: "i8", torch.float16: "f16", torch.bfloat16: "bf16"}[kind]
    slots = cache.slots(state.keys[0])
    assert [line.count(f"tensor<1x{slots}x2x16x{rows}>") for line in ops] == [2] * 2

    running = program.new_state()
    found = [program.prefill(tokens[:, :20].numpy(), state=running)]
    found += [program.decode(tokens[:, i : i + 1].numpy(), state=running) for i in range(20, 30)]
    with torch.no_grad():
        expected, _ = model(tokens, state)
    # A value on the border of two codes may go to either: sums in another order decide it.
    atol = {torch.int8: 1e-3, torch.float16: 1e-4, torch.bfloat16: 1e-3}[kind]
    if dtype == torch.bfloat16:
        atol = 2.0**-6  # two units in the last place of logits around 2
    logits = np.concatenate(found, 1).astype(np.float32)
    np.testing.assert_allclose(logits, expected.float().numpy(), rtol=0, atol=atol)
