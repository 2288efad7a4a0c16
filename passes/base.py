"""What a pass is: a frozen dataclass whose fields are its options and whose name is used everywhere.

The same name stands on the command line (``spikingbrain opt -p raise-attention``), in the file name
(``passes/raise_attention.py``), in the tests (``tests/passes/raise-attention.mlir``) and in the log.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch_mlir import ir

from spikingbrain.errors import OptionError, SourceLine
from spikingbrain.target import Target


@dataclass(frozen=True)
class Record:
    """One decision of a pass about one op: what was done or refused, where in the user's model, and why."""

    pass_name: str
    status: str  # "raised", "fused", "lowered", "refused"
    op: str
    where: str
    reason: str = ""

    def to_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


@dataclass
class PassContext:
    """What passes share during one run of a pipeline.

    Attributes:
        weight_arguments: for each function whose weights became arguments, what each stands for, in order.
    """

    target: Target
    records: list[Record] = field(default_factory=list)
    weight_arguments: dict[str, list[Any]] = field(default_factory=dict)

    def record(self, pass_: Pass, status: str, op: ir.Operation, reason: str = "") -> None:
        """Notes a decision; the compile report, ``explain`` and the log all read these notes."""
        line = source_line(op.location)
        entry = Record(pass_.name, status, op.name, str(line) if line else "", reason)
        self.records.append(entry)
        logging.getLogger(f"spikingbrain.passes.{pass_.name}").debug(
            "%s %s at %s %s", status, op.name, entry.where, reason
        )


class Pass(Protocol):
    """A step from valid IR to valid IR."""

    name: ClassVar[str]

    def run(self, module: ir.Module, context: PassContext) -> None:
        """Rewrites the module in place."""
        ...


def source_line(location: ir.Location) -> SourceLine | None:
    """Returns the innermost Python line a location names that is the user's rather than torch's, or None.

    Code that torch generated (``<eval_with_key>``) has no file and does not count.
    """
    lines = [line for line in _lines(location) if not line.file.startswith("<")]
    own = [line for line in lines if "/torch/" not in line.file.replace("\\", "/")]
    return next(iter(own or lines), None)


def _lines(location: ir.Location) -> list[SourceLine]:
    """Returns every line of a location, innermost first."""
    loc: Any = ir.Location.from_attr(location.attr, location.context)  # diagnostics carry the base class
    if isinstance(loc, ir.FileLineColLoc):
        return [SourceLine(str(loc.filename).strip('"'), loc.start_line)]
    if isinstance(loc, ir.CallSiteLoc):
        return _lines(loc.callee) + _lines(loc.caller)
    if isinstance(loc, ir.NameLoc):
        return _lines(loc.child_loc)
    if isinstance(loc, ir.FusedLoc):
        return [line for inner in loc.locations for line in _lines(inner)]
    return []


def parse_pass(text: str, known: dict[str, type[Any]]) -> Pass:
    """Returns the pass written as ``name`` or ``name{option=value other=value}``.

    Raises OptionError for an unknown pass or option, listing what is known.
    """
    name, _, rest = text.partition("{")
    if name not in known:
        raise OptionError(f"unknown pass {name!r}", hint=f"one of {', '.join(sorted(known))}")
    cls = known[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    options: dict[str, Any] = {}
    for item in rest.rstrip("}").replace(",", " ").split():
        key, _, value = item.partition("=")
        key = key.replace("-", "_")
        if key not in fields:
            listed = ", ".join(fields) or "none"
            raise OptionError(f"pass {name!r} has no option {key!r}", hint=f"its options: {listed}")
        kind = fields[key].type
        if kind in (bool, "bool"):
            options[key] = value.lower() in ("1", "true", "on")
        elif kind in (int, "int"):
            if not value.lstrip("-").isdigit():
                raise OptionError(f"option {key!r} of pass {name!r} is an integer, not {value!r}")
            options[key] = int(value)
        else:
            options[key] = value
    return cls(**options)  # type: ignore[no-any-return]
