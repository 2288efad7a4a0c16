# ruff: noqa
# fmt: off
"""wrong: gradient of input 0 (torch.float16 [1, 16, 16, 16]): 7 of 4096 elements, the first at [0, 0, 12, 9]: -0.00469970703125, expected 0.0034732818603515625

Run by itself it compares once, without regard to rounding; ``python tests/fuzz/run.py --files`` judges with it.
"""

import base64
import sys
import zlib

import torch
from torch import device

BACKEND = 'spikingbrain'
OPTIONS = {}
TRAINING = True
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
        uniform([1, 16, 16, 16], torch.float16),
    ]


def model(x0):
    tan = torch.ops.aten.tan.default(x0)
    upsample_bicubic2d = torch.ops.aten.upsample_bicubic2d.vec(tan, [256, 1], False, None)
    squeeze = torch.ops.aten.squeeze.dim(upsample_bicubic2d, 0)
    squeeze_1 = torch.ops.aten.squeeze.dim(squeeze, 2)
    to = torch.ops.aten.to.dtype(squeeze_1, torch.float64)
    softmax = torch.ops.aten.softmax.int(to, 0)
    return (softmax,)


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
