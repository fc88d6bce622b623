"""Images and labels for training, in an order and with augmentations that depend on the seed and position alone."""

import random
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from torch.utils.data import Sampler

from .arguments import DataArguments


def load_image_dataset(args: DataArguments) -> tuple[Dataset, Dataset | None]:
    """
    Load the images that the arguments name.

    Args:
        args ([`DataArguments`]): which dataset, splits and columns.

    Returns:
        `tuple[Dataset, Dataset | None]`: training and validation images; `None` if there is no validation split.

    Raises:
        ValueError: if a split or the image column is missing.
    """
    splits = load_splits(args)
    train_split = args.train_split or ("train" if "train" in splits else None)
    if train_split is None and len(splits) == 1:
        train_split = next(iter(splits))
    validation_split = args.validation_split or next((name for name in ("validation", "test") if name in splits), None)
    for argument, name in (("train_split", train_split), ("validation_split", validation_split)):
        if name not in splits and not (argument == "validation_split" and name is None):
            raise ValueError(f"`{argument}` must be one of the dataset's splits {list(splits)}, got {name!r}.")
    train = splits[train_split]
    if args.image_column not in train.column_names:
        raise ValueError(f"`image_column` {args.image_column!r} is none of the columns {train.column_names}.")
    if not isinstance(train.features[args.image_column], datasets.Image):
        raise ValueError(
            f"`image_column` {args.image_column!r} must hold images, but it has the type "
            f"{train.features[args.image_column]}."
        )
    train = draw(train, args.max_train_samples, args.seed)
    if validation_split is None:
        return train, None
    return train, draw(splits[validation_split], args.max_validation_samples, args.seed)


def draw(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    """
    Draw rows of a dataset.

    Args:
        dataset (`datasets.Dataset`): any dataset.
        limit (`int`, *optional*): how many rows at most; `None` for all.
        seed (`int`): which ones.

    Returns:
        `datasets.Dataset`: the dataset itself, or `limit` of its rows in random order.
    """
    return dataset if limit is None or limit >= len(dataset) else dataset.shuffle(seed=seed).select(range(limit))


def load_splits(args: DataArguments) -> DatasetDict:
    """
    Load all splits of the dataset that the arguments name.

    Args:
        args ([`DataArguments`]): which dataset.

    Returns:
        `datasets.DatasetDict`: the splits by name.
    """
    if args.train_data_dir is not None:
        return datasets.load_dataset("imagefolder", data_dir=args.train_data_dir)
    path = Path(args.dataset_name)
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path))
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))
    if (path / "state.json").is_file():
        return DatasetDict({"train": datasets.load_from_disk(str(path))})
    return datasets.load_dataset(args.dataset_name, args.dataset_config_name)


def read_class_names(dataset: Dataset, label_column: str) -> dict[int, str]:
    """
    Names of the classes of a dataset.

    Args:
        dataset (`datasets.Dataset`): a dataset with integer labels.
        label_column (`str`): its column of labels.

    Returns:
        `dict[int, str]`: ids from 0 to the number of classes less one, and their names. Without names in the
        dataset's features, a class is called by its number.

    Raises:
        ValueError: if the column is missing, or if a label is no integer or negative or above the names.
    """
    check_labels(dataset, label_column)
    names = getattr(dataset.features[label_column], "names", None)
    return dict(enumerate(names or map(str, range(max(dataset[label_column]) + 1))))


def check_labels(dataset: Dataset, label_column: str, num_classes: int | None = None) -> None:
    """
    Check that all labels are ids of classes.

    Args:
        dataset (`datasets.Dataset`): a dataset with integer labels.
        label_column (`str`): its column of labels.
        num_classes (`int`, *optional*): number of classes; by default the number of names, if there are names.

    Raises:
        ValueError: if the column is missing, or if a label is no integer or not in [0, num_classes).
    """
    if label_column not in dataset.column_names:
        raise ValueError(f"`label_column` {label_column!r} is none of the columns {dataset.column_names}.")
    labels = dataset[label_column]
    wrong = [label for label in labels if isinstance(label, bool) or not isinstance(label, int)]
    if wrong:
        raise ValueError(f"`label_column` {label_column!r} must hold integers, got {list(map(str, wrong[:5]))}.")
    labels = set(labels)
    names = getattr(dataset.features[label_column], "names", None)
    num_classes = num_classes or (max(labels) + 1 if names is None else len(names))
    if min(labels) < 0 or max(labels) >= num_classes:
        raise ValueError(
            f"`label_column` {label_column!r} must hold labels in [0, {num_classes}), but they span "
            f"[{min(labels)}, {max(labels)}]."
        )


class ImageDataset(torch.utils.data.Dataset):
    """
    Images as `pixel_values`, float32 of shape `(channels, resolution, resolution)` in [-1, 1], and `class_labels`.
    Transparent images are put on white.

    It is read by `(index, position)`, where `position` counts all images read in training: the random crop and flip
    are functions of the seed and of that position. A plain `index` gives the plain image: a square from the middle.

    Args:
        dataset (`datasets.Dataset`): with a column of images and, optionally, one of integer labels.
        args ([`DataArguments`]): columns, resolution, crop and flip.
        channels (`int`): 1 for grey images, 3 for RGB.
        with_labels (`bool`): whether to read `class_labels`.

    Raises:
        ValueError: if `channels` is neither 1 nor 3.
    """

    def __init__(self, dataset: Dataset, args: DataArguments, channels: int, with_labels: bool):
        if channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 (grey) or 3 (RGB), got {channels}.")
        self.dataset = dataset
        self.args = args
        self.mode = "L" if channels == 1 else "RGB"
        self.with_labels = with_labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        index, position = key if isinstance(key, tuple) else (key, None)
        row = self.dataset[index]
        image = self._crop(self._convert(row[self.args.image_column], index), position)
        # A fresh array: the one behind a PIL image is read-only.
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(*image.size[::-1], len(self.mode))
        item = {"pixel_values": pixels.permute(2, 0, 1).contiguous() / 127.5 - 1}
        if self.with_labels:
            item["class_labels"] = torch.tensor(row[self.args.label_column])
        return item

    def _convert(self, image: Image.Image | None, index: int) -> Image.Image:
        mode = None if image is None else image.mode
        # PIL would cut off values of more than 8 bits instead of scaling them.
        if mode is None or mode in ("I", "F") or mode.startswith("I;16"):
            raise ValueError(
                f"Row {index} of `image_column` {self.args.image_column!r} must hold an image of 8 bits a channel, "
                f"got {'None' if mode is None else f'mode {mode!r}'}."
            )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(self.mode)

    def _crop(self, image: Image.Image, position: int | None) -> Image.Image:
        """A square of the image, resized with PIL's antialiased bicubic filter."""
        short_side = min(image.size)
        if position is None:
            side, place, flip = short_side, (0.5, 0.5), False
        else:
            generator = random.Random(f"{self.args.seed}-{position}")
            side = round(short_side * generator.uniform(self.args.min_crop_scale, 1))
            place = (0.5, 0.5) if self.args.center_crop else (generator.random(), generator.random())
            flip = self.args.random_flip and generator.random() < 0.5
        left, top = (round((size - side) * share) for size, share in zip(image.size, place, strict=True))
        size = (self.args.resolution, self.args.resolution)
        image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


class ResumableSampler(Sampler[tuple[int, int]]):
    """
    One endless shuffled stream over a dataset, cut out from `start` to `stop`. Each pass over the data has its own
    order, drawn from the seed and the number of the pass, so that a run that starts in the middle reads what an
    uninterrupted one would have read.

    Args:
        num_samples (`int`): size of the dataset.
        seed (`int`): seed of the orders.
        start (`int`): first position of the stream.
        stop (`int`): position after the last.
    """  # noqa: D205

    def __init__(self, num_samples: int, seed: int, start: int, stop: int):
        self.num_samples = num_samples
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, pass_of_order = None, None
        for position in range(self.start, self.stop):
            current_pass, place = divmod(position, self.num_samples)
            if current_pass != pass_of_order:
                order = np.random.default_rng([self.seed, current_pass]).permutation(self.num_samples)
                pass_of_order = current_pass
            yield int(order[place]), position
