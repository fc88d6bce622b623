"""Sizes of two-dimensional grids."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex


def as_grid(size: int | Sequence[int], name: str = "sample_size") -> tuple[int, int]:
    """Rows and columns, or height and width, of two positive integers or of the side of a square."""
    sides = [operator.index(side) for side in ([size] * 2 if isinstance(size, SupportsIndex) else size)]
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"`{name}` must be two positive integers, or one for both, got {size}.")
    return sides[0], sides[1]


def token_grid(sample_size: int | Sequence[int], factor: int) -> tuple[int, int]:
    """Rows and columns of the tokens of images of `sample_size`, each the square of `factor` pixels per side."""
    height, width = as_grid(sample_size)
    if height % factor or width % factor:
        raise ValueError(f"`sample_size` must be a multiple of the downsampling factor {factor}, got {sample_size}.")
    return height // factor, width // factor
