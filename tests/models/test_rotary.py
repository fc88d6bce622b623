import cmath

import pytest
import torch

from hf_ifsq.models.rotary import apply_rotary_2d, rotary_table_2d


def test_rotation_equals_complex_multiplication():
    rows, columns, head_dim, theta = 3, 5, 8, 100.0
    states = torch.randn(rows * columns, head_dim)
    turned = apply_rotary_2d(states, *rotary_table_2d((rows, columns), head_dim, theta))
    for cell in range(rows * columns):
        positions = [cell // columns] * (head_dim // 4) + [cell % columns] * (head_dim // 4)
        for pair, position in enumerate(positions):
            step = pair % (head_dim // 4)
            factor = cmath.exp(1j * position / theta ** (2 * step / (head_dim / 2)))
            expected = complex(*states[cell, 2 * pair : 2 * pair + 2].tolist()) * factor
            assert complex(*turned[cell, 2 * pair : 2 * pair + 2].tolist()) == pytest.approx(expected, abs=1e-5)


def test_scores_depend_on_relative_positions_only():
    rows, columns, head_dim = 4, 5, 16
    query, key = torch.randn(2, 1, head_dim).expand(-1, rows * columns, -1)
    table = rotary_table_2d((rows, columns), head_dim)
    scores = apply_rotary_2d(query, *table) @ apply_rotary_2d(key, *table).T
    scores = scores.view(rows, columns, rows, columns)
    torch.testing.assert_close(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:], atol=1e-5, rtol=0)
    # Rows and columns both matter, and so does the direction.
    assert len({round(scores[1, 1, row, column].item(), 4) for row in range(3) for column in range(3)}) == 9


def test_batch_dimensions_and_dtype_of_states_are_kept():
    cos, sin = rotary_table_2d((2, 3), 8)
    states = torch.randn(2, 4, 6, 8, dtype=torch.bfloat16)
    turned = apply_rotary_2d(states, cos, sin)
    assert turned.dtype == torch.bfloat16 and cos.dtype == torch.float32
    expected = apply_rotary_2d(states.float()[1, 2], cos, sin)
    torch.testing.assert_close(turned[1, 2].float(), expected, atol=0, rtol=2**-8)


@pytest.mark.parametrize("head_dim", [2, 6])
def test_head_dim_must_be_a_multiple_of_4(head_dim):
    with pytest.raises(ValueError, match=f"head dimension.*multiple of 4, got {head_dim}"):
        rotary_table_2d((2, 2), head_dim)
