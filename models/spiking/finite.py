"""Finding the first spiking layer whose input is not finite, in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spikingbrain.models.spiking.errors import SpikingError
from spikingbrain.models.spiking.linear import SpikeLinear, SpikeLinearTraining


@contextmanager
def check_finite(model: nn.Module) -> Iterator[None]:
    """Lets the spiking layers of ``model``, inside the ``with``, raise SpikingError for an input with NaN or infinity.

    Compiled code has no such hooks; it is checked by the option of the same name.
    """
    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, (SpikeLinear, SpikeLinearTraining)):
                hooks.enter_context(layer.register_forward_pre_hook(_check(name)))
        yield


def _check(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def check(_: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        x: Tensor = args[0].detach()
        bad = ~x.isfinite().all(-1)
        if bad.any():
            row = bad.nonzero()[0].tolist()
            channels = x[tuple(row)]
            found = " and ".join(
                word for word, has in (("NaN", channels.isnan()), ("infinity", channels.isinf())) if has.any()
            )
            raise SpikingError(
                f"the input of spiking layer {name!r} holds {found}" + (f" in row {row}" if row else ""),
                why=f"{int(bad.sum())} of {bad.numel()} rows are not finite, and all layers before it had finite inputs",
                hint="look at what computes this layer's input",
            )

    return check
