"""Adversarial loss of tokenizers, as in VQGAN (https://arxiv.org/abs/2012.09841)."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight


class PatchDiscriminator(nn.Module):
    """
    Scores patches of an image, real ones higher than reconstructed ones (PatchGAN, https://arxiv.org/abs/1611.07004).
    It normalizes by groups of channels, not by batch: a score depends on its own image alone, so that several
    processes train like one.

    Args:
        in_channels (`int`): channels of the images.
        width (`int`, *optional*, defaults to 64): channels after the first convolution; they double up to 8 times it.
        num_layers (`int`, *optional*, defaults to 4): convolutions that halve the resolution.
    """

    def __init__(self, in_channels: int, width: int = 64, num_layers: int = 4):
        super().__init__()
        widths = [width * min(2**layer, 8) for layer in range(num_layers + 1)]
        strides = [2] * (num_layers - 1) + [1]
        layers = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after, stride in zip(widths, widths[1:], strides):
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, after), after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.smallest_side = 3 * 2**num_layers
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores `(batch, 1, rows, columns)` of images `(batch, in_channels, height, width)` in [-1, 1]."""
        if min(images.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"The discriminator needs images of at least {self.smallest_side} pixels per side, got "
                f"{tuple(images.shape[-2:])}: give it fewer layers."
            )
        return self.layers(images)


def hinge_loss(real_scores: torch.Tensor, fake_scores: torch.Tensor) -> torch.Tensor:
    """Loss of the discriminator, a scalar: real scores should be above 1, those of reconstructions below -1."""
    return (F.relu(1 - real_scores.float()).mean() + F.relu(1 + fake_scores.float()).mean()) / 2


def remember_input(last_layer: nn.Conv2d) -> None:
    """Let the layer that makes the images keep its latest input for [`adversarial_loss`]. Call it before it runs."""

    def remember(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            layer.latest_input = inputs[0].detach()

    last_layer.register_forward_pre_hook(remember)


def forget_input(last_layer: nn.Conv2d) -> None:
    """Free what the layer keeps, if a step had no [`adversarial_loss`]."""
    last_layer.__dict__.pop("latest_input", None)


def adversarial_loss(
    discriminator: nn.Module,
    images: torch.Tensor,
    reconstruction_loss: torch.Tensor,
    last_layer: nn.Conv2d,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Loss of the tokenizer: minus the mean score of its reconstructions. The discriminator gets no gradient.

    Its weight makes the gradient of this loss as large as that of the reconstruction loss, both with respect to the
    last layer of the decoder (VQGAN, equation 7). Both losses are followed back to the images, and from these to the
    layer's weight by the input that it remembers: the backward pass of a compiled tokenizer can run only once.

    Args:
        discriminator (`torch.nn.Module`): a discriminator that is not wrapped for several processes.
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): reconstructions.
        reconstruction_loss (`torch.Tensor`): a scalar, a function of `images`.
        last_layer (`torch.nn.Conv2d`): the convolution that made `images`, after [`remember_input`].
        reduce (`Callable`): mean of a tensor over the processes, so that all of them get the same weight.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the loss and its weight in [0, 10000], without gradient, two scalars.
    """
    inputs = last_layer.__dict__.pop("latest_input", None)
    if inputs is None:
        raise ValueError("`last_layer` must have kept its input: call `remember_input` before the model runs.")
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, images, retain_graph=True)
    judged = images.detach().requires_grad_()
    scores = discriminator(judged).float()
    # Of the sum, not of the mean, whose gradient in half precision would vanish.
    gradient = torch.autograd.grad(-scores.sum(), judged)[0] / scores.numel()
    # Minus the mean score, with this gradient: the way back through the discriminator is gone once.
    loss = -scores.detach().mean() + ((images - images.detach()) * gradient).sum()
    size = (last_layer.out_channels, last_layer.in_channels // last_layer.groups, *last_layer.kernel_size)
    options = (last_layer.stride, last_layer.padding, last_layer.dilation, last_layer.groups)

    def norm(images_gradient: torch.Tensor) -> torch.Tensor:
        return reduce(conv2d_weight(inputs.float(), size, images_gradient.float(), *options)).norm()

    weight = norm(reconstruction_gradient) / (norm(gradient) + 1e-4)
    return loss, weight.clamp(max=1e4)
