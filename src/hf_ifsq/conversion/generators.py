"""The AR models of LlamaGen and iFSQ, and iFSQ's diffusion transformer, into the generator models of this package."""

import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError

from ..models.configuration_ifsq_ar import SIZES, IFSQARConfig
from ..models.grid import as_grid
from ..models.modeling_ifsq_ar import IFSQARForImageGeneration
from ..models.rotary import rotary_table_2d
from ..models.transformer_ifsq_dit import IFSQDiTTransformer2DModel
from ..training.repa import RepresentationAlignment
from .checkpoint import CheckpointFormat, Rules, Weights, config_value, load_exactly


logger = logging.getLogger(__name__)

# Names of weights that are not part of a generator model, see `convert_projectors`.
PROJECTORS = r"projectors\.\d+\..*"
# What an AR model has for sampling alone.
CACHES = r"causal_mask|.*\.kv_cache\.[kv]_cache"

# Layers, width and heads of all official models, by their official names less `GPT-` or `LlamaGen-`.
OFFICIAL_SIZES = {**SIZES, "XXXL": (48, 2560, 40), "1B": (22, 2048, 32), "7B": (32, 4096, 32)}


def config_size(config: dict[str, Any], *paths: str) -> int | None:
    """A positive integer that the file tells under the first of some paths that it has; `None` where there is none."""
    told = {path: value for path in paths if (value := config_value(config, path)) is not None}
    for path, value in told.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"`checkpoint` must tell a positive integer as `{path}`, got {value!r}.")
        return value
    return None


def class_names(num_classes: int) -> dict[int, str] | None:
    """
    The `id2label` of an official model: 1000 classes are those of ImageNet-1k, as in all that are published, under the
    names of torchvision 0.29 (`torchvision/models/_meta.py`) by WordNet id. Five that differ in case or meaning alone
    are changed, so that no name is short for two classes: two cranes, two maillots, and the dog called Cardigan.
    """
    if num_classes != 1000:
        return None
    names = json.loads(Path(__file__).with_name("imagenet_classes.json").read_text(encoding="utf-8"))
    return dict(enumerate(names))


def count_classes(weights: Weights, table: str, config: dict[str, Any]) -> int:
    """Number of classes, by the file or else by their table, whose last row is then that of the null class."""
    rows = weights.size(table, 0)
    num_classes = config_size(config, "data.num_classes", "args.num_classes")
    if num_classes is None:
        return rows - 1
    if rows - num_classes not in (0, 1):
        if config_value(config, "data.num_classes") is None:
            logger.warning(f"`args.num_classes` of `checkpoint` is {num_classes}, but `{table}` has {rows} rows.")
            return rows - 1
        raise ValueError(
            f"`checkpoint` was trained with {num_classes} classes by the entry `data.num_classes` of its config, but "
            f"its table `{table}` has {rows} rows."
        )
    return num_classes


def choose_grid(config: dict[str, Any], grid_size: int | Sequence[int] | None) -> list[int]:
    """Rows and columns of the tokens, by what the file tells and by what is asked for."""
    pixels = config_size(config, "data.image_size", "args.image_size")
    ratios = [f"{tokenizer}.downsample_ratio" for tokenizer in ("cusvq", "vqvae", "fsq")]
    pixels_per_token = config_size(config, *ratios, "args.downsample_size")
    told = [pixels // pixels_per_token] * 2 if pixels and pixels_per_token else None
    if grid_size is None:
        if told is None:
            raise ValueError(
                "`grid_size` must be given, since the file does not tell it: rows and columns of the tokens, (16, 16) "
                "for images of 256 x 256 pixels and (24, 24) for 384 x 384, where a token is 16 x 16 pixels."
            )
        return told
    asked = list(as_grid(grid_size, "grid_size"))
    if told in (None, asked):
        return asked
    training = f"on {pixels} x {pixels} pixels with {pixels_per_token} x {pixels_per_token} per token"
    if config_value(config, "data.image_size") is not None:
        raise ValueError(
            f"`grid_size` must be {told} or left out, since by its config `checkpoint` was trained {training}, got "
            f"{asked}."
        )
    # What LlamaGen trains on are tokens in a folder, which its arguments need not fit.
    logger.warning(f"`grid_size` {asked} is taken, though by its `args` `checkpoint` was trained {training}: {told}.")
    return asked


def check_tables(weights: Weights, tables: dict[str, torch.Tensor], grid_size: Sequence[int]) -> None:
    """Raise a `ValueError` if tables of positions are not those that our model computes for a grid."""
    rows, columns = grid_size
    for name, table in tables.items():
        # Wide enough for tables in bfloat16.
        if weights[name].shape != table.shape or not torch.allclose(weights[name].float(), table, atol=1e-2):
            raise ValueError(
                f"`checkpoint` has positions under `{name}` of shape {tuple(weights[name].shape)} that are not those "
                f"of a {'square ' if rows == columns else ''}grid of {rows} x {columns} patches, which "
                f"{weights.model_class.__name__} computes."
            )


AR_RULES: Rules = (
    (r"^model\.", ""),
    (r"embed_classes", "cls_embedding.embedding_table"),
    (r"factor_layers", "factorized_blocks"),
    (r"self_attn\.qkv_proj", "attention.wqkv"),
    (r"self_attn\.o_proj", "attention.wo"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"(.*)mlp\.gate_up_proj(.*)", r"\1feed_forward.w1\2|\1feed_forward.w3\2"),
)
ONE_FACTOR: Rules = ((r"embed_tokens\.0", "tok_embeddings"), (r"lm_heads\.0", "output"))
SEVERAL_FACTORS: Rules = ((r"embed_tokens\.(\d+)", r"\1_emb"), (r"lm_heads", "output"))


def convert_llamagen_ar(
    weights: Weights,
    config: dict[str, Any],
    num_attention_heads: int | None = None,
    grid_size: int | Sequence[int] | None = None,
) -> IFSQARForImageGeneration:
    """Convert LlamaGen's class-conditional `Transformer`, or iFSQ's, which may predict a token in several factors."""
    table = "cls_embedding.embedding_table.weight"
    hidden_size, num_layers = weights.size(table, 1), weights.count(r"layers\.(\d+)\.")
    num_classes = count_classes(weights, table, config)
    # The weights are the same whatever the heads; a named size of LlamaGen tells them.
    if num_attention_heads is None:
        named = {(layers, width): heads for layers, width, heads in OFFICIAL_SIZES.values()}
        if (num_layers, hidden_size) not in named:
            raise ValueError(
                f"`num_attention_heads` must be given: the weights do not tell it, and no named size has {num_layers} "
                f"layers of width {hidden_size}. Layers, width and heads of these are {OFFICIAL_SIZES}."
            )
        num_attention_heads = named[num_layers, hidden_size]
    if num_attention_heads < 1:
        raise ValueError(f"`num_attention_heads` must be at least 1, got {num_attention_heads}.")
    # Positions before the first token, of which more than one would move the grid's.
    if config_size(config, "args.cls_token_num", "model.cls_token_num") not in (None, 1):
        raise ValueError("`checkpoint` must have been trained with `cls_token_num` 1 for IFSQARForImageGeneration.")
    # Heads are numbered only if there are several.
    num_factors = weights.count(r"output\.(\d+)\.")
    embeddings = [f"{factor}_emb.weight" for factor in range(num_factors)] or ["tok_embeddings.weight"]
    try:
        model_config = IFSQARConfig(
            vocab_sizes=[weights.size(name, 0) for name in embeddings],
            num_classes=num_classes,
            grid_size=choose_grid(config, grid_size),
            hidden_size=hidden_size,
            intermediate_size=weights.size("layers.0.feed_forward.w1.weight", 0),
            num_hidden_layers=num_layers,
            num_factor_layers=weights.count(r"factorized_blocks\.(\d+)\."),
            num_attention_heads=num_attention_heads,
            class_dropout_prob=0.1 if weights.size(table, 0) > num_classes else 0.0,
            id2label=class_names(num_classes),
        )
    except StrictDataclassError as error:  # It is not a `ValueError`.
        raise ValueError(str(error.__cause__ or error)) from error
    with init_empty_weights():
        model = IFSQARForImageGeneration(model_config)
    rules = (*AR_RULES, *(SEVERAL_FACTORS if num_factors else ONE_FACTOR))
    load_exactly(model, weights, rules, dropped=f"{PROJECTORS}|{CACHES}|freqs_cis")
    if "freqs_cis" in weights:
        grid = as_grid(model_config.grid_size)
        cos, sin = rotary_table_2d(grid, hidden_size // num_attention_heads)
        cells = torch.stack([cos[:, ::2], sin[:, ::2]], dim=-1)
        # The first position is that of the class.
        check_tables(weights, {"freqs_cis": torch.cat([torch.zeros_like(cells[:1]), cells])}, grid)
    return model


LLAMAGEN_AR = CheckpointFormat(
    name="an AR model of LlamaGen or iFSQ",
    telltales=("cls_embedding.embedding_table.weight", "layers.0.attention.wqkv.weight"),
    model_class=IFSQARForImageGeneration,
    convert=convert_llamagen_ar,
    options=("num_attention_heads", "grid_size"),
    other_entries=("config", "opt", "optimizer", "steps", "args"),
)


DIT_RULES: Rules = (
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

# What the model's output means, or its input, is not to be seen in the weights.
ONLY = {
    "scheduler.diffusion": False,
    "transport.path_type": "Linear",
    "transport.prediction": "velocity",
    # Latents less their mean over their deviation are not codes times a factor.
    "data.latent_norm": False,
}


def convert_ifsq_dit(weights: Weights, config: dict[str, Any]) -> IFSQDiTTransformer2DModel:
    """Convert iFSQ's `DiT`: sizes and options are read from its weights, its `scaling_factor` from the config."""
    for name, value in ONLY.items():
        told = config_value(config, name)
        if told not in (None, value):
            raise ValueError(
                f"`checkpoint` must have been trained with `{name}` {value!r} for "
                f"IFSQDiTTransformer2DModel, but its config has {told!r}."
            )
    scaling_factor = config_value(config, "data.latent_multiplier")
    if type(scaling_factor) not in (type(None), int, float):
        raise ValueError(f"`checkpoint` must tell a number as `data.latent_multiplier`, got {scaling_factor!r}.")
    stem = "x_embedder.proj.weight"
    num_classes = count_classes(weights, "y_embedder.embedding_table.weight", config)
    hidden_size, patch_size = weights.size(stem, 0), weights.size(stem, 3)
    if "feat_rope.freqs_cos" not in weights:
        raise ValueError(
            "`checkpoint` must have rotary positions, which IFSQDiTTransformer2DModel always has, but there is no "
            "`feat_rope.freqs_cos`: it was trained without, or is another diffusion transformer, such as DiT or SiT."
        )
    # Rotary positions are those of one head.
    head_dim = weights.size("feat_rope.freqs_cos", 1)
    patches = math.isqrt(weights.size("pos_embed", 1))
    swiglu = "blocks.0.mlp.w12.weight" in weights
    qk_norm = None
    if "blocks.0.attn.q_norm.weight" in weights:
        qk_norm = "layer_norm" if "blocks.0.attn.q_norm.bias" in weights else "rms_norm"
    with init_empty_weights():
        model = IFSQDiTTransformer2DModel(
            sample_size=patches * patch_size,
            patch_size=patch_size,
            in_channels=weights.size(stem, 1),
            num_layers=weights.count(r"blocks\.(\d+)\."),
            num_attention_heads=hidden_size // head_dim,
            attention_head_dim=head_dim,
            num_classes=num_classes,
            norm_type="rms_norm" if "blocks.0.norm1.weight" in weights else "layer_norm",
            qk_norm=qk_norm,
            activation_fn="swiglu" if swiglu else "gelu-approximate",
            id2label=class_names(num_classes),
            scaling_factor=scaling_factor,
        )
    # Our model computes these tables, but another size or base would show in them.
    cos, sin = rotary_table_2d((patches, patches), head_dim)
    fixed = model._fixed_positions((patches, patches), torch.device("cpu"))
    positions = {"pos_embed": fixed[None], "feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    rules = (*DIT_RULES, *(SWIGLU if swiglu else GELU))
    load_exactly(model, weights, rules, dropped="|".join([PROJECTORS, *map(re.escape, positions)]))
    check_tables(weights, positions, (patches, patches))
    return model


IFSQ_DIT = CheckpointFormat(
    name="a diffusion transformer of iFSQ",
    telltales=("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight"),
    model_class=IFSQDiTTransformer2DModel,
    convert=convert_ifsq_dit,
    other_entries=("config", "opt"),
)


def convert_projectors(weights: Weights) -> list[RepresentationAlignment]:
    """The projectors of a generator model that was trained with representation alignment: one per teacher."""
    alignments = []
    for index in range(weights.count(r"projectors\.(\d+)\.")):
        prefix = f"projectors.{index}."
        own = {name: weight for name, weight in weights.items() if name.startswith(prefix)}
        projector = Weights(own, RepresentationAlignment)
        with init_empty_weights():
            alignment = RepresentationAlignment(
                hidden_size=projector.size(f"{prefix}0.weight", 1),
                teacher_hidden_size=projector.size(f"{prefix}4.weight", 0),
                projector_dim=projector.size(f"{prefix}0.weight", 0),
            )
        load_exactly(alignment, projector, [(r"^projector\.", prefix)])
        alignments.append(alignment)
    return alignments
