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


def test_stacked_matrices_begin_with_whole_blocks() -> None:
    matrices = np.random.default_rng(0).random((3, 5, 2), np.float32)
    stacked = recipes.apply(["stack block=4"], [matrices])
    assert stacked.shape == (24, 2)
    for matrix, rows in zip(matrices, stacked.reshape(3, 8, 2), strict=True):
        np.testing.assert_array_equal(rows[:5], matrix)
        assert not rows[5:].any()


def test_groups_of_channels_are_padded() -> None:
    w = np.arange(12, dtype=np.int8).reshape(2, 6)
    padded = recipes.apply(["pad_groups size=3 to=4"], [w])
    np.testing.assert_array_equal(padded, [[0, 1, 2, 0, 3, 4, 5, 0], [6, 7, 8, 0, 9, 10, 11, 0]])


def test_a_longer_bias_changes_no_number() -> None:
    bias = recipes.apply(["lengthen to=4"], [np.float32([1, 2])])
    numbers = np.float32([0.0, -0.0, 0.0, -0.0])
    np.testing.assert_array_equal(numbers + bias, [1, 2, 0, 0])
    np.testing.assert_array_equal(np.signbit(numbers + bias), [False, False, False, True])


def test_each_matrix_of_a_stack_is_packed() -> None:
    stack = np.random.default_rng(0).random((3, 6, 5), np.float32)
    packed = recipes.apply(["transpose", "pack_columns block=4"], [stack])
    for matrix, expected in zip(stack, packed, strict=True):
        np.testing.assert_array_equal(expected, recipes.apply(["pack_columns block=4"], [matrix.T]))


@pytest.mark.parametrize(("offset", "element"), [(128, np.int8), (0, np.int8), (0, np.int16)])
def test_packing_for_dot_products(offset: int, element: type) -> None:
    codes = np.random.default_rng(0).integers(-128, 128, (5, 6)).astype(element)
    step = f"pack_dot lanes=2 vectors=2 width=4 offset={offset}"
    packed = recipes.apply([step], [codes])
    assert packed.shape == (2, 2, 2, 8)
    assert packed.dtype == element
    for n, k in np.ndindex(8, 8):
        code = int(codes[n, k]) if n < 5 and k < 6 else 0
        stored = packed[n // 4, k // 4, n // 2 % 2, n % 2 * 4 + k % 4]
        assert (int(stored) - code - offset) % 256 == 0


def test_packing_nibbles() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (3, 9)).astype(np.int8)
    packed = recipes.apply(["pack_nibbles lanes=4 vectors=1 width=2 offset=8"], [codes]).view(np.uint8)
    assert packed.shape == (1, 3, 1, 8)
    for n, k in np.ndindex(3, 9):
        byte = int(packed[0, k // 4, 0, n * 2 + k % 2])
        assert (byte >> 4 if k // 2 % 2 else byte & 15) - 8 == codes[n, k]


def test_nibbles_are_not_cut() -> None:
    with pytest.raises(ValueError, match=r"codes of 4 bits are -8 .. 7, got 0 .. 8"):
        recipes.apply(["pack_nibbles lanes=4 vectors=1 width=2 offset=8"], [np.arange(9).reshape(1, 9)])


def test_scales_become_a_column() -> None:
    scale = np.array([[0.5, 2.0, 3.0]], np.float16)
    found = recipes.apply(["column", "float32"], [scale])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, scale.T)
    np.testing.assert_array_equal(
        recipes.apply(["transpose", "ones"], [np.zeros((2, 3), np.int8)]), np.ones((3, 1))
    )


def test_an_empty_recipe_is_the_tensor_itself() -> None:
    tensor = np.ones(3)
    assert recipes.apply([], [tensor]) is tensor


@pytest.mark.parametrize(
    ("recipe", "sources", "text"),
    [
        (["shrink"], 1, "unknown recipe step 'shrink'; known: concat, "),
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


def test_codes_of_several_weights_are_joined_by_row() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((n, 6)).astype(np.float32) for n in (3, 2)]
    scales = [np.full((len(w), 1), 0.03, np.float32) for w in weights]
    pairs = [array for pair in zip(weights, scales, strict=True) for array in pair]
    joined = recipes.apply(["codes bits=8", "concat axis=0"], pairs)
    each = [recipes.apply(["codes bits=8"], [w, s]) for w, s in zip(weights, scales, strict=True)]
    np.testing.assert_array_equal(joined, np.concatenate(each))
