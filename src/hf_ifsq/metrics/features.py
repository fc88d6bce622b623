"""Features of images for the Fréchet distance."""

import torch

from ..training.repa import VisionModel


class FeatureExtractor(VisionModel):
    """
    One feature vector for an image, from any vision model that [`~transformers.AutoModel`] loads: its class token
    after the last layer, or where there is none the mean over all places. Poolers behind it are left out, as many
    checkpoints do not hold their weights.

    Args:
        name_or_path (`str`):
            a vision transformer or a convolutional network, from the Hub or a folder. Of a model of images and text
            the vision part is taken.
        image_size (`int`, *optional*):
            side in pixels to which images are resized; by default that of the model's config, or else 224. The config
            of DINOv2 says 518; its published distances are at 224.

    Raises:
        ValueError: if `image_size` is smaller than what one feature stands for.
    """

    def __init__(self, name_or_path: str, image_size: int | None = None):
        super().__init__(name_or_path)
        self.image_size = self.usual_size if image_size is None else image_size
        if self.image_size < self.stride:
            raise ValueError(f"`image_size` must be at least {self.stride} pixels, got {self.image_size}.")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 1 or 3, height, width)`):
                images in [-1, 1]; they are resized with an antialiased bicubic filter.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`, float32.
        """  # noqa: D205
        features = self.extract(pixel_values, (self.image_size, self.image_size))
        return features[:, 0] if self.has_class_token else features.mean(dim=1)
