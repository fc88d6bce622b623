"""Adversarial loss of tokenizers, as in VQGAN (https://arxiv.org/abs/2012.09841)."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


class PatchDiscriminator(nn.Module):
    """
    Tells real from reconstructed patches of an image (PatchGAN, https://arxiv.org/abs/1611.07004).

    The normalization is by groups of channels, where the original normalizes by batch: a score depends on its own
    image alone, so that several processes train like one.

    Args:
        in_channels (`int`): channels of the images.
        width (`int`, *optional*, defaults to 64): channels after the first convolution; they double up to 8 times it.
        num_layers (`int`, *optional*, defaults to 4): convolutions that halve the resolution.
    """

    def __init__(self, in_channels: int, width: int = 64, num_layers: int = 4):
        super().__init__()
        widths = [width * min(2**layer, 8) for layer in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(num_layers):
            stride = 2 if layer < num_layers - 1 else 1
            layers += [
                nn.Conv2d(widths[layer], widths[layer + 1], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, widths[layer + 1]), widths[layer + 1]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.smallest_side = 3 * 2**num_layers
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(batch, in_channels, height, width)`): images in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(batch, 1, rows, columns)`: a score for each patch, higher for real ones.

        Raises:
            ValueError: if the images are smaller than a patch.
        """  # noqa: D205
        if min(images.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"The discriminator needs images of at least {self.smallest_side} pixels a side, got "
                f"{tuple(images.shape[-2:])}: give it fewer layers."
            )
        return self.layers(images)


def hinge_loss(real_scores: torch.Tensor, fake_scores: torch.Tensor) -> torch.Tensor:
    """
    Loss of the discriminator: scores of real patches should be above 1, those of reconstructed ones below -1.

    Args:
        real_scores (`torch.Tensor`): scores of real images, of any shape.
        fake_scores (`torch.Tensor`): scores of reconstructions, of any shape.

    Returns:
        `torch.Tensor`: a scalar.
    """
    return (F.relu(1 - real_scores.float()).mean() + F.relu(1 + fake_scores.float()).mean()) / 2


def generator_loss(
    discriminator: nn.Module,
    images: torch.Tensor,
    reconstruction_loss: torch.Tensor,
    last_layer: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Loss of the tokenizer: minus the mean score of its reconstructions. The discriminator gets no gradient.

    Args:
        discriminator (`torch.nn.Module`): a discriminator that is not wrapped for several processes.
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): reconstructions.
        reconstruction_loss, last_layer, reduce: as for [`adaptive_weight`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the loss and its adaptive weight, two scalars.
    """
    discriminator.requires_grad_(False)
    loss = -discriminator(images).float().mean()
    discriminator.requires_grad_(True)
    return loss, adaptive_weight(reconstruction_loss, loss, last_layer, reduce)


def adaptive_weight(
    reconstruction_loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    last_layer: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    Weight that makes the gradient of the adversarial loss as large as that of the reconstruction loss, both with
    respect to the last layer of the decoder (VQGAN, equation 7).

    Args:
        reconstruction_loss (`torch.Tensor`): a scalar.
        adversarial_loss (`torch.Tensor`): a scalar.
        last_layer (`torch.Tensor`): the weight of the last layer.
        reduce (`Callable`): mean of a tensor over the processes, so that all of them get the same weight.

    Returns:
        `torch.Tensor`: a scalar in [0, 10000], without gradient.
    """
    norms = [
        reduce(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()).norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
