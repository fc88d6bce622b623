"""Rotary positions of a two-dimensional grid, shared by AR model and DiT."""

import torch


def rotary_table_2d(
    grid_size: tuple[int, int], head_dim: int, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines, float32 of shape `(rows * columns, head_dim)` each, that turn a head's channels by their place
    in the grid, as in LlamaGen (https://arxiv.org/abs/2406.06525). Cells are in raster order, pairs are neighbouring
    channels; the first half of the pairs turns with the row, the second half with the column, pair i of a half by
    `position * theta ** (-4 * i / head_dim)`.
    """
    if head_dim % 4:
        raise ValueError(f"2D rotary positions need a head dimension that is a multiple of 4, got {head_dim}.")
    rows, columns = grid_size
    exponents = torch.arange(head_dim // 4, device=device, dtype=torch.float32) * (4 / head_dim)
    frequencies = 1.0 / theta**exponents
    row_angles = torch.outer(torch.arange(rows, device=device, dtype=torch.float32), frequencies)
    column_angles = torch.outer(torch.arange(columns, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat([row_angles.repeat_interleave(columns, dim=0), column_angles.repeat(rows, 1)], dim=-1)
    angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary_2d(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Turn neighbouring channel pairs of `(..., sequence, head_dim)` by rows of [`rotary_table_2d`], each of shape
    `(sequence, head_dim)`, computed in their dtype; shape and dtype stay those of `states`.
    """
    pairs = states.to(torch.promote_types(states.dtype, cos.dtype)).unflatten(-1, (-1, 2))
    cos, sin = cos[..., ::2], sin[..., ::2]
    if torch.compiler.is_compiling():
        first, second = pairs.unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        # The same in one pass over the memory. Compilers do without: they know no complex numbers.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(states.dtype)
