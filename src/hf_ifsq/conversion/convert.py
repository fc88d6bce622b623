"""The known formats of official checkpoints, and the conversion of a file of any of them."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers.models.modeling_utils import ModelMixin
from transformers import PreTrainedModel

from ..training.repa import RepresentationAlignment
from .checkpoint import CheckpointFormat, read_checkpoint, recognize_format, select_weights
from .generators import convert_projectors
from .ifsq_dit import IFSQ_DIT
from .ifsq_tokenizer import IFSQ_TOKENIZER
from .llamagen_ar import LLAMAGEN_AR
from .llamagen_vq import LLAMAGEN_VQ


FORMATS = (IFSQ_TOKENIZER, LLAMAGEN_VQ, LLAMAGEN_AR, IFSQ_DIT)

logger = logging.getLogger(__name__)


@dataclass
class Conversion:
    """
    A converted checkpoint.

    Args:
        model ([`~diffusers.ModelMixin`] or [`~transformers.PreTrainedModel`]): the model, float32, in evaluation mode.
        format_name (`str`): what the official file holds.
        entry (`str`, *optional*): entry of the file that the weights are from; `None` if it is a bare set of weights.
        alignments (`list[RepresentationAlignment]`):
            the projectors of a generator model that was trained with representation alignment, one per teacher.
    """

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
        checkpoint (`str` or `pathlib.Path`):
            a file of `torch.save`, of which tensors and plain values are read only, or of safetensors.
        config (`str` or `pathlib.Path`, *optional*):
            the JSON file that a tokenizer of iFSQ was trained with; by default the one beside `checkpoint`.
        weights (`str`, *optional*):
            `ema` for the moving average of the weights, `raw` for the weights as trained. By default the moving
            average, or the only weights of a format that may come without one.
        num_attention_heads (`int`, *optional*):
            heads of an AR model; needed if its sizes are none of LlamaGen's.
        grid_size (`int` or `tuple[int, int]`, *optional*):
            rows and columns of the tokens of an AR model; needed if the file does not tell them, as
            LlamaGen's do not.

    Returns:
        [`Conversion`].

    Example:

    ```python
    from hf_ifsq.conversion import convert_checkpoint

    tokenizer = convert_checkpoint("vq_ds16_c2i.pt").model  # a diffusers.VQModel
    tokenizer.save_pretrained("llamagen-vq-16")
    ```
    """
    path = Path(checkpoint)
    entries = read_checkpoint(path)
    source = recognize_format(path, entries, FORMATS)
    selected, entry = select_weights(path, entries, source, weights)
    options = {"num_attention_heads": num_attention_heads, "grid_size": grid_size}
    for name, value in options.items():
        if value is not None and name not in source.options:
            raise ValueError(f"`{name}` must be left out for {source.name}, which needs none, got {value}.")
    values = _read_config(path, None if config is None else Path(config), entries, source)
    logger.info(f"Converting {path}, {source.name}, weights {'alone' if entry is None else f'under `{entry}`'}.")
    model = source.convert(selected, values, **{name: options[name] for name in source.options})
    return Conversion(model.eval(), source.name, entry, convert_projectors(selected))


def _read_config(
    checkpoint: Path, config: Path | None, entries: dict[str, Any], source: CheckpointFormat
) -> dict[str, Any] | None:
    if not source.config_files:
        if config is not None:
            raise ValueError(f"`config` must be left out for {source.name}, which has no such file, got {config}.")
        entry = None if source.config_entry is None else entries.get(source.config_entry)
        if not isinstance(entry, dict | None):
            raise ValueError(
                f"`checkpoint` {checkpoint} must have a dictionary under `{source.config_entry}`, got "
                f"{type(entry).__name__}."
            )
        return entry
    beside = [checkpoint.with_name(name) for name in source.config_files]
    paths = [path for path in beside if path.is_file()] if config is None else [config]
    if not paths:
        raise ValueError(
            f"`config` must be the JSON file that {source.name} was trained with: neither "
            f"{' nor '.join(map(str, beside))} is there."
        )
    values = [_read_json(path) for path in paths]
    if any(value != values[0] for value in values):
        raise ValueError(f"`config` must be given, since {' and '.join(map(str, paths))} differ.")
    return values[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"`config` must be a JSON file, but there is none at {path}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`config` {path} is not a JSON file.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`config` {path} must be a JSON object, got {type(value).__name__}.")
    return value
