"""Qwen2's tokenizer from its two files, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spikingbrain.models.errors import WeightsError
from spikingbrain.models.spikingbrain.tokenizer import tokenizer_json

TEXTS = [
    "It's 2026, and we've 1234 neurons.\n\n  They fire!  ",
    "naïve Ångström e\u0301cole \u212b",  # NFC joins and replaces some of these
    "神经元 发放 — spikes?!\r\n\tx_1 = 3.14 # done   ",
    "<|im_start|>user\nHI THERE, DON'T<|im_end|>",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary of the same kind, trained on the texts themselves."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("qwen")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [*TEXTS * 3, topics["while"], topics["integers"]], vocab_size=600, min_frequency=1
    )
    trained.save_model(str(folder))
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_equals_transformers(text: str, folder: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import Qwen2Tokenizer

    count = len(json.loads((folder / "vocab.json").read_text()))
    theirs = Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    ours = Tokenizer.from_str(tokenizer_json(folder) or "")
    assert ours.token_to_id("<|endoftext|>") == count == theirs.convert_tokens_to_ids("<|endoftext|>")
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    import unicodedata

    assert ours.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_files_of_the_folder(folder: Path, tmp_path: Path) -> None:
    assert tokenizer_json(tmp_path) is None
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    count = len(json.loads((folder / "vocab.json").read_text()))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|b|>": count + 1, "<|a|>": count}))
    from tokenizers import Tokenizer

    built = Tokenizer.from_str(tokenizer_json(tmp_path) or "")
    assert [built.token_to_id(t) for t in ("<|a|>", "<|b|>")] == [count, count + 1]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|a|>": count + 5}))
    with pytest.raises(WeightsError, match=f"number {count + 5}, and {count} follows"):
        tokenizer_json(tmp_path)
    (tmp_path / "merges.txt").write_text("#version\nqq zz\n")
    with pytest.raises(WeightsError, match="the tokenizer cannot be built"):
        tokenizer_json(tmp_path)
    (tmp_path / "tokenizer.json").write_text("ready")
    assert tokenizer_json(tmp_path) == "ready"
