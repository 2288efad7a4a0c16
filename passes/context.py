"""An MLIR context that knows every dialect the passes meet."""

from __future__ import annotations

import sys
from types import ModuleType

from torch_mlir import ir
from torch_mlir.dialects import torch as torch_dialect
from torch_mlir.passmanager import PassManager

from spikingbrain.passes import dialect

# The bindings import the Python module of an op's dialect, and where there is none they search for it at every op anew.
for _dialect in ("torch_c", "spikingbrain", "spikingbrain_control"):
    sys.modules.setdefault(f"torch_mlir.dialects.{_dialect}", ModuleType(_dialect))


def new_context() -> ir.Context:
    """Returns a context with the torch and spikingbrain dialects."""
    context = dialect.load()
    torch_dialect.register_dialect(context)
    with context, ir.Location.unknown():
        # torch_c, the cast dialect, is only registered once a pass that needs it has run.
        PassManager.parse("builtin.module(torch-func-backend-type-conversion)").run(
            ir.Module.create().operation
        )
    return context
