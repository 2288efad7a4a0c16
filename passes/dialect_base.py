"""What the definitions of our ops share: the dialect's class, and the verifiers' small words."""

import functools
from collections.abc import Callable
from typing import Any

from torch_mlir import ir
from torch_mlir.dialects import ext


class SpikingBrain(ext.Dialect, name="spikingbrain"):
    """Ops on tensors that keep the meaning of a language model's building blocks."""


def fail(op: ir.Operation, message: str) -> bool:
    """Emits an error at the op; returns False, which a verifier returns."""
    op.location.emit_error(f"'{op.name}' {message}")
    return False


def shape(value: ir.Value) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def fits(a: int, b: int) -> bool:
    """Returns whether two sizes can be equal, a dynamic one being equal to anything."""
    dynamic = ir.ShapedType.get_dynamic_size()
    return a == b or dynamic in (a, b)


def after_declaration(verify: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Lets an op without a declared attribute, or with an operand that is no ranked tensor, pass.

    MLIR calls our verifiers before it compares an op with its declaration, which then says what is missing.
    """

    @functools.wraps(verify)
    def checked(op: Any) -> bool:
        try:
            return verify(op)
        except (KeyError, ValueError):
            return True

    return checked
