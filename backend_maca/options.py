"""What a user may choose for MetaX GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spikingbrain.backend_maca import providers
from spikingbrain.errors import OptionError
from spikingbrain.tuning import USUAL

MOST_STREAMS = 8


@dataclass(frozen=True)
class MacaOptions:
    """What a user may choose.

    Attributes:
        providers: who provides an op, such as ``"linear=own,matmul=mcblas"``. ``linear`` is a projection by a weight,
            ``matmul`` any other matrix product. With ``mcblas`` products of more than 16 rows and 16 columns are calls of
            the library, as measurements of others suggest; smaller ones, and with ``own`` all, are generated kernels.
        resources: compile the kernels by the public device compilers that are installed, too, and report the registers
            and shared memory that each takes.
        work: count what the kernels do, for ``spikingbrain tune`` where no card is, and report it.
        streams: on how many streams the launches of a call may run at most; see ``plan/streams.py`` for which do.
        tuning: settings of kernels that are not the usual ones, by the names of ``spikingbrain.tuning.Tuning``.
    """

    providers: str = ""
    resources: bool = False
    work: bool = False
    streams: int = 1
    tuning: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.choice()
        if type(self.streams) is not int or not 1 <= self.streams <= MOST_STREAMS:
            raise OptionError(
                f"streams is {self.streams!r}", why=f"it must be a whole number from 1 to {MOST_STREAMS}"
            )
        USUAL.with_changes(self.tuning)

    def choice(self) -> dict[str, str]:
        """Returns the provider of each op. Raises OptionError for a word that is not known."""
        return {op: order[0].name for op, order in providers.choice(self.providers, providers.PLAN).items()}
