"""Pictures in folders as a dataset: every one counts with the label of its folder, or an error names what is wrong."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import datasets
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, NamedSplit
from datasets.table import InMemoryTable
from PIL import Image


logger = logging.getLogger(__name__)

# Names of folders, with or without a number after them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# What PIL knows by name only, for writing or for plugins of others.
NO_PICTURES = ("BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF")

# Pictures that PIL reads with a plugin or not at all.
OTHER_PICTURES = (
    *(".avif", ".heic", ".heif", ".jxl", ".svg", ".webp"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),
)

# The parts of the path of a folder below the one that is read.
Folder = tuple[str, ...]


@dataclass
class Listing:
    """
    The files of a folder and of all below, through links too, but for hidden ones: names of pictures by their folder,
    paths of other files, folders without any file, and what is wrong with some.
    """

    root: str
    pictures: dict[Folder, list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def path(self, folder: Folder, name: str = "") -> str:
        """The whole path of a folder, or of a file in it."""
        return os.path.join(self.root, *folder, name)


def list_files(root: str) -> Listing:
    """List the files of a folder; none if there is no such folder."""
    listing = Listing(os.path.abspath(root))
    formats = Image.registered_extensions()
    suffixes = {suffix for suffix, name in formats.items() if name in Image.OPEN and name not in NO_PICTURES}

    def walk(folder: Folder, above: tuple[tuple[int, int], ...]) -> None:
        path = listing.path(folder)
        status = os.stat(path)
        place = (status.st_dev, status.st_ino)
        if place in above:
            listing.problems.append(f"{path} is a link to a folder that it lies in: remove it")
            return
        pictures, below, others = [], [], len(listing.others)
        with os.scandir(path) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    below.append(entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    listing.problems.append(f"{entry.path} is a link to nothing: mend or remove it")
                elif suffix in suffixes:
                    pictures.append(entry.name)
                elif suffix in OTHER_PICTURES:
                    listing.problems.append(
                        f"{entry.path} is a picture of a kind that PIL does not read here: convert it, or move it away"
                    )
                else:
                    listing.others.append(entry.path)
        if pictures:
            listing.pictures[folder] = pictures
        elif not below and len(listing.others) == others:
            listing.empty.append(path)
        for name in sorted(below):
            walk((*folder, name), (*above, place))

    if os.path.isdir(listing.root):
        walk((), ())
    return listing


class ImageFolder(Mapping[str, Dataset]):
    """
    The splits of a folder of pictures: datasets of an `image` and, where there are class folders, a `label`. Each is
    made when it is asked for, so that what is wrong in one is no matter where it is left out. Pictures are not read.

    The layout is `CLASS/picture` or `SPLIT/CLASS/picture`, or without class folders `picture` or `SPLIT/picture`.
    Folders are splits if each of them is called like one (`train`, `val`, `test2017`), and if one of them is for
    training or has class folders; else they are classes. Rows are in the order of their paths. The ids of classes are
    those of the training split.

    Args:
        listing ([`Listing`]): the files.
        with_labels (`bool`, *optional*, defaults to `True`):
            whether labels are wanted. If not, pictures may lie at any depth.

    Raises:
        `ValueError`: naming a file, if there are pictures that cannot be read or that no split takes in; from a split,
            if its pictures lie at several depths or have a class that the training split has not.
    """

    def __init__(self, listing: Listing, with_labels: bool = True):
        self.listing, self.with_labels = listing, with_labels
        pictures = listing.pictures
        tops = sorted({folder[0] for folder in pictures if folder})
        names = [SPLITS.get(re.sub(r"[-._ 0-9]+$", "", top.lower())) for top in tops]
        self._tops, self._others = tops, [top for top, name in zip(tops, names) if name is None]
        self._folders: dict[str, Folder] = {"train": ()}
        if tops and not self._others and ("train" in names or any(len(folder) > 1 for folder in pictures)):
            self._folders = {str(name): (top,) for top, name in zip(tops, names)}
            if len(self._folders) < len(tops):
                raise ValueError(f"Several of the folders {tops} of {listing.root} are one split: rename them.")
            if () in pictures:
                stray = listing.path((), min(pictures[()]))
                raise ValueError(f"{stray} lies beside the folders of the splits {tops}: move it into one of them.")
            if with_labels and all(len(folder) == 1 for folder in pictures):
                raise ValueError(
                    f"The folders {tops} of {listing.root} may be classes, or splits without labels: put classes "
                    "into a folder `train`; for splits, give `--label_column none`."
                )
        if listing.problems:
            raise ValueError(f"{listing.problems[0]}.")
        if listing.others:
            kinds = Counter(os.path.splitext(path)[1] or os.path.basename(path) for path in listing.others)
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(10))
            logger.warning(f"{listing.root}: {len(listing.others)} files are no pictures and left out: {counts}.")
        if listing.empty:
            logger.warning(f"{listing.root}: {len(listing.empty)} folders are empty: {', '.join(listing.empty[:10])}.")

    def __len__(self) -> int:
        return len(self._folders)

    def __iter__(self) -> Iterator[str]:
        return (name for name in dict.fromkeys(SPLITS.values()) if name in self._folders)

    def __contains__(self, split: object) -> bool:
        return split in self._folders

    def __getitem__(self, split: str) -> Dataset:
        pictures = self._pictures(split)
        names = self._class_names(split, pictures)
        paths = sorted("/".join((*folder, name)) for folder, files in pictures.items() for name in files)
        root = self.listing.path(self._folders[split])
        columns: dict[str, pa.Array] = {"image": _to_images([f"{root}{path}" for path in paths])}
        features = Features({"image": datasets.Image()})
        if names is not None:
            ids = {name: number for number, name in enumerate(names)}
            columns["label"] = pa.array([ids[path.partition("/")[0]] for path in paths], pa.int64())
            features["label"] = ClassLabel(names=names)
        found = "without labels" if names is None else f"of {len(names)} classes"
        logger.info(f"The split {split!r}, {root}: {len(paths)} pictures {found}.")
        table = InMemoryTable(pa.table(columns, schema=features.arrow_schema))
        return Dataset(table, info=DatasetInfo(features=features), split=NamedSplit(split))

    def _pictures(self, split: str) -> dict[Folder, list[str]]:
        """Names of the pictures of a split, by the parts of their folders below its own."""
        top = self._folders[split]
        return {
            folder[len(top) :]: names for folder, names in self.listing.pictures.items() if folder[: len(top)] == top
        }

    def _class_names(self, split: str, pictures: dict[Folder, list[str]]) -> list[str] | None:
        """Names of the classes of a split by their ids; `None` if it has no labels."""
        strays = [folder for folder in sorted(pictures) if len(folder) != 1]
        if not strays:
            own = sorted({folder[0] for folder in pictures})
            if split == "train" or "train" not in self._folders:
                return own
            names = self._class_names("train", self._pictures("train"))
            unknown = [] if names is None else sorted(set(own) - set(names))
            if unknown and self.with_labels:
                path = self.listing.path((*self._folders[split], unknown[0]))
                raise ValueError(f"{path} is the folder of a class that the split 'train' does not have.")
            return own if unknown or names is None else names
        if strays != [()] or len(pictures) > 1:
            if not self.with_labels:
                return None
            folder = strays[-1]
            stray = self.listing.path((*self._folders[split], *folder), min(pictures[folder]))
            place = "deeper than in the folder of its class" if folder else "beside the folders of classes"
            splits = ""
            if self._folders == {"train": ()} and len(self._others) < len(self._tops):
                splits = f" The folders are not taken for splits, since {self._others} are none."
            raise ValueError(
                f"{stray} lies {place}: each picture of a split must lie in the folder of its class, or all of them "
                f"in one folder.{splits} Move it, or if no labels are needed, give `--label_column none`."
            )
        return None


def _to_images(paths: list[str]) -> pa.StructArray:
    """Files as `datasets` stores an image."""
    try:
        column = pa.array(paths, pa.string())
    except UnicodeEncodeError as error:
        raise ValueError(f"The name of the file {error.object!r} is not in UTF-8: rename it.") from error
    return pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), column], ["bytes", "path"])
