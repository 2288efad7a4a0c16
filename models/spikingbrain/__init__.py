"""SpikingBrain: the 7B (linear), the 76B (hybrid, mixture of experts), and small ones of the same architecture.

from spikingbrain.models.spikingbrain import SpikingBrain, tiny_7b
model = SpikingBrain(tiny_7b())
logits, state = model(tokens, model.initial_state(batch=1))
"""

from spikingbrain.models.spikingbrain.config import (
    LayerConfig,
    SpikingBrainConfig,
    spikingbrain_1b,
    spikingbrain_7b,
    spikingbrain_76b,
    tiny_7b,
    tiny_76b,
)
from spikingbrain.models.spikingbrain.model import SpikingBrain, State

__all__ = [
    "LayerConfig",
    "SpikingBrain",
    "SpikingBrainConfig",
    "State",
    "spikingbrain_1b",
    "spikingbrain_7b",
    "spikingbrain_76b",
    "tiny_7b",
    "tiny_76b",
]
