"""Recurrences that compute what is around them, and look-alikes that must not, against plain PyTorch.

Every case is a function of tensors; all of them are compiled as one module, once with kernels and once taken apart again.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim
from torch_mlir import ir

import spikingbrain
from spikingbrain.backend import StageContext, resolve_target
from spikingbrain.backend_iree.backend import MODULE
from spikingbrain.frontend.capture import capture
from spikingbrain.frontend.ops import linear_recurrence
from spikingbrain.passes import dialect_fused, pipeline, torch_ir
from spikingbrain.passes.base import PassContext, Record
from spikingbrain.passes.context import new_context
from spikingbrain.passes.dialect_fused import FusedRecurrence
from spikingbrain.passes.kernels.recurrence_unfused import unfuse

rt = pytest.importorskip("iree.runtime")

B, H, K, V = 2, 3, 20, 24
EPS = 0.5  # outputs that cancel are not blown up
Outputs = tuple[Tensor, ...]


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> Outputs:
    options = {"decay_axis": "key", "log_decay": True} | options
    return linear_recurrence(q, k, v, g, **options)  # type: ignore[no-any-return]


def feature_maps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Outputs:
    return recurrence(F.elu(q) + 1, F.relu(k) * K**-0.5, v.sigmoid(), F.logsigmoid(g) / 16, state=state)


def channel_vectors(q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, u: Tensor) -> Outputs:
    return recurrence(q * w + 0.5, F.silu(k + w), v * u.exp(), -F.softplus(g + w), reverse=True)


def value_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Outputs:
    return recurrence(q * 0.25, k.tanh(), v.neg(), -g.exp(), decay_axis="value", state=state)


def factors(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Outputs:
    return recurrence(q * 0.25, k, F.silu(v), 0.9 * g.sigmoid(), log_decay=False)


def bonus(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor) -> Outputs:
    o, last = recurrence(q.sigmoid(), k * 0.5, v, -g.exp(), bonus=u, exclusive=True)
    return F.silu(o), last


def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, gate: Tensor, state: Tensor) -> Outputs:
    k = k / (k.square().sum(-1, keepdim=True) + 1).sqrt()  # a sum in front stays there
    beta = beta.sigmoid()
    o, last = recurrence(
        F.silu(q), beta * k, v.tanh(), -F.softplus(g), erase=-beta * k, predict=g.sigmoid() * k, state=state
    )
    return F.rms_norm(o, (V,), None, EPS) * gate.sigmoid(), last


def delta_one_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor) -> Outputs:
    k = k / (k.square().sum(-1, keepdim=True) + 1).sqrt()
    o, last = recurrence(
        q * 0.25, 0.5 * k, v, -g.exp(), erase=-0.5 * k, predict=k.neg().neg(), decay_axis="head"
    )
    return o + u, last


def norm_and_gate(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, gate: Tensor) -> Outputs:
    o, last = recurrence(q, k, v, g.abs().neg())
    return F.rms_norm(o, (V,), u, EPS) * F.silu(gate), last


def centred(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor) -> Outputs:
    o, last = recurrence(q, k, v, g.abs().neg(), reverse=True)
    o = o - o.mean(-1, keepdim=True)
    return o * (o.square().mean(-1, keepdim=True) + EPS).rsqrt() + u, last


def flat_gate(q: Tensor, k: Tensor, v: Tensor, g: Tensor, flat: Tensor) -> Outputs:
    o, last = recurrence(q, k, v, g.abs().neg(), decay_axis="value")
    return F.silu(flat) * o.flatten(2), last


def grouped(q: Tensor, k: Tensor, v: Tensor, g: Tensor, gate: Tensor) -> Outputs:
    o, last = recurrence(q.relu(), k.relu(), v * 2, F.logsigmoid(g))
    return F.rms_norm(o, (V,), None, EPS) * gate.sigmoid(), last


def halves(q: Tensor, k: Tensor, v: Tensor, g: Tensor, gate: Tensor) -> Outputs:
    o, last = recurrence(q.float().relu(), k.float(), v.float(), F.logsigmoid(g.float()))
    return o.to(gate.dtype) * gate.sigmoid(), last


def joint(projected: Tensor, state: Tensor) -> Outputs:
    """Views alone: slices of a joint projection, split into heads."""
    q, k, v = projected.split([H * K, H * K, H * V], -1)
    q, k = (x.unflatten(-1, (H, K)) for x in (q, k))
    return linear_recurrence(q, k, v.unflatten(-1, (H, V)), state=state)


def heads_first(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Outputs:
    """[B, H, T, D] in memory."""
    q, k, v, g = (x.transpose(1, 2) for x in (q.relu(), k, v, g.abs().neg()))
    return recurrence(q, k, v, g)


def other_readers(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Outputs:
    q, g = q.relu(), g.abs().neg()
    o, last = recurrence(q, k, v, g)
    return o, last, q, g, o.neg()


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    o, last = linear_recurrence(q, k, v)
    return o * (o.square().mean(2, keepdim=True) + EPS).rsqrt(), last


def every_other(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return linear_recurrence(q[..., ::2], k, v)


def state_in_between(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    """The gate depends on the final state: outputs cannot be written at once."""
    o, last = linear_recurrence(q, k, v)
    return o * last.mean().sigmoid(), last


def columns_split(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Outputs:
    """Several workgroups share a state: none has a whole row, and each would compute all keys."""
    o, last = linear_recurrence(q, k.relu(), v.tanh(), decay_axis="none")
    return F.rms_norm(o, (128,), None, EPS) * gate.sigmoid(), last


SIZES = {"H": H, "K": K, "V": V, "S": H, "B": B, "P": H * (2 * K + V), "F": H * V, "L": 2 * K}
GROUPED, WIDE = SIZES | {"H": 6}, SIZES | {"H": 28, "S": 1, "V": 128}


@dataclass(frozen=True)
class Case:
    """A function, the sizes of its operands by letters, and what the passes are to say of it ("" for nothing)."""

    function: Callable[..., Outputs]
    operands: str
    fused: str
    sizes: dict[str, int] = dataclasses.field(default_factory=lambda: SIZES, hash=False)
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return self.function.__name__

    def inputs(self, time: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(time)
        sizes = self.sizes | {"T": time}
        made = []
        for letters in self.operands.split():
            x = torch.randn([sizes[letter] for letter in letters], generator=generator)
            made.append(x.to(self.dtype))
        return made


CASES = [
    Case(feature_maps, "BTHK BTSK BTSV BTSK BSKV", "computes q, k, v, decay"),
    Case(channel_vectors, "BTHK BTSK BTSV BTSK K V", "computes q, k, v, decay"),
    Case(value_decay, "BTHK BTSK BTSV BTSV BSKV", "computes q, k, v, decay"),
    Case(factors, "BTHK BTSK BTSV BTSK", "computes q, v, decay"),
    Case(bonus, "BTHK BTSK BTSV BTSK SK", "computes q, k, decay; computes the output"),
    Case(
        delta,
        "BTHK BTSK BTSV BTSK BTSK BTHV BSKV",
        "computes q, k, v, decay, erase, predict; computes the output with 1 row sum",
    ),
    Case(delta_one_decay, "BTHK BTSK BTSV BTS V", "computes q, k, erase, predict; computes the output"),
    Case(
        norm_and_gate,
        "BTHK BTSK BTSV BTSK V BTHV",
        "computes decay; computes the output with 1 row sum",
    ),
    Case(centred, "BTHK BTSK BTSV BTSK V", "computes decay; computes the output with 2 row sums"),
    Case(flat_gate, "BTHK BTSK BTSV BTSV BTF", "computes decay; computes the output"),
    Case(
        grouped,
        "BTHK BTSK BTSV BTSK BTHV",
        "computes q, k, v, decay; computes the output with 1 row sum",
        GROUPED,
    ),
    Case(
        halves,
        "BTHK BTSK BTSV BTSK BTHV",
        "computes q, k, v, decay; computes the output",
        dtype=torch.bfloat16,
    ),
    Case(joint, "BTP BSKV", "reads q, k, v where they are"),
    Case(heads_first, "BHTK BSTK BSTV BSTK", "computes q, decay; reads k, v where they are"),
    Case(other_readers, "BTHK BTSK BTSV BTSK", ""),
    Case(over_heads, "BTHK BTSK BTSV", ""),
    Case(every_other, "BTHL BTSK BTSV", ""),
    Case(state_in_between, "BTHK BTSK BTSV", ""),
    Case(columns_split, "BTHK BTSK BTSV BTHV", "computes v", WIDE),
]


TAKEN_APART = [case for case in CASES if case.function in (bonus, delta, centred, halves, joint)]


class Model(torch.nn.Module):
    def __init__(self, function: Callable[..., Outputs]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Outputs:
        return self.function(*inputs)


@functools.cache
def captured(case: Case) -> str:
    """Returns a case's module, as text; the length is dynamic."""
    time = Dim("T", min=1, max=512)
    shapes = tuple({letters.index("T"): time} if "T" in letters else {} for letters in case.operands.split())
    entry = spikingbrain.Entry(tuple(case.inputs(7)), dynamic_shapes={"inputs": shapes})
    return capture(Model(case.function), {case.name: entry}, None, lambda _: None).module


def joined(texts: list[str]) -> ir.Module:
    """Returns one module with the functions of several."""
    whole = ir.Module.create()
    for module in map(ir.Module.parse, texts):
        for op in list(module.body.operations):
            op.operation.detach_from_parent()
            whole.body.append(op)
    return whole


class Program:
    """Some cases, compiled for this machine, and what the pass said of them.

    ``apart``: what is fused becomes linear algebra again, as where there is no kernel for it.
    """

    def __init__(self, cases: Sequence[Case], apart: bool):
        backend, status = resolve_target("cpu")
        context = PassContext(status.target)
        with new_context(), ir.Location.unknown():
            module = joined([captured(case) for case in cases])
            for pass_ in pipeline.default_pipeline():
                pipeline.run([pass_], module, context)
                if pass_.name == "fuse-into-recurrence":
                    self.records = [r for r in context.records if r.pass_name == pass_.name]
                    fused = torch_ir.operations(module, dialect_fused.NAME)
                    self.fused = len(fused)
                    self.left = len(torch_ir.operations(module, "spikingbrain.linear_recurrence"))
                    for op in fused if apart else ():
                        unfuse(FusedRecurrence(op))
            pipeline.clean(module)
            pipeline.check_lowered(module)
            value: Any = str(module)
        with tempfile.TemporaryDirectory() as folder:
            stages = StageContext(status.target, backend.options(), Path(folder))
            for stage in backend.stages(status.target).values():
                value = stage(value, stages)
        config = rt.Config(device=rt.get_device("local-sync"))
        self.module = rt.load_vm_module(rt.VmModule.copy_buffer(config.vm_instance, value[MODULE]), config)

    def __call__(self, case: Case, inputs: list[Tensor]) -> list[np.ndarray[Any, Any]]:
        arrays = [_array(x) for x in inputs]
        found = self.module[case.name](*arrays)
        return [_floats(x.to_host()) for x in found]


def _array(x: Tensor) -> Any:
    if x.dtype != torch.bfloat16:
        return x.numpy()
    import ml_dtypes

    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _floats(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x.astype(np.float32)


@functools.cache
def program(apart: bool) -> Program:
    return Program(TAKEN_APART if apart else CASES, apart)


def check(case: Case, time: int, apart: bool) -> None:
    inputs = case.inputs(time)
    with torch.no_grad():
        exact = case.function(*(x.double() if x.dtype == torch.float32 else x for x in inputs))
    for got, want in zip(program(apart)(case, inputs), exact, strict=True):
        wanted = want.float().numpy()
        assert got.shape == wanted.shape
        limit = 3e-6 if case.dtype == torch.float32 else 2e-2
        scale = max(1.0, np.abs(wanted).max(initial=0))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=limit * scale)


@pytest.mark.parametrize("time", [0, 1, 3, 17, 70])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_torch(case: Case, time: int) -> None:
    check(case, time, apart=False)


@pytest.mark.parametrize("case", TAKEN_APART, ids=lambda case: case.name)
def test_equals_torch_when_taken_apart(case: Case) -> None:
    check(case, 9, apart=True)


def test_what_is_fused() -> None:
    records: list[Record] = program(False).records
    assert [r.reason for r in records] == [case.fused for case in CASES if case.fused]
    assert (program(False).fused, program(False).left) == (len(records), len(CASES) - len(records))
