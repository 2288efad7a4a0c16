"""What became of a recurrence: one record, which the log and ``explain`` read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RecurrenceReport:
    """What became of one loop or written form.

    Attributes:
        status: "raised" to ops of their own, "loop" where one body runs over time, "unrolled" where it stays as traced.
        op: the ops it became, such as "linear_recurrence"; "pointwise_scan" or "time_loop" for a loop; "" if unrolled.
        where: the user's line.
        reason: what it was recognised as, or why it was not.
        steps: how many steps of time it covers, 0 where unknown.
    """

    status: str
    op: str
    where: str
    reason: str
    steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "op": self.op,
            "where": self.where,
            "reason": self.reason,
            "steps": self.steps,
        }
