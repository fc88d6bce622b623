"""
Command-line arguments that several scripts share, and their parser. Only scripts know these classes: functions of the
library take values by name, which [`values_for`] picks.
"""

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import yaml
from transformers import HfArgumentParser

from ..models.image_tokenizer import load_image_tokenizer
from ..vision.vision_model import Teacher
from .data import load_image_dataset
from .image_transform import ImageTransform
from .model_card import without_local_paths
from .pretrained import Pretrained
from .tokens import TokenSource


# What a token dataset has settled already.
ABOUT_IMAGES = (
    "dataset_config_name",
    "train_split",
    "validation_split",
    "image_column",
    "label_column",
    "center_crop",
    "min_crop_scale",
    "random_flip",
)


# Those of `diffusers.optimization` that need no further arguments.
LR_SCHEDULERS = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


def argument(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass of arguments: default, text of `--help`, and options of `argparse` such as `choices`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def values_for(function: Callable, arguments: Any) -> dict[str, Any]:
    """The arguments in a dataclass that a function or class takes, under the same names."""
    names = inspect.signature(function).parameters
    return {entry.name: getattr(arguments, entry.name) for entry in fields(arguments) if entry.name in names}


def expand_home(arguments: Any) -> None:
    """Put the home folder for the `~` at the start of texts in a dataclass, as a shell does; recipes see no shell."""
    for entry in fields(arguments):
        value = getattr(arguments, entry.name)
        if isinstance(value, str):
            setattr(arguments, entry.name, os.path.expanduser(value))


@dataclass
class DataArguments:
    """
    The images that a script reads, how it cuts them, and where its result goes. A script adds its own arguments in a
    subclass.
    """

    # The arguments of which one names the data, and those that are at least 1, at least 0, or in [0, 1).
    SOURCES: ClassVar[tuple[str, ...]] = ("dataset_name", "train_data_dir")
    POSITIVE: ClassVar[tuple[str, ...]] = ("resolution", "max_train_samples")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("seed", "dataloader_num_workers")
    SHARES: ClassVar[tuple[str, ...]] = ()

    config: str | None = argument(None, "YAML file with arguments; arguments of the command line override it.")
    output_dir: str = argument("outputs/result", "Folder of the result.")
    seed: int = argument(0, "Seed of everything random.")

    dataset_name: str | None = argument(None, "Images: a dataset of the Hub, or a local folder or parquet file.")
    dataset_config_name: str | None = argument(None, "Configuration of the dataset, if it has several.")
    train_data_dir: str | None = argument(None, "Images: a folder of pictures, with one subfolder a class.")
    train_split: str | None = argument(None, "Split to train on; by default `train`, or the only one there is.")
    validation_split: str | None = argument(
        None, "Split to validate on, or `none`; by default `validation` or `test`, if any."
    )
    image_column: str = argument("image", "Column of the dataset with the images.")
    label_column: str = argument("label", "Column of the dataset with the class labels, or `none`.")
    max_train_samples: int | None = argument(None, "Train on only this many images, drawn by the seed.")
    resolution: int | None = argument(None, "Side in pixels; by default 256, or that of the token dataset.")
    center_crop: bool = argument(False, "Crop squares from the middle of the training images, not at random.")
    min_crop_scale: float = argument(1.0, "Side of the smallest random crop over the short side of the image.")
    random_flip: bool = argument(False, "Flip half of the training images from left to right.")
    dataloader_num_workers: int = argument(0, "Processes that load images, for each process of the script.")

    push_to_hub: bool = argument(False, "Push the result to the Hub.")
    hub_private_repo: bool = argument(False, "Make the repository private if it is new.")

    def __post_init__(self) -> None:
        expand_home(self)
        sources = [getattr(self, name) for name in self.SOURCES]
        if sum(source is not None for source in sources) != 1:
            *names, last_name = (f"`{name}`" for name in self.SOURCES)
            raise ValueError(f"Give exactly one of {', '.join(names)} or {last_name}, got {sources}.")
        if Path(self.data_name).resolve() == Path(self.output_dir).resolve():
            raise ValueError(f"`output_dir` must be another folder than that of the images, got {self.output_dir}.")
        if self.resolution is None and (self.dataset_name or self.train_data_dir):
            self.resolution = 256
        for least, checked in ((1, self.POSITIVE), (0, self.NOT_NEGATIVE)):
            for name in checked:
                value = getattr(self, name)
                # A comparison with NaN is false.
                if value is not None and not least <= value < math.inf:
                    raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        for name in self.SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
        if self.resolution is not None:
            # It checks its options.
            ImageTransform(
                **{name: value for name, value in values_for(ImageTransform, self).items() if value is not None}
            )

    @property
    def data_name(self) -> str:
        """The one source of data that is named."""
        return next(getattr(self, name) for name in self.SOURCES if getattr(self, name) is not None)


@dataclass
class TrainingArguments(DataArguments):
    """Arguments under the names of diffusers' training examples."""

    # What makes the model, unless it begins with weights.
    ARCHITECTURE: ClassVar[tuple[str, ...]] = ()
    POSITIVE = (
        *DataArguments.POSITIVE,
        *("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "max_validation_samples"),
        *("logging_steps", "validation_steps", "checkpointing_steps", "checkpoints_total_limit"),
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        *DataArguments.NOT_NEGATIVE,
        "lr_warmup_steps",
        "adam_weight_decay",
        "adam_epsilon",
    )
    SHARES: ClassVar[tuple[str, ...]] = ("adam_beta1", "adam_beta2", "ema_decay")

    output_dir: str = argument("outputs/model", "Folder of the trained model, its model card and its checkpoints.")
    max_validation_samples: int = argument(1000, "Validate on at most this many images, drawn by the seed.")

    pretrained_model_name_or_path: str | None = argument(
        None, "Weights to begin with: a folder or Hub name of a model, or of a pipeline that has one."
    )
    subfolder: str | None = argument(None, "Folder of the model in it; by default that of a pipeline, or the root.")

    train_batch_size: int = argument(16, "Images per device and forward pass.")
    num_train_epochs: float = argument(100, "Times that the dataset is gone through, without `max_train_steps`.")
    max_train_steps: int | None = argument(None, "Number of optimizer steps.")
    gradient_accumulation_steps: int = argument(1, "Forward passes per optimizer step.")
    gradient_checkpointing: bool = argument(False, "Recompute activations in the backward pass to save memory.")
    mixed_precision: str | None = argument(None, "By default as configured.", choices=["no", "fp16", "bf16"])

    learning_rate: float = argument(1e-4, "Learning rate after the warmup.")
    lr_scheduler: str = argument("constant", "Schedule of the learning rate.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = argument(0, "Steps over which the learning rate rises from zero.")
    adam_beta1: float = argument(0.9, "Decay of AdamW's mean of gradients.")
    adam_beta2: float = argument(0.95, "Decay of AdamW's mean of squared gradients.")
    adam_weight_decay: float = argument(0.0, "AdamW's weight decay.")
    adam_epsilon: float = argument(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = argument(1.0, "Norm to which gradients are clipped.")
    use_ema: bool = argument(False, "Keep an exponential moving average of the weights, and validate and save it.")
    ema_decay: float = argument(0.9999, "Decay of the moving average; it is lower in the first steps.")

    logging_steps: int = argument(10, "Steps between two entries of the log.")
    validation_steps: int = argument(1000, "Steps between two validations; there is one at the end in any case.")
    report_to: str = argument("none", "Tracker of the log.", choices=["none", "tensorboard", "wandb", "trackio"])
    tracker_project_name: str = argument("hf-ifsq", "Project name in the tracker.")
    checkpointing_steps: int = argument(500, "Steps between two checkpoints to resume from.")
    checkpoints_total_limit: int | None = argument(None, "Checkpoints to keep; the oldest are removed.")
    resume_from_checkpoint: str | None = argument(None, "Checkpoint to resume from, or `latest` of `output_dir`.")

    hub_model_id: str | None = argument(None, "Repository on the Hub; by default the name of `output_dir`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rate", "max_grad_norm", "num_train_epochs"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        if self.pretrained_model_name_or_path is not None:
            for name, value in self.given(self.ARCHITECTURE).items():
                raise ValueError(
                    f"`{name}` must be left out with `pretrained_model_name_or_path`, whose model has its own, got "
                    f"{value}."
                )
        elif self.subfolder is not None:
            raise ValueError(f"`subfolder` is for a `pretrained_model_name_or_path`, got {self.subfolder!r} alone.")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps > 0:
            raise ValueError(
                f"`lr_warmup_steps` must be 0 with the `lr_scheduler` 'constant', which has none, got "
                f"{self.lr_warmup_steps}: give 'constant_with_warmup'."
            )

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the arguments that were given: neither `None` nor a flag that was left out."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def pretrained(self, component: str, *model_classes: type) -> Pretrained | None:
        """The model to begin with, if one is named; `component` is what it is called in a pipeline."""
        if self.pretrained_model_name_or_path is None:
            return None
        return Pretrained(self.pretrained_model_name_or_path, component, model_classes, self.subfolder)

    def facts(self, resolution: int, num_parameters: int) -> dict[str, str]:
        """Data, size and learning rate, for the model card."""
        return {
            "data": f"`{without_local_paths(self.data_name)}`, {resolution} x {resolution} pixels",
            "parameters": f"{num_parameters:,}",
            "learning rate": f"{self.learning_rate:g}, {self.lr_scheduler}",
        }


@dataclass
class GeneratorArguments(TrainingArguments):
    """What both generators take: tokens instead of images, the tokenizer, alignment, validation pictures."""

    SOURCES = ("token_dataset", "dataset_name", "train_data_dir")
    POSITIVE = (*TrainingArguments.POSITIVE, "num_images_per_label", "guidance_scale", "projector_dim")
    SHARES = (*TrainingArguments.SHARES, "class_dropout_prob")

    token_dataset: str | None = argument(
        None, "Tokens in place of images, of `tokenize_dataset.py`: a folder or Hub name."
    )
    tokenizer: str | None = argument(None, "Folder or Hub name; by default the one that made the token dataset.")
    class_dropout_prob: float | None = argument(
        None, "Share of labels dropped, for guidance; by default 0.1, or as of the weights begun with."
    )
    teacher: str | None = argument(None, "Vision model to align with: a folder or Hub name.")
    repa_depth: int | None = argument(None, "Layer whose output is aligned; by default at a third of the depth.")
    projector_dim: int = argument(2048, "Width of the alignment's projector.")
    cknna_depth: int | None = argument(
        None, "Layer that validations compare with the teacher; by default the aligned."
    )
    num_images_per_label: int = argument(4, "Images of each class in a validation picture.")
    guidance_scale: float = argument(1.0, "Guidance of the validation pictures.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_scale > 1 and self.class_dropout_prob == 0:
            raise ValueError(
                f"`guidance_scale` of the validation pictures must be 1.0 without `class_dropout_prob`, which trains "
                f"the null class, got {self.guidance_scale}."
            )
        if self.token_dataset is None:
            if self.tokenizer is None:
                raise ValueError("Give `tokenizer`, or a `token_dataset`, which names its tokenizer; got neither.")
            return
        for entry in fields(DataArguments):
            if entry.name in ABOUT_IMAGES and getattr(self, entry.name) != entry.default:
                raise ValueError(
                    f"`{entry.name}` is about images, but `token_dataset` has tokens of images cut already: leave it "
                    f"out, or give it to `tokenize_dataset.py`; got {getattr(self, entry.name)!r}."
                )

    def load_source(self, device: torch.device, patch_size: int = 1) -> TokenSource:
        """The data, tokenizer and teacher that are named, on a device; `patch_size` codes are the side of a token."""
        if self.token_dataset is not None:
            from_tokens = TokenSource.from_token_dataset
            return from_tokens(**values_for(from_tokens, self) | {"patch_size": patch_size})
        tokenizer = load_image_tokenizer(str(self.tokenizer), sample_size=self.resolution).to(device)
        train, validation = load_image_dataset(**values_for(load_image_dataset, self))
        transform = ImageTransform(channels=tokenizer.in_channels, **values_for(ImageTransform, self))
        teacher = None
        if self.teacher is not None:
            teacher = Teacher(self.teacher, [side // patch_size for side in tokenizer.grid_size]).to(device)
        columns = (self.image_column, self.label_column)
        return TokenSource.from_images(train, validation, tokenizer, transform, *columns, teacher)

    def alignment_depths(self, num_layers: int) -> tuple[int, int]:
        """
        The layer that is aligned with the teacher, `repa_depth` or about a third of the depth, and the layer that
        validations compare with it, `cknna_depth` or the same.
        """
        repa_depth = max(1, round(num_layers / 3)) if self.repa_depth is None else self.repa_depth
        cknna_depth = repa_depth if self.cknna_depth is None else self.cknna_depth
        for name, depth in (("repa_depth", repa_depth), ("cknna_depth", cknna_depth)):
            if not 1 <= depth <= num_layers:
                raise ValueError(f"`{name}` must be in [1, {num_layers}], got {depth}.")
        return repa_depth, cknna_depth


Arguments = TypeVar("Arguments", bound=DataArguments)


def parse_args(arguments_class: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """
    Read the command line, and the YAML recipe that it names by `--config`, whose values it overrides.

    Args:
        arguments_class (`type`): [`DataArguments`] or a subclass.
        argv (`list[str]`, *optional*): arguments, by default those of the process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser([arguments_class], allow_abbrev=False)  # type: ignore[list-item]  # dataclasses are types
    config_parser = HfArgumentParser((), allow_abbrev=False, add_help=False)
    config_parser.add_argument("--config")
    recipe_file = config_parser.parse_known_args(argv)[0].config
    # The recipe goes before the command line, through the same types and choices: the last value of a name counts.
    recipe = [] if recipe_file is None else _recipe_to_argv(recipe_file, arguments_class)
    (arguments,) = parser.parse_args_into_dataclasses([*recipe, *argv])
    return arguments


def _recipe_to_argv(file: str, arguments_class: type[DataArguments]) -> list[str]:
    recipe = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
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
