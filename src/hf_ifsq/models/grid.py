"""Sizes of two-dimensional grids."""

from collections.abc import Sequence


def as_grid(size: int | Sequence[int]) -> tuple[int, int]:
    """
    Rows and columns, or height and width.

    Args:
        size (`int` or `Sequence[int]`): the side of a square, or two numbers.

    Returns:
        `tuple[int, int]`: two numbers.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns
