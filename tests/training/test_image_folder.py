import logging
import os
import re
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_ifsq.training.data import ImageDataset, ImageTransform, load_image_dataset, read_class_names


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def root(tmp_path):
    """A folder whose path is like a pattern."""
    return tmp_path / "[2024] pictures?"


def save(root, *files):
    """Pictures of one colour each, by which they are known again."""
    for number, file in enumerate(files):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * number).save(path)


def load(root, source="train_data_dir", **options):
    return load_image_dataset(**{source: str(root)}, **{"label_column": "label", **options})


def read(rows):
    """Number of each picture, of `save`, and the name of its class."""
    data = ImageDataset(rows, ImageTransform(8, channels=1))
    numbers = [round((data[index]["pixel_values"].mean().item() + 1) * 127.5 / 20) for index in range(len(data))]
    if "label" not in rows.column_names:
        return numbers
    feature = rows.features["label"]
    return [(number, feature.int2str(label)) for number, label in zip(numbers, rows["label"])]


@pytest.mark.parametrize("source", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize(
    "files, train, validation",
    [
        (["cat/0.png", "ant/1.png"], [(1, "ant"), (0, "cat")], None),
        (["cats/0.png", "cats/1.png"], [(0, "cats"), (1, "cats")], None),
        (["0.png", "1.png"], [0, 1], None),
        (["bus/0.png", "train/1.png", "car/2.png"], [(0, "bus"), (2, "car"), (1, "train")], None),
        (["dev/0.png", "test/1.png"], [(0, "dev"), (1, "test")], None),
        (["a/0.png", "a/my-train-set.png", "b/test.png"], [(0, "a"), (1, "a"), (2, "b")], None),
        (["a/0.PNG", "a/1.avif", "b/2.JPeG"], [(0, "a"), (1, "a"), (2, "b")], None),
        (["train/a/0.png", "train/b/1.png", "val/b/2.png"], [(0, "a"), (1, "b")], [(2, "b")]),
        (["Training/a/0.png", "valid/a/1.png", "test/a/2.png"], [(0, "a")], [(1, "a")]),
        (["train2017/a/0.png", "test2017/a/1.png"], [(0, "a")], [(1, "a")]),
        (["val/a/0.png", "val/b/1.png"], [(0, "a"), (1, "b")], None),
        (["train/a/0.png", "val/1.png"], [(0, "a")], [1]),
    ],
)
def test_layouts(root, source, files, train, validation):
    save(root, *files)
    loaded = load(root, source)
    assert read(loaded[0]) == train
    assert (loaded[1] and read(loaded[1])) == validation


@pytest.mark.parametrize("folders", [["a", "a-b", "b.c", "B"], ["train/a", "train/a b", "test/a"], ["."]])
def test_rows_are_in_the_order_of_datasets(tmp_path, folders):
    """So that the rows that a seed draws, and the results of runs, are those that its imagefolder would give."""
    names = ["x10.png", "x2.png", "Z.png", "y 1.png", "é.png"]
    save(tmp_path / "data", *(f"{folder}/{name}" for folder in folders for name in names))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "data"))
    for ours in load(tmp_path / "data"):
        if ours is not None:
            assert len(ours) % 5 == 0 and read(ours) == read(theirs[str(ours.split)])


def test_splits_without_class_folders(root):
    """Or two classes: who needs labels must say which."""
    save(root, "train/0.png", "val/1.png")
    with pytest.raises(ValueError, match=r"\['train', 'val'\].* folder `train`.*--label_column none"):
        load(root)
    for label_column in (None, "none"):
        train, validation = load(root, label_column=label_column)
        assert (read(train), read(validation)) == ([0], [1])


@pytest.mark.parametrize(
    "files, named",
    [
        (["a/0.png", "b/1.png", "cover.png"], r"/cover\.png lies beside"),
        (["a/0.png", "b/1.png", "a/more/x.png"], r"/a/more/x\.png lies deeper"),
        (["train/a/0.png", "val/a/0.png", "cover.png"], r"/cover\.png lies beside .*\['train', 'val'\]"),
        (["train/a/0.png", "val/a/0.png", "train/x.png"], r"/train/x\.png lies beside"),
        (["train/a/0.png", "val/a/0.png", "extra/a/x.png"], r"a/.\.png lies deeper.*\['extra'\] are none"),
        (["train/a/0.png", "val/a/0.png", "dev/a/1.png"], r"\['dev', 'train', 'val'\].* one split"),
        (["train/n01/images/0.png", "val/images/0.png"], r"/train/n01/images/0\.png lies deeper"),
        (["train/a/0.png", "val/b/1.png"], r"/val/b/ .* 'train' does not have.*--validation_split none"),
        (["train/a/0.png", "val/a/1.png", "val/x.png"], r"/val/x\.png lies beside.*--validation_split none"),
    ],
)
def test_what_breaks_the_layout_is_named(root, files, named):
    save(root, *files)
    with pytest.raises(ValueError, match=named):
        load(root)


@pytest.mark.parametrize(
    "files", [["a/0.png", "cover.png", "a/more/x.png"], ["train/n01/images/0.png", "train/1.png"]]
)
def test_any_depth_without_labels(root, files):
    save(root, *files)
    train, validation = load(root, label_column="none")
    assert validation is None and sorted(read(train)) == list(range(len(files)))


@pytest.mark.parametrize("broken", ["val/b/1.png", "val/x.png", "val/a/more/x.png"])
def test_what_is_wrong_in_a_split_that_is_left_out(root, broken):
    save(root, "train/a/0.png", "val/a/1.png", broken)
    train, validation = load(root, validation_split="none")
    assert validation is None and read(train) == [(0, "a")]


def test_validation_has_the_ids_of_training(root):
    save(root, "train/a/0.png", "train/b/1.png", "train/c/2.png", "val/c/3.png")
    train, validation = load(root)
    assert list(validation["label"]) == [2] and validation.features == train.features


def test_validation_without_labels(root):
    save(root, "train/a/0.png", "val/1.png")
    train, validation = load(root)
    with pytest.raises(ValueError, match=r"`label_column` 'label'.* split 'validation'.*--validation_split none"):
        read_class_names(train, "label", validation)


@pytest.mark.parametrize("links", ["a", "ab"])
def test_linked_classes_and_pictures(tmp_path, root, links):
    save(tmp_path / "all", "a/0.png", "b/1.png", "c/2.png")
    save(root, "c/0.png")
    for name in "ab":
        if name in links:
            (root / name).symlink_to(tmp_path / "all" / name)
        else:
            shutil.copytree(tmp_path / "all" / name, root / name)
    (root / "c" / "link.png").symlink_to(tmp_path / "all" / "c" / "2.png")
    assert read(load(root)[0]) == [(0, "a"), (1, "b"), (0, "c"), (2, "c")]


def test_links_that_lead_nowhere_or_around(root):
    save(root, "a/0.png", "b/1.png")
    (root / "c").symlink_to("gone")
    with pytest.raises(ValueError, match=r"/c is a link to nothing"):
        load(root)
    (root / "c").unlink()
    (root / "a" / "up").symlink_to(root)
    with pytest.raises(ValueError, match=r"/a/up/ is a link to a folder that it lies in"):
        load(root)


def test_pictures_that_pil_does_not_read(root):
    save(root, "a/0.png")
    (root / "a" / "x.HEIC").write_bytes(b"picture")
    with pytest.raises(ValueError, match=r"/a/x\.HEIC is a picture of a kind"):
        load(root)


def test_what_is_left_out_is_said(root, caplog):
    save(root, "a/0.png", "b/1.png")
    for name in ("README", "labels.csv", "a/0.txt", "a/Thumbs.db", "b/1.txt", ".DS_Store", "a/._0.png", "all.zip"):
        (root / name).write_text("text")
    (root / "c").mkdir()
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_text("text")
    caplog.set_level(logging.INFO)
    assert len(load(root)[0]) == 2
    said = "\n".join(caplog.messages)
    assert "6 files are no pictures and left out: 2 .txt" in said and "1 README" in said and "DS_Store" not in said
    assert re.search(r"1 folders are empty: \S+.*/c/", said) and "2 pictures of 2 classes" in said


@pytest.mark.parametrize("place, kinds", [("nowhere", ""), ("files", r".*\['.arrow', '.zip'\].*`dataset_name`")])
def test_no_pictures(tmp_path, place, kinds):
    (tmp_path / "files").mkdir()
    for name in ("a.zip", "b.arrow"):
        (tmp_path / "files" / name).write_text("text")
    with pytest.raises(ValueError, match=f"`train_data_dir` must be a folder of pictures, got .*{place}'{kinds}"):
        load(tmp_path / place)


def test_names_that_are_not_utf8(root):
    save(root, "a/0.png")
    try:
        shutil.copy(root / "a" / "0.png", os.fsencode(root / "a") + b"/\xe9.png")
    except OSError:
        pytest.skip("the file system takes no such name")
    with pytest.raises(ValueError, match="not in UTF-8"):
        load(root)


def test_metadata(tmp_path, caplog):
    """Read by `datasets`, with names of classes as ids."""
    for split, rows in {"train": "0.png,dog\n1.png,cat\n", "validation": "2.png,dog\n"}.items():
        save(tmp_path / "data" / split, "0.png", "1.png", "2.png")
        (tmp_path / "data" / split / "metadata.csv").write_text(f"file_name,label\n{rows}")
    train, validation = load(tmp_path / "data")
    assert (read(train), read(validation)) == ([(0, "dog"), (1, "cat")], [(2, "dog")])
    assert "there are 6" in caplog.text


def test_of_pictures_and_rows_neither_is_left_out_in_silence(tmp_path):
    save(tmp_path / "data", "a/logo.png", "b/logo.png")
    content = (tmp_path / "data" / "a" / "logo.png").read_bytes()
    table = pa.table({"image": [{"bytes": content, "path": None}] * 3, "label": [0, 1, 0]})
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match="`dataset_name`.*has pictures and files of rows, such as .*train.parquet"):
        load(tmp_path / "data", "dataset_name")
    assert len(load(tmp_path / "data" / "train.parquet", "dataset_name")[0]) == 3
    assert len(load(tmp_path / "data", "train_data_dir")[0]) == 2


def test_metadata_that_names_no_files_is_no_metadata(tmp_path):
    save(tmp_path / "data", "a/0.png", "b/1.png")
    (tmp_path / "data" / "metadata.csv").write_text("id,photographer\n0,nobody\n")
    for source in ("train_data_dir", "dataset_name"):
        train, _ = load(tmp_path / "data", source)
        assert train["label"][:] == [0, 1]


def test_an_empty_path_is_not_the_working_folder(tmp_path, monkeypatch):
    save(tmp_path, "a/0.png")
    monkeypatch.chdir(tmp_path)
    for source in ("train_data_dir", "dataset_name"):
        with pytest.raises(ValueError, match="is empty"):
            load("", source)
