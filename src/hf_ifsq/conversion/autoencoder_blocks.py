"""What the official autoencoders have in common: their convolutional blocks become those of diffusers."""

from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..models.autoencoder_ifsq import AutoencoderIFSQ
from .checkpoint import Rules, Weights, load_exactly


# From diffusers' names to official ones.
BLOCK_RULES: Rules = (
    (r"(down|up)samplers\.0", r"\1sample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)

Autoencoder = TypeVar("Autoencoder", AutoencoderIFSQ, VQModel)


def convert_autoencoder(
    model_class: type[Autoencoder], config: dict[str, Any], weights: Weights, rules: Rules, dropped: tuple[str, ...]
) -> Autoencoder:
    """
    Build an autoencoder of diffusers' `Encoder` and `Decoder` and fill it with official weights.

    Official encoders start at a base width, those of diffusers at the width of the first resolution. Where these
    differ, as in no published tokenizer, the result has twice as many channels, see `_widen`.
    """
    width = config["block_out_channels"][0]
    stem = weights["encoder.conv_in.weight"].shape[0] if "encoder.conv_in.weight" in weights else width
    narrow = stem != width and width % stem == 0
    with init_empty_weights():
        model = model_class(**config)
        if narrow:
            encoder, groups = model.encoder, model.config["norm_num_groups"]
            encoder.conv_in = nn.Conv2d(model.config["in_channels"], stem, 3, padding=1)
            options: dict[str, Any] = {"temb_channels": None, "groups": groups, "eps": 1e-6}
            encoder.down_blocks[0].resnets[0] = ResnetBlock2D(in_channels=stem, out_channels=width, **options)
    load_exactly(model, weights, (*BLOCK_RULES, *rules), dropped)
    return _widen(model, config) if narrow else model


def _widen(model: Autoencoder, config: dict[str, Any]) -> Autoencoder:
    """
    The same function by a model whose first convolution is as wide as its first resolution.

    The first residual block maps the stem, which is a convolution of the image, to `shortcut(stem) + residual(stem)`.
    Here there are twice as many channels in twice as many groups. The first half starts as `shortcut(stem)`, which is
    one convolution of the image too, and the second half holds the stem for `residual` to read; later blocks read the
    first half alone. Each channel of the stem is repeated so that a group keeps its statistics.
    """
    widths, groups = config["block_out_channels"], model.config["norm_num_groups"]
    with init_empty_weights():
        wide = type(model)(
            **{**config, "block_out_channels": [2 * width for width in widths], "norm_num_groups": 2 * groups}
        )
    width, first = widths[0], "encoder.down_blocks.0.resnets.0"
    old = model.state_dict()
    shortcut = old.pop(f"{first}.conv_shortcut.weight").flatten(1)
    shortcut_bias = old.pop(f"{first}.conv_shortcut.bias")
    state = {name: torch.zeros(weight.shape) for name, weight in wide.state_dict().items()}
    for name, weight in old.items():
        state[name][tuple(slice(size) for size in weight.shape)] = weight
        # Attention divides scores by the root of the number of channels, half of which are zero now.
        if "to_q" in name:
            state[name] *= 2**0.5

    stem, stem_bias = old["encoder.conv_in.weight"], old["encoder.conv_in.bias"]
    channels = torch.arange(stem.shape[0]).view(groups, -1).repeat(1, width // stem.shape[0]).flatten()
    composed = torch.einsum("os,sihw->oihw", shortcut, stem)
    state["encoder.conv_in.weight"] = torch.cat([composed, stem[channels]])
    state["encoder.conv_in.bias"] = torch.cat([shortcut @ stem_bias + shortcut_bias, stem_bias[channels]])
    # Where the second half holds each channel of the stem for the first time.
    read = width + torch.arange(width).view(groups, -1)[:, : stem.shape[0] // groups].flatten()
    for name, place in (("norm1.weight", read), ("norm1.bias", read), ("conv1.weight", (slice(width), read))):
        state[f"{first}.{name}"].zero_()[place] = old[f"{first}.{name}"]
    wide.load_state_dict(state, assign=True)
    return wide
