"""What a backend must provide. Third parties register one under the entry point group ``spikingbrain.backends``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spikingbrain.errors import TargetError
from spikingbrain.target import Target

if TYPE_CHECKING:
    import numpy as np

Buffer = Any  # a backend's own device buffer; opaque outside the backend
ENTRY_POINT_GROUP = "spikingbrain.backends"


@dataclass(frozen=True)
class TargetStatus:
    """Whether a target can be compiled for and run here, with the reason when it cannot."""

    target: Target
    compiles: bool
    runs: bool
    note: str = ""


@dataclass
class StageContext:
    """What every stage of a backend may look at.

    Attributes:
        target: the machine compiled for.
        options: the backend's own frozen options object.
        workdir: a folder for intermediate files and reproducers, removed after success.
        report: facts for the compile report; stages add to it.
    """

    target: Target
    options: Any
    workdir: Path
    report: dict[str, Any] = field(default_factory=dict)


# A stage turns the module (text, then whatever the backend makes of it) into its next form. The last stage of a
# backend returns the code members of the artifact: file name -> content.
Stage = Callable[[Any, StageContext], Any]


class Executable(Protocol):
    """Compiled code that is loaded and can be called; owns its device and the mapped weights."""

    def call(self, entry: str, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Runs an entry point. State arguments are consumed: their storage may be reused for the results."""
        ...

    def to_device(self, array: np.ndarray[Any, Any]) -> Buffer:
        """Copies a host array into a buffer."""
        ...

    def to_host(self, buffer: Buffer) -> np.ndarray[Any, Any]:
        """Copies a buffer to the host."""
        ...


class SharedMemory(Executable, Protocol):
    """Code that runs on the host's memory: tensors cross by DLPack, without copies."""

    @property
    def device(self) -> Any:
        """Returns the device that buffers belong to; executables that share it may share buffers."""
        ...

    def function(self, entry: str) -> Callable[[Sequence[Buffer]], list[Buffer]]:
        """Returns an entry point as a function, for callers that call it often."""
        ...

    def borrow(self, capsule: Any) -> Buffer:
        """Returns a buffer over the memory of a DLPack capsule, without a copy.

        Raises ValueError or RuntimeError where the memory cannot be used as it is (gaps, alignment).
        """
        ...

    def lend(self, buffer: Buffer) -> Any:
        """Returns a DLPack capsule over a buffer's memory, without a copy."""
        ...


@dataclass(frozen=True)
class TorchKernel:
    """A kernel for one op of ours, ``spikingbrain::...``, on tensors of torch; both take all of the op's arguments, checked.

    Attributes:
        refuse: returns why the kernel cannot take these arguments, or None; looks at shapes and types only.
        run: returns what the op does.
        told: for the report, returns who computes these arguments, and why nobody does who would come first; if None, the
            name of the kernels.
    """

    refuse: Callable[..., str | None]
    run: Callable[..., Any]
    told: Callable[..., str] | None = None


@dataclass(frozen=True)
class TorchKernels:
    """Kernels for tensors of one device of torch: its type, such as "cuda", a name for reports, a kernel for each op by name.

    ``providers`` is the user's choice between those who provide kernels, as text. Kernels with settings have both of

    - ``settings``: returns checked ones, those given or those in the file of that path; raises OptionError.
    - ``using``: returns a context in which kernels run with such. It is a function of a module, so that it can be stored.
    """

    device: str
    name: str
    table: Mapping[str, TorchKernel]
    providers: str = ""
    settings: Callable[[Any], dict[str, int]] | None = None
    using: Callable[[Mapping[str, int]], AbstractContextManager[None]] | None = None


class Backend(Protocol):
    """Code generation and loading for a family of targets.

    Where looking for devices takes time, a backend may also have ``status(name) -> TargetStatus | None``, which
    returns one of ``targets()`` and looks for that one's device only.

    Where a target's devices are rarely at hand, a backend may also have ``estimate(code, report, shapes)``: it returns for each
    entry point in ``shapes``, of its arguments, the seconds of a call by a model, of code compiled with the option ``work``.

    Where torch itself has the device, a backend may also have ``torch_kernels(target) -> TorchKernels | None``: what
    ``torch.compile`` puts in the place of our ops there. It raises TargetError where torch has no such device. If the user
    chooses between providers, it is called with their text as ``providers``.
    """

    name: str
    options: type  # a frozen dataclass; its fields are the user's options, all with defaults

    def targets(self) -> list[TargetStatus]:
        """Returns every target this backend knows, with what works here."""
        ...

    def cache_key(self, target: Target, options: Any) -> str:
        """Returns text that changes whenever the same module would compile to different code."""
        ...

    def stages(self, target: Target) -> dict[str, Stage]:
        """Returns the ordered stages after the shared passes."""
        ...

    def load(
        self,
        code: Mapping[str, memoryview],
        manifest: Mapping[str, Any],
        weights: Mapping[str, np.ndarray[Any, Any]],
    ) -> Executable:
        """Makes compiled code callable; ``weights`` are mapped, not copied, where the device allows."""
        ...


def backends() -> dict[str, Backend]:
    """Returns every registered backend by name; one whose packages are missing still lists its targets."""
    found: dict[str, Backend] = {}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        found[point.name] = point.load()()
    return found


def resolve_target(name: str) -> tuple[Backend, TargetStatus]:
    """Returns the backend and status of the target called ``name``; raises TargetError listing the known ones."""
    found = backends().values()
    for backend in found:
        if one := _status(backend, name):
            return backend, one
    known = [status.target.name for backend in found for status in backend.targets()]
    raise TargetError(f"unknown target {name!r}", hint=f"one of {', '.join(known)}")


def _status(backend: Backend, name: str) -> TargetStatus | None:
    ask = getattr(backend, "status", None)
    found: TargetStatus | None
    found = ask(name) if ask else next((s for s in backend.targets() if s.target.name == name), None)
    return found
