"""What a user may choose for MetaX GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spikingbrain.errors import OptionError
from spikingbrain.tuning import USUAL

# Op -> who provides it unless the user says otherwise: our kernels ("own") or the vendor's library.
PROVIDERS = {"linear": "mcblas", "matmul": "mcblas"}
KNOWN = ("own", "mcblas")


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
        tuning: settings of kernels that are not the usual ones, by the names of ``spikingbrain.tuning.Tuning``.
    """

    providers: str = ""
    resources: bool = False
    work: bool = False
    tuning: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.choice()
        USUAL.with_changes(self.tuning)

    def choice(self) -> dict[str, str]:
        """Returns the provider of each op. Raises OptionError for a word that is not known."""
        chosen = dict(PROVIDERS)
        for part in filter(None, (p.strip() for p in self.providers.split(","))):
            op, _, provider = part.partition("=")
            if op not in PROVIDERS or provider not in KNOWN:
                raise OptionError(
                    f"providers: {part!r} is not understood",
                    hint=f"OP=PROVIDER, the op one of {', '.join(PROVIDERS)}, the provider one of {', '.join(KNOWN)}",
                )
            chosen[op] = provider
        return chosen
