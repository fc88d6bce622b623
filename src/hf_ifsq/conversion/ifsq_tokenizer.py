"""The tokenizer of the official iFSQ code, `ImageFSQVAEModel`, into [`AutoencoderIFSQ`]."""

from typing import Any

import torch

from ..models.autoencoder_ifsq import AutoencoderIFSQ
from .autoencoder_blocks import convert_autoencoder
from .checkpoint import CheckpointFormat, Rules, Weights


ALPHAS = {"scale_sigmoid_16": 1.6, "scale_sigmoid_20": 2.0}

# Statistics that the training only logs, and integer constants that its moving average made floats of.
DROPPED = (r"quantize\.running_(mean|var)", r"quantize\.(_levels|_basis|_basis_group_\d+)")

SIZES = ("hidden_size", "hidden_size_mult", "num_res_blocks", "z_channels", "embed_dim", "levels")
LISTS = ("hidden_size_mult", "levels")
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
    # From our names to official ones.
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
    return convert_autoencoder(AutoencoderIFSQ, model_config, weights, rules, DROPPED)


def _check_config(config: dict[str, Any]) -> None:
    needed = [*SIZES, *FUNCTIONS]
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"`config` must have the entries {needed}, but lacks {missing}.")
    if config["act_fun"] not in ALPHAS:
        raise ValueError(f"`config` entry `act_fun` must be one of {list(ALPHAS)}, got {config['act_fun']!r}.")
    for name in SIZES:
        value = config[name]
        numbers = value if name in LISTS else [value]
        if not isinstance(numbers, list) or not numbers or any(type(n) is not int or n < 1 for n in numbers):
            kind = "a list of positive integers" if name in LISTS else "a positive integer"
            raise ValueError(f"`config` entry `{name}` must be {kind}, got {value!r}.")
    levels = config["levels"]
    if not all(level % 2 for level in levels):
        raise ValueError(f"`config` entry `levels` must be odd, as in the official code, got {levels}.")
    if len(levels) != config["embed_dim"]:
        raise ValueError(
            f"`config` entry `embed_dim` must be the number of `levels` {levels}, got {config['embed_dim']}."
        )
    resolutions = len(config["hidden_size_mult"])
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
            if value != only[name]:
                raise ValueError(f"`config` entry `{name}` must be {only[name]!r} for AutoencoderIFSQ, got {value!r}.")
        elif name not in (*needed, *IGNORED) and value not in (None, "", [], {}):
            raise ValueError(
                f"`config` entry `{name}` must be empty for AutoencoderIFSQ, which has none, got {value!r}."
            )


IFSQ_TOKENIZER = CheckpointFormat(
    name="an iFSQ tokenizer",
    telltales=("encoder.down.0.block.0.conv1.weight", "quantize.running_mean"),
    model_class=AutoencoderIFSQ,
    convert=convert_ifsq_tokenizer,
    raw_entry="state_dict.gen_model",
    ema_entry="ema_state_dict",
    # An empty average is an error: raw weights are only taken where asked for.
    default_weights=("ema",),
    other_entries=("state_dict.dics_model", "optimizer_state", "epoch", "current_step"),
    config_files=("config.json", "run.json"),
)
