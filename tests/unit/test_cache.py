"""What caches of keys and values hold: rounding, odd rows, and that models give the same numbers for any split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spikingbrain.models import cache
from spikingbrain.models.llama import Llama, LlamaConfig
from spikingbrain.models.spikingbrain import SpikingBrain, tiny_7b, tiny_76b

KINDS = [torch.float16, torch.bfloat16, torch.int8]


def codes(new: torch.Tensor) -> cache.Codes:
    found = cache.rounded(new, cache.empty(new, (1, 1, 1, 1), torch.int8))
    assert isinstance(found, cache.Codes)
    return found


def test_codes_are_off_by_half_a_scale_at_most() -> None:
    torch.manual_seed(0)
    new = torch.randn(2, 5, 3, 16) * torch.logspace(-30, 30, 3)[:, None]
    found = codes(new)
    wrong = (found.codes.double() * found.scales.double().unsqueeze(-1) - new.double()).abs()
    assert (wrong <= 0.5001 * found.scales.unsqueeze(-1)).all()
    assert (found.codes.abs().amax(-1) == 127).all()


def test_rows_of_zeros_and_of_what_is_not_finite() -> None:
    new = torch.ones(1, 5, 1, 4)
    new[0, 0], new[0, 1, 0, 2], new[0, 2, 0, 1], new[0, 3] = 0.0, torch.nan, -torch.inf, 1e-45
    found = codes(new)
    numbers = found.codes.float() * found.scales.unsqueeze(-1)
    assert (numbers[0, 0] == 0).all()
    assert numbers[0, 1:3].isnan().all()
    assert (numbers[0, 3].abs() <= 1e-38).all()
    assert (numbers[0, 4] == 1).all()


def test_a_cache_of_other_integers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.int16.*as floats or as int8"):
        cache.empty(torch.zeros(1), (1, 2, 1, 4), torch.int16)


def llama() -> Llama:
    return Llama(LlamaConfig(64, 32, 2, 4, 2, 8, 48, context=64, window=9, sinks=1))


MAKERS: dict[str, Callable[[], Llama | SpikingBrain]] = {
    "llama": llama,
    "7b": lambda: SpikingBrain(tiny_7b()),
    "76b": lambda: SpikingBrain(tiny_76b()),
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_any_split_gives_the_same(name: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model = MAKERS[name]().double().eval()  # so that no other rounding hides a difference
    tokens = torch.randint(0, 64, (2, 31))
    with torch.no_grad():
        exact, _ = model(tokens, model.initial_state(2, 48))
        whole, _ = model(tokens, model.initial_state(2, 48, kind))
        state, found = model.initial_state(2, 48, kind), []
        for piece in tokens.split([1, 1, 12, 17], dim=1):
            logits, state = model(piece, state)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=2e-4)
    assert 1e-6 < float((whole - exact).abs().max()) < 0.05
