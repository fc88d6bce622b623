"""Fréchet distance between two sets of features, from moments summed up over any number of batches and processes."""

import numpy as np
import torch


class FeatureMoments:
    """
    Number, mean and covariance of features that come in batches, in float64. Parts are merged by their means and
    centred sums (Chan et al., 1979), so that the result does not depend on how the data was divided.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(0)
        self._centred_sum = np.zeros((0, 0))

    @property
    def covariance(self) -> np.ndarray:
        """With the divisor `count - 1`, of shape `(width, width)`."""
        if self.count < 2:
            raise ValueError(f"A covariance takes at least 2 features, got {self.count}.")
        return self._centred_sum / (self.count - 1)

    def update(self, features: torch.Tensor | np.ndarray) -> None:
        """Take in a batch of shape `(batch, width)`: finite numbers, one row per image."""
        values = torch.as_tensor(features).detach().cpu().double().numpy()
        if values.ndim != 2 or not len(values):
            raise ValueError(f"`features` must have shape (batch, width), got {values.shape}.")
        if not np.isfinite(values).all():
            raise ValueError("`features` is not finite (NaN or infinity).")
        batch = FeatureMoments()
        batch.count, batch.mean = len(values), values.mean(axis=0)
        centred = values - batch.mean
        batch._centred_sum = centred.T @ centred
        self.merge(batch)

    def merge(self, other: "FeatureMoments") -> None:
        """Take in another part of the data, of features of the same width, such as that of another process."""
        if not other.count:
            return
        width = len(other.mean)
        if not self.count:
            self.mean, self._centred_sum = np.zeros(width), np.zeros((width, width))
        if len(self.mean) != width:
            raise ValueError(f"`features` must have the width {len(self.mean)} of those before, got {width}.")
        count = self.count + other.count
        difference = other.mean - self.mean
        between = np.outer(difference, difference) * (self.count * other.count / count)
        self._centred_sum = self._centred_sum + other._centred_sum + between
        self.mean = self.mean + difference * (other.count / count)
        self.count = count


def frechet_distance(moments: FeatureMoments, reference_moments: FeatureMoments) -> float:
    r"""
    Fréchet distance (squared Wasserstein-2 distance) between the Gaussians of two sets of features, as in FID
    (https://arxiv.org/abs/1706.08500): `|m_1 - m_2|**2 + tr(C_1 + C_2 - 2 (C_1 C_2)**(1/2))`. The trace of the root is
    the sum of the singular values of `C_1**(1/2) C_2**(1/2)`, which keeps the digits of sets of few samples.

    Args:
        moments ([`FeatureMoments`]): of one set, at least 2 samples.
        reference_moments ([`FeatureMoments`]): of the other, with the same features.

    Returns:
        `float`: at least 0, in the squared unit of the features; comparable only with the same extractor, the same
        resizing and the same numbers of samples.
    """
    covariance, reference_covariance = moments.covariance, reference_moments.covariance
    if covariance.shape != reference_covariance.shape:
        raise ValueError(
            f"The features of the two sets must have the same width, got {len(covariance)} and "
            f"{len(reference_covariance)}."
        )
    product = _symmetric_root(covariance) @ _symmetric_root(reference_covariance)
    trace_of_root = np.linalg.svd(product, compute_uv=False).sum()
    difference = moments.mean - reference_moments.mean
    distance = difference @ difference + np.trace(covariance) + np.trace(reference_covariance) - 2 * trace_of_root
    # Rounding may leave a tiny negative number for equal sets.
    return max(0.0, float(distance))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
