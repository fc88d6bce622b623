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
        `tuple[torch.Tensor, torch.Tensor]`: for each image the mean squared error, and the mean of one minus the
        cosine similarity over the channels; both float32 of shape `(batch,)`. The mean of their sum is trained on.
    """
    velocity, target = velocity.float(), target.float()
    squared_error = (velocity - target).square().mean(dim=(1, 2, 3))
    direction_error = (1 - F.cosine_similarity(velocity, target, dim=1)).mean(dim=(1, 2))
    return squared_error, direction_error
