"""The exceptions a user can meet.

Every message says, in this order: what failed, where in the user's model, why, and what to try.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceLine:
    """A place in the user's model."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def quote(self) -> str:
        """Returns the line with its text, for error messages."""
        import linecache

        text = linecache.getline(self.file, self.line).strip()
        return f"{self}\n    {text}" if text else str(self)


class SpikingBrainError(Exception):
    """Base of every error raised on purpose by this package."""

    def __init__(self, what: str, *, where: SourceLine | str | None = None, why: str = "", hint: str = ""):
        self.what, self.where, self.why, self.hint = what, where, why, hint
        place = where.quote() if isinstance(where, SourceLine) else where
        lines = [what]
        lines += [f"  at: {place}"] if place else []
        lines += [f"  because: {why}"] if why else []
        lines += [f"  try: {hint}"] if hint else []
        super().__init__("\n".join(lines))


class CompileError(SpikingBrainError):
    """Raised when a model cannot be compiled."""


class UnsupportedOp(CompileError):
    """Raised when an operation of the model has no lowering for the chosen target."""


class ShapeError(CompileError):
    """Raised when shapes, or the dynamic dimensions declared for them, do not fit the model."""


class PassFailed(CompileError):
    """Raised when a compiler pass or a native tool stops; carries the path of a reproducer."""


class OptionError(SpikingBrainError, ValueError):
    """Raised for an unknown option or a value outside its range; lists what is known."""


class TargetError(SpikingBrainError):
    """Raised when a target is unknown, or cannot be compiled for or run on here."""


class MissingDependency(SpikingBrainError, ImportError):
    """Raised when an optional package or tool is needed and not installed; names the command that installs it."""


class NotMapped(SpikingBrainError, ImportError):
    """Raised when code for NVIDIA GPUs imports something of its packages that has no stand-in; names the table of those."""


class ArtifactError(SpikingBrainError):
    """Base of the errors about artifact files."""


class CorruptArtifact(ArtifactError):
    """Raised when an artifact is damaged, truncated or incomplete."""


class NewerFormat(ArtifactError):
    """Raised when an artifact was written by a later format version than this package reads."""


class WrongTarget(ArtifactError):
    """Raised when an artifact was compiled for another machine than this one."""


class OutOfMemory(SpikingBrainError, MemoryError):
    """Raised before something is loaded that needs clearly more memory than there is."""


class CallError(SpikingBrainError, ValueError):
    """Raised when a compiled program is called with arguments that do not fit its entry point."""


class NotFinite(SpikingBrainError, ArithmeticError):
    """Raised with ``check_finite`` when the input of a spiking layer holds NaN or infinity."""


def needs_compiler(error: ModuleNotFoundError) -> MissingDependency:
    """Returns the error to raise where the slim installation was asked to compile."""
    return MissingDependency(
        f"compiling needs {error.name}, which is not installed", hint="pip install 'spikingbrain[compile]'"
    )
