"""Raising on a device that is not the CPU: what it makes of numbers lies where the graph's tensors are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from spikingbrain.frontend.before_autograd import raise_in_dynamo_graph


def leaky(x: Tensor, a: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = 0.9 * h + 0.1 * x[:, t] * a[:, t]
        out.append(h)
    return torch.stack(out, 1)


def test_constants_of_a_raised_loop_are_on_its_device() -> None:
    raised: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        made, found = raise_in_dynamo_graph(module, inputs)
        assert [r.op for r in found.recurrences] == ["linear_scan"]
        raised.append(made)
        return made

    torch._dynamo.reset()
    y = torch.compile(leaky, backend=backend)(*(torch.empty(2, 12, 8, device="meta") for _ in range(2)))
    assert y.device.type == "meta" and y.shape == (2, 12, 8)
    constants = [n for n in raised[0].graph.nodes if n.target is torch.ops.aten.full.default]
    assert constants and all(n.kwargs["device"].type == "meta" for n in constants)
