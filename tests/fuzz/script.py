"""A model as the text of a Python file that needs torch and nothing else."""

from __future__ import annotations

import base64
import importlib.util
import re
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx

LITERAL = 32  # elements that are written out; more are packed

_TEMPLATE = '''# ruff: noqa
# fmt: off
"""{title}

Run by itself it compares once, without regard to rounding; ``python tests/fuzz/run.py --files`` judges with it.
"""

import base64
import sys
import zlib

import torch
from torch import device

BACKEND = {backend!r}
OPTIONS = {options!r}
TRAINING = {training}
inf, nan = float("inf"), float("nan")


def packed(text, dtype, shape):
    return torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(text))), dtype=dtype).reshape(shape)


def strided(value, stride):
    return torch.empty_strided(value.shape, stride, dtype=value.dtype).copy_(value)


def uniform(shape, dtype, low=-2.0, high=2.0):
    value = low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return value > 0 if dtype == torch.bool else value.to(dtype)


def inputs():
    return [
{inputs}
    ]


{model}

def evaluate(function):
    args = [x.requires_grad_(TRAINING and x.is_floating_point()) for x in inputs()]
    with torch.set_grad_enabled(TRAINING):
        outputs = function(*args)
    smooth = [x for x in outputs if x.requires_grad]
    if not smooth:
        return outputs
    leaves, tangents = [x for x in args if x.requires_grad], [torch.ones_like(x) for x in smooth]
    gradients = torch.autograd.grad(smooth, leaves, tangents, allow_unused=True)
    return [*outputs, *[x for x in gradients if x is not None]]


def test(backend=BACKEND):
    expected = evaluate(model)
    actual = evaluate(torch.compile(model, backend=backend, options=OPTIONS or None, fullgraph=True, dynamic=False))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


if __name__ == "__main__":
    test(*sys.argv[1:])
'''


def uniform(shape: torch.Size, dtype: torch.dtype, low: float = -2.0, high: float = 2.0) -> torch.Tensor:
    """As in the text."""
    value = low + (high - low) * torch.rand(
        shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return value > 0 if dtype == torch.bool else value.to(dtype)


def text(
    graph: fx.GraphModule,
    inputs: list[torch.Tensor],
    title: str,
    backend: str,
    options: dict[str, Any],
    training: bool,
) -> str:
    title = title.replace("\\", "/").replace(chr(34) * 3, chr(39) * 3)
    values = "\n".join(f"        {_value(each)}," for each in inputs)
    return _TEMPLATE.format(
        title=title, backend=backend, options=options, training=training, inputs=values, model=_code(graph)
    )


def load(path: Path) -> ModuleType:
    """Returns the module; it has ``model``, ``inputs()``, ``OPTIONS`` and ``TRAINING``."""
    spec = importlib.util.spec_from_file_location(f"saved_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _code(graph: fx.GraphModule) -> str:
    code = graph.graph.python_code("self").src
    code = re.sub(r";  (\w+ = )+None\b.*", "", code)  # fx lets go of values early
    code = re.sub(r"^def forward\(self, ?", "def model(", code.strip(), flags=re.MULTILINE)
    return "\n".join(line.split("  # ")[0].rstrip() for line in code.splitlines() if line.strip()) + "\n"


def _value(value: torch.Tensor) -> str:
    shape = list(value.shape)
    drawn = uniform(value.shape, value.dtype)
    if value.numel() and torch.equal(value, drawn) and value.stride() == drawn.stride():
        return f"uniform({shape}, {value.dtype})"
    if value.numel() <= LITERAL:
        written = f"torch.tensor({value.tolist()!r}, dtype={value.dtype}).reshape({shape})"
    else:
        data = base64.b85encode(zlib.compress(value.contiguous().numpy().tobytes(), 9)).decode()
        written = f"packed({data!r}, {value.dtype}, {shape})"
    return written if value.is_contiguous() else f"strided({written}, {value.stride()})"
