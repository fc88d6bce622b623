"""Representation alignment (REPA, https://arxiv.org/abs/2410.06940): hidden states learn what a vision model sees."""

import torch
from torch import nn
from torch.nn import functional as F


class RepresentationAlignment(nn.Module):
    """
    Projector from a generator model's hidden states to a teacher's features, and the loss between the two. It is for
    training alone: no weight of it is part of that model.

    Args:
        hidden_size (`int`): width of the generator model.
        teacher_hidden_size (`int`): width of the teacher.
        projector_dim (`int`, *optional*, defaults to 2048): width of the projector.
    """

    def __init__(self, hidden_size: int, teacher_hidden_size: int, projector_dim: int = 2048):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(hidden_size, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, teacher_hidden_size),
        )

    def forward(self, hidden_states: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
        """
        Minus the mean cosine similarity, a scalar in [-1, 1].

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden_size)`):
                in raster order. In the AR model position i is the one that predicts token i.
            teacher_features (`torch.Tensor` of shape `(batch, tokens, teacher_hidden_size)`): of the same cells.
        """
        if hidden_states.shape[:2] != teacher_features.shape[:2]:
            raise ValueError(
                f"`hidden_states` and `teacher_features` must have the same batch and tokens, got "
                f"{tuple(hidden_states.shape[:2])} and {tuple(teacher_features.shape[:2])}."
            )
        projected = self.projector(hidden_states)
        # In float32: normalizing in half precision is a known source of NaN.
        return -F.cosine_similarity(projected.float(), teacher_features.float(), dim=-1).mean()
