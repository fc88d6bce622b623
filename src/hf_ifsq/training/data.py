"""Images and labels for training, in an order and with augmentations that depend on the seed and position alone."""

import contextlib
import glob
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, DatasetDict, NamedSplit, Value
from huggingface_hub import metadata_load
from torch.utils.data import Sampler

from ..models.checks import check_integer
from .image_folder import ImageFolder, Listing, list_files
from .image_transform import ImageTransform


logger = logging.getLogger(__name__)

# The split or the column that there shall not be.
NONE = "none"

METADATA_FILES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}

# Files of rows: pictures beside them are not the dataset.
ROW_FILES = {".parquet", ".arrow", ".tar", ".jsonl"}


def load_image_dataset(
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    max_train_samples: int | None = None,
    max_validation_samples: int | None = None,
    seed: int = 0,
) -> tuple[Dataset, Dataset | None]:
    """
    Load the training and the validation images of a dataset; `None` if there is no validation split.

    Args:
        dataset_name, dataset_config_name, train_data_dir: as in [`load_splits`].
        train_split (`str`, *optional*): by default `train`, or the only split there is.
        validation_split (`str`, *optional*):
            by default `validation` or `test`, if there is one; `none` leaves it out.
        image_column (`str`, *optional*, defaults to `"image"`): the column that holds the images.
        label_column (`str`, *optional*):
            the column that holds labels, where these are needed, or `none`. Names become ids: those of the training
            split in both splits.
        max_train_samples, max_validation_samples, seed (`int`, *optional*): images at most, and which ones.
    """
    label_column = None if label_column == NONE else label_column
    splits = load_splits(
        dataset_name,
        dataset_config_name=dataset_config_name,
        train_data_dir=train_data_dir,
        with_labels=label_column is not None,
    )
    if train_split is None:
        train_split = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
    if validation_split is None:
        usual = (name for name in ("validation", "test") if name in splits and name != train_split)
        validation_split = next(usual, NONE)
    train, names = pick_split(splits, train_split, "train_split", image_column), None
    if label_column is not None and label_column in train.column_names:
        train, names = _names_to_ids(train, label_column)
    train = draw(train, max_train_samples, seed)
    if validation_split == NONE:
        return train, None
    with _validation_can_be_left_out():
        validation = pick_split(splits, validation_split, "validation_split", image_column)
        if label_column is not None and names is not None and label_column in validation.column_names:
            validation, _ = _names_to_ids(validation, label_column, names)
    return train, draw(validation, max_validation_samples, seed)


def load_splits(
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    with_labels: bool = False,
) -> Mapping[str, Dataset]:
    """
    Load all splits of a dataset: `dataset_name` is one of the Hub, or locally a folder of pictures, one that
    `datasets` can load or has saved, or a parquet file; `dataset_config_name` tells several configurations apart;
    `train_data_dir`, in place of both, is a folder of pictures. Folders of pictures are read by [`ImageFolder`], or by
    `datasets`' imagefolder if they have a file `metadata.csv`, `.jsonl` or `.parquet`.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"Give either `dataset_name` or `train_data_dir`, got {dataset_name!r} and {train_data_dir!r}."
        )
    if "" in (dataset_name, train_data_dir):
        raise ValueError("`dataset_name` or `train_data_dir` is empty: it would be the working folder.")
    if dataset_name is None:
        return _load_folder(Path(str(train_data_dir)).expanduser(), with_labels)
    path = Path(dataset_name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"PAR1":
                raise ValueError(f"`dataset_name` {dataset_name!r} must be a parquet file, if it is a file.")
        return datasets.load_dataset("parquet", data_files=glob.escape(str(path)))
    if (path / "dataset_dict.json").is_file():
        return {name: _named(rows, name) for name, rows in DatasetDict.load_from_disk(str(path)).items()}
    if (path / "state.json").is_file():
        return {"train": _named(Dataset.load_from_disk(str(path)), "train")}
    if path.is_dir() and dataset_config_name is None:
        files, card = list_files(str(path)), path / "README.md"
        has_rows = [other for other in files.others if Path(other).suffix.lower() in ROW_FILES]
        has_configs = card.is_file() and "configs" in (metadata_load(card) or {})
        if files.pictures and not (has_configs or _has_metadata(files)):
            if has_rows:
                raise ValueError(
                    f"`dataset_name` {dataset_name!r} has pictures and files of rows, such as {has_rows[0]}: name the "
                    "folder or the file of one kind alone, or give the pictures by `train_data_dir`."
                )
            return ImageFolder(files, with_labels)
    return load_dataset(str(path) if path.is_dir() else dataset_name, name=dataset_config_name)


def load_dataset(name_or_path: str, **options: Any) -> DatasetDict:
    """Load a dataset by `datasets.load_dataset`, which finds nothing in a folder whose path is like a pattern."""
    for place in (name_or_path, options.get("data_dir", "")):
        if os.path.isdir(place) and glob.has_magic(os.path.realpath(place)):
            raise ValueError(
                f"{place!r} cannot be read: `datasets` takes brackets, `*` and `?` in a path for a pattern. Rename "
                "or move the folder."
            )
    return datasets.load_dataset(name_or_path, **options)


def _load_folder(path: Path, with_labels: bool) -> Mapping[str, Dataset]:
    files = list_files(str(path))
    suffixes = sorted({Path(other).suffix for other in files.others})
    count = sum(map(len, files.pictures.values()))
    if _has_metadata(files):
        splits = load_dataset("imagefolder", data_dir=str(path))
        if count > sum(map(len, splits.values())):
            logger.warning(f"{path}: left out pictures that its metadata does not name; in all there are {count}.")
        return splits
    if not count:
        kinds = f" with files of the kinds {suffixes}: unpack archives, and give files of rows as `dataset_name`"
        raise ValueError(f"`train_data_dir` must be a folder of pictures, got {str(path)!r}{kinds * bool(suffixes)}.")
    return ImageFolder(files, with_labels)


def _has_metadata(files: Listing) -> bool:
    """Whether there is metadata in the layout of `datasets`' imagefolder, which names files: others does not."""
    return any(Path(other).name in METADATA_FILES and _names_files(Path(other)) for other in files.others)


def _names_files(metadata: Path) -> bool:
    if metadata.suffix == ".parquet":
        columns = pq.read_schema(metadata).names
    else:
        with metadata.open(encoding="utf-8", errors="replace") as file:
            columns = re.findall(r"\w+", file.readline())
    return any(column == "file_name" or column.endswith("_file_name") for column in columns)


def _named(rows: Dataset, split: str) -> Dataset:
    """Rows that know their split, as all do but those that `save_to_disk` has written."""
    return Dataset(rows.data, info=rows.info, split=NamedSplit(split)) if split.isidentifier() else rows


def pick_split(splits: Mapping[str, Dataset], name: str | None, argument: str, image_column: str = "image") -> Dataset:
    """A split, which must have images in a column; `argument` is what named it, for the error."""
    if name is None or name not in splits:
        raise ValueError(f"`{argument}` must be one of the dataset's splits {list(splits)}, got {name!r}.")
    rows = splits[name]
    if image_column not in rows.column_names:
        images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        raise ValueError(
            f"`image_column` {image_column!r} is none of the columns {rows.column_names}; images are in {images}."
        )
    if not len(rows):
        raise ValueError(f"`{argument}` {name!r} has no rows.")
    feature = rows.features[image_column]
    if isinstance(feature, datasets.Image):
        return rows
    # The ways in which other programs store what `Image` would be.
    dtype = feature.dtype if isinstance(feature, Value) else None
    first = rows[0][image_column]
    are_files = dtype in ("string", "large_string") and os.path.isfile(first or "")
    is_struct = isinstance(feature, dict) and not {"bytes", "path"}.isdisjoint(feature)
    if are_files or is_struct or dtype in ("binary", "large_binary"):
        return rows.cast_column(image_column, datasets.Image())
    raise ValueError(
        f"`image_column` {image_column!r} must hold images, but it has the type {feature}, such as "
        f"{str(first)[:100]!r}. `cast_column({image_column!r}, Image())` of `datasets` makes images of encoded bytes, "
        "and of texts that are paths from the working folder or from `/`."
    )


def draw(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, drawn by the seed; all of them in their order if there are no more."""
    if limit is not None:
        check_integer(limit, "max_samples", maximum=2**63)
    check_integer(seed, "seed", minimum=0, maximum=2**32 - 1)
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))


def read_class_names(rows: Dataset, label_column: str, validation: Dataset | None = None) -> dict[int, str]:
    """
    Names of the classes of integer labels, by ids from 0 on; without names a class is called by its number. The
    validation rows, if there are any, must have no other classes.
    """
    check_labels(rows, label_column)
    names = getattr(rows.features[label_column], "names", None)
    if names is None:
        names = map(str, range(pc.max(_read_column(rows, label_column)).as_py() + 1))
    class_names = dict(enumerate(names))
    if validation is not None:
        with _validation_can_be_left_out():
            check_labels(validation, label_column, len(class_names))
    return class_names


def check_labels(rows: Dataset, label_column: str, num_classes: int | None = None) -> None:
    """Raise a `ValueError` unless all labels are integers in [0, num_classes), by default the number of names."""
    split = "" if rows.split is None else f" of the split {str(rows.split)!r}"
    if label_column not in rows.column_names:
        raise ValueError(
            f"`label_column` {label_column!r} is none of the columns{split} {rows.column_names}. Pictures of "
            "a folder have labels if each is a `CLASS/picture`, or where there are splits a `SPLIT/CLASS/picture`."
        )
    labels, title = _read_column(rows, label_column), f"`label_column` {label_column!r}{split}"
    if not pa.types.is_integer(labels.type):
        raise ValueError(
            f"{title} must hold integers, got {list(map(str, labels[:5].to_pylist()))} of the type {labels.type}: "
            f"`class_encode_column({label_column!r})` of `datasets` makes integers of the classes."
        )
    if labels.null_count:
        row, numbers = pc.index(labels.is_null(), True).as_py(), _row_numbers(rows)
        row = row if numbers is None else numbers[row].as_py()
        raise ValueError(f"{title} must hold integers, got None in {labels.null_count} rows, first in row {row}.")
    low, high = pc.min_max(labels).as_py().values()
    names = getattr(rows.features[label_column], "names", None)
    num_classes = num_classes or (high + 1 if names is None else len(names))
    if low < 0 or high >= num_classes:
        hidden = " Labels of -1 are those that a dataset keeps to itself." if low == -1 else ""
        raise ValueError(f"{title} must hold labels in [0, {num_classes}), but they span [{low}, {high}].{hidden}")


def _read_column(rows: Dataset, column: str) -> pa.ChunkedArray:
    """A whole column, at once: `rows[column]` makes Python objects, and those of rows that were drawn one by one."""
    values, numbers = rows.data.column(column), _row_numbers(rows)
    return values if numbers is None else values.take(numbers)


def _row_numbers(rows: Dataset) -> pa.ChunkedArray | None:
    """Where rows that were drawn or shuffled are in the dataset as it is stored; `None` if all are in their place."""
    return None if rows._indices is None else rows._indices.column(0)


def _names_to_ids(
    rows: Dataset, label_column: str, names: list[str] | None = None
) -> tuple[Dataset, list[str] | None]:
    """
    Rows with the ids of their classes in place of names, and these names, by default those of the rows; integers that
    have no names stay. Only for rows as they are stored: drawn ones would be copied.
    """
    feature, labels = rows.features[label_column], _read_column(rows, label_column)
    if isinstance(feature, ClassLabel):
        if names in (None, feature.names):
            return rows, feature.names
        check_labels(rows, label_column)
        labels = pa.array(feature.names).take(labels)
    elif not pa.types.is_string(labels.type) and not pa.types.is_large_string(labels.type):
        return rows, names
    own = sorted(pc.unique(labels.drop_null()).to_pylist())
    names = own if names is None else names
    unknown = sorted(set(own) - set(names))
    if unknown:
        raise ValueError(
            f"`label_column` {label_column!r} of the split {str(rows.split)!r} has classes that the training split "
            f"does not have: {unknown[:5]}."
        )
    ids = pc.index_in(labels, pa.array(names, labels.type)).to_pylist()
    return rows.remove_columns(label_column).add_column(label_column, ids, feature=ClassLabel(names=names)), names


@contextlib.contextmanager
def _validation_can_be_left_out() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} `--validation_split none` leaves the validation out.") from error


@dataclass
class ImageDataset(torch.utils.data.Dataset):
    """
    Rows with images as `pixel_values`, float32 of shape `(channels, resolution, resolution)` in [-1, 1], and, if there
    is a `label_column`, `class_labels`. It is read by `(index, position)`, where `position` counts all images read in
    training: random crop and flip are functions of the transform's seed and of that position, which the item holds for
    all else that is random. A plain `index` gives the plain image, with the index as its `position`. An image that
    cannot be read is a `ValueError` that names split, row of the dataset and file.
    """

    rows: Dataset
    transform: ImageTransform
    image_column: str = "image"
    label_column: str | None = None

    def __post_init__(self) -> None:
        self.stored, self._decoder = self.rows, datasets.Image()
        # A transform of the rows themselves, of `with_transform`, may need whatever is in them.
        if isinstance(self.rows, Dataset) and self.rows.format["type"] != "custom":
            columns = [self.image_column] if self.label_column is None else [self.image_column, self.label_column]
            self._decoder = replace(self.rows.features[self.image_column], decode=True)
            # Pictures as they are stored: those that are broken are met in `__getitem__` then, which names them.
            undecoded = replace(self._decoder, decode=False)
            rows = self.rows.with_format(None).select_columns(columns)
            self.stored = rows.cast_column(self.image_column, undecoded)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str | None:
        """By which `datasets` tells rows from others; `None` of rows that are no `Dataset`."""
        return getattr(self.rows, "_fingerprint", None)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, position = key if isinstance(key, tuple) else (key, None)
        row = self.stored[index]
        image = row[self.image_column]
        try:
            item: dict[str, Any] = {"pixel_values": self.transform(self._decoder.decode_example(image), position)}
        # Of any class: PIL's plugins do not agree on one.
        except Exception as error:
            raise ValueError(
                f"{self._describe(index, image)} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if self.label_column is not None:
            item["class_labels"] = torch.tensor(row[self.label_column])
        return item | {"position": index if position is None else position}

    def _describe(self, index: int, image: Any) -> str:
        row, split = index, getattr(self.rows, "split", None)
        if isinstance(self.rows, Dataset) and (numbers := _row_numbers(self.rows)) is not None:
            row = numbers[index].as_py()
        file = image.get("path") if isinstance(image, dict) else None
        place = f" of the split {str(split)!r}" * bool(split) + f" ({file})" * bool(file)
        return f"Row {row} of `image_column` {self.image_column!r}{place}"


def collate(items: list[Any]) -> Any:
    """Rows as a batch. Their positions stay on the host, where the random numbers of the images are drawn by them."""
    batch = torch.utils.data.default_collate(items)
    return batch | {"position": [item["position"] for item in items]} if isinstance(batch, dict) else batch


@dataclass
class ResumableSampler(Sampler[tuple[int, int]]):
    """
    One endless shuffled stream over a dataset, cut out from position `start` to `stop`. Each pass over the data has
    its own order, drawn from the seed and the number of the pass, so that a run that starts in the middle reads what
    an uninterrupted one would have read. It gives pairs of a row's index and its position in the stream.
    """

    num_samples: int
    seed: int
    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        pass_of_order, order = -1, np.arange(0)
        for position in range(self.start, self.stop):
            current_pass, place = divmod(position, self.num_samples)
            if current_pass != pass_of_order:
                order = np.random.default_rng([self.seed, current_pass]).permutation(self.num_samples)
                pass_of_order = current_pass
            yield int(order[place]), position
