"""torch's own database of higher-order ops, those that take functions: loops, branches, regions that are called.

They are tried like other ops, under ``higher_order.NAME.VARIANT``, with two differences: a call goes through Dynamo, which makes
graphs of the functions, and what torch itself refuses is recorded as "unsupported", not left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PREFIX = "higher_order."
# Listed for GPUs alone; torch has an implementation for the CPU too.
_ON_CPU = {"flex_attention", "flex_attention_backward", "local_map_hop"}
# Listed without gradients, which AOTAutograd has; what it lacks is the gradient of the gradient.
_DIFFERENTIABLE = {"scan", "while_loop"}
# Dynamo makes these ops itself, of `local_map` and `Tensor.register_hook`, and refuses a call by hand: AOTAutograd takes it.
_MADE_BY_DYNAMO = {"local_map_hop", "register_hook"}


@dataclass(frozen=True)
class HigherOrderOp:
    """An entry of the database, with what the harness reads of an OpInfo, for the CPU."""

    info: Any

    @property
    def op(self) -> Callable[..., Any]:
        return _showing_writes(self.info.op) if self.info.name == "auto_functionalize" else self.info.op

    @property
    def through_dynamo(self) -> bool:
        return self.info.name not in _MADE_BY_DYNAMO

    @property
    def supports_autograd(self) -> bool:
        return bool(self.info.supports_autograd) or self.info.name in _DIFFERENTIABLE

    def supported_dtypes(self, device: str) -> set[torch.dtype]:
        return {torch.float32} if self.info.name in _ON_CPU else set(self.info.supported_dtypes(device))

    def supported_backward_dtypes(self, device: str) -> set[torch.dtype]:
        return {t for t in self.supported_dtypes(device) if t.is_floating_point}

    def sample_inputs(self, device: str, dtype: torch.dtype, requires_grad: bool) -> Iterator[Any]:
        """Yields torch's samples; with ``requires_grad`` all floating tensors of them do."""
        for sample in self.info.sample_inputs(device, dtype, requires_grad=requires_grad):
            for leaf in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)):
                if requires_grad and isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaf.requires_grad_()
            yield sample


def _showing_writes(op: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an op that gives back its inputs as well, since it writes to them."""

    def both(*inputs: Tensor) -> tuple[Any, ...]:
        results = op(*inputs)
        return results, *(x.clone() for x in inputs)

    return both


def database() -> dict[str, HigherOrderOp]:
    """Returns the entries by name."""
    from torch.testing._internal.hop_db import hop_db

    return {f"{PREFIX}{o.name}.{o.variant_test_name}": HigherOrderOp(o) for o in hop_db}
