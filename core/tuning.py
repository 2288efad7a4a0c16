"""Settings of kernels that decide how long they take: which there are, and where they are read from.

``spikingbrain tune`` searches them (``search.py``); ``export(..., options={"tuning": {...}})`` takes them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spikingbrain.errors import ArtifactError, OptionError

if TYPE_CHECKING:
    from spikingbrain.artifact import Artifact
    from spikingbrain.target import Target

log = logging.getLogger(__name__)
_Group = TypeVar("_Group", bound=Any)


@dataclass(frozen=True)
class Setting:
    """What a setting may be.

    Attributes:
        allowed: every value that it may have.
        tried: values that a search tries beside the usual one.
        ops: a pattern of what the report of an export says of ops whose kernels read it.
        kind: of the targets that have these kernels, ``"cpu"`` or ``"gpu"``.
    """

    allowed: range | Sequence[int]
    tried: tuple[int, ...]
    ops: str
    kind: str = "cpu"

    def __str__(self) -> str:
        if not isinstance(self.allowed, range):
            return f"one of {', '.join(map(str, self.allowed))}"
        step = f" in steps of {self.allowed.step}" if self.allowed.step > 1 else ""
        return f"{self.allowed[0]} to {self.allowed[-1]}{step}"


def setting(usual: int, *facts: Any) -> Any:
    """Returns a field of a dataclass of settings; ``facts`` are those of ``Setting``."""
    return dataclasses.field(default=usual, metadata={"setting": Setting(*facts)})


def settings_in(group: type) -> dict[str, Setting]:
    """Returns the settings of a dataclass by name."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(group)}


def changed(group: _Group, changes: Mapping[str, Any]) -> _Group:
    """Returns settings with some changed; raises OptionError for an unknown name or a value that cannot be."""
    known = settings_in(type(group))
    for name, value in changes.items():
        if name not in known:
            raise OptionError(f"tuning: unknown setting {name!r}", hint=f"known: {', '.join(known)}")
        if type(value) is not int or value not in known[name].allowed:
            raise OptionError(f"tuning: {name} is {value!r}", why=f"it must be {known[name]}")
    return dataclasses.replace(group, **changes)


_LINEAR = r"(grouped_)?linear kernel.*"
_SPIKES = r"spike_(grouped_)?linear kernel.*"
_EVENTS = r"spike_(grouped_)?linear kernel of events.*"
_RECURRENCE = r"(linear|fused)_recurrence kernel"


@dataclass(frozen=True)
class Tuning:
    """What kernels read beside the facts of their target. Weights are stored the same way whatever it says.

    Results stay the same but for the order of sums of floats; sums of spikes stay the same bit by bit.

    Attributes:
        l2_bytes: cache next to one core; a quarter of it holds what a kernel reads again and again.
        linear_streams: places at which one row reads a panel of float weights at a time.
        spike_ahead_bytes: how far ahead of its use one row of spikes asks for a weight.
        firing_percent: of all channels, summed over the rows of a call: up to it only the weights of channels that fire are
            read, where they are stored for that (``passes/spike_forms.py``).
        event_steps_ahead: how many steps ahead of its use the weights of a channel that fires are asked for.
        decode_keys: keys that attention of one token takes per step of its softmax.
        query_rows: most rows of queries that a workgroup of attention of many tokens takes.
        recurrence_steps: most steps of a chunk of a recurrence.

        Of GPUs:
        attention_waves: of a block of attention of many tokens.
        share_keys: keys that a wave takes in attention of one token, where there are many.
        chunk_steps: most steps of a chunk of a recurrence over many tokens.
        chunk_waves: most waves of a block that moves its state through the chunks.
        step_waves: most waves of a block of a recurrence that goes step by step.
        staged_steps: most steps for which that stages what they read at once.
        linear_columns: columns of a wave of a product of few rows of floats.
        linear_row_tiles: tiles of 16 rows that a wave takes of a product of many.
        linear_column_tiles: tiles of 16 columns that it takes.
        linear_fragments: vectors of a lane that it stages for each barrier, as far as shared memory holds them.
        spike_row_tiles: tiles of 16 rows that a wave takes of a product of many rows of spikes.
        spike_chunks_ahead: chunks of a weight that a wave reads before it needs them, for few rows of spikes.
    """

    l2_bytes: int = setting(
        1 << 20,
        range(1 << 10, (1 << 30) + 1),
        (1 << 18, 1 << 19, 1 << 21),
        r"((grouped_)?linear|\w*scan)\b.*",
    )
    # 4 places were 8% faster than one where weights come from memory
    linear_streams: int = setting(4, (1, 2, 4, 8, 16), (2, 8), _LINEAR)
    # 4 to 7% faster than without
    spike_ahead_bytes: int = setting(4096, range((1 << 20) + 1), (1024, 2048, 8192), _SPIKES)
    firing_percent: int = setting(45, range(801), (30, 60), _EVENTS)  # of up to 8 rows
    event_steps_ahead: int = setting(8, range(1025), (4, 16), _EVENTS)
    decode_keys: int = setting(128, range(16, 4097, 16), (64, 256), r"attention kernel")
    query_rows: int = setting(64, range(16, 1025, 16), (32, 128), r"attention kernel")
    recurrence_steps: int = setting(16, range(4, 17), (8,), _RECURRENCE)
    attention_waves: int = setting(4, (1, 2, 4, 8, 16), (2, 8), r"attention kernel", "gpu")
    share_keys: int = setting(128, range(64, 4097, 64), (64, 256, 512), r"attention kernel", "gpu")
    chunk_steps: int = setting(64, (16, 32, 48, 64), (16, 32), _RECURRENCE, "gpu")
    chunk_waves: int = setting(4, (1, 2, 4, 8), (2, 8), _RECURRENCE, "gpu")
    step_waves: int = setting(16, (1, 2, 4, 8, 16), (4, 8), _RECURRENCE, "gpu")
    staged_steps: int = setting(8, range(1, 33), (4, 16), _RECURRENCE, "gpu")
    linear_columns: int = setting(4, (1, 2, 4, 8), (2, 8), _LINEAR, "gpu")
    linear_row_tiles: int = setting(2, (2, 4), (4,), _LINEAR, "gpu")
    linear_column_tiles: int = setting(4, (2, 4, 8), (2, 8), _LINEAR, "gpu")
    linear_fragments: int = setting(2, (1, 2, 3), (1, 3), _LINEAR, "gpu")
    spike_row_tiles: int = setting(2, (2, 4), (4,), _SPIKES, "gpu")
    spike_chunks_ahead: int = setting(4, (1, 2, 4, 8), (2, 8), _SPIKES, "gpu")

    def with_changes(self, changes: Mapping[str, Any]) -> Tuning:
        """Returns these settings with some changed; raises OptionError for an unknown name or a value that cannot be."""
        return changed(self, changes)


SETTINGS = settings_in(Tuning)
USUAL = Tuning()


def settings_of(kind: str, changes: Mapping[str, int]) -> dict[str, int]:
    """Returns those settings that kernels for a kind of targets read; raises OptionError for one that none does."""
    USUAL.with_changes(changes)
    return {name: value for name, value in changes.items() if SETTINGS[name].kind == kind}


def tuned(target: Target, options: Any) -> Target:
    """Returns the target with the settings of a backend's options; raises OptionError for one that its kernels do not read."""
    changes = getattr(options, "tuning", None)
    if not changes:
        return target
    target = dataclasses.replace(target, tuning=target.tuning.with_changes(changes))
    has_kernels = target.kind == "cpu" or target.wave_kernels
    known = [name for name, setting in SETTINGS.items() if setting.kind == target.kind and has_kernels]
    if strange := [name for name in changes if name not in known]:
        raise OptionError(
            f"tuning: kernels for {target.name} do not read {strange[0]!r}",
            hint=f"they read {', '.join(known) or 'none'}",
        )
    return target


def cpu() -> str:
    """Returns the name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def warn_of_another(artifact: Artifact) -> None:
    """Logs a warning where an artifact's settings were measured on another CPU than this machine's."""
    measured = artifact.manifest.get("tuned", {}).get("cpu")
    if measured and measured != (here := cpu()):
        log.warning(
            "%s was tuned on %r, this is %r: results are the same, other settings may be faster",
            artifact.path,
            measured,
            here,
        )


def read(path: str | Path) -> dict[str, int]:
    """Returns the settings in a JSON file, or those that an artifact was compiled with, for all of its targets.

    Raises OptionError or ArtifactError where there are none.
    """
    from spikingbrain.artifact import Artifact

    path = Path(path)
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise OptionError(f"cannot read {path}", why=error.strerror or str(error)) from error
    except ValueError:  # no text, or no JSON
        artifact = Artifact(path)
        further = [record["options"] for record in artifact.manifest.get("further_targets", [])]
        found = {}
        for options in (artifact.manifest["options"], *further):
            found.update(options.get("tuning", {}))
        if not found:
            raise ArtifactError(
                f"{path} was compiled with the settings that every export has",
                hint="spikingbrain tune MODEL -o FILE searches others",
            ) from None
        warn_of_another(artifact)
    if not isinstance(found, dict):
        raise OptionError(f"{path} holds no settings", hint='{"decode_keys": 256}')
    USUAL.with_changes(found)
    return found
