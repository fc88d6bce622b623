"""What the training of a tokenizer is made of: iFSQ and its baselines with random weights, and their loss."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

from ..models.autoencoder_ifsq import AutoencoderIFSQ
from ..vision.lpips import LPIPS
from .adversarial import adversarial_loss, forget_input


# Options of a bottleneck that not all of them have.
BOTTLENECKS = {
    "ifsq": ("levels", "alpha", "bound", "equal_bins", "noise_prob"),
    "fsq": ("levels",),
    "vq": ("latent_channels", "codebook_size"),
    "kl": ("latent_channels",),
}

# Usual weight of the loss of a bottleneck itself.
BOTTLENECK_WEIGHTS = {AutoencoderIFSQ: 0.0, VQModel: 1.0, AutoencoderKL: 1e-6}


def check_options(bottleneck: str, options: Iterable[str]) -> None:
    """Raise a `ValueError` if there is no such bottleneck, or if it has not all options that are named."""
    if bottleneck not in BOTTLENECKS:
        raise ValueError(f"`bottleneck` must be one of {list(BOTTLENECKS)}, got {bottleneck!r}.")
    for name in options:
        having = [other for other, names in BOTTLENECKS.items() if name in names]
        if not having:
            raise TypeError(f"`{name}` is no option of a tokenizer: {BOTTLENECKS}.")
        if bottleneck not in having:
            raise ValueError(f"`{name}` is for the `bottleneck` {' or '.join(map(repr, having))}, not {bottleneck!r}.")


def make_tokenizer(
    bottleneck: str = "ifsq",
    *,
    sample_size: int = 256,
    channels: int = 3,
    block_out_channels: Sequence[int] = (128, 128, 256, 512, 512),
    layers_per_block: int = 2,
    **options: Any,
) -> ModelMixin:
    """
    An image tokenizer with random weights. All have the same encoder and decoder. The defaults are the paper's.

    Args:
        bottleneck (`str`, *optional*, defaults to `"ifsq"`):
            `"ifsq"` or `"fsq"`: [`AutoencoderIFSQ`] with a slope `alpha` of 1.6 or 2.0; `"vq"`:
            [`~diffusers.VQModel`]; `"kl"`: [`~diffusers.AutoencoderKL`].
        sample_size (`int`, *optional*, defaults to 256): side of the images in pixels.
        channels (`int`, *optional*, defaults to 3): 1 for grey images, 3 for RGB.
        block_out_channels, layers_per_block: as of [`AutoencoderIFSQ`].
        options:
            `levels` of `"ifsq"` and `"fsq"`; `alpha`, `bound`, `equal_bins` and `noise_prob` of `"ifsq"`;
            `latent_channels` (4) of `"vq"` and `"kl"`; `codebook_size` (16,384) of `"vq"`.
    """
    check_options(bottleneck, options)
    sizes: dict[str, Any] = {"in_channels": channels, "out_channels": channels, "sample_size": sample_size}
    sizes |= {"block_out_channels": tuple(block_out_channels), "layers_per_block": layers_per_block}
    if "latent_channels" not in BOTTLENECKS[bottleneck]:
        return AutoencoderIFSQ(**sizes, **({"alpha": 2.0} if bottleneck == "fsq" else {}), **options)
    depth = len(block_out_channels)
    sizes |= {"down_block_types": ("DownEncoderBlock2D",) * depth, "up_block_types": ("UpDecoderBlock2D",) * depth}
    sizes |= {"mid_block_add_attention": False, "latent_channels": options.get("latent_channels", 4)}
    if bottleneck == "kl":
        return AutoencoderKL(**sizes, scaling_factor=1.0)
    return VQModel(**sizes, scaling_factor=1.0, num_vq_embeddings=options.get("codebook_size", 16384))


class TokenizerLosses(nn.Module):
    """
    The losses of a tokenizer, weighted and added: pixels, LPIPS, the bottleneck's own, the discriminator's.

    Args:
        distance (`str`): distance of pixels, `"l1"` or `"l2"`.
        lpips ([`LPIPS`], *optional*): perceptual distance.
        weights (`dict[str, float]`): those of the `perceptual`, `bottleneck` and `adversarial` losses.
    """

    def __init__(self, distance: str, lpips: LPIPS | None, weights: dict[str, float]):
        super().__init__()
        self.distance = {"l1": F.l1_loss, "l2": F.mse_loss}[distance]
        self.lpips = lpips
        self.weights = weights

    def forward(
        self,
        sample: torch.Tensor,
        bottleneck_loss: torch.Tensor,
        pixel_values: torch.Tensor,
        discriminator: nn.Module | None,
        last_layer: nn.Conv2d,
        accelerator: Accelerator,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        The sum, and its terms for the log, of reconstructions `sample` of `pixel_values`; with a `discriminator` also
        the [`adversarial_loss`], for which `last_layer` made the reconstructions on the devices of `accelerator`.
        """  # noqa: D205
        sample = sample.float()
        loss = self.distance(sample, pixel_values)
        terms = {"reconstruction_loss": loss}
        if self.lpips is not None:
            terms["perceptual_loss"] = self.lpips(sample, pixel_values).mean()
            loss = loss + self.weights["perceptual"] * terms["perceptual_loss"]
        if discriminator is not None:
            terms["adversarial_loss"], terms["adaptive_weight"] = adversarial_loss(
                discriminator, sample, loss, last_layer, reduce=lambda gradient: accelerator.reduce(gradient, "mean")
            )
            loss = loss + self.weights["adversarial"] * terms["adaptive_weight"] * terms["adversarial_loss"]
        forget_input(last_layer)
        if self.weights["bottleneck"] > 0:
            terms["bottleneck_loss"] = bottleneck_loss
            loss = loss + self.weights["bottleneck"] * bottleneck_loss
        return loss, terms
