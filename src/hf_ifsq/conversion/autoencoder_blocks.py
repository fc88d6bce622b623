"""What the official autoencoders have in common: their convolutional blocks become those of diffusers."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from .checkpoint import Weights, load_exactly


# From diffusers' names to official ones.
BLOCK_RENAMES = (
    (r"(down|up)samplers\.0", r"\1sample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)

Autoencoder = TypeVar("Autoencoder", bound=ModelMixin)


def convert_autoencoder(
    model_class: type[Autoencoder],
    config: dict[str, Any],
    weights: Weights,
    official_name: Callable[[str], str],
    dropped: Sequence[str],
) -> Autoencoder:
    """
    Build an autoencoder of diffusers' `Encoder` and `Decoder` and fill it with official weights.

    The official encoders start at a base width, those of diffusers at the width of the first resolution. Where these
    differ, the result has twice as many channels, see `_widen`; no published tokenizer needs that.

    Args:
        model_class (`type`): class of the model.
        config (`dict[str, Any]`): its arguments.
        weights (`dict[str, torch.Tensor]`): weights by official name.
        official_name (`Callable[[str], str]`): maps the name of a weight of the model to the official one.
        dropped (`list[str]`): patterns of official names that the model has no use for.

    Returns:
        An instance of `model_class`.

    Raises:
        ValueError: if the weights do not fit.
    """
    first_width = config["block_out_channels"][0]
    stem = weights.get("encoder.conv_in.weight", torch.empty(first_width))
    narrow = stem.shape[0] != first_width and first_width % stem.shape[0] == 0
    with init_empty_weights():
        model = model_class(**config)
        if narrow:
            groups = model.config.norm_num_groups
            model.encoder.conv_in = nn.Conv2d(model.config.in_channels, stem.shape[0], 3, padding=1)
            model.encoder.down_blocks[0].resnets[0] = ResnetBlock2D(
                in_channels=stem.shape[0], out_channels=first_width, temb_channels=None, groups=groups, eps=1e-6
            )
    load_exactly(model, weights, lambda name: [official_name(name)], dropped)
    return _widen(model, config) if narrow else model


def _widen(model: Autoencoder, config: dict[str, Any]) -> Autoencoder:
    """
    The same function by a model whose first convolution is as wide as its first resolution.

    The first residual block maps the stem, which is a convolution of the image, to `shortcut(stem) + residual(stem)`.
    Here there are twice as many channels in twice as many groups. The first half starts as `shortcut(stem)`, which is
    one convolution of the image too, and the second half holds the stem for `residual` to read; later blocks read the
    first half alone. Each channel of the stem is repeated so that a group keeps its statistics.
    """
    width, groups = config["block_out_channels"][0], model.config.norm_num_groups
    wide_config = {
        **config,
        "block_out_channels": [2 * channels for channels in config["block_out_channels"]],
        "norm_num_groups": 2 * groups,
    }
    with init_empty_weights():
        wide = type(model)(**wide_config)
    first = "encoder.down_blocks.0.resnets.0"
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
    for name in (f"{first}.norm1.weight", f"{first}.norm1.bias", f"{first}.conv1.weight"):
        state[name].zero_()
    state[f"{first}.norm1.weight"][read] = old[f"{first}.norm1.weight"]
    state[f"{first}.norm1.bias"][read] = old[f"{first}.norm1.bias"]
    state[f"{first}.conv1.weight"][:width, read] = old[f"{first}.conv1.weight"]
    wide.load_state_dict(state, assign=True)
    return wide
