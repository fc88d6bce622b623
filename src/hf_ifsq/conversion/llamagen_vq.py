"""LlamaGen's image tokenizers VQ-8 and VQ-16 into diffusers' [`~diffusers.VQModel`]."""

import re
from typing import Any

from diffusers import VQModel
from torch.nn import functional as F

from .autoencoder_blocks import BLOCK_RENAMES, convert_autoencoder
from .checkpoint import CheckpointFormat, Weights, count_indices, rename, size_of


# Codes used lately, which the training only logs.
DROPPED = (r"quantize\.codebook_used",)

RENAMES = (
    *BLOCK_RENAMES,
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


def convert_llamagen_vq(weights: Weights, config: dict[str, Any] | None = None) -> VQModel:
    """
    Convert the weights of LlamaGen's `VQModel`, whose sizes are read from them.

    Args:
        weights (`dict[str, torch.Tensor]`): weights by official name.
        config (`None`): there is none.

    Returns:
        [`~diffusers.VQModel`] for images of 256 x 256 pixels. Its codebook is normalized: then the nearest code in
        Euclidean distance, which diffusers takes, is the nearest in angle, which LlamaGen takes.

    Raises:
        ValueError: if the weights do not fit.
    """
    levels = count_indices(weights, r"encoder\.conv_blocks\.(\d+)\.")
    attention = ["Attn" if level == levels - 1 else "" for level in range(levels)]
    model_config = {
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attention)],
        "block_out_channels": [
            size_of(weights, f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0, VQModel) for level in range(levels)
        ],
        "layers_per_block": count_indices(weights, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "latent_channels": size_of(weights, "post_quant_conv.weight", 0, VQModel),
        "num_vq_embeddings": size_of(weights, "quantize.embedding.weight", 0, VQModel),
        "vq_embed_dim": size_of(weights, "quantize.embedding.weight", 1, VQModel),
        "sample_size": 256,
        "scaling_factor": 1.0,
    }
    # Attention projects by 1x1 convolutions in LlamaGen and by matrices in diffusers.
    weights = {
        name: weight.flatten(1) if re.search(r"\.(q|k|v|proj_out)\.weight$", name) else weight
        for name, weight in weights.items()
    }
    # Indices are told by angle, so the codebook is normalized at each use in LlamaGen.
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"].float(), dim=-1)
    return convert_autoencoder(VQModel, model_config, weights, lambda name: rename(name, RENAMES), DROPPED)


LLAMAGEN_VQ = CheckpointFormat(
    name="a LlamaGen VQ tokenizer",
    telltales=("encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"),
    convert=convert_llamagen_vq,
    dropped_entries=("optimizer", "discriminator", "optimizer_disc", "steps"),
)
