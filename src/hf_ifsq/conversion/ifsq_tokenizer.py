"""The tokenizer of the official iFSQ code, `ImageFSQVAEModel`, into [`AutoencoderIFSQ`]."""

from typing import Any

import torch

from ..models.autoencoder_ifsq import AutoencoderIFSQ
from .autoencoder_blocks import BLOCK_RENAMES, convert_autoencoder
from .checkpoint import CheckpointFormat, Weights, rename


ALPHAS = {"scale_sigmoid_16": 1.6, "scale_sigmoid_20": 2.0}

# Statistics that the training only logs, and integer constants that its moving average made floats of.
DROPPED = (r"quantize\.running_(mean|var)", r"quantize\.(_levels|_basis|_basis_group_\d+)")

SIZES = ("hidden_size", "hidden_size_mult", "num_res_blocks", "z_channels", "embed_dim", "levels")
LISTS = ("hidden_size_mult", "levels")
# Without a trace in the weights: a guess could be wrong unnoticed.
FUNCTIONS = ("act_fun", "do_simple_bound", "norm_type")
# They act in training only, or on how indices are grouped.
IGNORED = ("_diffusers_version", "dropout", "factorized_bits")


def convert_ifsq_tokenizer(weights: Weights, config: dict[str, Any] | None) -> AutoencoderIFSQ:
    """
    Convert the weights of an `ImageFSQVAEModel`.

    Args:
        weights (`dict[str, torch.Tensor]`): weights by official name.
        config (`dict[str, Any]`): the arguments of the model.

    Returns:
        [`AutoencoderIFSQ`] for images of 256 x 256 pixels.

    Raises:
        ValueError: if `config` is incomplete or beyond [`AutoencoderIFSQ`], or if the weights do not fit it.
    """
    config = config or {}
    _check_config(config)
    levels = config["levels"]
    if "quantize._levels" in weights and weights["quantize._levels"].round().tolist() != levels:
        raise ValueError(
            f"`config` entry `levels` is {levels}, but the checkpoint was trained with "
            f"{weights['quantize._levels'].round().int().tolist()}."
        )
    widths = [config["hidden_size"] * factor for factor in config["hidden_size_mult"]]
    model_config = {
        "block_out_channels": widths,
        "layers_per_block": config["num_res_blocks"],
        "z_channels": config["z_channels"],
        "levels": levels,
        "alpha": ALPHAS[config["act_fun"]],
    }
    rules = (
        *BLOCK_RENAMES,
        (r"mid_block\.resnets", "mid_block"),
        (r"resnets", "block"),
        (r"down_blocks", "down"),
        # Official upsampling blocks are counted from the highest resolution, those of diffusers from the lowest.
        (r"up_blocks\.(\d+)", lambda match: f"up.{len(widths) - 1 - int(match[1])}"),
    )
    if config["num_res_blocks"] == 1:
        weights = _with_second_mid_block(weights, widths[-1])
    return convert_autoencoder(AutoencoderIFSQ, model_config, weights, lambda name: rename(name, rules), DROPPED)


def _check_config(config: dict[str, Any]) -> None:
    missing = [name for name in (*SIZES, *FUNCTIONS) if name not in config]
    if missing:
        raise ValueError(f"`config` must have the entries {[*SIZES, *FUNCTIONS]}, but lacks {missing}.")
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
        elif name not in (*SIZES, *FUNCTIONS, *IGNORED) and value not in (None, "", [], {}):
            raise ValueError(
                f"`config` entry `{name}` must be empty for AutoencoderIFSQ, which has none, got {value!r}."
            )


def _with_second_mid_block(weights: Weights, width: int) -> Weights:
    """
    The official middle has as many residual blocks as a resolution, that of diffusers always two. Where there is one,
    the second adds zero to its input, and can still be trained.
    """  # noqa: D205
    second = {}
    for half in ("encoder", "decoder"):
        for layer in ("1", "2"):
            name = f"{half}.mid_block.1"
            kernel = torch.zeros(width, width, 3, 3)
            second[f"{name}.norm{layer}.weight"] = torch.ones(width)
            second[f"{name}.norm{layer}.bias"] = torch.zeros(width)
            second[f"{name}.conv{layer}.weight"] = torch.nn.init.dirac_(kernel) if layer == "1" else kernel
            second[f"{name}.conv{layer}.bias"] = torch.zeros(width)
    return weights if second.keys() & weights.keys() else {**second, **weights}


IFSQ_TOKENIZER = CheckpointFormat(
    name="an iFSQ tokenizer",
    telltales=("encoder.down.0.block.0.conv1.weight", "quantize.running_mean"),
    convert=convert_ifsq_tokenizer,
    raw_entry="state_dict.gen_model",
    ema_entry="ema_state_dict",
    # An empty average is an error: raw weights are only taken where asked for.
    default_weights=("ema",),
    dropped_entries=("state_dict.dics_model", "optimizer_state", "epoch", "current_step"),
    config_files=("config.json", "run.json"),
)
