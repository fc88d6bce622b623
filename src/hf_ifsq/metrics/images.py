"""Distances of each image of a batch to its original: PSNR and SSIM."""

import functools
import math

import torch

from ..vision.lpips import check_image_pair


# SSIM's Gaussian window: 11 pixels with a standard deviation of 1.5.
WINDOW_RADIUS = 5
WINDOW_SIGMA = 1.5


def peak_signal_noise_ratio(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of each image: `10 * log10(2**2 / mean squared error)` over its pixels and channels.

    Args:
        images (`torch.Tensor` of shape `(batch, 1 or 3, height, width)`): floats in [-1, 1].
        references (`torch.Tensor` of the same shape): their originals.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32: decibels, the higher the more alike; infinite for equal images.
    """
    check_image_pair(images, references)
    return 10 * torch.log10(4 / (images.float() - references.float()).square().mean(dim=(1, 2, 3)))


def structural_similarity(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    Structural similarity of each image (SSIM, https://doi.org/10.1109/TIP.2003.819861): with the paper's Gaussian
    window of 11 pixels and constants 0.01 and 0.03, averaged over channels and all places where the window fits in.

    Args:
        images (`torch.Tensor` of shape `(batch, 1 or 3, height, width)`): floats in [-1, 1], at least 11 x 11 pixels.
        references (`torch.Tensor` of the same shape): their originals.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32: at most 1, which is for equal images.
    """
    check_image_pair(images, references, smallest_side=2 * WINDOW_RADIUS + 1)
    images, references = images.float(), references.float()
    # Means are taken in [0, 2], variances and the covariance in [-1, 1], where they lose less to cancellation.
    mean, reference_mean = _windowed_mean(images), _windowed_mean(references)
    variances = _windowed_mean(images * images + references * references) - mean * mean - reference_mean**2
    covariance = _windowed_mean(images * references) - mean * reference_mean
    mean, reference_mean = mean + 1, reference_mean + 1
    constant_1, constant_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean * reference_mean + constant_1) / (mean * mean + reference_mean**2 + constant_1)
    structure = (2 * covariance + constant_2) / (variances + constant_2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _windowed_mean(values: torch.Tensor) -> torch.Tensor:
    # A sum of shifted images instead of a convolution, which GPUs would run in TF32: its three digits are too few for
    # the differences above.
    weights = [math.exp(-((place / WINDOW_SIGMA) ** 2) / 2) for place in range(-WINDOW_RADIUS, WINDOW_RADIUS + 1)]
    for dim in (-1, -2):
        length = values.shape[dim] - 2 * WINDOW_RADIUS
        shifted = (weight * values.narrow(dim, start, length) for start, weight in enumerate(weights))
        values = functools.reduce(torch.add, shifted) / sum(weights)
    return values
