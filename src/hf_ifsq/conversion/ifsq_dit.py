"""The diffusion transformer of the official iFSQ code into [`IFSQDiTTransformer2DModel`]."""

import math
import re
from typing import Any

import torch
from accelerate import init_empty_weights

from ..models.rotary import rotary_table_2d
from ..models.transformer_ifsq_dit import IFSQDiTTransformer2DModel
from .checkpoint import CheckpointFormat, Rules, Weights, load_exactly
from .generators import PROJECTORS, class_names, config_value, count_classes


# From our names to official ones.
RULES: Rules = (
    (r"patch_embed", "x_embedder.proj"),
    (r"time_embed\.linear_1", "t_embedder.mlp.0"),
    (r"time_embed\.linear_2", "t_embedder.mlp.2"),
    (r"class_embed", "y_embedder.embedding_table"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out", "final_layer.norm_final"),
    (r"^modulation_out", "final_layer.adaLN_modulation.1"),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"to_qkv", "qkv"),
    (r"norm_([qk])\.", r"\1_norm."),
    (r"to_out", "proj"),
)
SWIGLU: Rules = ((r"ff\.proj_in", "mlp.w12"), (r"ff\.proj_out", "mlp.w3"))
GELU: Rules = ((r"ff\.proj_in", "mlp.fc1"), (r"ff\.proj_out", "mlp.fc2"))

# Tables that our model computes.
POSITIONS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")

# What the model's output means, or its input, is not to be seen in the weights.
ONLY = {
    ("transport", "path_type"): "Linear",
    ("transport", "prediction"): "velocity",
    # Latents less their mean over their deviation are not codes times a factor.
    ("data", "latent_norm"): False,
}


def convert_ifsq_dit(weights: Weights, config: dict[str, Any]) -> IFSQDiTTransformer2DModel:
    """Convert iFSQ's `DiT`: sizes and options are read from its weights, its `scaling_factor` from the config."""
    for (section, name), value in ONLY.items():
        told = config_value(config, section, name)
        if told not in (None, value):
            raise ValueError(
                f"`checkpoint` must have been trained with `{section}.{name}` {value!r} for "
                f"IFSQDiTTransformer2DModel, but its config has {told!r}."
            )
    stem = "x_embedder.proj.weight"
    num_classes = count_classes(weights, "y_embedder.embedding_table.weight", config)
    hidden_size, patch_size = weights.size(stem, 0), weights.size(stem, 3)
    if "feat_rope.freqs_cos" not in weights:
        raise ValueError(
            "`checkpoint` must have rotary positions, which IFSQDiTTransformer2DModel always has, but there is no "
            "`feat_rope.freqs_cos`: it was trained without, or is another diffusion transformer."
        )
    # Rotary positions are those of one head.
    head_dim = weights.size("feat_rope.freqs_cos", 1)
    patches = math.isqrt(weights.size("pos_embed", 1))
    swiglu = "blocks.0.mlp.w12.weight" in weights
    qk_norm = None
    if "blocks.0.attn.q_norm.weight" in weights:
        qk_norm = "layer_norm" if "blocks.0.attn.q_norm.bias" in weights else "rms_norm"
    model_config = {
        "sample_size": patches * patch_size,
        "patch_size": patch_size,
        "in_channels": weights.size(stem, 1),
        "num_layers": weights.count(r"blocks\.(\d+)\."),
        "num_attention_heads": hidden_size // head_dim,
        "attention_head_dim": head_dim,
        "num_classes": num_classes,
        "norm_type": "rms_norm" if "blocks.0.norm1.weight" in weights else "layer_norm",
        "qk_norm": qk_norm,
        "activation_fn": "swiglu" if swiglu else "gelu-approximate",
        "id2label": class_names(num_classes),
        "scaling_factor": config_value(config, "data", "latent_multiplier"),
    }
    with init_empty_weights():
        model = IFSQDiTTransformer2DModel(**model_config)
    rules = (*RULES, *(SWIGLU if swiglu else GELU))
    load_exactly(model, weights, rules, [PROJECTORS, *map(re.escape, POSITIONS)])
    # Fixed tables are not trained, but another size or base would show in them.
    cos, sin = rotary_table_2d((patches, patches), head_dim)
    fixed = model._fixed_positions((patches, patches), torch.device("cpu"))
    for name, table in zip(POSITIONS, (fixed[None], cos, sin), strict=True):
        # Wide enough for tables in bfloat16.
        if weights[name].shape != table.shape or not torch.allclose(weights[name].float(), table, atol=1e-2):
            raise ValueError(
                f"`checkpoint` has positions under `{name}` of shape {tuple(weights[name].shape)} that are not those "
                f"of a square grid of {patches} x {patches} patches, which IFSQDiTTransformer2DModel computes."
            )
    return model


IFSQ_DIT = CheckpointFormat(
    name="a diffusion transformer of iFSQ",
    telltales=("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight"),
    model_class=IFSQDiTTransformer2DModel,
    convert=convert_ifsq_dit,
    other_entries=("config", "opt"),
)
