"""The known formats of official checkpoints, and the conversion of a file of any of them."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers import ModelMixin
from transformers import PreTrainedModel

from .checkpoint import CheckpointFormat, read_checkpoint, recognize_format, select_weights
from .ifsq_tokenizer import IFSQ_TOKENIZER
from .llamagen_vq import LLAMAGEN_VQ


FORMATS = (IFSQ_TOKENIZER, LLAMAGEN_VQ)

logger = logging.getLogger(__name__)


@dataclass
class Conversion:
    """
    A converted checkpoint.

    Args:
        model ([`~diffusers.ModelMixin`] or [`~transformers.PreTrainedModel`]): the model, float32, in evaluation mode.
        format_name (`str`): what the official file holds.
        entry (`str`, *optional*): entry of the file that the weights are from; `None` if it is a bare set of weights.
    """

    model: ModelMixin | PreTrainedModel
    format_name: str
    entry: str | None


def convert_checkpoint(
    checkpoint: str | Path, config: str | Path | None = None, weights: Literal["ema", "raw"] | None = None
) -> Conversion:
    """
    Convert an official checkpoint. Its format is told by the names of its weights, which must fit one to one.

    Args:
        checkpoint (`str` or `pathlib.Path`):
            a file of `torch.save`, of which tensors and plain values are read only, or of safetensors.
        config (`str` or `pathlib.Path`, *optional*):
            the JSON file that the model was trained with, for formats that have one; by default the one beside
            `checkpoint`.
        weights (`str`, *optional*):
            `ema` for the moving average of the weights, `raw` for the weights as trained. By default the moving
            average, or the only weights of a format that may come without one.

    Returns:
        [`Conversion`].

    Raises:
        FileNotFoundError: if `checkpoint` or `config` is no file.
        ValueError: if `checkpoint` is of no known format or lacks the asked weights, if a weight is missing,
            unexpected, misshapen or not finite, or if `config` is missing or describes another architecture.

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
    values = _read_config(path, None if config is None else Path(config), source)
    logger.info(f"Converting {path}, {source.name}, weights {'alone' if entry is None else f'under `{entry}`'}.")
    return Conversion(model=source.convert(selected, values).eval(), format_name=source.name, entry=entry)


def _read_config(checkpoint: Path, config: Path | None, source: CheckpointFormat) -> dict[str, Any] | None:
    if not source.config_files:
        if config is not None:
            raise ValueError(f"`config` must be left out for {source.name}, whose weights say all, got {config}.")
        return None
    beside = [checkpoint.parent / name for name in source.config_files]
    paths = [path for path in beside if path.is_file()] if config is None else [config]
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
            raise ValueError(f"`config` {path} is no JSON file.") from error
        if not isinstance(values[-1], dict):
            raise ValueError(f"`config` {path} must be a JSON object, got {type(values[-1]).__name__}.")
    if any(value != values[0] for value in values):
        raise ValueError(f"`config` must be given, since {' and '.join(map(str, paths))} differ.")
    return values[0]
