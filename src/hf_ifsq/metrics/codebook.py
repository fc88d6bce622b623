"""How a tokenizer uses its codebook, counted over any number of batches and processes."""

import math
from typing import Any

import numpy as np
import torch

from ..models.quantization import FiniteScalarQuantizer, check_indices


# Bins of [-1, 1] for the Kolmogorov-Smirnov distance, which they make exact to 2**-16.
NUM_BINS = 2**16


class CodebookUsage:
    """
    Counts the tokens of images: what share of the codebook they use, and how evenly. Memory grows with the number of
    different tokens alone. Compare codebooks on many times as many tokens as there are codes: entropies are at most
    the logarithm of the number of tokens.

    Args:
        codebook_size (`int`, *optional*): number of codes; by default the product of `levels`.
        levels (`list[int]`, *optional*): levels of each dimension, the first least significant in a token.
    """

    def __init__(self, codebook_size: int | None = None, levels: list[int] | None = None):
        if levels is not None:
            if not levels or min(levels) < 2 or codebook_size not in (None, math.prod(levels)):
                raise ValueError(
                    f"`levels` must be integers of at least 2 with the product `codebook_size`, got {levels} and "
                    f"{codebook_size}."
                )
            codebook_size = math.prod(levels)
        if codebook_size is None:
            raise ValueError("Give `codebook_size` or `levels`, got neither.")
        if not 1 <= codebook_size <= 2**63 - 1:
            raise ValueError(f"`codebook_size` must be in [1, 2**63 - 1], got {codebook_size}.")
        self.codebook_size = codebook_size
        self.levels = None if levels is None else list(levels)
        self._tokens = self._counts = np.zeros(0, dtype=np.int64)
        self._bins: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """How often each used token occurs, the most frequent first; int64 of shape `(num_codes_used,)`."""
        return np.sort(self._counts)[::-1]

    def update(self, indices: torch.Tensor | np.ndarray, bounded: torch.Tensor | None = None) -> None:
        """
        Count the tokens of a batch.

        Args:
            indices (`torch.Tensor` or `np.ndarray` of any shape): integers in [0, codebook_size).
            bounded (`torch.Tensor` of shape `(batch, len(levels), *spatial)`, *optional*):
                floats in [-1, 1], the values that were quantized to these tokens, see [`bounded_values`]. Give it
                with all batches or with none.
        """
        tokens = torch.as_tensor(indices).detach().cpu()
        check_indices(tokens, self.codebook_size)
        bins = None if bounded is None else self._count_bins(torch.as_tensor(bounded).detach(), tokens.numel())
        self._add(*np.unique(tokens.numpy().astype(np.int64), return_counts=True), bins)

    def merge(self, other: "CodebookUsage") -> None:
        """Add the counts of another part of the data, such as that of another process, of the same codebook."""
        if (self.codebook_size, self.levels) != (other.codebook_size, other.levels):
            raise ValueError(
                f"`other` must count the same codebook of {self.codebook_size} codes and levels {self.levels}, got "
                f"{other.codebook_size} and {other.levels}."
            )
        self._add(other._tokens, other._counts, other._bins)

    def compute(self) -> dict[str, Any]:
        """
        The usage of the codebook so far.

        Returns:
            `dict[str, Any]`:
            - `num_tokens` (`int`), `num_codes_used` (`int`): tokens counted, and how many different ones.
            - `usage` (`float`): share of the codebook that occurs, in [0, 1].
            - `entropy_bits` (`float`): entropy of a token in bits, at most `log2(codebook_size)`.
            - `perplexity` (`float`): `2**entropy_bits`: as many evenly used codes have the same entropy.
            - with `levels`, `dimension_histograms` (`list[list[int]]`): how often each level of each dimension
              occurs; and `dimension_entropies_bits` (`list[float]`), at most `log2(level)` each.
            - with `bounded`, `dimension_ks_distances` (`list[float]`): per dimension the largest distance of the
              cumulative distributions of these values and of the uniform one, in [0, 1] and exact to 2**-16.
        """
        if not len(self._tokens):
            raise ValueError("There are no tokens: call `update` first.")
        num_tokens, entropy = int(self._counts.sum()), _entropy_bits(self._counts)
        result: dict[str, Any] = {
            "num_tokens": num_tokens,
            "num_codes_used": len(self._tokens),
            "usage": len(self._tokens) / self.codebook_size,
            "entropy_bits": entropy,
            "perplexity": 2**entropy,
        }
        if self.levels is not None:
            histograms, digits = [], self._tokens
            for level in self.levels:
                histograms.append(_sum_counts(digits % level, self._counts, level))
                digits = digits // level
            result["dimension_histograms"] = [histogram.tolist() for histogram in histograms]
            result["dimension_entropies_bits"] = [_entropy_bits(histogram) for histogram in histograms]
        if self._bins is not None:
            distances = np.abs(self._bins.cumsum(axis=1) / num_tokens - np.arange(1, NUM_BINS + 1) / NUM_BINS)
            result["dimension_ks_distances"] = distances.max(axis=1).tolist()
        return result

    @property
    def num_codes_if_even(self) -> float:
        """Different codes expected of as many tokens, were they all equally likely."""
        # Of the chance that a token is not a given code.
        log_missed = math.log1p(-1 / self.codebook_size) if self.codebook_size > 1 else -math.inf
        return self.codebook_size * -math.expm1(int(self._counts.sum()) * log_missed)

    def _add(self, tokens: np.ndarray, counts: np.ndarray, bins: np.ndarray | None) -> None:
        if not len(tokens):
            return
        if len(self._tokens) and (bins is None) != (self._bins is None):
            raise ValueError("`bounded` must be given with all tokens or with none.")
        self._tokens, places = np.unique(np.concatenate([self._tokens, tokens]), return_inverse=True)
        self._counts = _sum_counts(places, np.concatenate([self._counts, counts]), len(self._tokens))
        if bins is not None:
            self._bins = bins if self._bins is None else self._bins + bins

    def _count_bins(self, bounded: torch.Tensor, num_tokens: int) -> np.ndarray:
        dimensions = len(self.levels or [])
        if bounded.ndim < 2 or bounded.shape[1] != dimensions or bounded.numel() != dimensions * num_tokens:
            raise ValueError(
                f"`bounded` must have shape (batch, {dimensions}, *spatial), a dimension for each of the `levels` "
                f"{self.levels}, and {num_tokens} places, one for each token, got shape {tuple(bounded.shape)}."
            )
        if not bounded.is_floating_point():
            raise ValueError(f"`bounded` must be floats in [-1, 1], got dtype {bounded.dtype}.")
        # A comparison with NaN is false.
        if not (bounded.abs() <= 1).all():
            raise ValueError(
                f"`bounded` must be in [-1, 1], but it spans [{bounded.min().item()}, {bounded.max().item()}]."
            )
        bins = ((bounded.float() + 1) * (NUM_BINS / 2)).long().clamp_(max=NUM_BINS - 1).transpose(0, 1).flatten(1)
        return np.stack([np.bincount(dimension, minlength=NUM_BINS) for dimension in bins.cpu().numpy()])


def bounded_values(quantizer: FiniteScalarQuantizer, latent: torch.Tensor) -> torch.Tensor:
    """
    What a quantizer bins: its input of shape `(batch, d, *spatial)` after the bound, float32 of the same shape in
    [-1, 1]. For even numbers of levels that are rounded, the centre of their shifted range is moved to 0.
    """
    bounded = quantizer.bounded(latent)
    if not quantizer.equal_bins:
        levels = torch.tensor(quantizer.levels, device=latent.device).view(-1, *[1] * (latent.ndim - 2))
        bounded = torch.where(levels % 2 == 0, (bounded * levels + 1) / (levels - 1), bounded)
    # For even numbers of levels the bound is stretched by a thousandth.
    return bounded.clamp(-1, 1)


def _entropy_bits(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(abs((shares * np.log2(shares)).sum()))


def _sum_counts(places: np.ndarray, counts: np.ndarray, num_places: int) -> np.ndarray:
    # Summed in float64, which holds counts to 2**53.
    return np.bincount(places, counts, num_places).astype(np.int64)
