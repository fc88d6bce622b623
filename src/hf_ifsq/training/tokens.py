"""Token datasets, images tokenized once, and the source that gives generators tokens of either images or these."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from .data import ImageDataset, draw, load_dataset, read_class_names
from .image_transform import ImageTransform
from .model_card import without_local_paths


logger = logging.getLogger(__name__)

INFO_FILE = "token_dataset.json"

# Path of a local tokenizer from the folder of its tokens. Nothing under this folder is ever uploaded to the Hub.
TOKENIZER_PATH_FILE = Path(".cache", "huggingface", "tokenizer_path.txt")


@dataclass(frozen=True)
class TokenDatasetInfo:
    """
    What the rows of a token dataset are, the content of its `token_dataset.json`: the `tokenizer` by `name_or_path`,
    `revision` (of the Hub, or `None`) and [`fingerprint`]; the factor that makes latents of its codes; the side of the
    images in pixels; `name_or_path`, `hidden_size` and `weights_sha256` of the `teacher` whose features are stored, if
    any; rows of each split; what chose and cut the images, and grouped them into batches and files; and the version of
    this package. It is for others too: where something lies on this machine is not in it.
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
        """Read the description of a token dataset, which is a folder or a name on the Hub."""
        file = Path(name_or_path, INFO_FILE)
        if Path(name_or_path).is_dir() and not file.is_file():
            raise ValueError(
                f"`token_dataset` {name_or_path!r} has no {INFO_FILE}: it is not a token dataset, or one that is not "
                "finished, which the same `tokenize_dataset.py` command goes on with."
            )
        if not file.is_file():
            try:
                file = Path(hf_hub_download(name_or_path, INFO_FILE, repo_type="dataset"))
            except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
                raise ValueError(
                    f"`token_dataset` must be a folder that `tokenize_dataset.py` wrote or a dataset of the Hub with "
                    f"a {INFO_FILE}, got {name_or_path!r}: {error}"
                ) from error
        return cls.from_file(file)

    @classmethod
    def from_file(cls, file: Path) -> "TokenDatasetInfo":
        """Read a `token_dataset.json`."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except TypeError as error:
            raise ValueError(f"{file} was written by another version of this package: {error}.") from error

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        rows, columns = self.tokenizer["grid_size"]
        return rows * columns


def fingerprint(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """What makes the tokens of a tokenizer its own: class, codebook, quantizer's options, SHA-256 of the weights."""
    config = tokenizer.model.config
    return {
        "class": type(tokenizer.model).__name__,
        "codebook_size": tokenizer.codebook_size,
        "levels": tokenizer.levels,
        **{name: config.get(name) for name in ("alpha", "bound", "equal_bins")},
        "grid_size": list(tokenizer.grid_size),
        "weights_sha256": hash_weights(tokenizer.model),
    }


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of the names and values of a model's weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_token_dataset(name_or_path: str, info: TokenDatasetInfo) -> DatasetDict:
    """
    Load the rows of a token dataset, a folder or a name on the Hub, and check that they are what its description says:
    splits with `indices`, `label` and `teacher_features` where there are any.
    """
    # The check below says more than the one of `datasets`.
    splits = load_dataset(name_or_path, verification_mode="no_checks")
    num_rows = {name: len(rows) for name, rows in splits.items()}
    title, size = f"`token_dataset` {name_or_path!r}", info.tokenizer["codebook_size"]
    if num_rows != info.num_rows:
        raise ValueError(f"{title} must have the rows {info.num_rows}, but has {num_rows}.")
    for name, rows in splits.items():
        feature = rows.features.get("indices")
        if getattr(feature, "length", None) != info.num_tokens:
            raise ValueError(
                f"{title} must have a column `indices` of {info.num_tokens} tokens per row, but that of the split "
                f"{name!r} is {feature}."
            )
        for chunk in rows.data.column("indices").chunks:
            tokens = chunk.flatten()
            low, high = pc.min_max(tokens).as_py().values()
            if len(tokens) != len(chunk) * info.num_tokens or tokens.null_count:
                raise ValueError(f"{title} has missing tokens in the split {name!r}.")
            if len(chunk) and (low < 0 or high >= size):
                raise ValueError(
                    f"{title} must have `indices` in [0, {size}), the codebook, but those of the split {name!r} span "
                    f"[{low}, {high}]."
                )
    return splits


class TokenDataset(torch.utils.data.Dataset):
    """
    Rows of a token dataset as `indices`, int64 of shape `(tokens,)`, `class_labels`, and, if asked for,
    `teacher_features`, float16 of shape `(tokens, width)`. It is read like an [`ImageDataset`], by `index` or by
    `(index, position)`; the position makes no difference to the rows, which have crops and flips in them already.
    """

    def __init__(self, rows: Dataset, with_teacher_features: bool = False):
        columns = ["indices", "label"] + ["teacher_features"] * with_teacher_features
        # Rows as Arrow tables: twenty times as fast as the numpy format of `datasets` where lists are nested.
        self.rows = rows.select_columns(columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """By which `datasets` tells rows from others."""
        return self.rows._fingerprint

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, position = key if isinstance(key, tuple) else (key, key)
        row = self.rows[index]
        # Copies: what lies in a memory-mapped file is read-only.
        indices = torch.from_numpy(_first_row(row["indices"]).astype(np.int64))
        item: dict[str, Any] = {"indices": indices, "position": position}
        item["class_labels"] = torch.tensor(row["label"][0].as_py())
        if "teacher_features" in row.column_names:
            item["teacher_features"] = torch.from_numpy(_first_row(row["teacher_features"]).copy())
        return item


def _first_row(column: pa.ChunkedArray) -> np.ndarray:
    """The only row of a column of nested lists of fixed lengths, without a copy."""
    values, shape = column.chunk(0), []
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    return values.to_numpy().reshape(shape)


@dataclass
class TokenSource:
    """
    What a generator model is trained on: tokens or codes, class labels and, with a teacher, its features. They come
    from images that are tokenized on the way, or from a token dataset; then no image is read, tokenizer and teacher do
    not run, and the tokenizer stays on the CPU but for validation pictures.

    Args:
        tokenizer ([`ImageTokenizer`]): the tokenizer, in float32: a rounded latent is another token.
        train_data, validation_data ([`ImageDataset`] or [`TokenDataset`]): rows; there may be none for validation.
        id2label (`dict[int, str]`): names of the classes.
        teacher ([`Teacher`], *optional*), teacher_hidden_size (`int`, *optional*): gives features of some width.

    Attributes:
        measures_cknna (`bool`): whether there are both features and enough validation images to compare them with.
    """

    tokenizer: ImageTokenizer
    train_data: ImageDataset | TokenDataset
    validation_data: ImageDataset | TokenDataset | None
    id2label: dict[int, str]
    teacher: Teacher | None = None
    teacher_hidden_size: int | None = None

    def __post_init__(self) -> None:
        if self.teacher is not None:
            self.teacher_hidden_size = self.teacher.hidden_size
        count = len(self.validation_data or ()) if self.teacher_hidden_size else 0
        self.measures_cknna = count > CKNNA_NEIGHBORS
        if 0 < count <= CKNNA_NEIGHBORS:
            logger.warning(
                f"Validations leave out CKNNA, which takes more than {CKNNA_NEIGHBORS} images, its number of nearest "
                f"neighbours: there are {count}."
            )

    @classmethod
    def from_images(
        cls,
        train: Dataset,
        validation: Dataset | None,
        tokenizer: ImageTokenizer,
        transform: ImageTransform,
        image_column: str = "image",
        label_column: str = "label",
        teacher: Teacher | None = None,
    ) -> "TokenSource":
        """Labelled images that are tokenized on the way, by a tokenizer and a teacher on the training's device."""
        id2label = read_class_names(train, label_column, validation)
        options = (transform, image_column, label_column)
        validation_data = None if validation is None else ImageDataset(validation, *options)
        return cls(tokenizer, ImageDataset(train, *options), validation_data, id2label, teacher)

    @classmethod
    def from_token_dataset(
        cls,
        token_dataset: str,
        tokenizer: str | None = None,
        teacher: str | None = None,
        patch_size: int = 1,
        resolution: int | None = None,
        max_train_samples: int | None = None,
        max_validation_samples: int | None = None,
        seed: int = 0,
    ) -> "TokenSource":
        """
        Tokens that were made in advance, in a folder or on the Hub.

        Args:
            tokenizer (`str`, *optional*): where its tokenizer is now, by default the place that it names.
            teacher (`str`, *optional*): name of the teacher whose features are stored, if they are wanted.
            patch_size (`int`, *optional*, defaults to 1): codes along a side of the square that a feature stands for.
            resolution (`int`, *optional*): side in pixels that the images must have had.
            max_train_samples, max_validation_samples, seed (`int`, *optional*): rows at most, and which ones.
        """
        info = TokenDatasetInfo.load(token_dataset)
        if resolution not in (None, info.resolution):
            raise ValueError(
                f"`resolution` is {resolution}, but `token_dataset` {token_dataset!r} is of images of "
                f"{info.resolution} pixels: leave it out."
            )
        width = None if teacher is None else _width_of_features(token_dataset, info, teacher, patch_size)
        loaded = _load_tokenizer_of(token_dataset, info, tokenizer)
        splits = load_token_dataset(token_dataset, info)
        train, validation = draw(splits["train"], max_train_samples, seed), splits.get("validation")
        if validation is not None:
            validation = draw(validation, max_validation_samples, seed)
        id2label = read_class_names(train, "label", validation)
        validation_data = None if validation is None else TokenDataset(validation, width is not None)
        return cls(loaded, TokenDataset(train, width is not None), validation_data, id2label, None, width)

    @torch.no_grad()
    def indices(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Token ids of a batch of rows: int64 of shape `(batch, tokens)`, in [0, codebook_size), in raster order."""
        if "indices" in batch:
            return batch["indices"]
        return self.tokenizer.encode_indices(batch["pixel_values"]).flatten(1)

    @torch.no_grad()
    def codes(
        self, batch: dict[str, torch.Tensor], generators: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Codes of a batch of rows, `(batch, latent_channels, rows, columns)`; see [`ImageTokenizer.encode_codes`]."""
        if "indices" in batch:
            return self.tokenizer.indices_to_codes(batch["indices"].unflatten(1, self.tokenizer.grid_size))
        return self.tokenizer.encode_codes(batch["pixel_values"], generators)

    @torch.no_grad()
    def teacher_features(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features of a batch of rows: float32 of shape `(batch, patches, teacher_hidden_size)`, in raster order."""
        if "teacher_features" in batch:
            return batch["teacher_features"].float()
        if self.teacher is None:
            raise ValueError("There are no teacher features: no `teacher` was given.")
        return self.teacher(batch["pixel_values"])

    @contextlib.contextmanager
    def tokenizer_on(self, device: torch.device) -> Iterator[None]:
        """The tokenizer for a while on another device, to decode what is generated there."""
        usual_device = self.tokenizer.model.device
        self.tokenizer.to(device)
        try:
            yield
        finally:
            self.tokenizer.to(usual_device)


def _load_tokenizer_of(token_dataset: str, info: TokenDatasetInfo, name_or_path: str | None) -> ImageTokenizer:
    """The tokenizer of a token dataset, from the place that it names or from where it is now."""
    name, revision = name_or_path or _local_tokenizer_of(token_dataset), None
    if name is None:
        name, revision = str(info.tokenizer["name_or_path"]), info.tokenizer["revision"]
    try:
        tokenizer = load_image_tokenizer(name, sample_size=info.resolution, revision=revision)
    except OSError as error:
        raise ValueError(
            f"The tokenizer {name!r} of `token_dataset` {token_dataset!r} cannot be loaded: give `--tokenizer` with "
            f"the place where it is now. {error}"
        ) from error
    differences = [
        f"`{key}` ({info.tokenizer.get(key)} and {value})"
        for key, value in fingerprint(tokenizer).items()
        if info.tokenizer.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"`token_dataset` {token_dataset!r} and `tokenizer` {name!r} disagree on {', '.join(differences)}: use "
            f"the tokenizer that made the tokens, {info.tokenizer['name_or_path']!r}."
        )
    return tokenizer


def remember_tokenizer(token_dataset: str, tokenizer: str) -> None:
    """
    Note where the tokenizer of a token dataset lies if it is a folder, for its trainings on this machine: neither the
    description nor what is uploaded says where something lies.
    """
    if os.path.isdir(tokenizer):
        file = Path(token_dataset, TOKENIZER_PATH_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tokenizer).resolve()
        # On another drive of Windows there is no way from one to the other.
        if folder.anchor == Path(token_dataset).resolve().anchor:
            folder = Path(os.path.relpath(folder, Path(token_dataset).resolve()))
        file.write_text(str(folder), encoding="utf-8")


def _local_tokenizer_of(token_dataset: str) -> str | None:
    file = Path(token_dataset, TOKENIZER_PATH_FILE)
    if file.is_file():
        folder = os.path.normpath(Path(token_dataset, file.read_text(encoding="utf-8")))
        return folder if os.path.isdir(folder) else None
    return None


def _width_of_features(token_dataset: str, info: TokenDatasetInfo, teacher: str, patch_size: int) -> int:
    """Width of the features of a teacher, which a token dataset must have for patches of single codes."""
    stored = None if info.teacher is None else info.teacher["name_or_path"]
    if info.teacher is None or without_local_paths(stored) != without_local_paths(teacher):
        has = "no teacher features" if stored is None else f"features of {stored!r}"
        raise ValueError(
            f"`teacher` is {teacher!r}, but `token_dataset` {token_dataset!r} has {has}: tokenize the images with "
            f"`--teacher {teacher}`, or train without `--teacher` or from images."
        )
    if patch_size != 1:
        raise ValueError(
            f"`teacher` features of `token_dataset` {token_dataset!r} stand for single codes, but the `patch_size` is "
            f"{patch_size}: train from images, or without `--teacher`."
        )
    return info.teacher["hidden_size"]
