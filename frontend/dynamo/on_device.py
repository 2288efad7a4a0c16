"""torch.compile for a target whose device belongs to torch: the graph runs on torch's kernels, our ops on the backend's.

The kernels take the place of the ops' eager bodies for tensors of that device, in the whole process. What a kernel does not
take runs the eager body there, and the report says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from spikingbrain.backend import TorchKernels, resolve_target
from spikingbrain.errors import OptionError
from spikingbrain.frontend import ops
from spikingbrain.frontend.dynamo.ops import (
    EXPERTS,
    Kind,
    Verdict,
    classify,
    operands,
    packet_name,
    tensors_of,
)
from spikingbrain.frontend.ops import on_device
from spikingbrain.frontend.ops.linear_recurrence import check as check_recurrence
from spikingbrain.frontend.ops.linear_scan import check as check_scan
from spikingbrain.frontend.ops.spikes import check as check_spikes
from spikingbrain.frontend.ops.window_attention import check as check_attention

log = logging.getLogger("spikingbrain.compile")


@functools.cache
def kernels_of(target: str, providers: str = "") -> TorchKernels | None:
    """Returns the kernels that run a target's device inside torch, installed; None for a target without.

    Raises:
        TargetError: torch has no such device here.
        MissingDependency: a package that the kernels need is not installed.
        OptionError: ``providers`` names what there is not, or another choice than that of an earlier call.
    """
    backend, status = resolve_target(target)
    find = getattr(backend, "torch_kernels", None)
    named = {"providers": providers} if providers else {}
    kernels: TorchKernels | None = find(status.target, **named) if find else None
    if kernels is None:
        return None
    if on_device.remember(kernels):
        for name in kernels.table:
            _install(name, kernels)
    first = on_device.installed(kernels.device)
    if first is not None and first.providers != kernels.providers:
        raise OptionError(
            f"providers {providers!r} after {first.providers!r}",
            why=f"kernels take the place of ops on {kernels.device} once in a process, for all models",
            hint="one choice for every torch.compile of a process",
        )
    return kernels


def refusal(target: str, providers: str, op: str) -> Callable[..., str | None] | None:
    """Returns what tells why kernels of a target inside torch do not take a call of ``op``; None where it has none."""
    kernels = kernels_of(target, providers)
    return kernels.table[op].refuse if kernels is not None and op in kernels.table else None


def _install(name: str, kernels: TorchKernels) -> None:
    op: Any = getattr(ops, name)
    told: set[str] = set()

    def run(*args: Any, **kwargs: Any) -> Any:
        given = arguments(name, args, kwargs)
        kernel = kernels.table[name]
        reason = kernel.refuse(*given)
        if reason is None:
            return kernel.run(*given)
        if reason not in told:
            told.add(reason)
            log.info("%s runs its eager body on %s: %s", name, kernels.device, reason)
        return op._init_fn(*args, **kwargs)  # the op's eager body; tests/unit/test_private_api.py

    op.register_kernel(kernels.device)(run)


def verdicts(graph: fx.Graph, kernels: TorchKernels) -> dict[fx.Node, Verdict]:
    """Returns for each op of a graph who runs it: torch, or a kernel of the backend."""
    return {n: _verdict(n, kernels) for n in graph.nodes if n.op == "call_function"}


def _verdict(node: fx.Node, kernels: TorchKernels) -> Verdict:
    name = packet_name(node.target)
    if name == "getitem":  # one of several results: shares its source's fate
        source = node.args[0]
        return _verdict(source, kernels) if source.op == "call_function" else Verdict(Kind.SCALAR)
    devices = {t.device.type for t in [*operands(node), *tensors_of(node.meta.get("val"))]}
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "spikingbrain":
        usual = classify(node)
        scalar = usual.kind is Kind.SCALAR
        return (
            usual if scalar else Verdict(Kind.LIBRARY, f"torch's kernels on {' and '.join(sorted(devices))}")
        )
    if elsewhere := devices - {kernels.device}:
        return Verdict(
            Kind.EAGER,
            f"a tensor on {', '.join(sorted(elsewhere))}; the target's are on {kernels.device}",
            f'model.to("{kernels.device}"), and its inputs',
        )
    if name in EXPERTS or name == "spike_encode":
        return Verdict(Kind.LIBRARY, f"its body is a few of torch's kernels on {kernels.device}")
    if name not in kernels.table:
        return Verdict(Kind.EAGER, f"{name} has no kernel for this target, its body runs in eager")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    kernel, given = kernels.table[name], arguments(name, args, kwargs)
    reason = kernel.refuse(*given)
    if reason is None:
        return Verdict(Kind.KERNEL, kernel.told(*given) if kernel.told else kernels.name)
    return Verdict(Kind.EAGER, reason)


def arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the arguments of a call of an op of ours as a kernel takes them: all of them, checked as the op does."""
    given = [*args, *(kwargs.get(key, default) for key, default in _defaults(name)[len(args) :])]
    return _CHECKED[name](*given) if name in _CHECKED else tuple(given)


@functools.cache
def _defaults(name: str) -> list[tuple[str, Any]]:
    return [
        (a.name, a.default_value) for a in getattr(torch.ops.spikingbrain, name).default._schema.arguments
    ]


def _recurrence(*given: Any) -> tuple[Any, ...]:
    q, k, v, decay, erase, predict, bonus, state, axis, _, exclusive, _ = given
    check_recurrence(q, k, v, decay, erase, predict, bonus, state, axis, exclusive)
    return given


def _scan(*given: Any) -> tuple[Any, ...]:
    decay, update, state, _, _ = given
    check_scan(decay, update, state)
    return given


def _spikes(
    counts: Tensor,
    threshold: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation: Tensor | None,
    float_weight: Tensor | None,
    silent: float,
    turned: bool,
) -> tuple[Any, ...]:
    scale, codes = check_spikes(counts, threshold, weight, scale, bias, bits, turned)
    return counts, threshold, codes, scale, bias, bits


def _attention(*given: Any) -> tuple[Any, ...]:
    check_attention(*given[:5], *given[6:])
    return given


_CHECKED: dict[str, Callable[..., tuple[Any, ...]]] = {
    "linear_recurrence": _recurrence,
    "linear_scan": _scan,
    "spike_linear": _spikes,
    "window_attention": _attention,
}
