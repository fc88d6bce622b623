"""Losses without parameters."""

import torch
from torch.nn import functional as F


def velocity_loss(velocity: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Flow-matching loss of iFSQ's DiT: the squared error of the predicted velocity, and the error of its direction.

    Args:
        velocity (`torch.Tensor` of shape `(batch, channels, height, width)`): predicted velocity.
        target (`torch.Tensor` of the same shape): data minus noise.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: mean squared error, and mean of one minus the cosine similarity over the
        channels; both scalars in float32. Their sum is trained on.
    """
    velocity, target = velocity.float(), target.float()
    return F.mse_loss(velocity, target), (1 - F.cosine_similarity(velocity, target, dim=1)).mean()
