"""What a program will need and what there is, from invented files of the system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikingbrain import artifact, errors, memory
from spikingbrain.artifact import Artifact, TensorHeader
from spikingbrain.memory import Forecast, available, gb

GB = 10**9
STATE = [
    {"name": "memories.0", "shape": ["B", 4, 16, 16], "dtype": "float32", "fill": 0.0},
    {"name": "keys.0", "shape": ["B", 1000, 16], "dtype": "bfloat16", "fill": 0.0},
    {"name": "position", "shape": ["B"], "dtype": "int64", "fill": 0},
]


def system(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


MEMINFO = "MemTotal: 32000000 kB\nMemFree: 100 kB\nMemAvailable:   20000000 kB\n"
STAT = f"anon 5\ninactive_file {GB}\nactive_file {2 * GB}\n"
V1_STAT = STAT + f"total_inactive_file {GB // 2}\ntotal_active_file {GB // 2}\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 20_000_000 * 1024),
        ({"proc/meminfo": "MemTotal: 32000000 kB\n"}, None),
        (
            {  # version 2: the group around this one leaves less
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/outer/inner\n",
                "sys/fs/cgroup/outer/memory.max": f"{8 * GB}\n",
                "sys/fs/cgroup/outer/memory.current": f"{6 * GB}\n",
                "sys/fs/cgroup/outer/memory.stat": STAT,
                "sys/fs/cgroup/outer/inner/memory.max": "max\n",
                "sys/fs/cgroup/outer/inner/memory.current": "1\n",
            },
            5 * GB,
        ),
        (
            {  # version 1, from inside of a container, where the path is the host's
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "9:cpu:/x\n4:memory:/docker/1234\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GB}\n",
                "sys/fs/cgroup/memory/memory.stat": V1_STAT,
            },
            2 * GB,
        ),
        (
            {  # more in use than allowed, which a lowered limit leaves for a while
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "10\n",
                "sys/fs/cgroup/memory.current": "20\n",
            },
            0,
        ),
    ],
)
def test_what_is_available(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert available(system(tmp_path, files)) == expected


def test_this_machine_has_memory() -> None:
    there = available()
    assert there is None or 0 < there < 1 << 50


@pytest.fixture
def file(tmp_path: Path) -> Path:
    header, path = TensorHeader("w", (100_000,), "f32"), tmp_path / "a.sbrain"
    manifest = {"entries": {}, "state": STATE}
    zeros = np.zeros(100_000, np.float32)
    artifact.write(path, manifest, {"code.bin": bytes(5000)}, [header], lambda _: zeros, {"note": b"x" * 99})
    return path


def test_a_forecast_adds_up(file: Path) -> None:
    found = Forecast.of(Artifact(file), batch=3)
    assert found.state == {"memories.0": 3 * 4096, "keys.0": 3 * 32_000, "position": 24}
    assert found.code == 5000
    assert 400_000 < found.weights < 401_000  # and a header
    assert found.total == found.weights + 5000 + 3 * 36_104


def test_texts_that_cannot_share_a_state_have_one_each() -> None:
    fixed = [{"name": "keys", "shape": [1, 10, 4], "dtype": "float32"}]
    assert memory.state_bytes(fixed, 1) == {"keys": 160}
    assert memory.state_bytes(fixed, 3) == {"keys": 480}
    shared = [
        {"name": "keys", "shape": ["B", 10], "dtype": "float32"},
        {"name": "t", "shape": [], "dtype": "int64"},
    ]
    assert memory.state_bytes(shared, 3) == {"keys": 120, "t": 8}


def test_clearly_too_little_memory_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Forecast.of(Artifact(file))
    for there in (None, found.total, int(found.total / 1.09)):
        monkeypatch.setattr(memory, "available", lambda there=there: there)
        found.check("a.sbrain")
    monkeypatch.setattr(memory, "available", lambda: 200_000)
    with pytest.raises(errors.OutOfMemory) as caught:
        found.check("a.sbrain")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"a.sbrain needs {gb(found.total)} of memory, and 200.0 kB are available"
    assert lines[1].startswith(f"  because: {gb(found.weights)} of weights, 36.1 kB of state of one text; ")
    assert "load(..., check_memory=False)" in lines[2]
    assert isinstance(caught.value, MemoryError)


def test_large_states_are_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(memory, "available", lambda: asked.append(1) or 300 << 20)
    memory.check_state(STATE, 7000)
    assert not asked  # small enough not to ask
    memory.check_state(STATE, 8000)
    with pytest.raises(errors.OutOfMemory, match="a state of 10000 texts needs"):
        memory.check_state(STATE, 10_000)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("count", "words"),
    [(999, "999 bytes"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (152 * GB, "152.0 GB")],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert gb(count) == words
