"""Recipes: from the model's tensors to the stored one."""

from __future__ import annotations

import numpy as np
import pytest

from spikingbrain.passes import recipes


def test_packing_puts_columns_side_by_side() -> None:
    matrix = np.arange(5 * 3, dtype=np.float32).reshape(5, 3)  # N = 5 columns of the projection, K = 3
    packed = recipes.apply(["pack_columns block=4"], [matrix])
    assert packed.shape == (2, 3, 4)
    for n in range(8):
        expected = matrix[n] if n < 5 else np.zeros(3)
        np.testing.assert_array_equal(packed[n // 4, :, n % 4], expected)


def test_joined_then_packed_equals_packed_whole() -> None:
    parts = [np.random.default_rng(i).random((n, 6), np.float32) for i, n in enumerate((4, 2, 3))]
    joined = recipes.apply(["concat axis=0", "pack_columns block=4"], parts)
    np.testing.assert_array_equal(joined, recipes.apply(["pack_columns block=4"], [np.concatenate(parts)]))


def test_an_empty_recipe_is_the_tensor_itself() -> None:
    tensor = np.ones(3)
    assert recipes.apply([], [tensor]) is tensor


@pytest.mark.parametrize(
    ("recipe", "sources", "text"),
    [
        (["shrink"], 1, "unknown recipe step 'shrink'; known: concat, pack_columns"),
        ([], 2, "leaves 2 tensors"),
    ],
)
def test_refusals(recipe: list[str], sources: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        recipes.apply(recipe, [np.ones((2, 2))] * sources)


def test_keys_tell_stored_tensors_apart() -> None:
    assert recipes.key(["a"], []) == "a"
    assert (
        recipes.key(["a", "b"], ["concat axis=0", "pack_columns block=4"])
        == "a+b|concat axis=0|pack_columns block=4"
    )
