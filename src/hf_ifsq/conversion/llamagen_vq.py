"""LlamaGen's image tokenizers VQ-8 and VQ-16 into diffusers' [`~diffusers.VQModel`]."""

import re
from typing import Any

from diffusers.models.autoencoders.vq_model import VQModel
from torch.nn import functional as F

from .autoencoder_blocks import convert_autoencoder
from .checkpoint import CheckpointFormat, Rules, Weights


# Codes used lately, which the training only logs.
DROPPED = (r"quantize\.codebook_used",)

# From our names to official ones.
RULES: Rules = (
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
    """
    Convert LlamaGen's `VQModel`, whose sizes are read from its weights, for images of 256 x 256 pixels.

    The codebook is normalized: then the nearest code in Euclidean distance, which diffusers takes, is the nearest in
    angle, which LlamaGen takes.
    """
    levels = weights.count(r"encoder\.conv_blocks\.(\d+)\.")
    attention = [""] * (levels - 1) + ["Attn"]
    model_config = {
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attention)],
        "block_out_channels": [
            weights.size(f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0) for level in range(levels)
        ],
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
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"].float(), dim=-1)
    return convert_autoencoder(VQModel, model_config, weights, RULES, DROPPED)


LLAMAGEN_VQ = CheckpointFormat(
    name="a LlamaGen VQ tokenizer",
    telltales=("encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"),
    model_class=VQModel,
    convert=convert_llamagen_vq,
    other_entries=("optimizer", "discriminator", "optimizer_disc", "steps"),
)
