"""Before bufferization: what linear algebra cannot say becomes launches, loops over tensors get a memory of their own."""

from __future__ import annotations

from torch_mlir import ir

from spikingbrain.backend_maca.lower.carried import keep_memory
from spikingbrain.backend_maca.lower.mlir import functions, host_ops, parse
from spikingbrain.backend_maca.lower.scalars import sink_scalars
from spikingbrain.backend_maca.lower.scans import lower_scan
from spikingbrain.backend_maca.lower.scatters import lower_scatter
from spikingbrain.backend_maca.lower.sorts import lower_sort
from spikingbrain.passes import dialect

_LOWERINGS = {
    "scf.for": keep_memory,
    "scf.if": keep_memory,
    "scf.while": keep_memory,
    "linalg.fill": sink_scalars,
    "linalg.generic": sink_scalars,
    "tensor.from_elements": sink_scalars,
    "tensor.insert": sink_scalars,
    "tm_tensor.scan": lower_scan,
    "tm_tensor.scatter": lower_scatter,
    "tm_tensor.sort": lower_sort,
}


def prepare(text: str) -> str:
    """Lowers sorts, scans and scatters to launches of kernels, and gives what loops carry a memory."""
    with dialect.load() as context, ir.Location.unknown():
        module = parse(text, context)
        for function in functions(module):
            for op in host_ops(function):
                if op.name in _LOWERINGS:
                    _LOWERINGS[op.name](op)
        return str(module.operation.get_asm(enable_debug_info=True))
