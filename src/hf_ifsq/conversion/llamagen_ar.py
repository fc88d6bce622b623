"""The AR models of LlamaGen and of iFSQ into [`IFSQARForImageGeneration`]."""

from collections.abc import Sequence
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError

from ..models.configuration_ifsq_ar import SIZES, IFSQARConfig
from ..models.modeling_ifsq_ar import IFSQARForImageGeneration
from .checkpoint import CheckpointFormat, Rules, Weights, load_exactly
from .generators import PROJECTORS, class_names, config_value, count_classes


# From our names to official ones.
RULES: Rules = (
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
    """
    Convert LlamaGen's class-conditional `Transformer`, or iFSQ's, which may predict a token in several factors.

    All sizes but `num_attention_heads` and `grid_size` are read from the weights. Probabilities of dropout are the
    defaults of our config, which are those of LlamaGen.
    """
    table = "cls_embedding.embedding_table.weight"
    hidden_size, num_layers = weights.size(table, 1), weights.count(r"layers\.(\d+)\.")
    num_classes = count_classes(weights, table, config)
    # Heads are numbered only if there are several.
    num_factors = weights.count(r"output\.(\d+)\.")
    embeddings = [f"{factor}_emb.weight" for factor in range(num_factors)] or ["tok_embeddings.weight"]
    try:
        model_config = IFSQARConfig(
            vocab_sizes=[weights.size(name, 0) for name in embeddings],
            num_classes=num_classes,
            grid_size=_grid_size(grid_size, config),
            hidden_size=hidden_size,
            intermediate_size=weights.size("layers.0.feed_forward.w1.weight", 0),
            num_hidden_layers=num_layers,
            num_factor_layers=weights.count(r"factorized_blocks\.(\d+)\."),
            num_attention_heads=_num_attention_heads(num_attention_heads, num_layers, hidden_size),
            class_dropout_prob=0.1 if weights.size(table, 0) > num_classes else 0.0,
            id2label=class_names(num_classes),
        )
    except StrictDataclassError as error:  # It is not a `ValueError`.
        raise ValueError(str(error.__cause__ or error)) from error
    with init_empty_weights():
        model = IFSQARForImageGeneration(model_config)
    load_exactly(model, weights, (*RULES, *(SEVERAL_FACTORS if num_factors else ONE_FACTOR)), [PROJECTORS])
    return model


def _num_attention_heads(given: int | None, num_layers: int, hidden_size: int) -> int:
    """The weights are the same whatever the heads; a named size of LlamaGen tells them."""
    named = {(layers, width): heads for layers, width, heads in SIZES.values()}
    heads = named.get((num_layers, hidden_size)) if given is None else given
    if heads is None:
        raise ValueError(
            f"`num_attention_heads` must be given: the weights do not tell it, and no named size has {num_layers} "
            f"layers of width {hidden_size}. Layers, width and heads of these are {SIZES}."
        )
    if heads < 1:
        raise ValueError(f"`num_attention_heads` must be at least 1, got {heads}.")
    return heads


def _grid_size(given: int | Sequence[int] | None, config: dict[str, Any]) -> list[int]:
    grid_size = [given] * 2 if isinstance(given, int) else list(given or ())
    pixels = config_value(config, "data", "image_size")
    pixels_per_token = config_value(config, "fsq", "downsample_ratio")
    if pixels is None or pixels_per_token is None:
        if given is None:
            raise ValueError(
                "`grid_size` must be given, since the file does not tell it: rows and columns of the tokens, (16, 16) "
                "for images of 256 x 256 pixels and (24, 24) for 384 x 384, where a token is 16 x 16 pixels."
            )
        return grid_size
    told = [pixels // pixels_per_token] * 2
    if given is not None and grid_size != told:
        raise ValueError(
            f"`grid_size` must be {told} or left out, since by its config `checkpoint` was trained on {pixels} x "
            f"{pixels} pixels with {pixels_per_token} x {pixels_per_token} per token, got {grid_size}."
        )
    return told


LLAMAGEN_AR = CheckpointFormat(
    name="an AR model of LlamaGen or iFSQ",
    telltales=("cls_embedding.embedding_table.weight", "layers.0.attention.wqkv.weight"),
    model_class=IFSQARForImageGeneration,
    convert=convert_llamagen_ar,
    options=("num_attention_heads", "grid_size"),
    other_entries=("config", "opt", "optimizer", "steps", "args"),
)
