"""Frozen vision models: the teacher of representation alignment, and features of images for the Fréchet distance."""

import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from ..models.grid import as_grid


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionModel(nn.Module):
    """
    Any vision model that [`~transformers.AutoModel`] loads from a folder or from the Hub, frozen and in evaluation
    mode: a vision transformer or a convolutional network; of a model of images and text, the vision part.

    Its features are `hidden_size` wide and `stride` pixels apart; `has_class_token` says whether the first stands for
    the whole image. `usual_size` is the side in pixels of the images that its config names, or else 224.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name_or_path: str):
        super().__init__()
        model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        parameters = inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        size = getattr(self.model.config, "image_size", None)
        self.usual_size = side = size if isinstance(size, int) else 224
        _, num_features, self.hidden_size = self.extract(torch.zeros(1, 3, side, side), (side, side)).shape
        self.stride, self.has_class_token = side // math.isqrt(num_features), False
        patch_size = getattr(self.model.config, "patch_size", None)
        # Where there are fewer, a hierarchical model merges patches on the way.
        if isinstance(patch_size, int) and num_features >= (side // patch_size) ** 2:
            self.stride, self.has_class_token = patch_size, num_features > (side // patch_size) ** 2

    def train(self, mode: bool = True) -> "VisionModel":
        """It stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def extract(self, pixel_values: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """
        All features `(batch, features, hidden_size)`, float32, of images `(batch, 1 or 3, height, width)` in [-1, 1]
        after resizing to `image_size` with an antialiased bicubic filter and ImageNet's normalization. Class and
        register tokens, if any, come before the features of the patches in raster order.
        """
        images = ((pixel_values.float() + 1) / 2).expand(-1, 3, -1, -1)
        images = F.interpolate(images, size=image_size, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.model((images - self.mean) / self.std, **self.options).last_hidden_state
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)
        return features.float()


class Teacher(VisionModel):
    """
    The features of a frozen vision model at each cell of a token grid: the target of representation alignment.

    Args:
        name_or_path (`str`): a folder or a name on the Hub.
        grid_size (`int` or `tuple[int, int]`): rows and columns of the token grid, to which the patch grid is fitted.
    """

    def __init__(self, name_or_path: str, grid_size: int | Sequence[int]):
        super().__init__(name_or_path)
        self.grid_size = rows, columns = as_grid(grid_size)
        self.image_size = (self.stride * rows, self.stride * columns)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The features of patches `(batch, rows * columns, hidden_size)`, float32 and in raster order, without class and
        register tokens, of images `(batch, 1 or 3, height, width)` in [-1, 1].
        """
        features = self.extract(pixel_values, self.image_size)
        num_patches = math.prod(self.grid_size)
        if features.shape[1] < num_patches:
            raise ValueError(
                f"The `teacher` gives {features.shape[1]} features for an image of {self.image_size} pixels, fewer "
                f"than the {num_patches} cells of the token grid {self.grid_size}."
            )
        return features[:, -num_patches:]


class FeatureExtractor(VisionModel):
    """
    One feature vector per image: the class token of a frozen vision model after its last layer, or where there is
    none the mean over all places. Poolers behind it are left out, as many checkpoints do not hold their weights.

    Args:
        name_or_path (`str`): a folder or a name on the Hub.
        image_size (`int`, *optional*):
            side in pixels to which images are resized; by default that of the model's config, or else 224. The config
            of DINOv2 says 518; its published distances are at 224.
    """

    def __init__(self, name_or_path: str, image_size: int | None = None):
        super().__init__(name_or_path)
        self.image_size = self.usual_size if image_size is None else image_size
        if self.image_size < self.stride:
            raise ValueError(f"`image_size` must be at least {self.stride} pixels, got {self.image_size}.")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features `(batch, hidden_size)`, float32, of images `(batch, 1 or 3, height, width)` in [-1, 1]."""
        features = self.extract(pixel_values, (self.image_size, self.image_size))
        return features[:, 0] if self.has_class_token else features.mean(dim=1)
