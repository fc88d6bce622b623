"""The tokenizers of iFSQ and LlamaGen into [`AutoencoderIFSQ`] and diffusers' [`~diffusers.VQModel`]."""

import re
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from ..models.autoencoder_ifsq import AutoencoderIFSQ
from .checkpoint import CheckpointFormat, Rules, Weights, load_exactly


BLOCK_RULES: Rules = (
    (r"(down|up)samplers\.0", r"\1sample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)

Autoencoder = TypeVar("Autoencoder", AutoencoderIFSQ, VQModel)


def convert_autoencoder(
    model_class: type[Autoencoder], config: dict[str, Any], weights: Weights, rules: Rules, dropped: str
) -> Autoencoder:
    """
    Build an autoencoder of diffusers' `Encoder` and `Decoder` and fill it with official weights. The official encoder
    may start narrower than at its first resolution, as in no published tokenizer: see `_widen`.
    """
    width = config["block_out_channels"][0]
    stem = weights.size("encoder.conv_in.weight", 0)
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
    The same function by a model whose first convolution is as wide as its first resolution, as diffusers' are.

    The first residual block maps the stem, which is a convolution of the image, to `shortcut(stem) + residual(stem)`.
    Here there are twice as many channels in twice as many groups. The first half starts as `shortcut(stem)`, which is
    one convolution of the image too, and the second half holds the stem for `residual` to read; later blocks read the
    first half alone. Each channel of the stem is repeated so that a group keeps its statistics.
    """
    widths, groups = config["block_out_channels"], model.config["norm_num_groups"]
    wide_config = {"block_out_channels": [2 * width for width in widths], "norm_num_groups": 2 * groups}
    with init_empty_weights():
        wide = type(model)(**{**config, **wide_config})
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


# The config of an iFSQ tokenizer.
ALPHAS = {"scale_sigmoid_16": 1.6, "scale_sigmoid_20": 2.0}
SIZES = ("hidden_size", "num_res_blocks", "z_channels", "embed_dim")
SIZE_LISTS = ("hidden_size_mult", "levels")
# Without a trace in the weights: a guess could be wrong unnoticed.
FUNCTIONS = ("act_fun", "do_simple_bound", "norm_type")
# They act in training only, or on how indices are grouped.
IGNORED = ("_diffusers_version", "dropout", "factorized_bits")


def convert_ifsq_tokenizer(weights: Weights, config: dict[str, Any]) -> AutoencoderIFSQ:
    """Convert an `ImageFSQVAEModel` of the given arguments for images of 256 x 256 pixels."""
    _check_config(config)
    levels, factors = config["levels"], config["hidden_size_mult"]
    trained = weights["quantize._levels"].round().int().tolist() if "quantize._levels" in weights else levels
    if trained != levels:
        raise ValueError(f"`config` entry `levels` is {levels}, but the checkpoint was trained with {trained}.")
    model_config = {
        "block_out_channels": [config["hidden_size"] * factor for factor in factors],
        "layers_per_block": config["num_res_blocks"],
        "z_channels": config["z_channels"],
        "levels": levels,
        "alpha": ALPHAS[config["act_fun"]],
    }
    rules: Rules = (
        (r"mid_block\.resnets", "mid_block"),
        (r"resnets", "block"),
        (r"down_blocks", "down"),
        # Official upsampling blocks are counted from the highest resolution, those of diffusers from the lowest.
        (r"up_blocks\.(\d+)", lambda match: f"up.{len(factors) - 1 - int(match[1])}"),
    )
    # The official middle has as many residual blocks as a resolution, that of diffusers always two. Where there is
    # one, a second one adds zero to its input, and can still be trained.
    if not any(".mid_block.1." in name for name in weights):
        for name, weight in list(weights.items()):
            if ".mid_block.0." in name:
                weights[name.replace("block.0", "block.1")] = torch.zeros_like(weight) if "conv2" in name else weight
    # Statistics that the training only logs, and integer constants that its moving average made floats of.
    dropped = r"quantize\.(running_mean|running_var|_levels|_basis|_basis_group_\d+)"
    return convert_autoencoder(AutoencoderIFSQ, model_config, weights, rules, dropped)


def _check_config(config: dict[str, Any]) -> None:
    def check(name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"`config` entry `{name}` must be {what}, got {config[name]!r}.")

    def is_size(value: object) -> bool:
        return type(value) is int and value > 0

    needed = [*SIZES, *SIZE_LISTS, *FUNCTIONS]
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"`config` must have the entries {needed}, but lacks {missing}.")
    for name in SIZES:
        check(name, is_size(config[name]), "a positive integer")
    for name in SIZE_LISTS:
        sizes = config[name]
        check(
            name, isinstance(sizes, list) and sizes != [] and all(map(is_size, sizes)), "a list of positive integers"
        )
    levels, resolutions = config["levels"], len(config["hidden_size_mult"])
    check("levels", all(level % 2 for level in levels), "odd, as in the official code")
    check("embed_dim", config["embed_dim"] == len(levels), f"the number of `levels` {levels}")
    check("act_fun", config["act_fun"] in ALPHAS, f"one of {list(ALPHAS)}")
    only = {
        "_class_name": "ImageFSQVAEModel",
        "norm_type": "groupnorm",
        "do_simple_bound": True,
        "double_z": True,
        "use_quant_layer": True,
        "encoder_resnet_blocks": ["ResnetBlock2D"] * resolutions,
        "decoder_resnet_blocks": ["ResnetBlock2D"] * resolutions,
        "encoder_spatial_downsample": ["Downsample"] * (resolutions - 1) + [""],
        "decoder_spatial_upsample": [""] + ["Upsample"] * (resolutions - 1),
    }
    for name, value in config.items():
        if name in only:
            check(name, value == only[name], f"{only[name]!r} for AutoencoderIFSQ")
        elif name not in (*needed, *IGNORED):
            check(name, value in (None, "", [], {}), "empty for AutoencoderIFSQ, which has none")


IFSQ_TOKENIZER = CheckpointFormat(
    name="an iFSQ tokenizer",
    telltales=("encoder.down.0.block.0.conv1.weight", "quantize.running_mean"),
    model_class=AutoencoderIFSQ,
    convert=convert_ifsq_tokenizer,
    raw_entries=("state_dict.gen_model", "state_dict"),
    ema_entry="ema_state_dict",
    # An empty average is an error: raw weights are only taken where asked for.
    default_weights=("ema",),
    other_entries=("state_dict.dics_model", "optimizer_state", "epoch", "current_step"),
    config_files=("config.json", "run.json"),
)


VQ_RULES: Rules = (
    (r"mid_block\.resnets\.0", "mid.0"),
    (r"mid_block\.attentions\.0", "mid.1"),
    (r"mid_block\.resnets\.1", "mid.2"),
    # Both count the decoder's blocks from the lowest resolution.
    (r"(down|up)_blocks", "conv_blocks"),
    (r"resnets", "res"),
    (r"attentions", "attn"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])\.", r"\1."),
)


def convert_llamagen_vq(weights: Weights, _: dict[str, Any]) -> VQModel:
    """Convert LlamaGen's `VQModel`, whose sizes are read from its weights, for images of 256 x 256 pixels."""
    levels = weights.count(r"encoder\.conv_blocks\.(\d+)\.")
    widths = [weights.size(f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0) for level in range(levels)]
    attention = [""] * (levels - 1) + ["Attn"]
    model_config = {
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attention)],
        "block_out_channels": widths,
        "layers_per_block": weights.count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "latent_channels": weights.size("post_quant_conv.weight", 0),
        "num_vq_embeddings": weights.size("quantize.embedding.weight", 0),
        "vq_embed_dim": weights.size("quantize.embedding.weight", 1),
        "sample_size": 256,
        "scaling_factor": 1.0,
    }
    # Attention projects by 1x1 convolutions in LlamaGen and by matrices in diffusers.
    for name, weight in weights.items():
        if re.search(r"\.(q|k|v|proj_out)\.weight$", name):
            weights[name] = weight.flatten(1)
    # The nearest code in Euclidean distance, which diffusers takes, is then that in angle, which LlamaGen takes.
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"].float(), dim=-1)
    # Codes used lately, which the training only logs.
    dropped = r"quantize\.codebook_used"
    return convert_autoencoder(VQModel, model_config, weights, VQ_RULES, dropped)


LLAMAGEN_VQ = CheckpointFormat(
    name="a LlamaGen VQ tokenizer",
    telltales=("encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"),
    model_class=VQModel,
    convert=convert_llamagen_vq,
    other_entries=("optimizer", "discriminator", "optimizer_disc", "steps", "args"),
)
