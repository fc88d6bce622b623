"""Images and labels for training, in an order and with augmentations that depend on the seed and position alone."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from torch.utils.data import Sampler


def load_image_dataset(
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    image_column: str = "image",
    max_train_samples: int | None = None,
    max_validation_samples: int | None = None,
    seed: int = 0,
) -> tuple[Dataset, Dataset | None]:
    """
    Load the training and the validation images of a dataset; `None` if there is no validation split.

    Args:
        dataset_name, dataset_config_name, train_data_dir: as in [`load_splits`].
        train_split (`str`, *optional*): by default `train`, or the only split there is.
        validation_split (`str`, *optional*): by default `validation` or `test`, if there is one.
        image_column (`str`, *optional*, defaults to `"image"`): the column that holds the images.
        max_train_samples, max_validation_samples, seed (`int`, *optional*): images at most, and which ones.
    """
    splits = load_splits(dataset_name, dataset_config_name=dataset_config_name, train_data_dir=train_data_dir)
    if train_split is None:
        train_split = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
    train = draw(pick_split(splits, train_split, "train_split", image_column), max_train_samples, seed)
    if validation_split is None:
        validation_split = next((name for name in ("validation", "test") if name in splits), None)
    if validation_split is None:
        return train, None
    validation = pick_split(splits, validation_split, "validation_split", image_column)
    return train, draw(validation, max_validation_samples, seed)


def load_splits(
    dataset_name: str | None = None, *, dataset_config_name: str | None = None, train_data_dir: str | None = None
) -> DatasetDict:
    """
    Load all splits of a dataset: `dataset_name` is one of the Hub, or locally a folder that `datasets` can load or has
    saved, or a parquet file; `dataset_config_name` tells several configurations apart; `train_data_dir`, in place of
    both, is a folder in the layout of `datasets`' imagefolder.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"Give either `dataset_name` or `train_data_dir`, got {dataset_name!r} and {train_data_dir!r}."
        )
    if dataset_name is None:
        return datasets.load_dataset("imagefolder", data_dir=train_data_dir)
    path = Path(dataset_name)
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path))
    if (path / "dataset_dict.json").is_file():
        return DatasetDict.load_from_disk(str(path))
    if (path / "state.json").is_file():
        return DatasetDict({"train": Dataset.load_from_disk(str(path))})
    return datasets.load_dataset(dataset_name, dataset_config_name)


def pick_split(splits: DatasetDict, name: str | None, argument: str, image_column: str = "image") -> Dataset:
    """A split, which must have images in a column; `argument` is what named it, for the error."""
    if name not in splits:
        raise ValueError(f"`{argument}` must be one of the dataset's splits {list(splits)}, got {name!r}.")
    rows = splits[name]
    if image_column not in rows.column_names:
        raise ValueError(f"`image_column` {image_column!r} is none of the columns {rows.column_names}.")
    feature = rows.features[image_column]
    if not isinstance(feature, datasets.Image):
        raise ValueError(f"`image_column` {image_column!r} must hold images, but it has the type {feature}.")
    return rows


def draw(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, drawn by the seed; all of them in their order if there are no more."""
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))


def read_class_names(rows: Dataset, label_column: str) -> dict[int, str]:
    """Names of the classes of integer labels, by ids from 0 on; without names a class is called by its number."""
    check_labels(rows, label_column)
    names = getattr(rows.features[label_column], "names", None)
    return dict(enumerate(names or map(str, range(max(rows[label_column]) + 1))))


def check_labels(rows: Dataset, label_column: str, num_classes: int | None = None) -> None:
    """Raise a `ValueError` unless all labels are integers in [0, num_classes), by default the number of names."""
    if label_column not in rows.column_names:
        raise ValueError(f"`label_column` {label_column!r} is none of the columns {rows.column_names}.")
    labels = rows[label_column]
    wrong = [label for label in labels if isinstance(label, bool) or not isinstance(label, int)]
    if wrong:
        raise ValueError(f"`label_column` {label_column!r} must hold integers, got {list(map(str, wrong[:5]))}.")
    labels = set(labels)
    names = getattr(rows.features[label_column], "names", None)
    num_classes = num_classes or (max(labels) + 1 if names is None else len(names))
    if min(labels) < 0 or max(labels) >= num_classes:
        raise ValueError(
            f"`label_column` {label_column!r} must hold labels in [0, {num_classes}), but they span "
            f"[{min(labels)}, {max(labels)}]."
        )


@dataclass(frozen=True)
class ImageTransform:
    """
    Crop, flip and resize: a picture becomes `pixel_values`. Transparent pictures are put on white; squares are resized
    by PIL's antialiased bicubic filter.

    Args:
        resolution (`int`): side of the result in pixels.
        channels (`int`, *optional*, defaults to 3): 1 for grey, 3 for RGB.
        center_crop (`bool`, *optional*, defaults to `False`): whether random squares lie in the middle.
        min_crop_scale (`float`, *optional*, defaults to 1.0):
            side of the smallest random square over the short side of the picture, in (0, 1].
        random_flip (`bool`, *optional*, defaults to `False`): whether half of the pictures are mirrored.
        seed (`int`, *optional*, defaults to 0): seed of the random squares and flips.
    """

    resolution: int
    channels: int = 3
    center_crop: bool = False
    min_crop_scale: float = 1.0
    random_flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 (grey) or 3 (RGB), got {self.channels}.")
        if self.resolution < 1:
            raise ValueError(f"`resolution` must be at least 1, got {self.resolution}.")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"`min_crop_scale` must be in (0, 1], got {self.min_crop_scale}.")

    def __call__(self, image: Image.Image, position: int | None = None) -> torch.Tensor:
        """
        Transform a picture of 8 bits per channel to float32 `(channels, resolution, resolution)` in [-1, 1]. With a
        `position`, it and the seed draw square and flip; without, it is the plain square in the middle.
        """
        # PIL would cut off values of more than 8 bits instead of scaling them.
        if image is None or image.mode in ("I", "F") or image.mode.startswith("I;16"):
            got = "None" if image is None else f"mode {image.mode!r}"
            raise ValueError(f"`image` must be an image of 8 bits per channel, got {got}.")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = self._square(image.convert("L" if self.channels == 1 else "RGB"), position)
        # A fresh array: the one behind a PIL image is read-only.
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(*image.size[::-1], self.channels)
        return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1

    def _square(self, image: Image.Image, position: int | None) -> Image.Image:
        side: float = min(image.size)
        place, flip = (0.5, 0.5), False
        if position is not None:
            generator = random.Random(f"{self.seed}-{position}")
            side = round(side * generator.uniform(self.min_crop_scale, 1))
            place = (0.5, 0.5) if self.center_crop else (generator.random(), generator.random())
            flip = self.random_flip and generator.random() < 0.5
        left, top = (round((size - side) * share) for size, share in zip(image.size, place, strict=True))
        size = (self.resolution, self.resolution)
        image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


@dataclass
class ImageDataset(torch.utils.data.Dataset):
    """
    Rows with images as `pixel_values`, float32 of shape `(channels, resolution, resolution)` in [-1, 1], and, if there
    is a `label_column`, `class_labels`. It is read by `(index, position)`, where `position` counts all images read in
    training: random crop and flip are functions of the transform's seed and of that position, which the item holds for
    all else that is random. A plain `index` gives the plain image, with the index as its `position`.
    """

    rows: Dataset
    transform: ImageTransform
    image_column: str = "image"
    label_column: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, position = key if isinstance(key, tuple) else (key, None)
        row = self.rows[index]
        try:
            item: dict[str, Any] = {"pixel_values": self.transform(row[self.image_column], position)}
        except ValueError as error:
            raise ValueError(f"Row {index} of `image_column` {self.image_column!r}: {error}") from error
        if self.label_column is not None:
            item["class_labels"] = torch.tensor(row[self.label_column])
        return item | {"position": index if position is None else position}


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
