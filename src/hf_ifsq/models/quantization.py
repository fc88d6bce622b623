"""Finite scalar quantization: the one place where scalars become codes and integers."""

import math

import torch
from torch import nn


# Beyond it, neighbouring half-integers are no longer exact in float32.
MAX_LEVEL = 2**20


class _RoundStraightThrough(torch.autograd.Function):
    """`round` whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: torch.Tensor) -> torch.Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor) -> torch.Tensor:
        return grad_output


class FiniteScalarQuantizer(nn.Module):
    r"""
    Rounds each channel of a latent to one of a few levels.

    A value is bounded by `b = 2 * sigmoid(alpha * z) - 1`. With `alpha=1.6` this is iFSQ (https://arxiv.org/abs/2601.17124),
    which maps a Gaussian latent to a nearly uniform one; with `alpha=2.0` it is `tanh(z)`, the bound of FSQ
    (https://arxiv.org/abs/2309.15505). For an odd number of levels L, `digit = round(b * (L-1)/2) + (L-1)/2` and
    `code = (digit - (L-1)/2) / ((L-1)/2)`. An even L follows the FSQ paper's own code: the bound is shifted by half a
    bin and stretched by 1e-3, and `code = (digit - L/2) / (L/2)`. The gradient of the rounding is passed straight
    through.

    The index of a vector is its digits read in mixed radix, the first channel least significant.

    All arithmetic runs in float32 and int64, whatever autocast or the dtype of the model says; codes come back in the
    dtype of the input. No table of the codebook is held.

    Args:
        levels (`list[int]`):
            Number of levels of each channel, from 2 to 2**20 each, with a product of at most 2**63 - 1.
        alpha (`float`, *optional*, defaults to 1.6):
            Slope of the bound, positive.

    Raises:
        ValueError: if `levels` is empty, has too small or large a level or too large a product, or if `alpha` is not
            positive.

    Example:

    ```python
    >>> import torch
    >>> from hf_ifsq import FiniteScalarQuantizer

    >>> quantizer = FiniteScalarQuantizer(levels=[17, 17, 17, 17])
    >>> codes, indices = quantizer(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    >>> codes.shape, indices.shape, quantizer.codebook_size
    (torch.Size([2, 4, 8, 8]), torch.Size([2, 8, 8]), 83521)
    >>> torch.equal(quantizer.indices_to_codes(indices), codes)
    True

    ```
    """

    def __init__(self, levels: list[int] | tuple[int, ...], alpha: float = 1.6):
        super().__init__()
        levels = list(levels)
        if not levels or any(not isinstance(level, int) or level < 2 for level in levels):
            raise ValueError(f"`levels` must be one or more integers of at least 2, one a channel, got {levels}.")
        if max(levels) > MAX_LEVEL:
            raise ValueError(f"`levels` must be at most {MAX_LEVEL} each, which float32 can tell apart, got {levels}.")
        if math.prod(levels) > 2**63 - 1:
            raise ValueError(
                f"`levels` {levels} make a codebook of {math.prod(levels)} entries, but an int64 index can count only "
                f"2**63 - 1 = {2**63 - 1}: use fewer channels or fewer levels."
            )
        if not alpha > 0 or not math.isfinite(alpha):
            raise ValueError(f"`alpha` must be a positive finite number, got {alpha}.")
        self.levels = levels
        self.alpha = float(alpha)
        # An integer buffer keeps its dtype when the model is cast; float constants are derived from it on each call.
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int64), persistent=False)

    @property
    def codebook_size(self) -> int:
        """Number of different codes: the product of the levels."""
        return math.prod(self.levels)

    def extra_repr(self) -> str:
        """Levels and slope, for `print(model)`."""
        return f"levels={self.levels}, alpha={self.alpha}"

    def _channelwise(self, constants: torch.Tensor, ndim: int) -> torch.Tensor:
        return constants.view(-1, *[1] * (ndim - 2))

    def bound(self, z: torch.Tensor) -> torch.Tensor:
        """
        Map unbounded values to digits before rounding, less the centre of their range.

        Args:
            z (`torch.Tensor` of shape `(batch, d, *spatial)`): unbounded latent.

        Returns:
            `torch.Tensor` of the shape of `z`, float32: values within (-(L-1)/2, (L-1)/2) for odd L; for even L within
            half a bin around {-L/2, ..., L/2 - 1}.
        """
        levels = self._channelwise(self._levels, z.ndim)
        half_width = (levels - 1) / 2
        if all(level % 2 for level in self.levels):
            return torch.addcmul(-half_width, (z.float() * self.alpha).sigmoid_(), 2 * half_width)
        even = (levels % 2 == 0).float()
        # FSQ's stretch is 1e-3. The cap only acts above 900 levels, where 1e-3 would open one bin more than there are.
        half_width = half_width * (1 + even * (0.9 / (levels - 1)).clamp(max=1e-3))
        offset = even / 2
        shift = 2 * torch.atanh(offset / half_width)
        bounded = torch.sigmoid(torch.addcmul(shift, z.float(), torch.full_like(shift, self.alpha)))
        return torch.addcmul(-half_width - offset, bounded, 2 * half_width)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Quantize a latent.

        Args:
            z (`torch.Tensor` of shape `(batch, d, *spatial)`):
                unbounded latent, `d = len(levels)`. A value that is no number stays one in the codes; its index has no
                meaning.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the codes in [-1, 1], of the shape and dtype of `z`, and their
            indices, int64 of shape `(batch, *spatial)`, in [0, codebook_size).

        Raises:
            ValueError: if `z` has not `d` channels or is no floating-point tensor.
        """
        self._check_channels(z, "z")
        with torch.autocast(device_type=z.device.type, enabled=False):
            rounded = _RoundStraightThrough.apply(self.bound(z))
            half = self._channelwise(self._levels // 2, z.ndim)
            indices = self._centred_digits_to_indices(rounded.detach())
            codes = rounded.div_(half).to(z.dtype)
        return codes, indices

    def nearest_codes(self, values: torch.Tensor) -> torch.Tensor:
        """
        Round values of any size to the nearest codes.

        Args:
            values (`torch.Tensor` of shape `(batch, d, *spatial)`): values in the range of codes or beyond.

        Returns:
            `torch.Tensor` of the shape and dtype of `values`: codes in [-1, 1].

        Raises:
            ValueError: if `values` has not `d` channels.
        """
        self._check_channels(values, "values")
        half = self._channelwise(self._levels // 2, values.ndim)
        last = self._channelwise(self._levels, values.ndim) - 1 - half
        return (torch.clamp((values.float() * half).round(), -half, last) / half).to(values.dtype)

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            codes (`torch.Tensor` of shape `(batch, d, *spatial)`): codes in [-1, 1], rounded to the nearest code.

        Returns:
            `torch.Tensor` of shape `(batch, *spatial)`, int64: indices in [0, codebook_size).

        Raises:
            ValueError: if `codes` has not `d` channels, or a value that is no number or outside the codebook.
        """  # noqa: D205
        self._check_channels(codes, "codes")
        half = self._channelwise(self._levels // 2, codes.ndim)
        centred_digits = (codes.float() * half).round()
        levels = self._channelwise(self._levels, codes.ndim)
        if not ((centred_digits >= -half) & (centred_digits < levels - half)).all():
            raise ValueError(
                f"`codes` must be within the codebook of levels {self.levels}, that is within [-1, 1], but it spans "
                f"[{codes.min().item()}, {codes.max().item()}]."
            )
        return self._centred_digits_to_indices(centred_digits)

    def indices_to_codes(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """
        Args:
            indices (`torch.Tensor` of shape `(batch, *spatial)`): integers in [0, codebook_size).
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): dtype of the codes.

        Returns:
            `torch.Tensor` of shape `(batch, d, *spatial)`: codes in [-1, 1].

        Raises:
            ValueError: if `indices` is not an integer tensor or has an index outside the codebook.
        """  # noqa: D205
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"`indices` must be integers, got a tensor of dtype {indices.dtype}.")
        if indices.numel() and (indices.min() < 0 or indices.max() >= self.codebook_size):
            raise ValueError(
                f"`indices` must be in [0, {self.codebook_size}), the codebook of levels {self.levels}, but they span "
                f"[{indices.min().item()}, {indices.max().item()}]."
            )
        remainder = indices.long()
        digits = []
        for level in self.levels:
            digits.append(remainder % level)
            remainder = remainder // level
        # The indices of a token dataset may be on another device than the quantizer.
        half = self._channelwise(self._levels // 2, indices.ndim + 1).to(indices.device)
        return ((torch.stack(digits, dim=1) - half) / half).to(dtype)

    def _centred_digits_to_indices(self, centred_digits: torch.Tensor) -> torch.Tensor:
        # Horner's rule from the most significant channel down, in int64: exact for any codebook that fits. A digit is
        # its centred value plus L // 2; the sum over the channels of that constant is added once, at the end.
        indices = centred_digits[:, -1].long()
        centre = self.levels[-1] // 2
        for channel in reversed(range(len(self.levels) - 1)):
            indices.mul_(self.levels[channel]).add_(centred_digits[:, channel].long())
            centre = centre * self.levels[channel] + self.levels[channel] // 2
        return indices.add_(centre)

    def _check_channels(self, values: torch.Tensor, name: str) -> None:
        if not values.is_floating_point():
            raise ValueError(f"`{name}` must be floating-point numbers, got a tensor of dtype {values.dtype}.")
        if values.ndim < 2 or values.shape[1] != len(self.levels):
            raise ValueError(
                f"`{name}` must have shape (batch, {len(self.levels)}, *spatial), one channel for each of the levels "
                f"{self.levels}, got {tuple(values.shape)}."
            )
