"""A small language model of gated linear attention (GLA)."""

from spikingbrain.models.gla.model import Gla, GlaConfig, State, small, tiny

__all__ = ["Gla", "GlaConfig", "State", "small", "tiny"]
