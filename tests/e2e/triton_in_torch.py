"""torch.compile for target maca by Triton's interpreter; prints what differs from eager, as JSON. See test_triton_target.py."""

import json
import logging
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spikingbrain
from spikingbrain.backend_maca.triton import settings
from spikingbrain.frontend.ops import spike_linear
from spikingbrain.models.recurrences import gated_delta_rule
from spikingbrain.models.recurrences.gated import gla
from spikingbrain.models.recurrences.linear_recurrence import linear_recurrence
from spikingbrain.models.recurrences.scan import linear_scan
from spikingbrain.models.spiking import SpikeLinear

ops = torch.ops.spikingbrain
OPTIONS = {"target": "maca"}


class Mixed(nn.Module):
    """Gated linear attention, an elementwise recurrence and a decay that the kernels do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(12, 4 * 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = self.into(x).unflatten(-1, (4, 2, 8)).unbind(2)
        o, _ = gla(q, k, v, F.logsigmoid(g))
        h, _ = linear_scan(torch.sigmoid(x), x, None)
        factor, _ = linear_recurrence(q, k, v, torch.sigmoid(g), decay_axis="key")
        return self.out((o + factor).flatten(2)) + h


def ruled(q: Tensor, k: Tensor, v: Tensor, g: Tensor, strength: Tensor) -> Tensor:
    k = F.normalize(k, dim=-1)
    return gated_delta_rule(q, k, v, F.logsigmoid(g), torch.sigmoid(strength))[0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    seen = (at <= at[:, None]) & ((at > at[:, None] - 6) | (at < 2))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return o + F.scaled_dot_product_attention(q, q, q)  # without a mask: torch's


def gradients(model: nn.Module, call, x: Tensor) -> list[Tensor]:
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def scan(x: Tensor) -> Tensor:
    return linear_scan(torch.sigmoid(x), x, None)[0]


def channels_of_launches(x: Tensor, folder: Path) -> list[list[int]]:
    """Returns the setting that launches saw, forward and backward: usual, given, again (from the cache), a file's, usual."""
    seen: list[int] = []
    current = settings.current

    def noted() -> settings.TritonTuning:
        seen.append(current().scan_channels)
        return current()

    settings.current = noted
    file = folder / "settings.json"
    file.write_text(json.dumps({"tuning": {"scan_channels": 128}, "device": "another"}))
    given = {"tuning": {"scan_channels": 64}}
    found = []
    for options in ({}, given, given, {"tuning": str(file)}, {}):
        torch._dynamo.reset()
        compiled = torch.compile(scan, backend="spikingbrain", options=OPTIONS | options)
        torch.autograd.grad(compiled(x).sum(), [x])
        found.append(seen[:])
        seen.clear()
    settings.current = current
    return found


def error(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max())


def main() -> None:
    torch.manual_seed(0)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("spikingbrain.compile").addHandler(handler)
    logging.getLogger("spikingbrain.compile").setLevel(logging.INFO)

    model, x = Mixed(), torch.randn(2, 11, 12, requires_grad=True)
    wanted = gradients(model, model, x)
    found = gradients(model, torch.compile(model, backend="spikingbrain", options=OPTIONS), x)
    told = spikingbrain.explain(model, x, options=OPTIONS).to_dict()

    # an op with bonus, exclusive and backwards in time: the kernel's terms beside the eager body's
    q, k, v, g = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(4))
    bonus = torch.randn(2, 8, requires_grad=True)
    of_kernel, of_body = [], []
    for into, decay, log in ((of_kernel, F.logsigmoid(g), True), (of_body, torch.sigmoid(g), False)):
        o, last = ops.linear_recurrence(q, k, v, decay, None, None, bonus, None, "key", log, True, True)
        into += [o, last, *torch.autograd.grad(o.square().sum() + last.sum(), [q, k, v, g, bonus])]

    # the gated delta rule, whose backward is calls of the op
    delta = [torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3)]
    delta += [torch.randn(1, 9, 2, requires_grad=True) for _ in range(2)]
    of_delta = []
    for call in (ruled, torch.compile(ruled, backend="spikingbrain", options=OPTIONS | {"strict": True})):
        o = call(*delta)
        of_delta.append([o.detach(), *torch.autograd.grad(o.square().sum(), delta)])

    heads = [torch.randn(2, n, 19, 8, requires_grad=True) for n in (4, 2, 2)]
    of_attention = []
    for call in (attend, torch.compile(attend, backend="spikingbrain", options=OPTIONS)):
        o = call(*heads)
        of_attention.append([o.detach(), *torch.autograd.grad(o.square().sum(), heads)])
    told_of_attention = spikingbrain.explain(attend, *heads, options=OPTIONS).to_dict()

    spiking = SpikeLinear.of(nn.Linear(40, 24))
    y = torch.randn(3, 5, 40)
    y[0, 0, 0] = 1e6  # a count outside int8
    with torch.no_grad():
        compiled = torch.compile(spiking, backend="spikingbrain", options=OPTIONS)(y)
        of_layer = error(compiled, spiking(y))
        counts, threshold = ops.spike_encode(y)
        given = (counts, threshold, spiking.codes, spiking.scale, spiking.bias)
        same = torch.equal(ops.spike_linear(*given), spike_linear._init_fn(*given))
    of_spikes = spikingbrain.explain(spiking, y, options=OPTIONS).to_dict()
    try:
        ops.linear_recurrence(q, k[:, 1:], v)
        refused = ""
    except spikingbrain.errors.ShapeError as wrong:
        refused = str(wrong)
    try:
        spikingbrain.compile(model, target="maca", providers="attention=torch")
        second = ""
    except spikingbrain.errors.OptionError as wrong:
        second = str(wrong)
    try:
        spikingbrain.compile(model, target="maca", tuning={"scan_channels": 100})
        wrong_setting = ""
    except spikingbrain.errors.OptionError as wrong:
        wrong_setting = str(wrong)
    with tempfile.TemporaryDirectory() as folder:
        channels = channels_of_launches(x, Path(folder))
    print(
        json.dumps(
            {
                "wrong setting": wrong_setting,
                "channels": channels,
                "errors": [error(a, b) for a, b in zip(found, wanted, strict=True)],
                "delta rule": [error(a, b) for a, b in zip(*of_delta, strict=True)],
                "attention": [error(a, b) for a, b in zip(*reversed(of_attention), strict=True)],
                "found of attention": told_of_attention["attention"],
                "regions of attention": told_of_attention["regions"],
                "bonus": [error(a, b) for a, b in zip(of_kernel, of_body, strict=True)],
                "regions": told["regions"],
                "of layer": of_layer,
                "spikes are the same": same,
                "regions of spikes": of_spikes["regions"],
                "log": lines,
                "refused": refused,
                "second choice": second,
            }
        )
    )


if __name__ == "__main__":
    main()
