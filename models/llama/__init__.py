"""Llama: the model, and loaders of its weights and tokenizer."""

from spikingbrain.models.llama.model import Llama, LlamaConfig, State

__all__ = ["Llama", "LlamaConfig", "State"]
