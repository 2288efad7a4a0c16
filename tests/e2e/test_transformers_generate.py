"""`generate()` of transformers with a compiled forward: the same tokens, and few graphs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler")
transformers = pytest.importorskip("transformers")


def _qwen() -> torch.nn.Module:
    config = transformers.Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def _mamba2() -> torch.nn.Module:
    config = transformers.Mamba2Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=8,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return transformers.Mamba2ForCausalLM(config).eval()


@pytest.mark.parametrize(
    "make, options, graphs",
    [
        pytest.param(
            _qwen, {}, 3, id="a growing cache", marks=pytest.mark.slow
        ),  # the prompt, a first token, tokens of any length
        pytest.param(
            _qwen, {"cache_implementation": "static"}, 2, id="a static cache", marks=pytest.mark.slow
        ),
        pytest.param(_mamba2, {}, 2, id="a state", marks=pytest.mark.slow),
    ],
)
def test_generates_the_same_tokens(make, options, graphs: int, fresh_dynamo: None) -> None:  # type: ignore[no-untyped-def]
    model = make()
    prompt = torch.randint(1, 97, (2, 7))
    plain = model.forward
    expected = model.generate(prompt, max_new_tokens=16, do_sample=False, **options)
    counters.clear()
    model.forward = torch.compile(plain, backend="spikingbrain")
    assert torch.equal(model.generate(prompt, max_new_tokens=16, do_sample=False, **options), expected)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    longer = torch.randint(1, 97, (2, 11))
    found = model.generate(longer, max_new_tokens=5, do_sample=False, **options)
    model.forward = plain
    assert torch.equal(found, model.generate(longer, max_new_tokens=5, do_sample=False, **options))
    # Another prompt is another size; a static cache is as long as the text will be.
    assert counters["stats"]["unique_graphs"] <= graphs + 2
