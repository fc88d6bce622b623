"""How alike two representations of the same images are."""

import torch
from torch.nn import functional as F


CKNNA_NEIGHBORS = 10


def cknna(features: torch.Tensor, other_features: torch.Tensor, k: int = CKNNA_NEIGHBORS) -> float:
    """
    Centred kernel nearest-neighbour alignment (https://arxiv.org/abs/2405.07987): kernel alignment that looks only at
    pairs of images that are nearest neighbours in both representations.

    Rows are scaled to length one. With the kernels `K` and `L` of all inner products and the mask `M` of the pairs
    `(i, j)`, `i != j`, in which `j` is one of the `k` nearest neighbours of `i` in both, it is
    `H(M * K, M * L) / sqrt(H(M_K * K, M_K * K) * H(M_L * L, M_L * L))`, where `M_K` and `M_L` are the masks of one
    representation alone and `H` is the unbiased estimator of the Hilbert-Schmidt independence criterion (Song et al.,
    2012). It is computed in float64 on the CPU.

    Args:
        features (`torch.Tensor` of shape `(images, width)`): one representation, one row per image.
        other_features (`torch.Tensor` of shape `(images, other_width)`): the other, of the same images in their order.
        k (`int`, *optional*, defaults to 10):
            number of nearest neighbours; with images - 1, the measure is the unbiased centred kernel alignment.

    Returns:
        `float`: 1 for equal representations, near 0 for unrelated ones; the same if either is rotated or its rows
        are scaled. It depends a little on the order: published values have the measured model first and a vision
        model second. NaN where `H` of a representation with itself is not positive.
    """
    if features.ndim != 2 or other_features.ndim != 2 or len(features) != len(other_features):
        raise ValueError(
            "`features` and `other_features` must have shape (images, width) with as many images, got "
            f"{tuple(features.shape)} and {tuple(other_features.shape)}."
        )
    # The estimator divides by images - 3.
    if not 1 <= k < len(features) or len(features) < 4:
        raise ValueError(
            f"`k` must be in [1, images), and there must be 4 images or more, got `k` {k} for {len(features)}."
        )
    kernel, neighbors = _kernel_and_neighbors(features, k, "features")
    other_kernel, other_neighbors = _kernel_and_neighbors(other_features, k, "other_features")
    alignment = _hsic(other_neighbors * kernel, neighbors * other_kernel)
    squared_norm, other_squared_norm = _hsic(kernel, kernel), _hsic(other_kernel, other_kernel)
    if squared_norm <= 0 or other_squared_norm <= 0:
        return float("nan")
    return (alignment / (squared_norm * other_squared_norm).sqrt()).item()


def _kernel_and_neighbors(features: torch.Tensor, k: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inner products of rows with their nearest neighbours, else zeros, and the mask of the neighbours; (n, n)."""
    features = features.detach().cpu().double()
    if not features.isfinite().all():
        raise ValueError(f"`{name}` is not finite (NaN or infinity).")
    features = F.normalize(features, dim=1)
    kernel = features @ features.T
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
    neighbors = torch.zeros_like(kernel).scatter_(1, nearest, 1.0)
    return neighbors * kernel, neighbors


def _hsic(kernel: torch.Tensor, other_kernel: torch.Tensor) -> torch.Tensor:
    """Unbiased estimator for two kernels `(images, images)` with diagonals of zeros, which need not be symmetric."""
    count = len(kernel)
    trace = (kernel * other_kernel.T).sum()
    sums = kernel.sum() * other_kernel.sum() / ((count - 1) * (count - 2))
    cross = (kernel @ other_kernel).sum() * 2 / (count - 2)
    return (trace + sums - cross) / (count * (count - 3))
