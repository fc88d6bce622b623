"""What makes `pixel_values` of a picture."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..models.checks import check_integer


@dataclass(frozen=True)
class ImageTransform:
    """
    Crop, flip and resize: a picture becomes `pixel_values`. Transparent pictures are put on white; squares are resized
    by PIL's antialiased bicubic filter.

    Args:
        resolution (`int`): side of the result in pixels.
        channels (`int`, *optional*, defaults to 3): 1 for grey, 3 for RGB.
        center_crop (`bool`, *optional*, defaults to `False`): whether random squares lie in the middle.
        min_crop_scale (`float`, *optional*, defaults to 1.0):
            side of the smallest random square over the short side of the picture, in (0, 1].
        random_flip (`bool`, *optional*, defaults to `False`): whether half of the pictures are mirrored.
        seed (`int`, *optional*, defaults to 0): seed of the random squares and flips.
    """

    resolution: int
    channels: int = 3
    center_crop: bool = False
    min_crop_scale: float = 1.0
    random_flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.resolution, "resolution")
        if self.channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 (grey) or 3 (RGB), got {self.channels}.")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"`min_crop_scale` must be in (0, 1], got {self.min_crop_scale}.")

    def __call__(self, image: Image.Image, position: int | None = None) -> torch.Tensor:
        """
        Transform a picture of 8 bits per channel to float32 `(channels, resolution, resolution)` in [-1, 1]. With a
        `position`, it and the seed draw square and flip; without, it is the plain square in the middle.
        """
        # PIL would cut off values of more than 8 bits instead of scaling them.
        if image is None or image.mode in ("I", "F") or image.mode.startswith("I;16"):
            got = "None" if image is None else f"mode {image.mode!r}"
            raise ValueError(f"`image` must be an image of 8 bits per channel, got {got}.")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = self._square(image.convert("L" if self.channels == 1 else "RGB"), position)
        # A fresh array: the one behind a PIL image is read-only.
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(*image.size[::-1], self.channels)
        return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1

    def _square(self, image: Image.Image, position: int | None) -> Image.Image:
        side: float = min(image.size)
        place, flip = (0.5, 0.5), False
        if position is not None:
            generator = random.Random(f"{self.seed}-{position}")
            side = round(side * generator.uniform(self.min_crop_scale, 1))
            place = (0.5, 0.5) if self.center_crop else (generator.random(), generator.random())
            flip = self.random_flip and generator.random() < 0.5
        left, top = (round((size - side) * share) for size, share in zip(image.size, place, strict=True))
        size = (self.resolution, self.resolution)
        image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
