"""Teaches a converted layer's linear attention to do what the attention in its place did, one layer at a time.

Much cheaper than training the model: the layer sees what the source model's layer saw, and learns its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from spikingbrain.models.checkpoint import replace_parameter
from spikingbrain.models.errors import ConfigError
from spikingbrain.models.llama.model import Llama
from spikingbrain.models.spikingbrain.attention import Attention
from spikingbrain.models.spikingbrain.config import SpikingBrainConfig
from spikingbrain.models.spikingbrain.model import SpikingBrain
from spikingbrain.models.spikingbrain.moment import moment_of_text

Pair = tuple[Tensor, Tensor]  # what a layer's attention reads and what it returns, [B, T, E]


def attention_pairs(source: Llama, layer: int, texts: Iterable[Tensor]) -> Iterator[Pair]:
    """Yields what the attention of a layer reads and returns for each batch of tokens [B, T]; nothing is computed behind it."""

    class Seen(Exception):
        pass

    pair: list[Tensor] = []

    def remember(module: nn.Module, arguments: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> None:
        pair[:] = [arguments[0].detach(), result[0].detach()]
        raise Seen

    handle = source.get_submodule(f"blocks.{layer}.attention").register_forward_hook(remember)
    try:
        for tokens_BT in texts:
            with torch.no_grad():
                try:
                    source(tokens_BT, source.initial_state(len(tokens_BT), capacity=tokens_BT.shape[1]))
                except Seen:
                    yield pair[0], pair[1]
    finally:
        handle.remove()


class LinearAttentionAlone(nn.Module):
    """A layer's linear attention as a function from x [B, T, E] to its output [B, T, E], from an empty memory on."""

    def __init__(self, attention: Attention, config: SpikingBrainConfig):
        super().__init__()
        if attention.linear is None or attention.softmax is not None:
            raise ConfigError(
                "the layer has softmax attention",
                where="fit",
                why="it needs no fitting, or not by itself",
                hint="a layer with linear attention alone",
            )
        self.attention, self.config = attention, config

    def forward(self, x_BTE: Tensor) -> Tensor:
        config = self.config
        memory = x_BTE.new_zeros(len(x_BTE), config.key_heads, config.head_size, config.head_size)
        position_B = torch.zeros(len(x_BTE), dtype=torch.int64, device=x_BTE.device)
        moment = moment_of_text(config, position_B, x_BTE.shape[1], None, {}, x_BTE.dtype)
        y_BTE: Tensor = self.attention(x_BTE, memory, None, moment)[0]
        return y_BTE


def fit_layer(
    model: SpikingBrain,
    layer: int,
    pairs: Sequence[Pair],
    steps: int = 150,
    learning_rate: float = 2e-3,
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda module: module,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Trains one layer's attention, in place, with Adam; returns the loss of each step.

    The loss is the squared error over the squared size of the output. ``wrap`` makes the function that is trained, such as
    ``torch.compile``; ``progress`` hears of each step. Batches of ``pairs`` come by turns.
    """
    alone = LinearAttentionAlone(model.get_submodule(f"blocks.{layer}.attention"), model.config)  # type: ignore[arg-type]
    for name, parameter in list(alone.named_parameters()):
        replace_parameter(
            alone, name, parameter.detach().clone()
        )  # a converted model shares its source's tensors
    called = wrap(alone)
    optimiser = torch.optim.Adam(alone.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, max(0.05, 1 - (step - warm) / max(1, steps - warm)))
    )
    losses = []
    for step in range(steps):
        x_BTE, wanted_BTE = pairs[step % len(pairs)]
        loss = (called(x_BTE) - wanted_BTE).square().sum() / wanted_BTE.square().sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        progress(step, losses[-1])
    return losses
