"""Models that call plain functions, ours or fla's, are captured with the ops in their place."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikingbrain.compat import fla_ops as fla
from spikingbrain.compat.table import STAND_INS
from spikingbrain.errors import UnsupportedOp
from spikingbrain.frontend.ops import substitutions
from spikingbrain.frontend.ops.substitutions import register_for_dynamo, substituted, table
from spikingbrain.models import recurrences
from spikingbrain.models.recurrences import gla, hgrn, mamba
from spikingbrain.models.recurrences.linear_recurrence import linear_recurrence
from spikingbrain.models.reference import recurrences as reference

sys.path.append(str(Path(__file__).parents[1]))
from tolerances import assert_close

B, T, H, K = 2, 9, 2, 4


class Mixed(nn.Module):
    """Calls one function of each kind."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        o, state = gla(q, k, v, g, output_final_state=True)
        h, _ = hgrn(o.flatten(2), g.flatten(2))
        y, _ = mamba(h, F.softplus(h), -torch.ones(H * K, 3), q.flatten(2)[..., :3], k.flatten(2)[..., :3])
        return y, state


def _inputs(steps: int = T) -> tuple[Tensor, ...]:
    torch.manual_seed(steps)
    return *(torch.randn(B, steps, H, K) for _ in range(3)), -torch.rand(B, steps, H, K)


def _ops(graph: torch.fx.Graph) -> list[str]:
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("spikingbrain.")]


def test_export_of_any_length_holds_the_ops() -> None:
    steps = {1: torch.export.Dim("T")}
    with substituted():
        program = torch.export.export(Mixed(), _inputs(), dynamic_shapes=(steps,) * 4)
    assert _ops(program.graph) == ["linear_recurrence", "linear_scan", "selective_scan"]
    inputs = _inputs(70)
    for actual, expected in zip(program.module()(*inputs), Mixed()(*inputs), strict=True):
        assert_close(actual, expected, "result")


def test_functions_are_put_back() -> None:
    before = linear_recurrence
    with pytest.raises(RuntimeError, match="stop"), substituted():
        assert globals()["linear_recurrence"] is not before
        o, _ = linear_recurrence(*_inputs()[:3])  # the op, whose body still has the plain function
        assert o.shape == (B, T, H, K)
        raise RuntimeError("stop")
    assert globals()["linear_recurrence"] is before


def test_compiled_graphs_hold_the_ops_and_train(fresh_dynamo: None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    register_for_dynamo()
    register_for_dynamo()  # a second call finds nothing to do
    results = []
    for model in (torch.compile(Mixed(), backend=keep, fullgraph=True), Mixed()):
        inputs = [x.requires_grad_() for x in _inputs()]
        y, state = model(*inputs)
        assert state is not None
        results.append((y, state, *torch.autograd.grad(y.square().sum() + state.sum(), inputs)))
    assert _ops(graphs[0].graph) == ["linear_recurrence", "linear_scan", "selective_scan"]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, "result or gradient", scale=1.0)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Yields a module in the place of `fla.ops.gla`, with a function that runs on no machine."""

    def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None, **rest: Any) -> Any:
        raise RuntimeError("0 active drivers")

    module = types.ModuleType("fla.ops.gla")
    module.chunk_gla = torch.compiler.disable(chunk_gla)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla.ops.gla", module)
    yield module


def test_models_that_call_fla(stand_in: types.ModuleType, fresh_dynamo: None) -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            o, _ = stand_in.chunk_gla(q, k, v, g, scale=1.0, output_final_state=True, cu_seqlens=None)
            return o

    inputs = _inputs()
    expected = gla(*inputs, scale=1.0)[0]
    with pytest.raises(RuntimeError, match="0 active drivers"):
        Model()(*inputs)
    with substituted():
        program = torch.export.export(Model(), inputs)
    assert _ops(program.graph) == ["linear_recurrence"]
    assert_close(program.module()(*inputs), expected, "exported")
    register_for_dynamo()
    assert_close(torch.compile(Model(), backend="eager", fullgraph=True)(*inputs), expected, "compiled")


def test_what_fla_alone_computes_is_refused_by_name() -> None:
    inputs = _inputs()
    with pytest.raises(UnsupportedOp, match="fla's chunk_gla with head_first"):
        fla.gla(*inputs, head_first=True)
    with pytest.raises(UnsupportedOp, match="cu_seqlens and normalize"):
        fla.chunk_linear_attn(*inputs[:3], cu_seqlens=torch.tensor([0, 3, 9]))
    with pytest.raises(UnsupportedOp, match="both gk and gv"):
        fla.fused_recurrent_gla(*inputs[:3], gk=inputs[3], gv=inputs[3])
    with pytest.raises(UnsupportedOp, match="beta for each value channel"):
        fla.delta_rule(*inputs)
    with pytest.raises(UnsupportedOp, match="no A_log"):
        fla.kda(*inputs, inputs[3][..., 0], use_gate_in_kernel=True)
    with pytest.raises(UnsupportedOp, match="a state and no gate"):
        fla.gsa(*inputs, output_final_state=True)


def test_fla_options() -> None:
    """What fla's kernels do on the way, beside the recurrence."""
    q, k, v, g = (x.double() for x in _inputs())
    beta, state, gates = (
        torch.randn(B, T, 2 * H).double(),
        torch.randn(B, 2 * H, K, K).double(),
        _inputs(T)[3][..., 0],
    )
    wide_v = torch.cat((v, -v), 2)

    # Values of more heads than keys, normalised keys, gates from parameters, a state stored with values first.
    A_log, bias, pre = (
        torch.randn(2 * H).double(),
        torch.randn(2 * H).double(),
        torch.randn(B, T, 2 * H).double(),
    )
    o, last = fla.fused_recurrent_gated_delta_rule(
        q,
        k,
        wide_v,
        pre,
        beta=beta,
        initial_state=state.mT.contiguous(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
        state_v_first=True,
    )
    q2, k2 = (
        x.repeat_interleave(2, 2) / (x.repeat_interleave(2, 2).square().sum(-1, True) + 1e-6).sqrt()
        for x in (q, k)
    )
    gate = -A_log.exp() * F.softplus(pre + bias)
    expected = reference.gated_delta_rule(q2, k2, wide_v, gate, 2 * beta.sigmoid(), state)
    assert_close(o, expected[0], "gated delta rule")
    assert_close(last, expected[1].mT, "its state")

    channel = torch.randn(B, T, H, K).double()
    o, _ = fla.kda(
        q, k, v, channel, beta[..., :H].sigmoid(), A_log=A_log[:H], use_gate_in_kernel=True, lower_bound=-5.0
    )
    gate = -5.0 * (A_log[:H].exp().view(H, 1) * channel).sigmoid()
    assert_close(o, reference.kda(q, k, v, gate, beta[..., :H].sigmoid())[0], "KDA with a bounded gate")

    gamma = -torch.rand(H).double()
    o, _ = fla.chunk_simple_gla(q, k, v, gates.double(), gamma)
    assert_close(
        o, reference.simple_gla(q, k, v, gates.double() + gamma)[0], "simple GLA with a constant gate"
    )
    o, _ = fla.fused_recurrent_gla(q, k, v, gv=g)
    assert_close(
        o, reference.linear_recurrence(q * K**-0.5, k, v, g, decay_axis="value", log_decay=True)[0], "gv"
    )

    positive = (q.abs(), k.abs(), v)
    _, (kept, keys) = fla.chunk_linear_attn(*positive, output_final_state=True)
    o, _ = fla.chunk_linear_attn(*positive, initial_state=(kept, keys))
    twice = reference.normalised_linear_attention(*(torch.cat((x, x), 1) for x in positive))[0]
    assert_close(o, twice[:, T:], "normalised linear attention, continued")
    assert keys.shape == (B, 1, H, K)

    for name, other, arguments in (
        ("chunk_retention", "retention", (q, k, v)),
        ("chunk_rwkv6", "rwkv6", (q, k, v, g, q[0, 0])),
        ("chunk_gsa", "gsa", (q, k, v, q, g)),
        ("chunk_hgrn", "hgrn", (q[..., 0], g[..., 0])),
        ("chunk_lightning_attn", "lightning_attention", (q, k, v, 1, 3)),
    ):
        o, _ = STAND_INS["fla.ops"][name](*arguments)
        assert_close(o, getattr(reference, other)(*arguments)[0], name)


def test_functions_of_fla_are_looked_up_only_if_imported(stand_in: types.ModuleType) -> None:
    originals = [original for original, _ in table()]
    assert stand_in.chunk_gla in originals
    assert len(originals) == len(substitutions._OWN) + 1
    assert recurrences.gla not in originals
