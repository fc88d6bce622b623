"""Sizes of two-dimensional grids."""

from collections.abc import Sequence

import numpy as np

from .checks import MAX_SIZE


def as_grid(size: int | Sequence[int], name: str = "sample_size") -> tuple[int, int]:
    """Rows and columns, or height and width, of two positive integers or of the side of a square."""
    given = size if isinstance(size, Sequence) and not isinstance(size, str) else [size] * 2
    sides = [int(side) for side in given if isinstance(side, (int, np.integer)) and not isinstance(side, bool)]
    if len(sides) != 2 or len(given) != 2 or not 1 <= min(sides) <= max(sides) <= MAX_SIZE:
        raise ValueError(f"`{name}` must be two positive integers, or one for both, got {size!r}.")
    return sides[0], sides[1]


def token_grid(sample_size: int | Sequence[int], factor: int) -> tuple[int, int]:
    """Rows and columns of the tokens of images of `sample_size`, each the square of `factor` pixels per side."""
    height, width = as_grid(sample_size)
    if height % factor or width % factor:
        raise ValueError(f"`sample_size` must be a multiple of the downsampling factor {factor}, got {sample_size}.")
    return height // factor, width // factor
