"""What can be wrong with a spiking model."""

from __future__ import annotations


class SpikingError(ValueError):
    """Raised when activations or weights cannot be made spikes or integers; says what, where, why, and what to try."""

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = ""):
        lines = [what]
        lines += [f"  at: {where}"] if where else []
        lines += [f"  because: {why}"] if why else []
        lines += [f"  try: {hint}"] if hint else []
        super().__init__("\n".join(lines))
