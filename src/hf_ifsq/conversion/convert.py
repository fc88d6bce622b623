"""The conversion of a file of any known format, and of its model with a tokenizer into a pipeline."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedModel

from ..models.grid import as_grid
from ..models.image_tokenizer import load_image_tokenizer
from ..models.modeling_ifsq_ar import IFSQARForImageGeneration
from ..models.transformer_ifsq_dit import IFSQDiTTransformer2DModel
from ..pipelines.pipeline_ifsq_ar import IFSQARPipeline
from ..pipelines.pipeline_ifsq_dit import IFSQDiTPipeline
from ..training.repa import RepresentationAlignment
from .checkpoint import CheckpointFormat, recognize_format, select_weights
from .generators import IFSQ_DIT, LLAMAGEN_AR, convert_projectors
from .reading import read_checkpoint
from .tokenizers import IFSQ_TOKENIZER, LLAMAGEN_VQ


FORMATS = (IFSQ_TOKENIZER, LLAMAGEN_VQ, LLAMAGEN_AR, IFSQ_DIT)

logger = logging.getLogger(__name__)


@dataclass
class Conversion:
    """A converted checkpoint, see [`convert_checkpoint`]."""

    model: ModelMixin | PreTrainedModel
    format_name: str
    entry: str | None
    alignments: list[RepresentationAlignment]


def convert_checkpoint(
    checkpoint: str | Path,
    config: str | Path | None = None,
    weights: Literal["ema", "raw"] | None = None,
    num_attention_heads: int | None = None,
    grid_size: int | Sequence[int] | None = None,
) -> Conversion:
    """
    Convert an official checkpoint. Its format is told by the names of its weights, which must fit one to one.

    Args:
        checkpoint (`str` or `pathlib.Path`): a file of `torch.save` or of safetensors. No code in it is run.
        config (`str` or `pathlib.Path`, *optional*):
            the JSON file that a tokenizer of iFSQ was trained with; by default the one beside `checkpoint`.
        weights (`str`, *optional*):
            `ema` for the moving average of the weights, `raw` for the weights as trained. By default the moving
            average, or the only weights of a format that may come without one.
        num_attention_heads (`int`, *optional*): heads of an AR model; needed if its sizes are none of LlamaGen's.
        grid_size (`int` or `tuple[int, int]`, *optional*):
            rows and columns of the tokens of an AR model; needed if the file does not tell them, as the published ones
            of LlamaGen do not.

    Returns:
        [`Conversion`]: the `model`, float32 and in evaluation mode; what the file holds (`format_name`); its `entry`
        with the weights, `None` if it is a bare set of weights; and the projectors of a generator model that was
        trained with REPA, one per teacher (`alignments`).

    Example:

    ```python
    from hf_ifsq.conversion import assemble_pipeline, convert_checkpoint

    tokenizer = convert_checkpoint("vq_ds16_c2i.pt").model  # a diffusers.VQModel
    tokenizer.save_pretrained("llamagen-vq-16")
    model = convert_checkpoint("c2i_B_256.pt", grid_size=16).model
    assemble_pipeline(model, "llamagen-vq-16").save_pretrained("llamagen-b")
    ```
    """
    path = Path(os.path.expanduser(checkpoint))
    entries = read_checkpoint(path)
    source = recognize_format(path, entries, FORMATS)
    selected, entry = select_weights(path, entries, source, weights)
    options = {"num_attention_heads": num_attention_heads, "grid_size": grid_size}
    for name, value in options.items():
        if value is not None and name not in source.options:
            raise ValueError(f"`{name}` must be left out for {source.name}, which needs none, got {value}.")
    if source.config_files:
        values = _read_config(path, config, source)
    elif config is not None:
        raise ValueError(f"`config` must be left out for {source.name}, which has no such file, got {config}.")
    else:
        values = entries.get("config") or {}
        if not isinstance(values, dict):
            raise ValueError(
                f"`checkpoint` {path} must have a dictionary under `config`, got {type(values).__name__}."
            )
        # iFSQ's trainers write a config, LlamaGen's their arguments.
        values = {**values, "args": entries.get("args")}
    logger.info(f"Converting {path}, {source.name}, weights {'alone' if entry is None else f'under `{entry}`'}.")
    model = source.convert(selected, values, **{name: options[name] for name in source.options})
    return Conversion(model.eval(), source.name, entry, convert_projectors(selected))


def _read_config(checkpoint: Path, config: str | Path | None, source: CheckpointFormat) -> dict[str, Any]:
    """The config of a format that has it in a file: the given one or, under its usual names, beside the checkpoint."""
    beside = [checkpoint.with_name(name) for name in source.config_files]
    paths = [path for path in beside if path.is_file()] if config is None else [Path(os.path.expanduser(config))]
    if not paths:
        raise ValueError(
            f"`config` must be the JSON file that {source.name} was trained with: neither "
            f"{' nor '.join(map(str, beside))} is there."
        )
    values = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"`config` must be a JSON file, but there is none at {path}.")
        try:
            values.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"`config` {path} is not a JSON file.") from error
        if not isinstance(values[-1], dict):
            raise ValueError(f"`config` {path} must be a JSON object, got {type(values[-1]).__name__}.")
    if any(value != values[0] for value in values):
        raise ValueError(f"`config` must be given, since {' and '.join(map(str, paths))} differ.")
    return values[0]


def assemble_pipeline(
    model: IFSQARForImageGeneration | IFSQDiTTransformer2DModel, tokenizer: str
) -> IFSQARPipeline | IFSQDiTPipeline:
    """
    Put a converted generator model and its tokenizer into a pipeline, one of diffusion with Euler's method.

    The tokenizer is loaded for images of the model's grid. For diffusion the two must agree on `scaling_factor`, which
    the official code keeps beside the model: the one in the model's config wins, or where it has none the tokenizer's.

    Args:
        model ([`IFSQARForImageGeneration`] or [`IFSQDiTTransformer2DModel`]):
            the generator model; that of diffusion takes over `scaling_factor` and `levels` in place.
        tokenizer (`str`): a folder or a name on the Hub, of a converted or a trained tokenizer.
    """
    changes: dict[str, Any] = {}
    if isinstance(model, IFSQARForImageGeneration):
        grid_size = as_grid(model.config.grid_size)
    elif isinstance(model, IFSQDiTTransformer2DModel):
        grid_size = as_grid(model.config["sample_size"])
        if model.config["scaling_factor"] is not None:
            changes["scaling_factor"] = model.config["scaling_factor"]
    else:
        raise ValueError(f"`tokenizer` must be left out for {type(model).__name__}, which is not a generator model.")
    tokenizer = os.path.expanduser(tokenizer)
    # Twice: how many pixels a cell has is known of a loaded tokenizer, and what is made of its config when it loads.
    try:
        loaded = load_image_tokenizer(tokenizer)
    except OSError as error:
        raise ValueError(
            f"`tokenizer` must be the folder or the name on the Hub of a tokenizer, but {tokenizer!r} does not load."
        ) from error
    rows, columns = (cells * loaded.downsampling_factor for cells in grid_size)
    changes["sample_size"] = rows if rows == columns else (rows, columns)
    for name, value in changes.items():
        if loaded.model.config[name] != value:
            logger.info(f"Changing `{name}` of the tokenizer from {loaded.model.config[name]} to {value}.")
    loaded = load_image_tokenizer(tokenizer, **changes)
    components: dict[str, Any] = {"transformer": model, "tokenizer": loaded.model}
    if isinstance(model, IFSQARForImageGeneration):
        return IFSQARPipeline(**components)
    model.register_to_config(**{name: getattr(loaded, name) for name in ("levels", "equal_bins", "scaling_factor")})
    return IFSQDiTPipeline(**components, scheduler=FlowMatchEulerDiscreteScheduler())
