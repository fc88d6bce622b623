"""Token datasets, images tokenized once, and the source that gives generators tokens of either images or these."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from ..metrics.alignment import CKNNA_NEIGHBORS
from ..models.image_tokenizer import ImageTokenizer, load_image_tokenizer
from ..vision.vision_model import Teacher
from .arguments import GeneratorArguments
from .data import ImageDataset, check_labels, draw, load_image_dataset, read_class_names


logger = logging.getLogger(__name__)

INFO_FILE = "token_dataset.json"


@dataclass(frozen=True)
class TokenDatasetInfo:
    """
    What the rows of a token dataset are: the content of its `token_dataset.json`.

    Args:
        tokenizer (`dict`):
            `name_or_path`, `revision` (of the Hub, or `None`), and what [`ImageTokenizer.describe`] says.
        scaling_factor (`float`): of the tokenizer, what codes are multiplied by to make latents.
        resolution (`int`): side in pixels of the images.
        teacher (`dict` or `None`): `name_or_path` and `hidden_size` of the stored features, if any.
        num_rows (`dict[str, int]`): rows of each split.
        images (`dict`): the arguments that chose and cut the images.
        shards (`dict`): the arguments that grouped the images into batches and files.
        hf_ifsq_version (`str`): version of this package that made the rows.
    """

    tokenizer: dict[str, Any]
    scaling_factor: float
    resolution: int
    teacher: dict[str, Any] | None
    num_rows: dict[str, int]
    images: dict[str, Any]
    shards: dict[str, Any]
    hf_ifsq_version: str

    @classmethod
    def load(cls, name_or_path: str) -> "TokenDatasetInfo":
        """
        Read the description of a token dataset.

        Args:
            name_or_path (`str`): folder of the token dataset, or its name on the Hub.

        Returns:
            [`TokenDatasetInfo`].

        Raises:
            ValueError: if there is no finished token dataset of that name.
        """
        file = Path(name_or_path, INFO_FILE)
        if not Path(name_or_path).is_dir():
            try:
                file = Path(hf_hub_download(name_or_path, INFO_FILE, repo_type="dataset"))
            except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
                raise ValueError(
                    f"`token_dataset` must be a folder that `tokenize_dataset.py` wrote or a dataset of the Hub with "
                    f"a {INFO_FILE}, got {name_or_path!r}: {error}"
                ) from error
        elif not file.is_file():
            raise ValueError(
                f"`token_dataset` {name_or_path!r} has no {INFO_FILE}: it is no token dataset, or one that is not "
                "finished, which the same `tokenize_dataset.py` command goes on with."
            )
        return cls.from_file(file)

    @classmethod
    def from_file(cls, file: Path) -> "TokenDatasetInfo":
        """Read a `token_dataset.json`; a `ValueError` if it has other entries than said above."""
        content = json.loads(file.read_text(encoding="utf-8"))
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{file} was written by another version of this package: {error}.") from error

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def num_tokens(self) -> int:
        """Tokens an image."""
        rows, columns = self.tokenizer["grid_size"]
        return rows * columns


def load_token_dataset(name_or_path: str, info: TokenDatasetInfo) -> DatasetDict:
    """
    Load the rows of a token dataset, and check that they are what its description says.

    Args:
        name_or_path (`str`): folder of the token dataset, or its name on the Hub.
        info ([`TokenDatasetInfo`]): its description.

    Returns:
        `datasets.DatasetDict`: its splits, with `indices`, `label` and `teacher_features` where there are any.

    Raises:
        ValueError: if rows are missing, or if a token is not in the codebook.
    """
    # The check below says more than the one of `datasets`.
    splits = datasets.load_dataset(name_or_path, verification_mode="no_checks")
    num_rows = {name: len(rows) for name, rows in splits.items()}
    if num_rows != info.num_rows:
        raise ValueError(f"`token_dataset` {name_or_path!r} must have the rows {info.num_rows}, but has {num_rows}.")
    codebook_size = info.tokenizer["codebook_size"]
    for name, rows in splits.items():
        feature = rows.features.get("indices")
        if getattr(feature, "length", None) != info.num_tokens:
            raise ValueError(
                f"`token_dataset` {name_or_path!r} must have a column `indices` of {info.num_tokens} tokens a row, "
                f"but that of the split {name!r} is {feature}."
            )
        for chunk in rows.data.column("indices").chunks:
            tokens = chunk.flatten()
            bounds = pc.min_max(tokens).as_py()
            if len(tokens) != len(chunk) * info.num_tokens or tokens.null_count:
                raise ValueError(f"`token_dataset` {name_or_path!r} has missing tokens in the split {name!r}.")
            if len(chunk) and (bounds["min"] < 0 or bounds["max"] >= codebook_size):
                raise ValueError(
                    f"`token_dataset` {name_or_path!r} must have `indices` in [0, {codebook_size}), the codebook, but "
                    f"those of the split {name!r} span [{bounds['min']}, {bounds['max']}]."
                )
    return splits


class TokenDataset(torch.utils.data.Dataset):
    """
    Rows of a token dataset as `indices`, int64 of shape `(tokens,)`, `class_labels`, and, if asked for,
    `teacher_features`, float16 of shape `(tokens, width)`.

    It is read like an [`ImageDataset`], by `index` or by `(index, position)`; the position makes no difference, since
    crops and flips are in the rows already.

    Args:
        rows (`datasets.Dataset`): with the columns `indices` and `label`.
        with_teacher_features (`bool`): whether to read `teacher_features`.
    """

    def __init__(self, rows: Dataset, with_teacher_features: bool):
        columns = ["indices", "label"] + ["teacher_features"] * with_teacher_features
        # Rows as Arrow tables: twenty times as fast as the numpy format of `datasets` where lists are nested.
        self.rows = rows.select_columns(columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        row = self.rows[key[0] if isinstance(key, tuple) else key]
        item = {
            "indices": torch.from_numpy(_first_row(row["indices"]).astype(np.int64)),
            "class_labels": torch.tensor(row["label"][0].as_py()),
        }
        if "teacher_features" in row.column_names:
            # A copy: what lies in a memory-mapped file is read-only.
            item["teacher_features"] = torch.from_numpy(_first_row(row["teacher_features"]).copy())
        return item


def _first_row(column: pa.ChunkedArray) -> np.ndarray:
    """The only row of a column of nested lists of fixed lengths, without a copy."""
    values, shape = column.chunk(0), []
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    return values.to_numpy().reshape(shape)


class TokenSource:
    """
    What a generator is trained on: tokens or codes, class labels and, with a teacher, its features. They come from
    images that are tokenized on the way, or from a token dataset; then no image is read, tokenizer and teacher do not
    run, and the tokenizer stays on the CPU but for validation pictures.

    Args:
        args ([`GeneratorArguments`]): which data, tokenizer and teacher. Without a `resolution`, that of the token
            dataset is entered.
        device (`torch.device`): where the generator is trained.
        patch_size (`int`, *optional*, defaults to 1): codes along a side of the square that the teacher's features
            stand for.

    Attributes:
        tokenizer ([`ImageTokenizer`]): the tokenizer, in float32: a rounded latent is another token.
        train_data ([`ImageDataset`] or [`TokenDataset`]): training rows, to be read by `(index, position)`.
        validation_data ([`ImageDataset`], [`TokenDataset`] or `None`): validation rows, to be read by `index`.
        id2label (`dict[int, str]`): names of the classes.
        teacher_hidden_size (`int` or `None`): width of the teacher's features; `None` without a teacher.
        measures_cknna (`bool`): whether validations can compare hidden states with the teacher's features: there are
            both a teacher and enough validation images.

    Raises:
        ValueError: if labels, tokens, tokenizer or teacher are not what the arguments or the token dataset say.
    """

    def __init__(self, args: GeneratorArguments, device: torch.device, patch_size: int = 1):
        self.device = device
        self.teacher_hidden_size: int | None = None
        self._teacher: Teacher | None = None
        if args.token_dataset is None:
            self._open_images(args, patch_size)
        else:
            self._open_tokens(args, patch_size)
        self.measures_cknna = args.teacher is not None and self.validation_data is not None
        if self.measures_cknna and len(self.validation_data) <= CKNNA_NEIGHBORS:
            logger.warning(
                f"Validations leave out CKNNA, which takes more than {CKNNA_NEIGHBORS} images, its number of nearest "
                f"neighbours: there are {len(self.validation_data)}."
            )
            self.measures_cknna = False

    def _open_images(self, args: GeneratorArguments, patch_size: int) -> None:
        self.tokenizer = load_image_tokenizer(args.tokenizer, sample_size=args.resolution).to(self.device)
        train, validation = load_image_dataset(args)
        self._read_labels(train, validation, args.label_column)
        channels = self.tokenizer.in_channels
        self.train_data = ImageDataset(train, args, channels, with_labels=True)
        self.validation_data = None
        if validation is not None:
            self.validation_data = ImageDataset(validation, args, channels, with_labels=True)
        if args.teacher is not None:
            grid_size = tuple(side // patch_size for side in self.tokenizer.grid_size)
            self._teacher = Teacher(args.teacher, grid_size).to(self.device)
            self.teacher_hidden_size = self._teacher.hidden_size

    def _open_tokens(self, args: GeneratorArguments, patch_size: int) -> None:
        info = TokenDatasetInfo.load(args.token_dataset)
        if args.resolution not in (None, info.resolution):
            raise ValueError(
                f"`resolution` is {args.resolution}, but `token_dataset` {args.token_dataset!r} is of images of "
                f"{info.resolution} pixels: leave it out."
            )
        args.resolution = info.resolution
        if args.teacher is not None:
            _check_teacher(args, info, patch_size)
            self.teacher_hidden_size = info.teacher["hidden_size"]
        self.tokenizer = _load_tokenizer_of(args, info)
        splits = load_token_dataset(args.token_dataset, info)
        train, validation = draw(splits["train"], args.max_train_samples, args.seed), splits.get("validation")
        if validation is not None:
            validation = draw(validation, args.max_validation_samples, args.seed)
        self._read_labels(train, validation, "label")
        self.train_data = TokenDataset(train, with_teacher_features=args.teacher is not None)
        self.validation_data = None
        if validation is not None:
            self.validation_data = TokenDataset(validation, with_teacher_features=args.teacher is not None)

    def _read_labels(self, train: Dataset, validation: Dataset | None, label_column: str) -> None:
        self.id2label = read_class_names(train, label_column)
        if validation is not None:
            check_labels(validation, label_column, len(self.id2label))

    @torch.no_grad()
    def indices(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Token ids of a batch.

        Args:
            batch (`dict[str, torch.Tensor]`): rows of `train_data` or `validation_data`.

        Returns:
            `torch.Tensor` of shape `(batch, tokens)`, int64, in [0, codebook_size), in raster order.
        """
        if "indices" in batch:
            return batch["indices"]
        return self.tokenizer.encode_indices(batch["pixel_values"]).flatten(1)

    @torch.no_grad()
    def codes(self, batch: dict[str, torch.Tensor], sample_posterior: bool = False) -> torch.Tensor:
        """
        Codes of a batch.

        Args:
            batch (`dict[str, torch.Tensor]`): rows of `train_data` or `validation_data`.
            sample_posterior (`bool`, *optional*, defaults to `False`):
                whether to draw the codes of an `AutoencoderKL` from their distribution instead of taking its mode.

        Returns:
            `torch.Tensor` of shape `(batch, latent_channels, rows, columns)`.
        """
        if "indices" in batch:
            return self.tokenizer.indices_to_codes(batch["indices"].unflatten(1, self.tokenizer.grid_size))
        return self.tokenizer.encode_codes(batch["pixel_values"], sample_posterior=sample_posterior)

    @torch.no_grad()
    def teacher_features(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Features of the teacher, stored ones where the data has them.

        Args:
            batch (`dict[str, torch.Tensor]`): rows of `train_data` or `validation_data`.

        Returns:
            `torch.Tensor` of shape `(batch, patches, teacher_hidden_size)`, float32, in raster order.
        """
        if "teacher_features" in batch:
            return batch["teacher_features"].float()
        return self._teacher(batch["pixel_values"])

    @contextlib.contextmanager
    def tokenizer_on_device(self) -> Iterator[None]:
        """The tokenizer for a while where the generator is, to decode what it generates."""
        device = self.tokenizer.model.device
        self.tokenizer.to(self.device)
        try:
            yield
        finally:
            self.tokenizer.to(device)


def _load_tokenizer_of(args: GeneratorArguments, info: TokenDatasetInfo) -> ImageTokenizer:
    """The tokenizer of a token dataset, or the one that the arguments name if it is the same."""
    name, revision = args.tokenizer, None
    if name is None:
        name, revision = info.tokenizer["name_or_path"], info.tokenizer["revision"]
    try:
        tokenizer = load_image_tokenizer(name, sample_size=info.resolution, revision=revision)
    except OSError as error:
        raise ValueError(
            f"The tokenizer {name!r} of `token_dataset` {args.token_dataset!r} cannot be loaded: give `--tokenizer` "
            f"with the place where it is now. {error}"
        ) from error
    differences = [
        f"`{key}` ({info.tokenizer.get(key)} and {value})"
        for key, value in tokenizer.describe().items()
        if info.tokenizer.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"`token_dataset` {args.token_dataset!r} and `tokenizer` {name!r} disagree on {', '.join(differences)}: "
            f"use the tokenizer that made the tokens, {info.tokenizer['name_or_path']!r}."
        )
    return tokenizer


def _check_teacher(args: GeneratorArguments, info: TokenDatasetInfo, patch_size: int) -> None:
    stored = None if info.teacher is None else info.teacher["name_or_path"]
    if stored != args.teacher:
        has = "no teacher features" if stored is None else f"features of {stored!r}"
        raise ValueError(
            f"`teacher` is {args.teacher!r}, but `token_dataset` {args.token_dataset!r} has {has}: tokenize the "
            f"images with `--teacher {args.teacher}`, or train without `--teacher` or from images."
        )
    if patch_size != 1:
        raise ValueError(
            f"`teacher` features of `token_dataset` {args.token_dataset!r} stand for single codes, but the "
            f"`patch_size` is {patch_size}: train from images, or without `--teacher`."
        )
