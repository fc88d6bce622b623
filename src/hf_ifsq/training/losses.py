"""Losses without parameters."""

import torch
from torch.nn import functional as F


def velocity_loss(velocity: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Flow-matching loss of iFSQ's DiT: the mean squared error of each image's velocity `(batch, channels, height,
    width)` against data minus noise, and the mean of one minus the cosine similarity over the channels. Both are
    float32 of shape `(batch,)`; the mean of their sum is trained on.
    """
    velocity, target = velocity.float(), target.float()
    squared_error = (velocity - target).square().mean(dim=(1, 2, 3))
    direction_error = (1 - F.cosine_similarity(velocity, target, dim=1)).mean(dim=(1, 2))
    return squared_error, direction_error
