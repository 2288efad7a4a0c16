"""Llama: the model, weights and tokenizers from GGUF files (`gguf`, `tokenizer`), a real one (`smollm2`)."""

from spikingbrain.models.errors import ConfigError, MissingPackage, WeightsError
from spikingbrain.models.llama.gguf import load
from spikingbrain.models.llama.model import Llama, LlamaConfig, State
from spikingbrain.models.llama.tokenizer import chat_template, tokenizer_json

__all__ = [
    "ConfigError",
    "Llama",
    "LlamaConfig",
    "MissingPackage",
    "State",
    "WeightsError",
    "chat_template",
    "load",
    "tokenizer_json",
]
