"""Command-line arguments that all training scripts share, and their parser."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser


def _argument(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainingArguments:
    """
    Arguments under the names of diffusers' training examples. A script adds its own in a subclass.

    Raises:
        ValueError: if an argument is out of its range or if no data is named.
    """

    config: str | None = _argument(None, "YAML file with arguments; arguments of the command line override it.")
    output_dir: str = _argument("outputs/model", "Folder of the trained model, its model card and its checkpoints.")
    seed: int = _argument(0, "Seed of everything random in training.")

    dataset_name: str | None = _argument(
        None, "Images: a dataset of the Hub, or a local folder or parquet file that `datasets` can load."
    )
    dataset_config_name: str | None = _argument(None, "Configuration of the dataset, if it has several.")
    train_data_dir: str | None = _argument(None, "Images: a folder in the layout of `datasets`' imagefolder.")
    train_split: str | None = _argument(None, "Split to train on; by default `train`, or the only one there is.")
    validation_split: str | None = _argument(None, "Split to validate on; by default `validation` or `test`, if any.")
    image_column: str = _argument("image", "Column of the dataset with the images.")
    label_column: str = _argument("label", "Column of the dataset with the class labels.")
    max_train_samples: int | None = _argument(None, "Train on only this many images, drawn by the seed.")
    max_validation_samples: int = _argument(1000, "Validate on at most this many images, drawn by the seed.")
    resolution: int = _argument(256, "Side in pixels of the square images trained on.")
    center_crop: bool = _argument(False, "Crop squares from the middle of the training images, not at random.")
    min_crop_scale: float = _argument(
        1.0, "Side of the smallest random crop over the short side of the image; crops are resized to `resolution`."
    )
    random_flip: bool = _argument(False, "Flip half of the training images from left to right.")
    dataloader_num_workers: int = _argument(0, "Processes that load images, for each training process.")

    train_batch_size: int = _argument(16, "Images a device and forward pass.")
    num_train_epochs: float = _argument(100, "Times that the dataset is gone through, without `max_train_steps`.")
    max_train_steps: int | None = _argument(None, "Number of optimizer steps.")
    gradient_accumulation_steps: int = _argument(1, "Forward passes an optimizer step.")
    gradient_checkpointing: bool = _argument(False, "Recompute activations in the backward pass to save memory.")
    mixed_precision: str | None = _argument(
        None, "`no`, `fp16` or `bf16`; by default as `accelerate` is configured.", choices=["no", "fp16", "bf16"]
    )

    learning_rate: float = _argument(1e-4, "Learning rate after the warmup.")
    lr_scheduler: str = _argument("constant", "Schedule of the learning rate, a name of `diffusers.optimization`.")
    lr_warmup_steps: int = _argument(0, "Steps over which the learning rate rises from zero.")
    adam_beta1: float = _argument(0.9, "Decay of AdamW's mean of gradients.")
    adam_beta2: float = _argument(0.95, "Decay of AdamW's mean of squared gradients.")
    adam_weight_decay: float = _argument(0.0, "AdamW's weight decay.")
    adam_epsilon: float = _argument(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _argument(1.0, "Norm to which gradients are clipped.")
    use_ema: bool = _argument(False, "Keep an exponential moving average of the weights, and validate and save it.")
    ema_decay: float = _argument(0.9999, "Decay of the moving average; it is lower in the first steps.")

    logging_steps: int = _argument(10, "Steps between two entries of the log.")
    validation_steps: int = _argument(1000, "Steps between two validations; there is one at the end in any case.")
    report_to: str = _argument("none", "Tracker of the log.", choices=["none", "tensorboard", "wandb", "trackio"])
    tracker_project_name: str = _argument("hf-ifsq", "Project name in the tracker.")
    checkpointing_steps: int = _argument(500, "Steps between two checkpoints to resume from.")
    checkpoints_total_limit: int | None = _argument(None, "Checkpoints to keep; the oldest are removed.")
    resume_from_checkpoint: str | None = _argument(
        None, "Checkpoint folder to resume from, or `latest` for the last one in `output_dir`."
    )

    push_to_hub: bool = _argument(False, "Push the result to the Hub.")
    hub_model_id: str | None = _argument(None, "Repository on the Hub; by default the name of `output_dir`.")
    hub_private_repo: bool = _argument(False, "Make the repository private if it is new.")

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"Give either `dataset_name` or `train_data_dir`, got {self.dataset_name!r} and "
                f"{self.train_data_dir!r}."
            )
        at_least_one = (
            "resolution",
            "train_batch_size",
            "max_train_steps",
            "max_train_samples",
            "max_validation_samples",
            "gradient_accumulation_steps",
            "logging_steps",
            "validation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
        )
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("learning_rate", "max_grad_norm", "num_train_epochs"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"`min_crop_scale` must be in (0, 1], got {self.min_crop_scale}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}.")

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name."""
        return asdict(self)


Arguments = TypeVar("Arguments", bound=TrainingArguments)


def parse_args(arguments_class: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """
    Read the command line, and the YAML recipe that it names by `--config`, whose values it overrides.

    Args:
        arguments_class (`type`): [`TrainingArguments`] or a subclass.
        argv (`list[str]`, *optional*): arguments, by default those of the process.

    Returns:
        An instance of `arguments_class`.

    Raises:
        ValueError: if the recipe is no mapping or has an unknown name, or if an argument is out of its range.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(arguments_class, allow_abbrev=False)
    config_parser = HfArgumentParser((), allow_abbrev=False, add_help=False)
    config_parser.add_argument("--config")
    recipe_file = config_parser.parse_known_args(argv)[0].config
    # The recipe goes before the command line, through the same types and choices: the last value of a name counts.
    recipe = [] if recipe_file is None else _recipe_to_argv(recipe_file, arguments_class)
    (arguments,) = parser.parse_args_into_dataclasses([*recipe, *argv])
    return arguments


def _recipe_to_argv(file: str, arguments_class: type[TrainingArguments]) -> list[str]:
    recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"`config` {file} must be a YAML mapping of argument names to values.")
    types = {entry.name: entry.type for entry in fields(arguments_class)}
    unknown = sorted(set(recipe) - set(types))
    if unknown:
        raise ValueError(f"`config` {file} has unknown arguments for {arguments_class.__name__}: {unknown}.")
    argv = []
    for name, value in recipe.items():
        if isinstance(value, list) and "list" not in str(types[name]):
            raise ValueError(f"`config` {file}: `{name}` takes one value, got {value}.")
        if isinstance(value, bool) and "bool" not in str(types[name]):
            # YAML reads `no` as a boolean.
            value = "yes" if value else "no"
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv
