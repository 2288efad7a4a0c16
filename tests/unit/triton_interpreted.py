"""Runs the Triton kernels by Triton's interpreter and prints, as JSON, how far they are from plain references.

A process of its own: Triton reads TRITON_INTERPRET when kernels are declared. `test_triton_kernels.py` judges the numbers.
"""

import json

import torch
from torch import Tensor

from spikingbrain.backend_maca.triton import attention, delta, recurrence, settings, spikes
from spikingbrain.backend_maca.triton import scan as elements
from spikingbrain.models import spiking
from spikingbrain.models.reference.recurrences import linear_recurrence as by_steps
from spikingbrain.models.reference.recurrences import linear_scan as by_elements

found: dict[str, dict[str, float]] = {}


def record(case: str, names: str, given: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    """Records the largest error of each, relative to the largest value."""
    found[case] = {}
    for name, x, y in zip(names.split(), given, wanted, strict=True):
        if y is None or not y.numel():
            continue
        assert x is not None and x.shape == y.shape
        found[case][name] = float((x.detach().double() - y).abs().max() / y.abs().max().clamp(min=1e-30))
        if not torch.isfinite(x).all():
            found[case][name] = float("inf")


def extreme(gate: Tensor) -> Tensor:
    """Returns gates that forget all, nearly all, or nearly nothing."""
    return torch.where(
        gate > 0.6,
        -torch.inf,
        torch.where(gate < -0.6, -1e4, torch.where(gate > 0.3, -3.0, gate.abs() * -1e-3)),
    )


def recur(
    case, steps, axis, exclusive, heads=2, states=1, keys=20, values=24, dtype=torch.float32, gates=None
):
    batch = 1 if axis == "key" else 2  # the interpreter is slow
    size = {"none": None, "head": (batch, steps, states), "key": (batch, steps, states, keys)}[axis]
    decay = None if size is None else torch.randn(size)
    if decay is not None:
        decay = (torch.nn.functional.logsigmoid if gates is None else gates)(decay).to(dtype)
    q, k, v = (
        torch.randn(batch, steps, n, d).to(dtype)
        for n, d in ((heads, keys), (states, keys), (states, values))
    )
    state = torch.randn(batch, states, keys, values)
    exact = [None if x is None else x.double().requires_grad_() for x in (q, k, v, decay, state)]
    o_, last_ = by_steps(
        *exact[:3], exact[3], state=exact[4], decay_axis=axis, log_decay=True, exclusive=exclusive
    )
    do, dlast = torch.randn(o_.shape).to(dtype), torch.randn(last_.shape)
    both = [(x, g.double()) for x, g in ((o_, do), (last_, dlast)) if x.requires_grad]
    torch.autograd.backward(*zip(*both, strict=True))
    o, last = recurrence.forward(q, k, v, decay, state, axis, exclusive)
    gradients = recurrence.backward(do, dlast, q, k, v, decay, state, axis, exclusive)
    of = [None if x is None else x.grad for x in exact]
    record(case, "o last dq dk dv ddecay dstate", [o, last, *gradients], [o_.detach(), last_.detach(), *of])


def delta_rule(case, steps, axis, exclusive, dtype=torch.float32, gates=None):
    keys, values, states, heads = (
        (20, 24, 1, 1) if axis == "key" else (20, 24, 2, 4)
    )  # the interpreter is slow
    q, k, v = (torch.randn(1, steps, n, d) for n, d in ((heads, keys), (states, keys), (states, values)))
    k = torch.nn.functional.normalize(k, dim=-1)
    strength = torch.rand(1, steps, states, 1) * 2  # up to a reflection
    size = {"none": None, "head": (1, steps, states), "key": (1, steps, states, keys)}[axis]
    decay = None if size is None else torch.nn.functional.logsigmoid(torch.randn(size))
    decay = gates(torch.randn(size)) if gates else decay
    given = [q, k, v, decay, -strength * k, k + 0.01 * torch.randn(k.shape)]
    given = [None if x is None else x.to(dtype) for x in given]
    state = torch.randn(1, states, keys, values)
    exact = [None if x is None else x.double() for x in (*given, None, state)]
    o_, last_ = by_steps(*exact, decay_axis=axis, log_decay=True, exclusive=exclusive)
    record(case, "o last", [*delta.forward(*given, state, axis, exclusive)], [o_, last_])


def scan(case, dtype, log, reverse, state):
    decay, x = torch.randn(2, 9, 300), torch.randn(2, 9, 300).to(dtype)
    decay = (torch.where(decay > 1, -torch.inf, -decay.abs()) if log else decay).to(dtype)
    first = torch.randn(2, 300) if state else None
    h = elements.linear_scan(decay, x, first, log, reverse)
    of_state = None if first is None else first.double()
    record(case, "h last", [*h], [*by_elements(decay.double(), x.double(), of_state, log, reverse)])


def softmax(q, k, v, window, sinks, at=None):
    steps, count = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    position, key = torch.arange(steps)[:, None] + count - steps, torch.arange(count)
    if at is not None:
        position, key = at[0][:, None, :, None], at[1][:, None, None]
    sees = (key >= 0) & (key <= position) & ((key > position - window) | (key < sinks) if window else True)
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) * q.shape[-1] ** -0.5
    blind = ~sees.any(-1, keepdim=True)
    weights = scores.masked_fill(~(sees | blind), -torch.inf).softmax(-1).masked_fill(blind, 0.0)
    return torch.einsum("bhtn,bnhe->bthe", weights, v)


def attend(case, steps, keys, window, sinks, heads=2, sources=1, dtype=torch.float32, scale=1.0, at=None):
    shapes = ((steps, heads, 20), (keys, sources, 20), (keys, sources, 12))
    given = [(torch.randn(2, *shape) * scale).to(dtype) for shape in shapes]
    exact = [x.double().requires_grad_() for x in given]
    places = (None, None) if at is None else at
    o, sums = attention.forward(*given, window, sinks, None, *places)
    o_ = softmax(*exact, window, sinks, at)
    do = torch.randn(o.shape).to(dtype)
    gradients = attention.backward(do, *given, o, sums, window, sinks, None, *places)
    o_.backward(do.double())
    record(case, "o dq dk dv", [o, *gradients], [o_.detach(), *(x.grad for x in exact)])


def spike(case, counts, outputs, groups=1, bias=True, turned=False):
    rows, channels = counts.shape
    codes = torch.randint(-128, 128, (outputs, channels), dtype=torch.int8)
    codes = codes.T.contiguous().T if turned else codes
    scale, threshold = torch.rand(outputs, groups) + 0.1, torch.rand(rows) + 0.1
    b = torch.randn(outputs) if bias else None
    y = spikes.spike_linear(counts, threshold, codes, scale, b)
    exact = spiking.spike_linear(counts, threshold[:, None], codes, scale, b, torch.float64)
    if groups > 1:
        record(case, "y", [y], [exact.double()])
    else:
        same = torch.where(y.isnan(), exact.isnan(), y == exact)
        found[case] = {"different": float((~same).sum())}
        beyond = ~(counts.abs().amax(1) < spikes.EXACT)
        if beyond.any():
            finite = exact[beyond].isfinite()
            found[case]["different"] = float((~same[~beyond]).sum())
            record(f"{case}: large", "y", [y[beyond][finite]], [exact[beyond][finite].double()])
            found[f"{case}: large"]["NaN"] = float((y[beyond].isnan() != exact[beyond].isnan()).sum())


# Settings with which a few cases run once more: blocks of other sizes than the usual ones, in each kernel.
OTHERS = {
    "attention_rows": 32, "attention_keys": 16, "attention_float_numbers": 1024, "float_block_steps": 16,
    "float_block_channels": 16, "block_steps": 16, "block_channels": 32, "step_values": 16, "delta_numbers": 1024,
    "scan_channels": 64, "spike_rows": 16, "spike_outputs": 16, "spike_few_rows_channels": 32,
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with settings.using({"block_steps": 32, "block_channels": 32}):  # so that few steps fill blocks
        usual()
    with settings.using(OTHERS):
        recur("other settings: gates of heads", 21, "head", False, gates=extreme)
        recur("other settings: gates of keys", 20, "key", False, heads=1)
        recur("other settings: one step", 1, "head", False)
        delta_rule("other settings: delta rule", 20, "head", False)
        scan("other settings: elements", torch.float32, True, False, True)
        attend("other settings: attention", 20, 41, 9, 3)
        spike("other settings: bytes", torch.randint(-300, 300, (19, 70)).float(), 33)


def usual() -> None:
    recur("no decay", 37, "none", False)
    recur("no decay, exclusive, one step", 1, "none", True)
    recur("one step, gates of keys", 1, "key", False)
    recur("one step, gates of heads, extreme", 1, "head", False, states=2, gates=extreme)
    recur("no steps", 0, "key", False)
    recur("gates of heads, extreme", 70, "head", False, states=2, gates=extreme)
    recur("gates of heads, exclusive", 37, "head", True)
    recur("gates of keys, extreme", 35, "key", False, gates=extreme)
    recur("gates of keys, exclusive", 21, "key", True, heads=1)
    recur("bfloat16", 20, "head", False, dtype=torch.bfloat16)
    recur("float16", 17, "key", False, heads=1, keys=16, dtype=torch.float16)
    delta_rule("delta rule", 37, "none", False)
    delta_rule("delta rule, one step", 1, "head", True)
    delta_rule("delta rule, gates of heads, extreme", 70, "head", False, gates=extreme)
    delta_rule("delta rule, gates of keys", 35, "key", True)
    delta_rule("delta rule in bfloat16", 20, "head", False, dtype=torch.bfloat16)
    scan("elements, factors of any sign", torch.float32, False, False, False)
    scan("elements, logarithms, backwards", torch.float32, True, True, True)
    scan("elements in float16", torch.float16, True, False, True)
    attend("causal", 37, 37, 0, 0)
    attend("window and sinks, later queries", 40, 71, 9, 3, heads=4, sources=2)
    attend("many sinks", 70, 70, 5, 40, heads=1)
    attend("one query", 1, 71, 20, 2)
    attend("no queries", 0, 5, 2, 1)
    held = torch.stack([torch.randperm(50) for _ in range(2)])  # as a ring keeps its keys, some slots empty
    at = (
        torch.arange(40, 61).expand(2, -1),
        torch.cat((held.where(held % 5 > 0, -1), torch.arange(40, 61).expand(2, -1)), 1),
    )
    attend("positions, window and sinks", 21, 71, 9, 3, heads=4, sources=2, at=at)
    blind = torch.tensor([[7, 2, 30], [1, 0, 4]])
    attend("positions, queries that see nothing", 3, 40, 4, 0, at=(blind, torch.arange(5, 45).expand(2, -1)))
    attend("positions, one query", 1, 71, 0, 0, at=(at[0][:, :1], at[1].int()))
    attend("attention in bfloat16", 20, 20, 9, 1, dtype=torch.bfloat16)
    small = torch.randint(-128, 128, (3, 70)).float()
    spike("bytes", small, 33)
    spike("bytes, weights turned", small, 33, turned=True, bias=False)
    large = torch.randint(-3, 4, (20, 300)).float()
    for row, (column, count) in enumerate(
        [(7, 4194303), (299, -4194303), (0, 128), (1, -129), (2, 32896), (3, -40000)]
    ):
        large[row, column] = count
    spike("counts outside int8", large, 20)
    spike("groups", torch.randint(-300, 300, (5, 96)).float(), 20, groups=4)
    clamped = torch.zeros(4, 64)
    clamped[0, 0], clamped[1, 2], clamped[2, 1], clamped[3, 1] = 1e30, 8388609, float("nan"), 77
    clamped[1, 3] = -4194304
    spike("clamped thresholds", clamped, 8, bias=False)
    spike("no rows", small[:0], 5)


if __name__ == "__main__":
    main()
    print(json.dumps(found))
