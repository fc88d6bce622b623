"""Sizes of two-dimensional grids."""

from collections.abc import Sequence


def as_grid(size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns, or height and width, of two numbers or of the side of a square."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns
