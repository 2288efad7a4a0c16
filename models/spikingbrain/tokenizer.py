"""The tokenizer of Qwen2, which SpikingBrain takes over, from `vocab.json` and `merges.txt`.

Byte-level BPE; texts are brought into the Unicode form NFC, and cut into words, single digits and signs before. Special
tokens follow the vocabulary: their ids are in `added_tokens.json` or `tokenizer_config.json` where a checkpoint has them,
else they are the three of the published models.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from spikingbrain.models.errors import WeightsError

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What stays together before bytes are merged: contractions, words with the sign or blank in front, single digits, signs, blanks.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer_json(folder: str | os.PathLike[str]) -> str | None:
    """Returns a checkpoint's tokenizer as the text of a tokenizer.json; None if the folder holds none.

    A `tokenizer.json` of the folder is taken as it is. Raises WeightsError for files that do not fit together.
    """
    folder = Path(folder)
    ready = folder / "tokenizer.json"
    if ready.is_file():
        return ready.read_text(encoding="utf-8")
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        return None
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        special = _special_tokens(folder, len(vocabulary))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise WeightsError(
            "the tokenizer cannot be built",
            where=str(folder),
            why=str(error),
            hint="vocab.json and merges.txt of one model",
        ) from error
    built.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False)
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    built.decoder = decoders.ByteLevel()
    for number, (token, wanted) in enumerate(sorted(special.items(), key=lambda item: item[1])):
        if wanted != len(vocabulary) + number:
            raise WeightsError(
                f"the special token {token} has the number {wanted}, and {len(vocabulary) + number} follows",
                where=str(folder),
                why="special tokens are counted on from the vocabulary",
                hint="the tokenizer.json that was published with the model",
            )
        built.add_special_tokens([AddedToken(token, normalized=False)])
    text: str = built.to_str()
    return text


def _special_tokens(folder: Path, first: int) -> dict[str, int]:
    added, settings = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if added.is_file():
        found: dict[str, int] = json.loads(added.read_text(encoding="utf-8"))
        return found
    if settings.is_file():
        decoder = json.loads(settings.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        if decoder:
            return {token["content"]: int(number) for number, token in decoder.items()}
    return {token: first + number for number, token in enumerate(SPECIAL)}
