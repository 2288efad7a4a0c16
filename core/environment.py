"""Numbers that the user gives in environment variables."""

from __future__ import annotations

import os

from spikingbrain import errors


def number(variable: str, default: float) -> float:
    """Returns the value of an environment variable, the default if it is not set; raises OptionError for what is no number."""
    text = os.environ.get(variable, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise errors.OptionError(f"{variable} is {text!r}", why="it must be a number") from None
