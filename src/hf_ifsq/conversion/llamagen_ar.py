"""The generators of LlamaGen and the autoregressive ones of iFSQ into [`IFSQARForImageGeneration`]."""

from collections.abc import Sequence
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError

from ..models.configuration_ifsq_ar import SIZES, IFSQARConfig
from ..models.modeling_ifsq_ar import IFSQARForImageGeneration
from .checkpoint import CheckpointFormat, Weights, count_indices, load_exactly, rename, size_of
from .generators import PROJECTORS, class_names, config_value, count_classes


# From our names to official ones.
RENAMES = (
    (r"^model\.", ""),
    (r"embed_classes", "cls_embedding.embedding_table"),
    (r"factor_layers", "factorized_blocks"),
    (r"self_attn\.qkv_proj", "attention.wqkv"),
    (r"self_attn\.o_proj", "attention.wo"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"mlp\.down_proj", "feed_forward.w2"),
)
ONE_FACTOR = ((r"embed_tokens\.0", "tok_embeddings"), (r"lm_heads\.0", "output"))
SEVERAL_FACTORS = ((r"embed_tokens\.(\d+)", r"\1_emb"), (r"lm_heads", "output"))


def convert_llamagen_ar(
    weights: Weights,
    config: dict[str, Any] | None = None,
    num_attention_heads: int | None = None,
    grid_size: Sequence[int] | None = None,
) -> IFSQARForImageGeneration:
    """
    Convert the weights of LlamaGen's class-conditional `Transformer`, or of iFSQ's, which may predict a token in
    several factors. All sizes but `num_attention_heads` and `grid_size` are read from the weights.

    Args:
        weights (`dict[str, torch.Tensor]`): weights by official name; those of REPA projectors are left out.
        config (`dict[str, Any]`, *optional*): the config in the file.
        num_attention_heads (`int`, *optional*):
            by default that of the named size of LlamaGen with as many layers of the same width.
        grid_size (`tuple[int, int]`, *optional*): rows and columns of the tokens, by default as `config` says.

    Returns:
        [`IFSQARForImageGeneration`]. With 1000 classes they are named as those of ImageNet. Its probabilities of
        dropout are the defaults of its config, which are those of LlamaGen.

    Raises:
        ValueError: if the weights do not fit, or if an argument is missing or contradicts `config`.
    """  # noqa: D205
    table = "cls_embedding.embedding_table.weight"
    hidden_size = size_of(weights, table, 1, IFSQARForImageGeneration)
    num_layers = count_indices(weights, r"layers\.(\d+)\.")
    num_classes, has_null_class = count_classes(weights, table, config, IFSQARForImageGeneration)
    # Heads are numbered only if there are several.
    num_factors = count_indices(weights, r"output\.(\d+)\.")
    embeddings = [f"{factor}_emb.weight" for factor in range(num_factors)] or ["tok_embeddings.weight"]
    model_config = _make_config(
        vocab_sizes=[size_of(weights, name, 0, IFSQARForImageGeneration) for name in embeddings],
        num_classes=num_classes,
        grid_size=_grid_size(grid_size, config),
        hidden_size=hidden_size,
        intermediate_size=size_of(weights, "layers.0.feed_forward.w1.weight", 0, IFSQARForImageGeneration),
        num_hidden_layers=num_layers,
        num_factor_layers=count_indices(weights, r"factorized_blocks\.(\d+)\."),
        num_attention_heads=_num_attention_heads(num_attention_heads, num_layers, hidden_size),
        class_dropout_prob=0.1 if has_null_class else 0.0,
        id2label=class_names(num_classes),
    )
    with init_empty_weights():
        model = IFSQARForImageGeneration(model_config)
    rules = (*RENAMES, *(SEVERAL_FACTORS if num_factors else ONE_FACTOR))

    def official_names(name: str) -> list[str]:
        name = rename(name, rules)
        parts = ("feed_forward.w1", "feed_forward.w3") if "mlp.gate_up_proj" in name else ("",)
        return [name.replace("mlp.gate_up_proj", part) for part in parts]

    load_exactly(model, weights, official_names, [PROJECTORS])
    return model


def _make_config(**sizes: Any) -> IFSQARConfig:
    try:
        return IFSQARConfig(**sizes)
    except StrictDataclassError as error:  # It is no `ValueError`.
        raise ValueError(str(error.__cause__ or error)) from error


def _num_attention_heads(given: int | None, num_layers: int, hidden_size: int) -> int:
    """The weights are the same whatever the heads."""
    if given is not None:
        if given < 1:
            raise ValueError(f"`num_attention_heads` must be at least 1, got {given}.")
        return given
    named = {(layers, width): heads for layers, width, heads in SIZES.values()}
    if (num_layers, hidden_size) not in named:
        raise ValueError(
            f"`num_attention_heads` must be given: the weights do not tell it, and no named size has {num_layers} "
            f"layers of width {hidden_size}. Layers, width and heads of these are {SIZES}."
        )
    return named[num_layers, hidden_size]


def _grid_size(given: Sequence[int] | None, config: dict[str, Any] | None) -> list[int]:
    pixels = config_value(config, "data", "image_size")
    pixels_per_token = config_value(config, "fsq", "downsample_ratio")
    if pixels is None or pixels_per_token is None:
        if given is None:
            raise ValueError(
                "`grid_size` must be given, since the file does not tell it: rows and columns of the tokens, (16, 16) "
                "for images of 256 x 256 pixels and (24, 24) for 384 x 384, where a token is 16 x 16 pixels."
            )
        return list(given)
    told = [pixels // pixels_per_token] * 2
    if given is not None and list(given) != told:
        raise ValueError(
            f"`grid_size` must be {told} or left out, since by its config `checkpoint` was trained on {pixels} x "
            f"{pixels} pixels with {pixels_per_token} x {pixels_per_token} a token, got {list(given)}."
        )
    return told


LLAMAGEN_AR = CheckpointFormat(
    name="an autoregressive generator of LlamaGen or iFSQ",
    telltales=("cls_embedding.embedding_table.weight", "layers.0.attention.wqkv.weight"),
    convert=convert_llamagen_ar,
    options=("num_attention_heads", "grid_size"),
    dropped_entries=("opt", "optimizer", "steps", "args"),
    config_entry="config",
)
