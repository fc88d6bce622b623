"""Learned perceptual distance between images (LPIPS, https://arxiv.org/abs/1801.03924), on the features of VGG16."""

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


# Widths of VGG16's convolutions in their five stages. Each stage ends with features that are compared.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HEADS_FILE = Path(__file__).with_name("lpips_vgg.safetensors")


def check_image_pair(
    images: torch.Tensor, references: torch.Tensor, smallest_side: int = 1, read_values: bool = True
) -> None:
    """Check that two batches can be compared: floats in [-1, 1] of one shape `(batch, 1 or 3, height, width)`."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or not shape[0] or min(shape[2:]) < smallest_side:
        raise ValueError(
            "`images` must have shape (batch, 1 or 3, height, width) with at least "
            f"{smallest_side} pixels per side, got {shape}."
        )
    if references.shape != images.shape:
        raise ValueError(f"`references` must have the shape of `images`, {shape}, got {tuple(references.shape)}.")
    for name, values in (("images", images), ("references", references)):
        if not values.is_floating_point():
            raise ValueError(f"`{name}` must be floats in [-1, 1], got a tensor of dtype {values.dtype}.")
        # A comparison with NaN is false.
        if read_values and not (values.abs() <= 1).all():
            raise ValueError(
                f"`{name}` must be in [-1, 1], but it spans [{values.min().item()}, {values.max().item()}]: scale "
                "pixels by `x / 127.5 - 1`, and clamp reconstructions."
            )


class LPIPS(nn.Module):
    r"""
    Learned perceptual distance of two images, on their VGG16 features `f` and `g` after each of five stages:
    `sum_l mean_hw sum_c w_lc * (f_lchw / |f_lhw| - g_lchw / |g_lhw|)**2`. The weights `w` are those of version 0.1 of
    LPIPS, which come with this package; VGG16's own are loaded.

    It is frozen, stays in evaluation mode and runs in float32 whatever autocast says. Gradients flow to the images.

    Args:
        vgg (`str`, *optional*, defaults to `"timm/vgg16.tv_in1k"`):
            safetensors of an ImageNet VGG16 under torchvision's names (`features.0.weight`, ...): a repository on the
            Hub or a folder with a `model.safetensors`, or the file itself.
        revision (`str`, *optional*): branch, tag or commit of the repository.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, vgg: str = "timm/vgg16.tv_in1k", revision: str | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        self._stage_ends = []
        in_channels = 3
        for stage, widths in enumerate(STAGES):
            layers += [nn.MaxPool2d(2)] if stage else []
            for width in widths:
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                in_channels = width
            self._stage_ends.append(len(layers) - 1)
        # The places in this list are the numbers in torchvision's names.
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1, bias=False) for widths in STAGES)
        # Maps [-1, 1] to what VGG16 was trained on.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.heads.load_state_dict(load_file(HEADS_FILE))
        self._load_features(vgg, revision)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """It stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(batch, 1 or 3, height, width)`):
                in [-1, 1] or, as reconstructions in training, about so; at least 16 pixels per side.
            references (`torch.Tensor` of the same shape): what they are compared with.

        Returns:
            `torch.Tensor` of shape `(batch,)`, float32: distances of at least 0, the smaller the more alike.
        """
        check_image_pair(images, references, smallest_side=16, read_values=False)
        distances: list[torch.Tensor] = []
        with torch.autocast(device_type=images.device.type, enabled=False):
            pair = [(values.float() - self.shift) / self.scale for values in (images, references)]
            for number, layer in enumerate(self.features):
                pair = [layer(hidden) for hidden in pair]
                if number in self._stage_ends:
                    lengths = [torch.linalg.vector_norm(hidden, dim=1, keepdim=True) + 1e-10 for hidden in pair]
                    difference = pair[0] / lengths[0] - pair[1] / lengths[1]
                    head = self.heads[len(distances)]
                    distances.append(head(difference.square()).mean(dim=(1, 2, 3)))
        return torch.stack(distances).sum(dim=0)

    def _load_features(self, vgg: str, revision: str | None) -> None:
        try:
            file = Path(vgg)
            if file.is_dir():
                file = file / "model.safetensors"
            elif not file.is_file() and file.suffix != ".safetensors":
                file = Path(hf_hub_download(vgg, "model.safetensors", revision=revision))
            weights = load_file(file)
        except (OSError, HFValidationError, SafetensorError) as error:
            raise OSError(
                f"The weights of VGG16 could not be had from `vgg` {vgg!r}. Pass the name of a repository on the Hub, "
                f"or without a network a folder with its `model.safetensors`, or such a file. ({error})"
            ) from error
        problems = []
        for name, own in self.features.state_dict(prefix="features.").items():
            if name not in weights:
                problems.append(f"{name} is missing")
            elif weights[name].shape != own.shape:
                problems.append(f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(own.shape)}")
            elif not torch.isfinite(weights[name]).all():
                problems.append(f"{name} is not finite")
            else:
                own.copy_(weights[name])
        if problems:
            raise ValueError(f"`vgg` {vgg!r} does not hold VGG16's features: {', '.join(problems)}.")
