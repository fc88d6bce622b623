"""The files of a token dataset that `tokenize_dataset.py` makes: shards in parquet, their description, and a card."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, DatasetInfo, Features, List, SplitDict, SplitInfo, Value
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from pyarrow.parquet import ParquetWriter

from hf_ifsq.training.data import ImageDataset
from hf_ifsq.training.tokens import INFO_FILE, TokenDatasetInfo


# Tokens are close to random: what can be saved is the bits that no token uses, and these lie together once the first
# bytes of all numbers of a page are followed by all their second bytes, and so on. Features hardly get smaller.
PARQUET_OPTIONS = {
    "compression": "zstd",
    "compression_level": {"indices.list.element": 12},
    "use_byte_stream_split": True,
    "use_dictionary": False,
    "write_statistics": False,
    "data_page_size": 2**23,
    # Compresses the list structure too, which version 2 leaves as it is.
    "data_page_version": "1.0",
}

# Bytes of rows kept in memory until they are written.
ROW_GROUP_BYTES = 2**25

CARD = Path(__file__).with_name("token_dataset_card.md")


@dataclass(frozen=True)
class Shard:
    """The rows `start` to `stop` of a split, which are the file `path`."""

    start: int
    stop: int
    path: Path


@dataclass(frozen=True)
class ShardBatches:
    """
    Batches of shards as keys of an [`ImageDataset`], for a `DataLoader`. No batch has rows of two shards, so that the
    content of a shard depends neither on the others nor on the process that makes it.

    Args:
        shards (`list[Shard]`): shards, one after another.
        batch_size (`int`): rows of a batch; the last one of a shard may have fewer.
        num_augmentations (`int`): rows per image, random crops drawn by the number of the row; 0 for one plain row.
    """

    shards: list[Shard]
    batch_size: int
    num_augmentations: int

    def count(self, shard: Shard) -> int:
        """Batches of a shard."""
        return math.ceil((shard.stop - shard.start) / self.batch_size)

    def __len__(self) -> int:
        return sum(map(self.count, self.shards))

    def __iter__(self) -> Iterator[list[int | tuple[int, int]]]:
        for shard in self.shards:
            for start in range(shard.start, shard.stop, self.batch_size):
                rows = range(start, min(start + self.batch_size, shard.stop))
                yield [(row // self.num_augmentations, row) if self.num_augmentations else row for row in rows]


class TokenDatasetWriter:
    """
    Writes a token dataset: `data/*.parquet`, which are shards of the splits, `token_dataset.json` and `README.md`, in
    the layout that `datasets.load_dataset` reads. A shard is in the folder as a whole or not at all, and the
    description has another name until all of them are: a run that was killed goes on with the shards that are missing.

    Args:
        folder (`str`): where to write.
        info ([`TokenDatasetInfo`]): what the rows are.
        label_feature (`datasets.ClassLabel` or `datasets.Value`, *optional*): type of the labels, if there are any.
    """

    def __init__(self, folder: str, info: TokenDatasetInfo, label_feature: ClassLabel | Value | None):
        self.folder = Path(folder)
        self.info = info
        dtype = np.min_scalar_type(info.tokenizer["codebook_size"] - 1)
        self.features = Features({"indices": List(Value(str(dtype)), length=info.num_tokens)})
        if label_feature is not None:
            self.features["label"] = label_feature
        if info.teacher is not None:
            feature = List(Value("float16"), length=info.teacher["hidden_size"])
            self.features["teacher_features"] = List(feature, length=info.num_tokens)

    def begin(self) -> None:
        """Prepare the folder, before any process writes shards and in only one of them."""
        for file in (self.folder / INFO_FILE, self._unfinished):
            if file.is_file():
                self._check_same(TokenDatasetInfo.from_file(file))
                return
        if any(self.folder.glob("data/*")):
            raise ValueError(f"`output_dir` {self.folder} has data of something else: choose another folder.")
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        _write_whole(self._unfinished, json.dumps(asdict(self.info), indent=2) + "\n")

    def shards(self, split: str) -> list[Shard]:
        """All files of a split, in the order of their rows."""
        num_rows, rows_per_shard = self.info.num_rows[split], self.info.shards["images_per_shard"]
        starts = range(0, num_rows, rows_per_shard)
        names = [f"{split}-{number:05d}-of-{len(starts):05d}.parquet" for number in range(len(starts))]
        ends = [min(start + rows_per_shard, num_rows) for start in starts]
        return [Shard(start, end, self.folder / "data" / name) for start, end, name in zip(starts, ends, names)]

    @contextlib.contextmanager
    def open(self, shard: Shard) -> Iterator[Callable[..., None]]:
        """
        Open a shard: what it gives adds a batch of rows, a tensor `(batch, ...)` for each column by its name. At the
        end the file takes the name of the shard.
        """
        partial = shard.path.with_name(f"partial-{shard.path.name}")
        schema = self.features.arrow_schema
        # Written in groups, for memory not to grow with a shard.
        group: list[pa.Table] = []
        num_rows = 0

        def flush() -> None:
            if group:
                writer.write_table(pa.concat_tables(group))
                group.clear()

        def add(**columns: torch.Tensor) -> None:
            nonlocal num_rows
            arrays = [_to_arrow(name, columns[name].cpu().numpy(), schema.field(name).type) for name in self.features]
            group.append(pa.table(arrays, schema=schema))
            num_rows += len(group[-1])
            if sum(table.nbytes for table in group) >= ROW_GROUP_BYTES:
                flush()

        with ParquetWriter(partial, schema, **PARQUET_OPTIONS) as writer:
            yield add
            flush()
        if num_rows != shard.stop - shard.start:
            raise RuntimeError(f"{shard.path} must get {shard.stop - shard.start} rows, got {num_rows}.")
        partial.rename(shard.path)

    def finish(self, title: str) -> None:
        """Write the card under a title and give the description its name, after all shards and in only one process."""
        # The names of the files say what split they are, not `configs` of the card: with these, `datasets` takes the
        # cached rows of any other folder of the same name for those of this one.
        splits = SplitDict()
        for name, num_rows in self.info.num_rows.items():
            splits.add(SplitInfo(name, num_examples=num_rows))
        content = DatasetInfosDict({"default": DatasetInfo(features=self.features, splits=splits)})
        metadata = DatasetCardData(tags=["image-tokens", "ifsq"])
        content.to_dataset_card_data(metadata)
        values = {"title": title, "info": self.info, "columns": list(self.features), "info_file": INFO_FILE}
        card = DatasetCard.from_template(metadata, str(CARD), None, **values)
        _write_whole(self.folder / "README.md", f"{card}\n")
        if self._unfinished.is_file():
            self._unfinished.rename(self.folder / INFO_FILE)

    @property
    def _unfinished(self) -> Path:
        return self.folder / f"partial-{INFO_FILE}"

    def _check_same(self, begun: TokenDatasetInfo) -> None:
        # Nested entries under names like `tokenizer.levels`.
        before, now = (pd.json_normalize(asdict(info)).iloc[0].to_dict() for info in (begun, self.info))
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            differences = ", ".join(f"`{name}` ({before.get(name)} and now {now.get(name)})" for name in names)
            raise ValueError(
                f"`output_dir` {self.folder} has a token dataset begun with other settings: {differences}. Give the "
                "same ones to go on, or another folder. A `sha256` differs where the files themselves are others."
            )


def fingerprint_images(data: ImageDataset, num_contents: int = 1000) -> str:
    """
    SHA-256 of the names, sizes and labels of all images of a dataset, and of the contents of at most `num_contents` of
    those that are drawn. Where they lie and when they were written makes no difference.
    """
    digest = hashlib.sha256()
    table = data.stored.data
    for images in table.column(data.image_column).chunks:
        paths = pc.struct_field(images, "path").to_pylist()
        sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
        for path, size in zip(paths, sizes):
            # A missing file is an error when it is read, which names it better.
            if size is None and path is not None and os.path.isfile(path):
                size = os.path.getsize(path)
            digest.update(f"{os.path.basename(path or '')} {size}\n".encode())
    if data.label_column is not None:
        digest.update(str(table.column(data.label_column).to_pylist()).encode())
    for index in np.linspace(0, len(data) - 1, min(len(data), num_contents)).astype(int).tolist():
        image = data.stored[index][data.image_column] or {}
        if image.get("bytes") is not None:
            digest.update(image["bytes"])
        elif os.path.isfile(image.get("path") or ""):
            digest.update(Path(image["path"]).read_bytes())
    return digest.hexdigest()


def _to_arrow(name: str, values: np.ndarray, arrow_type: pa.DataType) -> pa.Array:
    lengths = []
    while pa.types.is_fixed_size_list(arrow_type):
        lengths.append(arrow_type.list_size)
        arrow_type = arrow_type.value_type
    with np.errstate(over="ignore"):
        flat = values.reshape(-1).astype(arrow_type.to_pandas_dtype())
    if np.issubdtype(flat.dtype, np.floating) and not np.isfinite(flat).all():
        raise ValueError(f"`{name}` must be finite in {flat.dtype}, got values in [{values.min()}, {values.max()}].")
    array = pa.array(flat, type=arrow_type)
    for length in reversed(lengths):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array


def _write_whole(path: Path, text: str) -> None:
    """Write a text file that is there as a whole or not at all."""
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
