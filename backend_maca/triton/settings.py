"""Settings of the Triton kernels: which there are, where they are read from, and those with which kernels are launched now.

``tune.py`` searches them; ``torch.compile(..., options={"target": "maca", "tuning": {...}})`` takes them for what it compiles.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikingbrain.errors import OptionError
from spikingbrain.tuning import changed, setting, settings_in

log = logging.getLogger(__name__)

_WARPS, _STAGES = ((1, 2, 4, 8), (2, 8)), ((1, 2, 3, 4), (2,))
OPS = ("attention", "recurrence", "delta", "scan", "spikes")


@dataclass(frozen=True)
class TritonTuning:
    """What launchers of Triton kernels choose by. Results stay the same but for the order of sums of floats.

    A warp is a wave of 64 lanes on a MetaX GPU. Sizes are powers of two; a block is never larger than the problem.

    Attributes:
        attention_rows: most queries of a block.
        attention_keys: most keys of a step of the softmax.
        attention_numbers: most numbers of a block of queries, rows by channels, of 16 bits, forward.
        attention_gradient_numbers: the same, backward, which holds more such blocks at a time.
        attention_float_numbers: the same of float32, forward and backward: registers hold fewer.
        attention_warps: of a block.
        attention_stages: of the pipeline over keys.
        block_steps: most steps of a block of a recurrence of 16 bits.
        block_channels: most keys, and most values, of a tile of its state.
        float_block_steps: most steps in float32; at 64 by 64 NVIDIA's registers spill.
        float_block_channels: most keys, and most values, in float32.
        step_values: values of a block where there is one step.
        delta_numbers: most numbers of a tile of the state of delta rules, which holds the rows of all keys.
        recurrence_warps: of a block.
        recurrence_stages: of its pipelines.
        scan_channels: channels of a block of the elementwise recurrence.
        scan_warps: of a block.
        scan_stages: of its pipeline over steps.
        spike_rows: most rows of a block of the spiking projection.
        spike_outputs: outputs of a block.
        spike_channels: most channels of a dot.
        spike_few_rows_channels: the same in blocks of 16 rows.
        spike_warps: of a block.
        spike_stages: of its pipeline over channels.
    """

    attention_rows: int = setting(64, (16, 32, 64, 128), (32, 128), "attention")
    attention_keys: int = setting(32, (16, 32, 64, 128), (16, 64), "attention")
    attention_numbers: int = setting(8192, (2048, 4096, 8192, 16384), (4096, 16384), "attention")
    attention_gradient_numbers: int = setting(4096, (2048, 4096, 8192, 16384), (2048, 8192), "attention")
    attention_float_numbers: int = setting(2048, (1024, 2048, 4096, 8192), (4096,), "attention")
    attention_warps: int = setting(4, *_WARPS, "attention")
    attention_stages: int = setting(1, *_STAGES, "attention")
    block_steps: int = setting(64, (16, 32, 64), (16, 32), "recurrence")
    block_channels: int = setting(64, (16, 32, 64, 128), (32, 128), "recurrence")
    float_block_steps: int = setting(32, (16, 32, 64), (16, 64), "recurrence")
    float_block_channels: int = setting(32, (16, 32, 64, 128), (16, 64), "recurrence")
    step_values: int = setting(32, (16, 32, 64, 128), (16, 64), "recurrence")
    delta_numbers: int = setting(2048, (1024, 2048, 4096, 8192), (4096,), "delta")
    recurrence_warps: int = setting(4, *_WARPS, "recurrence")
    recurrence_stages: int = setting(1, *_STAGES, "recurrence")
    scan_channels: int = setting(256, (64, 128, 256, 512, 1024), (64, 128, 512), "scan")
    scan_warps: int = setting(4, *_WARPS, "scan")
    scan_stages: int = setting(1, *_STAGES, "scan")
    spike_rows: int = setting(64, (16, 32, 64, 128), (32, 128), "spikes")
    spike_outputs: int = setting(64, (16, 32, 64, 128), (32, 128), "spikes")
    spike_channels: int = setting(64, (32, 64, 128), (32, 128), "spikes")
    spike_few_rows_channels: int = setting(128, (32, 64, 128, 256), (64, 256), "spikes")
    spike_warps: int = setting(4, *_WARPS, "spikes")
    spike_stages: int = setting(1, *_STAGES, "spikes")

    def options(self, op: str) -> dict[str, int]:
        """Returns how the kernels of ``attention``, ``recurrence``, ``scan`` or ``spike`` are compiled."""
        return {
            "num_warps": getattr(self, f"{op}_warps"),
            "num_stages": getattr(self, f"{op}_stages"),
        }


USUAL = TritonTuning()
SETTINGS = settings_in(TritonTuning)
_current: ContextVar[TritonTuning] = ContextVar("settings of Triton kernels", default=USUAL)


def current() -> TritonTuning:
    """Returns the settings of launches here."""
    return _current.get()


@contextmanager
def using(changes: Mapping[str, int]) -> Iterator[None]:
    """Launches with the usual settings but for some; raises OptionError for an unknown name or a value that cannot be."""
    token = _current.set(changed(USUAL, changes))
    try:
        yield
    finally:
        _current.reset(token)


def read(given: Any, device: str = "") -> dict[str, int]:
    """Returns checked settings: those given, or those in the JSON file of that path, which ``tune.py`` or a user wrote.

    Logs a warning where the file's were measured on another device than ``device``. Raises OptionError.
    """
    found = given
    if isinstance(given, str | Path):
        try:
            found = json.loads(Path(given).read_bytes())
        except OSError as error:
            raise OptionError(f"cannot read {given}", why=error.strerror or str(error)) from error
        except ValueError as error:
            raise OptionError(f"{given} is no JSON", why=str(error), hint='{"attention_keys": 64}') from error
    if isinstance(found, Mapping) and "tuning" in found:
        measured = found.get("device")
        if device and measured and measured != device:
            log.warning(
                "%s was tuned for %r, this is %r: other settings may be faster", given, measured, device
            )
        found = found["tuning"]
    if not isinstance(found, Mapping):
        raise OptionError(
            f"tuning: {given!r} holds no settings", hint='{"attention_keys": 64}, or a file of JSON'
        )
    changed(USUAL, found)
    return dict(found)
