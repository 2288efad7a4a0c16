"""The chat template of a checkpoint's folder, in each place where one is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spikingbrain.tools.checkpoint_models import chat

TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None}
KNOWN = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        (None, None, {}),
        (TOKENS, None, {}),
        ({**TOKENS, "chat_template": "T"}, None, {"template": "T", **KNOWN}),
        ({**TOKENS, "chat_template": "old"}, "T", {"template": "T", **KNOWN}),
        (None, "T", {"template": "T"}),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "U"},
                    {"name": "default", "template": "T"},
                ]
            },
            None,
            {"template": "T"},
        ),
        ({"chat_template": [{"name": "tool_use", "template": "U"}]}, None, {}),
    ],
)
def test_where_templates_are(
    tmp_path: Path, config: dict[str, Any] | None, file: str | None, expected: dict[str, str]
) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert chat(str(tmp_path)) == expected
