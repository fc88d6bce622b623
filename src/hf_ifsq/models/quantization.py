"""Finite scalar quantization: the one place where scalars become codes and integers."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import nn

from .checks import (
    as_ids,
    check_choice,
    check_codebook,
    check_flag,
    check_has_values,
    check_integers,
    check_number,
    check_positive,
    check_tensor,
)


# Beyond it, neighbouring half-integers are no longer exact in float32.
MAX_LEVEL = 2**20


class Bound(NamedTuple):
    """An increasing function of `z` and `alpha` from the real numbers to (-1, 1), and its inverse for one number."""

    function: Callable[[torch.Tensor, float], torch.Tensor]
    inverse: Callable[[float, float], float]


BOUNDS = {
    # Of iFSQ with alpha = 1.6; with alpha = 2 it is tanh(z), the bound of FSQ.
    "sigmoid": Bound(lambda z, alpha: 2 * torch.sigmoid(alpha * z) - 1, lambda b, alpha: 2 * math.atanh(b) / alpha),
    # 2 * Phi(z) - 1 by the distribution function Phi of the normal distribution, which it makes uniform.
    "normal": Bound(lambda z, alpha: torch.erf(z / math.sqrt(2)), lambda b, alpha: NormalDist().inv_cdf((b + 1) / 2)),
}


def check_indices(indices: torch.Tensor, codebook_size: int, codebook: str = "the codebook") -> torch.Tensor:
    """
    Integers of any type as int64, or a `ValueError` unless all are in [0, codebook_size); the values are not read in
    compilation.
    """  # noqa: D205
    indices = as_ids(indices, "indices")
    check_has_values(indices, "indices")
    checked = indices.numel() and not torch.compiler.is_compiling()
    if checked and (indices.min() < 0 or indices.max() >= codebook_size):
        raise ValueError(
            f"`indices` must be in [0, {codebook_size}), {codebook}, but they span [{indices.min().item()}, "
            f"{indices.max().item()}]."
        )
    return indices


class _StraightThrough(torch.autograd.Function):
    """`quantized`, whose gradient is passed to `values` as it is."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, values: torch.Tensor, quantized: torch.Tensor
    ) -> torch.Tensor:
        return quantized

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output, None


class FiniteScalarQuantizer(nn.Module):
    r"""
    Quantizes each channel of a latent to one of a few levels.

    A value is bounded by `b = 2 * sigmoid(alpha * z) - 1`. With `alpha=1.6` this is iFSQ (https://arxiv.org/abs/2601.17124),
    which maps a Gaussian latent to a nearly uniform one; with `alpha=2.0` it is `tanh(z)`, the bound of FSQ
    (https://arxiv.org/abs/2309.15505). For an odd number of levels L, `digit = round(b * (L-1)/2) + (L-1)/2` and
    `code = (digit - (L-1)/2) / ((L-1)/2)`: the two outermost bins are half as wide as the others. An even L follows
    the FSQ paper's own code: the bound is shifted by half a bin and stretched by 1e-3, and
    `code = (digit - L/2) / (L/2)`. With L = 2 that puts over 99.9 % of a Gaussian into one code: take `equal_bins`.

    With `equal_bins`, (-1, 1) is cut into L bins of the same width, `digit = floor((b+1)/2 * L)`, for odd and even L
    alike. Codes are the centres of the bins, `(2 * digit + 1 - L) / L`; they are not stretched to -1 and 1.
    `bound="normal", equal_bins=True, noise_prob=1.0` is finite scalar perturbation, FSP (https://arxiv.org/abs/2602.17133).

    The gradient is passed straight through. The index of a vector is its digits read in mixed radix, the first channel
    least significant. All arithmetic runs in float32 and int64, whatever autocast or the dtype of the model says;
    codes come back in the dtype of the input. No table of the codebook is held.

    Args:
        levels (`list[int]`): levels of each of the `d` channels, from 2 to 2**20, with a product of at most 2**63 - 1.
        alpha (`float`, *optional*, defaults to 1.6): slope of the bound `"sigmoid"`, positive. Other bounds have none.
        bound (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, or `"normal"` for `2 * Phi(z) - 1` with the distribution function of the normal distribution.
        equal_bins (`bool`, *optional*, defaults to `False`): whether all bins have the same width.
        noise_prob (`float`, *optional*, defaults to 0.0):
            with `equal_bins`, the probability that a value in training is not quantized but moved by uniform noise of
            at most half a bin, unless that leads out of (-1, 1). Indices are those of the values without noise.

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

    def __init__(
        self,
        levels: list[int] | tuple[int, ...],
        alpha: float = 1.6,
        bound: str = "sigmoid",
        equal_bins: bool = False,
        noise_prob: float = 0.0,
    ):
        super().__init__()
        levels = list(levels) if isinstance(levels, tuple) else levels
        check_integers(levels, "levels", minimum=2, maximum=MAX_LEVEL)
        check_codebook(levels, "levels")
        check_positive(alpha, "alpha")
        check_choice(bound, "bound", BOUNDS)
        check_flag(equal_bins, "equal_bins")
        check_number(noise_prob, "noise_prob", 0, 1)
        if bound != "sigmoid" and alpha != 1.6:
            raise ValueError(f"`alpha` is the slope of the bound 'sigmoid' alone, got {alpha} with {bound!r}.")
        if noise_prob and not equal_bins:
            raise ValueError(f"`noise_prob` must be 0 without `equal_bins`, got {noise_prob}.")
        self.levels = list(levels)
        self.alpha = float(alpha)
        self.bound = bound
        self.equal_bins = equal_bins
        self.noise_prob = float(noise_prob)

        # Constants per channel, in lists: a buffer would be lost when a model is made on the meta device.
        # A code is (digit + offset) / scale, where `digit` is counted from L // 2.
        self._lowest = [-(level // 2) for level in levels]
        self._highest = [(level - 1) // 2 for level in levels]
        self._scale = [level / 2 if equal_bins else level // 2 for level in levels]
        self._offset = [0.5 if equal_bins and level % 2 == 0 else 0 for level in levels]
        # FSQ's bound of even levels: half a bin lower, and 0 stays 0. It is stretched by 1e-3; the cap acts above 900
        # levels alone, where that would open one bin too many.
        even = [level % 2 == 0 and not equal_bins for level in levels]
        stretch = [1 + min(1e-3, 0.9 / (level - 1)) for level in levels]
        self._centre = [-1 / level if shifted else 0 for level, shifted in zip(levels, even)]
        self._width = [(1 + c) * more if shifted else 1 for c, more, shifted in zip(self._centre, stretch, even)]
        self._shift = [BOUNDS[bound].inverse(-c / width, self.alpha) for c, width in zip(self._centre, self._width)]

    @property
    def codebook_size(self) -> int:
        """Number of different codes: the product of the levels."""
        return math.prod(self.levels)

    def extra_repr(self) -> str:
        """All options, for `print(model)`."""
        names = ("levels", "alpha", "bound", "equal_bins", "noise_prob")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def bounded(self, z: torch.Tensor) -> torch.Tensor:
        """
        Bound a latent `(batch, d, *spatial)` to the range of the codes: `forward` takes the code next to what this
        returns, float32 values in (-1, 1), or for even levels without `equal_bins` within half a bin around the codes
        {-1, ..., 1 - 2/L}.
        """  # noqa: D205
        self._check_channels(z, "z")
        bound = BOUNDS[self.bound].function
        if not any(self._centre):
            return bound(z.float(), self.alpha)
        centre, width, shift = (self._per_channel(values, z) for values in (self._centre, self._width, self._shift))
        return bound(z.float() + shift, self.alpha) * width + centre

    def forward(self, z: torch.Tensor, uniforms: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Quantize a latent `(batch, d, *spatial)`, unbounded. Gives the codes in [-1, 1], of its shape and dtype, and
        their indices, int64 of shape `(batch, *spatial)`, in [0, codebook_size). What is not a number stays so in the
        codes; its index has no meaning. `uniforms` in [0, 1), `(batch, 2, d, *spatial)`, decide which values get noise
        in training and how much, in place of the global random state.
        """
        self._check_channels(z, "z")
        # There is none on the device meta.
        with torch.autocast(device_type="cpu" if z.is_meta else z.device.type, enabled=False):
            values = self.bounded(z)
            digits = self._nearest_digits(values)
            indices = self._digits_to_indices(digits)
            codes = self._digits_to_codes(digits)
            if self.training and self.noise_prob:
                codes = self._with_noise(values.detach(), codes, uniforms)
            codes = _StraightThrough.apply(values, codes)
        return codes.to(z.dtype), indices

    def nearest_codes(self, values: torch.Tensor) -> torch.Tensor:
        """Codes next to values of any size `(batch, d, *spatial)`, of their shape and dtype."""
        self._check_channels(values, "values")
        return self._digits_to_codes(self._nearest_digits(values)).to(values.dtype)

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """Indices `(batch, *spatial)`, int64, of codes `(batch, d, *spatial)`, which may be inexact by half a bin."""
        self._check_channels(codes, "codes")
        check_has_values(codes, "codes")
        digits = self._nearest_digits(codes)
        half_bin = 0.5 / self._per_channel(self._scale, codes)
        # A comparison with NaN is false.
        if not ((codes.float() - self._digits_to_codes(digits)).abs() <= half_bin * (1 + 1e-6)).all():
            raise ValueError(
                f"`codes` must be within the codebook of levels {self.levels}, that is within [-1, 1], but it spans "
                f"[{codes.min().item()}, {codes.max().item()}]."
            )
        return self._digits_to_indices(digits)

    def indices_to_codes(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Codes `(batch, d, *spatial)` in [-1, 1] of integers `(batch, *spatial)` in [0, codebook_size)."""
        remainder = check_indices(indices, self.codebook_size, f"the codebook of levels {self.levels}")
        if indices.ndim == 0:
            raise ValueError("`indices` must have shape (batch, *spatial), got a single number.")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be that of floating-point numbers, got {dtype!r}.")
        digits = []
        for level in self.levels:
            digits.append(remainder % level - level // 2)
            remainder = remainder // level
        return self._digits_to_codes(torch.stack(digits, dim=1).float()).to(dtype)

    def _nearest_digits(self, values: torch.Tensor) -> torch.Tensor:
        """Digits less L // 2, in float32."""
        digits = values.detach().float() * self._per_channel(self._scale, values)
        if self.equal_bins:
            digits.sub_(self._per_channel(self._offset, values))
        # `clamp` by tensors takes four times as long.
        torch.maximum(digits.round_(), self._per_channel(self._lowest, values), out=digits)
        return torch.minimum(digits, self._per_channel(self._highest, values), out=digits)

    def _digits_to_codes(self, digits: torch.Tensor) -> torch.Tensor:
        if self.equal_bins:
            digits = digits + self._per_channel(self._offset, digits)
        return digits / self._per_channel(self._scale, digits)

    def _digits_to_indices(self, digits: torch.Tensor) -> torch.Tensor:
        # Horner's rule from the most significant channel down, in int64: exact for any codebook that fits. The sum
        # over the channels of the constants L // 2 is added once, at the end.
        indices = digits[:, -1].long()
        centre = self.levels[-1] // 2
        for channel in reversed(range(len(self.levels) - 1)):
            indices.mul_(self.levels[channel]).add_(digits[:, channel].long())
            centre = centre * self.levels[channel] + self.levels[channel] // 2
        return indices.add_(centre)

    def _with_noise(self, values: torch.Tensor, codes: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
        if uniforms is None:
            uniforms = torch.stack([torch.rand_like(values), torch.rand_like(values)], dim=1)
        half_bin = 0.5 / self._per_channel(self._scale, values)
        moved = values + half_bin * (2 * uniforms[:, 0] - 1)
        noisy = torch.where(moved.abs() < 1, moved, values)
        return torch.where(uniforms[:, 1] >= 1 - self.noise_prob, noisy, codes)

    def _per_channel(self, constants: Sequence[float], like: torch.Tensor) -> torch.Tensor:
        """Constants to broadcast to float32 values of the shape and device of `like`; one number if all are equal."""
        if len(set(constants)) == 1:
            return like.new_full((), constants[0], dtype=torch.float32)
        # Filled where the values are: a device would have to wait for a copy from the host.
        filled = [like.new_full((1,), constant, dtype=torch.float32) for constant in constants]
        return torch.cat(filled).view(-1, *[1] * (like.ndim - 2))

    def _check_channels(self, values: torch.Tensor, name: str) -> None:
        check_tensor(values, name)
        if not values.is_floating_point():
            raise ValueError(f"`{name}` must be floating-point numbers, got a tensor of dtype {values.dtype}.")
        if values.ndim < 2 or values.shape[1] != len(self.levels):
            raise ValueError(
                f"`{name}` must have shape (batch, {len(self.levels)}, *spatial), one channel for each of the levels "
                f"{self.levels}, got {tuple(values.shape)}."
            )
