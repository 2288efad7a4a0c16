"""lower-torch: torch dialect to linalg on tensors, by torch-mlir's own pipelines, with its known faults guarded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch_mlir import ir
from torch_mlir.dialects import torch as torch_dialect  # noqa: F401  (registers the passes)
from torch_mlir.passmanager import PassManager

from spikingbrain.errors import ShapeError, UnsupportedOp
from spikingbrain.passes import torch_ir
from spikingbrain.passes.base import PassContext, source_line
from spikingbrain.passes.outlined_loops import outlined_loops

_PIPELINES = (
    "torchdynamo-export-to-torch-backend-pipeline",
    "torch-backend-to-linalg-on-tensors-backend-pipeline",
)
# Ours are not part of upstream's contract, so its final check is replaced by the one below.
_DROPPED = re.compile(r",?torch-verify-linalg-on-tensors-backend-contract")


@dataclass(frozen=True)
class LowerTorch:
    """Runs torch-mlir's two pipelines and refuses what they lower wrongly.

    In: torch dialect with ops of ours between casts. Out: linalg, tensor, arith, math, scf and ours, no torch op; so
    also in the bodies of time loops.
    Raises UnsupportedOp for a torch op without a lowering, ShapeError where upstream guessed a dynamic size.
    """

    name: ClassVar[str] = "lower-torch"

    def run(self, module: ir.Module, context: PassContext) -> None:
        with outlined_loops(module):
            self._run(module)

    def _run(self, module: ir.Module) -> None:
        for name in _PIPELINES:
            text = _DROPPED.sub("", str(PassManager.parse(f"builtin.module({name})")))
            pipeline = PassManager.parse(text)
            pipeline.enable_verifier(
                False
            )  # the Python verifiers of our ops cost more than the passes themselves
            try:
                pipeline.run(module.operation)
            except ir.MLIRError as error:
                raise _unsupported(error) from None
        for op in torch_ir.walk(module):
            if op.name.startswith(("torch.", "torch_c.")):
                raise UnsupportedOp(f"no lowering for {op.name}", where=source_line(op.location))
            if op.name == "tensor.cast" and _guesses(op):
                raise ShapeError(
                    f"a dynamic size was assumed to be {op.results[0].type}",
                    where=source_line(op.location),
                    why="torch-mlir lowers some reshapes and index ops as if only one dimension were dynamic",
                    hint="make one of the dimensions static, or reshape in two steps",
                )


def _guesses(cast: ir.Operation) -> bool:
    """Returns whether a cast claims to know a size that its operand's type leaves dynamic."""
    source, result = (ir.RankedTensorType(v.type) for v in (cast.operands[0], cast.results[0]))
    dynamic = ir.ShapedType.get_dynamic_size()
    return any(a == dynamic and b != dynamic for a, b in zip(source.shape, result.shape, strict=True))


def _unsupported(error: ir.MLIRError) -> UnsupportedOp:
    first = error.error_diagnostics[0] if error.error_diagnostics else None
    message = first.message if first else str(error)
    custom = re.search(r'name = "(torch\.[\w.]+)"', message) if "torch.operator" in message else None
    op = custom or re.search(r"(torch\.[\w.]+)", message)
    return UnsupportedOp(
        f"no lowering for {op.group(1)}" if op else "torch-mlir refused the program",
        where=source_line(first.location) if first else None,
        why=message.splitlines()[0][:300],
        hint="express it with other ops, or leave it outside the exported module",
    )
