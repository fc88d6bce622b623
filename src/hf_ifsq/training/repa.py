"""Representation alignment (REPA, https://arxiv.org/abs/2410.06940): hidden states learn what a vision model sees."""

import inspect
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionModel(nn.Module):
    """
    A frozen vision model, and images made ready for it.

    Args:
        name_or_path (`str`):
            a vision model that [`~transformers.AutoModel`] loads, from the Hub or a folder: a vision transformer or a
            convolutional network. Of a model of images and text the vision part is taken.

    Attributes:
        hidden_size (`int`): width of its features.
        stride (`int`): pixels from one feature to the next.
        has_class_token (`bool`): whether its first feature stands for the whole image.
        usual_size (`int`): side in pixels of the images that its config names, or else 224.
    """

    def __init__(self, name_or_path: str):
        super().__init__()
        model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        parameters = inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        size = getattr(self.model.config, "image_size", None)
        self.usual_size = size if isinstance(size, int) else 224
        self.stride, self.hidden_size, self.has_class_token = self._probe()

    @torch.no_grad()
    def _probe(self) -> tuple[int, int, bool]:
        """Stride, width and class token of the features, seen on an image of the usual size."""
        side = self.usual_size
        features = self.model(torch.zeros(1, 3, side, side), **self.options).last_hidden_state
        if features.ndim == 4:
            return side // features.shape[-1], features.shape[1], False
        patch_size = getattr(self.model.config, "patch_size", None)
        if isinstance(patch_size, int) and features.shape[1] >= (side // patch_size) ** 2:
            return patch_size, features.shape[2], features.shape[1] > (side // patch_size) ** 2
        # A hierarchical transformer merges patches on the way.
        return side // math.isqrt(features.shape[1]), features.shape[2], False

    def train(self, mode: bool = True) -> "VisionModel":
        """It stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def extract(self, pixel_values: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """
        All features of images, resized with an antialiased bicubic filter and normalized by the statistics of
        ImageNet.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 1 or 3, height, width)`): images in [-1, 1].
            image_size (`tuple[int, int]`): height and width to which they are resized.

        Returns:
            `torch.Tensor` of shape `(batch, features, hidden_size)`, float32: class and register tokens, if any,
            before those of the patches in raster order.
        """
        images = ((pixel_values.float() + 1) / 2).expand(-1, 3, -1, -1)
        images = F.interpolate(images, size=image_size, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.model((images - self.mean) / self.std, **self.options).last_hidden_state
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)
        return features.float()


class Teacher(VisionModel):
    """
    A frozen vision model whose patch features are the target of the alignment.

    Args:
        name_or_path (`str`): as in [`VisionModel`].
        grid_size (`tuple[int, int]`): rows and columns of the token grid, which the patch grid is made equal to.
    """

    def __init__(self, name_or_path: str, grid_size: tuple[int, int]):
        super().__init__(name_or_path)
        self.grid_size = tuple(grid_size)
        self.image_size = tuple(self.stride * cells for cells in grid_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 1 or 3, height, width)`): images in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(batch, rows * columns, hidden_size)`, float32: the features of the patches in
            raster order, without class and register tokens.

        Raises:
            ValueError: if the model gives fewer features than the grid has cells.
        """  # noqa: D205
        features = self.extract(pixel_values, self.image_size)
        num_patches = self.grid_size[0] * self.grid_size[1]
        if features.shape[1] < num_patches:
            raise ValueError(
                f"The `teacher` gives {features.shape[1]} features for an image of {self.image_size} pixels, fewer "
                f"than the {num_patches} cells of the token grid {self.grid_size}."
            )
        return features[:, -num_patches:]


class RepresentationAlignment(nn.Module):
    """
    Projector from a generator's hidden states to a teacher's features, and the loss between the two. It belongs to
    training alone: no weight of it is part of a generator.

    Args:
        hidden_size (`int`): width of the generator.
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
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden_size)`):
                in raster order. In an autoregressive model position i is the one that predicts token i.
            teacher_features (`torch.Tensor` of shape `(batch, tokens, teacher_hidden_size)`): of the same cells.

        Returns:
            `torch.Tensor`: minus the mean cosine similarity, a scalar in [-1, 1].

        Raises:
            ValueError: if the two have not the same number of tokens.
        """  # noqa: D205
        if hidden_states.shape[:2] != teacher_features.shape[:2]:
            raise ValueError(
                f"`hidden_states` and `teacher_features` must have the same batch and tokens, got "
                f"{tuple(hidden_states.shape[:2])} and {tuple(teacher_features.shape[:2])}."
            )
        projected = self.projector(hidden_states)
        # In float32: normalizing in half precision is a known source of NaN.
        return -F.cosine_similarity(projected.float(), teacher_features.float(), dim=-1).mean()
