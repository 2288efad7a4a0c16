"""The exceptions that models raise. Every message says what failed, where, why, and what to try."""

from __future__ import annotations


def _message(what: str, where: str, why: str, hint: str) -> str:
    lines = [what]
    lines += [f"  at: {where}"] if where else []
    lines += [f"  because: {why}"] if why else []
    lines += [f"  try: {hint}"] if hint else []
    return "\n".join(lines)


class ConfigError(ValueError):
    """Raised when the sizes of a model do not fit together."""

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = ""):
        super().__init__(_message(what, where, why, hint))


class WeightsError(ValueError):
    """Raised when a weights file is damaged, or holds something that the model cannot take."""

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = ""):
        super().__init__(_message(what, where, why, hint))


class MissingPackage(ImportError):
    """Raised when a package is needed and not installed; names the command that installs it."""

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = ""):
        super().__init__(_message(what, where, why, hint))
