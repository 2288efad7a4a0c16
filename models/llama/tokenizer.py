"""The tokenizer that a GGUF file carries, as a Hugging Face `tokenizers.Tokenizer`.

Only byte-level BPE (`tokenizer.ggml.model` = "gpt2") is known. Bytes that the vocabulary has no token for are
dropped, as by llama.cpp and by the original tokenizer.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from spikingbrain.models.errors import MissingPackage, WeightsError
from spikingbrain.models.llama.gguf import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Kinds of tokens in `tokenizer.ggml.token_type`.
CONTROL, USER_DEFINED = 3, 4

# `tokenizer.ggml.pre` -> are digits split one by one before the byte-level rule of GPT-2?
PRE_TOKENIZERS = {"gpt-2": False, "smollm": True}


def tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a GGUF file."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    except ImportError as error:
        raise MissingPackage(
            "the tokenizer needs the package tokenizers", why=str(error), hint="pip install tokenizers"
        ) from error

    file = GgufFile(path)
    metadata = file.metadata
    _check(file)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    prefix_space = metadata.get("tokenizer.ggml.add_space_prefix", False)

    built = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=True)]
    if PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    built.pre_tokenizer = pre_tokenizers.Sequence(steps)
    built.decoder = decoders.ByteLevel()

    kinds = metadata.get("tokenizer.ggml.token_type", [])
    by_kind = {kind: [t for t, k in zip(tokens, kinds, strict=False) if k == kind] for kind in set(kinds)}
    built.add_special_tokens([AddedToken(t, normalized=False) for t in by_kind.get(CONTROL, [])])
    built.add_tokens([AddedToken(t, normalized=False) for t in by_kind.get(USER_DEFINED, [])])
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        first = metadata["tokenizer.ggml.bos_token_id"]
        built.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A", special_tokens=[(tokens[first], first)]
        )
    return built


def tokenizer_json(path: str | os.PathLike[str]) -> str:
    """Returns the tokenizer of a GGUF file as the text of a tokenizer.json."""
    text: str = tokenizer(path).to_str()
    return text


def chat_template(path: str | os.PathLike[str]) -> str | None:
    """Returns the Jinja template that turns a conversation into a prompt, None when the file has none."""
    template: str | None = GgufFile(path).metadata.get("tokenizer.chat_template")
    return template


def _check(file: GgufFile) -> None:
    supported = {"tokenizer.ggml.model": ["gpt2"], "tokenizer.ggml.pre": list(PRE_TOKENIZERS)}
    for key, values in supported.items():
        if file.metadata.get(key) not in values:
            raise WeightsError(
                f"{key} is {file.metadata.get(key)!r}, and only {', '.join(map(repr, values))} are known",
                where=str(file.path),
                why="another rule would cut texts into other tokens than the model was trained on",
                hint="the tokenizer.json published with the model",
            )
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if key not in file.metadata:
            raise WeightsError(
                f"the file has no tokenizer: {key} is absent",
                where=str(file.path),
                hint="the tokenizer.json published with the model",
            )
