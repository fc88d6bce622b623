import functools
import io
import os
import re
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader

from hf_ifsq.training.data import (
    ImageDataset,
    ImageTransform,
    ResumableSampler,
    draw,
    load_image_dataset,
    load_splits,
    pick_split,
    read_class_names,
)


NAMES = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pictures(count=6, height=8, width=8, channels=3, seed=0):
    generator = np.random.default_rng(seed)
    shape = (count, height, width) + ((3,) if channels == 3 else ())
    return [Image.fromarray(array) for array in generator.integers(0, 256, shape, dtype=np.uint8)]


def make_dataset(images, labels=None):
    labels = [index % len(NAMES) for index in range(len(images))] if labels is None else labels
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def make_data(rows, channels=3, label_column="label", resolution=8, **options):
    return ImageDataset(rows, ImageTransform(resolution, channels, **options), label_column=label_column)


def to_pixels(array):
    """Pixels in [0, 255], channels last or missing, as `pixel_values`."""
    array = np.asarray(array, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


# --- the order ---


@pytest.mark.parametrize("num_samples, seed", [(7, 0), (1, 3), (40, 12)])
def test_each_pass_is_another_permutation(num_samples, seed):
    pairs = list(ResumableSampler(num_samples, seed, 0, 5 * num_samples))
    assert [position for _, position in pairs] == list(range(5 * num_samples))
    passes = np.array([index for index, _ in pairs]).reshape(5, num_samples)
    assert (np.sort(passes) == np.arange(num_samples)).all()
    if num_samples > 5:
        assert len({tuple(order) for order in passes}) == 5
        other = [index for index, _ in ResumableSampler(num_samples, seed + 1, 0, num_samples)]
        assert other != passes[0].tolist() != list(range(num_samples))


def test_a_stream_cut_anywhere_goes_on_equally():
    whole = list(ResumableSampler(7, 5, 0, 24))
    for cut in range(25):
        head, tail = ResumableSampler(7, 5, 0, cut), ResumableSampler(7, 5, cut, 24)
        assert [*head, *tail] == whole and len(head) == cut and len(tail) == 24 - cut
    assert list(ResumableSampler(7, 5, 24, 20)) == [] and len(ResumableSampler(7, 5, 24, 20)) == 0


# --- the images ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stored", [1, 3])
def test_plain_images(channels, stored):
    images = pictures(channels=stored)
    images[0].putpixel((0, 0), 0 if stored == 1 else (0, 0, 0))
    images[0].putpixel((1, 0), 255 if stored == 1 else (255, 255, 255))
    data = make_data(make_dataset(images), channels)
    assert len(data) == 6
    for index, image in enumerate(images):
        item = data[index]
        assert item["pixel_values"].dtype == torch.float32 and item["pixel_values"].is_contiguous()
        expected = to_pixels(image.convert("L" if channels == 1 else "RGB"))
        torch.testing.assert_close(item["pixel_values"], expected, rtol=0, atol=1e-6)
        assert item["class_labels"].dtype == torch.int64 and item["class_labels"] == index % 3
    first = data[0]["pixel_values"]
    assert first[:, 0, 0].tolist() == [-1] * channels and first[:, 0, 1].tolist() == [1] * channels


def test_images_without_labels():
    data = make_data(make_dataset(pictures()).remove_columns("label"), label_column=None)
    assert data[0].keys() == {"pixel_values", "position"}


@pytest.mark.parametrize("height, width", [(8, 14), (14, 8), (8, 8), (8, 11)])
def test_center_crop(height, width):
    (image,) = pictures(1, height, width)
    array = np.asarray(image)
    top, left = (height - 8) / 2, (width - 8) / 2
    allowed = [
        to_pixels(array[y : y + 8, x : x + 8])
        for y in {int(np.floor(top)), int(np.ceil(top))}
        for x in {int(np.floor(left)), int(np.ceil(left))}
    ]
    plain = make_data(make_dataset([image]))
    center = make_data(make_dataset([image]), center_crop=True)
    for item in (plain[0], center[0, 0], center[0, 17]):
        assert any(torch.allclose(item["pixel_values"], crop, atol=1e-6) for crop in allowed)


@pytest.mark.parametrize("side, resolution", [(24, 8), (8, 24), (12, 8)])
def test_resized_to_the_resolution(side, resolution):
    (image,) = pictures(1, side, 2 * side)
    data = make_data(make_dataset([image]), resolution=resolution)
    # The middle of the whole image, resized.
    whole = np.asarray(image.resize((2 * resolution, resolution), Image.Resampling.BICUBIC))
    expected = to_pixels(whole[:, resolution // 2 : resolution // 2 + resolution])
    torch.testing.assert_close(data[0]["pixel_values"], expected, rtol=0, atol=1.01 / 127.5)


def find_crop(crop, array):
    """Every (top, left) at which a crop of unchanged size lies in an image, and of its mirror image."""
    side = crop.shape[1]
    places = [(y, x) for y in range(array.shape[0] - side + 1) for x in range(array.shape[1] - side + 1)]
    return [
        (y, x, flipped)
        for y, x in places
        for flipped in (False, True)
        if torch.allclose(crop.flip(2) if flipped else crop, to_pixels(array[y : y + side, x : x + side]), atol=1e-6)
    ]


@pytest.mark.parametrize("height, width", [(8, 13), (13, 8)])
@pytest.mark.parametrize("random_flip", [False, True])
def test_random_crops_lie_in_the_image_and_cover_it(height, width, random_flip):
    (image,) = pictures(1, height, width)
    data = make_data(make_dataset([image]), random_flip=random_flip)
    found = [find_crop(data[0, position]["pixel_values"], np.asarray(image)) for position in range(200)]
    assert all(len(places) == 1 for places in found)
    places = [place for (place,) in found]
    assert {(y, x) for y, x, _ in places} == {(y, x) for y in range(height - 7) for x in range(width - 7)}
    flips = sum(flipped for *_, flipped in places)
    assert 70 < flips < 130 if random_flip else flips == 0


def test_crop_scale():
    # A ramp: the difference of a crop's first and last pixel is its side less one pixel, in the image's pixels.
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1)))
    data = make_data(make_dataset([ramp]), 1, resolution=32, min_crop_scale=0.5)
    pixels = torch.stack([data[0, position]["pixel_values"][0] for position in range(200)])
    step = (pixels[:, 16, 24] - pixels[:, 16, 8]) / 16  # a share of the scale: 2 at 1.0
    scale = step / (4 / 127.5) / 2
    assert scale.min() > 0.48 and scale.max() < 1.02 and scale.min() < 0.55 and scale.max() > 0.95
    assert pixels.min() >= -1 and (pixels[:, 16, -1] <= ramp.getpixel((63, 0)) / 127.5 - 1 + 0.03).all()


def test_augmentations_depend_on_seed_and_position_alone():
    images = pictures(3, 8, 20)
    args = {"random_flip": True, "min_crop_scale": 0.5}
    data = make_data(make_dataset(images), seed=1, **args)
    first = [data[0, position]["pixel_values"] for position in range(20)]
    torch.manual_seed(99)
    np.random.seed(99)
    again = make_data(make_dataset(images[:1]), seed=1, **args)
    for position in reversed(range(20)):
        assert torch.equal(again[0, position]["pixel_values"], first[position])
    other = make_data(make_dataset(images), seed=2, **args)
    assert sum(torch.equal(other[0, position]["pixel_values"], first[position]) for position in range(20)) < 5
    assert len({tuple(pixels.flatten().tolist()) for pixels in first}) > 15


def test_workers_give_the_same_as_none():
    data = make_data(make_dataset(pictures(10, 8, 20)), random_flip=True)
    batches = [
        list(DataLoader(data, batch_size=4, sampler=ResumableSampler(10, 0, 3, 27), num_workers=workers))
        for workers in (0, 2)
    ]
    assert len(batches[0]) == len(batches[1]) == 6
    for one, other in zip(*batches):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["class_labels"], other["class_labels"])


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_bad_channels(channels):
    with pytest.raises(ValueError, match=f"`channels` must be 1.*3.*got {channels}"):
        make_data(make_dataset(pictures()), channels)


# --- where they come from ---


def first_pixels(dataset):
    return [image.convert("RGB").getpixel((0, 0)) for image in dataset["image"]]


@pytest.fixture
def source(request, tmp_path):
    """Arguments that name nine training and three validation images, in one of the layouts."""
    train, test = make_dataset(pictures(9)), make_dataset(pictures(3, seed=1))
    if request.param == "imagefolder":
        for split, rows in (("train", train), ("test", test)):
            for number, row in enumerate(rows):
                folder = tmp_path / "data" / split / NAMES[row["label"]]
                folder.mkdir(parents=True, exist_ok=True)
                row["image"].save(folder / f"{number}.png")
        return {"train_data_dir": str(tmp_path / "data")}, train, test
    if request.param == "save_to_disk":
        DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "data")
        return {"dataset_name": str(tmp_path / "data")}, train, test
    (tmp_path / "data").mkdir()
    train.to_parquet(tmp_path / "data" / "train.parquet")
    if request.param == "file":
        return {"dataset_name": str(tmp_path / "data" / "train.parquet")}, train, None
    test.to_parquet(tmp_path / "data" / "test.parquet")
    return {"dataset_name": str(tmp_path / "data")}, train, test


@pytest.mark.parametrize("source", ["imagefolder", "file", "folder", "save_to_disk"], indirect=True)
def test_load_image_dataset(source):
    arguments, train, test = source
    loaded_train, loaded_test = load_image_dataset(**arguments)
    assert (loaded_test is None) == (test is None)
    for loaded, expected in ((loaded_train, train), (loaded_test, test)):
        if expected is not None:
            pairs = zip(first_pixels(expected), expected["label"])
            assert sorted(zip(first_pixels(loaded), loaded["label"])) == sorted(pairs)
    assert read_class_names(loaded_train, "label") == dict(enumerate(NAMES))


def test_a_single_saved_dataset(tmp_path):
    train = make_dataset(pictures(9))
    train.save_to_disk(tmp_path / "data")
    loaded, validation = load_image_dataset(dataset_name=str(tmp_path / "data"))
    assert validation is None and first_pixels(loaded) == first_pixels(train)
    assert read_class_names(loaded, "label") == dict(enumerate(NAMES))


@pytest.fixture
def three_splits(tmp_path):
    splits = {"train": pictures(9), "validation": pictures(4, seed=1), "test": pictures(5, seed=2)}
    DatasetDict({name: make_dataset(images) for name, images in splits.items()}).save_to_disk(tmp_path / "data")
    return str(tmp_path / "data")


@pytest.mark.parametrize(
    "overrides, train_size, validation_size",
    [
        ({}, 9, 4),
        ({"train_split": "test", "validation_split": "train"}, 5, 9),
        ({"validation_split": "test"}, 9, 5),
        ({"max_validation_samples": 2}, 9, 2),
        ({"max_train_samples": 3}, 3, 4),
        ({"max_train_samples": 100}, 9, 4),
    ],
)
def test_choice_of_splits_and_samples(three_splits, overrides, train_size, validation_size):
    train, validation = load_image_dataset(dataset_name=three_splits, **overrides)
    assert (len(train), len(validation)) == (train_size, validation_size)


def test_max_train_samples_are_drawn_by_the_seed(three_splits):
    def draw(seed):
        train, _ = load_image_dataset(dataset_name=three_splits, max_train_samples=5, seed=seed)
        return first_pixels(train)

    whole, _ = load_image_dataset(dataset_name=three_splits)
    assert draw(0) == draw(0) and set(draw(0)) < set(first_pixels(whole))
    assert len({tuple(draw(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("sources", [{}, {"dataset_name": "images", "train_data_dir": "photos"}])
def test_exactly_one_source(sources):
    with pytest.raises(ValueError, match="either `dataset_name` or `train_data_dir`, got"):
        load_splits(**sources)


@pytest.mark.parametrize("options", [{"resolution": 0}, {"min_crop_scale": 0.0}, {"min_crop_scale": 1.5}])
def test_bad_transforms(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"`{name}` must be .*got {value}"):
        ImageTransform(**{"resolution": 8, **options})


def test_the_only_split_is_trained_on(tmp_path):
    DatasetDict({"photos": make_dataset(pictures(4))}).save_to_disk(tmp_path / "data")
    train, validation = load_image_dataset(dataset_name=str(tmp_path / "data"))
    assert len(train) == 4 and validation is None


@pytest.mark.parametrize(
    "overrides, match",
    [
        ({"train_split": "trian"}, r"`train_split`.*\['train', 'validation', 'test'\].*'trian'"),
        ({"validation_split": "valid"}, r"`validation_split`.*\['train', 'validation', 'test'\].*'valid'"),
        ({"image_column": "img"}, r"`image_column` 'img'.*\['image', 'label'\]"),
        ({"image_column": "label"}, "`image_column` 'label'.*images"),
    ],
)
def test_missing_splits_and_columns(three_splits, overrides, match):
    with pytest.raises(ValueError, match=match):
        load_image_dataset(dataset_name=three_splits, **overrides)


def test_several_splits_without_train(tmp_path):
    splits = {"a": make_dataset(pictures(2)), "b": make_dataset(pictures(2))}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"`train_split`.*\['a', 'b'\].*None"):
        load_image_dataset(dataset_name=str(tmp_path / "data"))


# --- class names ---


def labelled(labels, feature=None):
    return Dataset.from_dict({"label": labels}, features=Features({"label": feature or Value("int64")}))


def test_class_names():
    assert read_class_names(labelled([2, 0, 2], ClassLabel(names=NAMES)), "label") == dict(enumerate(NAMES))
    assert read_class_names(labelled([0, 3, 1]), "label") == {0: "0", 1: "1", 2: "2", 3: "3"}


@pytest.mark.parametrize(
    "dataset, column, got",
    [
        (labelled([0]), "kind", "['label']"),
        (labelled([0, -2]), "label", "[-2, 0]"),
        (labelled([0, -1, 2], ClassLabel(names=NAMES)), "label", "[-1, 2]"),
        (labelled([0.5], Value("float64")), "label", "['0.5']"),
        (labelled(["cat"], Value("string")), "label", "['cat']"),
        (labelled([True], Value("bool")), "label", "['True']"),
        (labelled([0, None]), "label", "None"),
    ],
)
def test_bad_labels(dataset, column, got):
    with pytest.raises(ValueError, match=f"`label_column` '{column}'.*{re.escape(got)}"):
        read_class_names(dataset, column)


def test_labels_are_only_read_if_asked_for():
    rows = [{"image": image, "label": "cat"} for image in pictures(2)]
    assert set(make_data(rows, label_column=None)[1]) == {"pixel_values", "position"}


@pytest.mark.parametrize("mode", ["I", "I;16", "F", None])
def test_images_that_would_be_cut_off(mode):
    image = None if mode is None else Image.new(mode, (16, 16))
    data = make_data([{"image": image}], label_column=None)
    with pytest.raises(ValueError, match=f"Row 0 of `image_column` 'image'.*got {'None' if mode is None else 'mode'}"):
        data[0]


def test_transparency_is_put_on_white():
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 51))
    data = make_data([{"image": image}], label_column=None, resolution=16)
    # A fifth of red (1, -1, -1) on white (1, 1, 1), to one of 256 steps.
    expected = torch.tensor([1.0, 0.6, 0.6]).view(3, 1, 1).expand(3, 16, 16)
    torch.testing.assert_close(data[0]["pixel_values"], expected, atol=1 / 127.5, rtol=0)


# --- images that cannot be read ---


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def broken_images():
    (image,) = pictures(1, 48, 64)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    return {
        "truncated.jpg": encode(image, "JPEG")[:1500],
        "truncated.png": encode(image)[:1500],
        "empty.png": b"",
        "page.png": b"<html>404</html>",
        "text.png": encode(image, pnginfo=text),
        "bomb.png": encode(Image.new("1", (20000, 20000))),
    }


@pytest.mark.parametrize("name", broken_images())
@pytest.mark.parametrize("options", [{}, {"max_train_samples": 5, "seed": 0}])
def test_broken_images_in_rows_are_named(tmp_path, name, options):
    """By their row in the dataset, wherever it is among those that are drawn."""
    images = [{"bytes": encode(pictures(1)[0]), "path": f"{row}.png"} for row in range(6)]
    images[3] = {"bytes": broken_images()[name], "path": name}
    make_dataset(images).to_parquet(tmp_path / "train.parquet")
    data = make_data(load_image_dataset(str(tmp_path / "train.parquet"), **options)[0])
    named = rf"Row 3 of `image_column` 'image' of the split 'train' \({name}\) cannot be read: \w+"
    with pytest.raises(ValueError, match=named):
        list(DataLoader(data, batch_size=2))
    if name == "page.png":
        with pytest.raises(ValueError, match=named):
            list(DataLoader(data, batch_size=2, num_workers=1, sampler=ResumableSampler(len(data), 0, 0, len(data))))


@pytest.mark.parametrize("wrong", ["page", "gone", "folder"])
def test_broken_files_are_named(tmp_path, wrong):
    for row, image in enumerate(pictures(4)):
        path = tmp_path / "data" / "a" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    train, _ = load_image_dataset(train_data_dir=str(tmp_path / "data"))
    path.unlink()
    if wrong == "page":
        path.write_text("<html>404</html>")
    elif wrong == "folder":
        path.mkdir()
    data = make_data(train)
    assert len([data[index] for index in range(3)]) == 3
    with pytest.raises(ValueError, match=rf"Row 3 of .*'train' \({re.escape(str(path))}\) cannot be read"):
        data[3]


def test_images_are_decoded_as_datasets_does():
    """Turned as their EXIF says, and in the mode that the feature asks for."""
    (image,) = pictures(1, 12, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [encode(image, exif=exif), encode(image.convert("P")), encode(image.convert("LA")), encode(image, "WEBP")]
    for feature in (datasets.Image(), datasets.Image(mode="L"), datasets.Image(decode=False)):
        rows = Dataset.from_dict({"image": images}, features=Features({"image": feature}))
        decoded = rows.cast_column("image", datasets.Image(mode=feature.mode))
        data = make_data(rows, label_column=None)
        for index in range(len(images)):
            expected = ImageTransform(8)(decoded[index]["image"])
            assert torch.equal(data[index]["pixel_values"], expected)


def test_other_columns_are_not_read():
    rows = make_dataset(pictures(2)).add_column(
        "mask", [{"bytes": b"broken", "path": None}] * 2, feature=datasets.Image()
    )
    assert make_data(rows)[1].keys() == {"pixel_values", "class_labels", "position"}


def test_rows_with_a_transform_of_their_own():
    images = pictures(3)
    rows = make_dataset(images).with_transform(lambda batch: {"image": [image.rotate(90) for image in batch["image"]]})
    data = make_data(rows, label_column=None)
    assert torch.equal(data[1]["pixel_values"], to_pixels(images[1].rotate(90)))


# --- tables of other programs ---


@pytest.mark.parametrize("stored", ["bytes", "large bytes", "struct", "struct of bytes", "paths"])
def test_images_without_their_feature(tmp_path, stored):
    images = pictures(4)
    contents = [encode(image) for image in images]
    for row, content in enumerate(contents):
        (tmp_path / f"{row}.png").write_bytes(content)
    column = {
        "bytes": pa.array(contents),
        "large bytes": pa.array(contents, pa.large_binary()),
        "struct": pa.array([{"bytes": content, "path": None} for content in contents]),
        "struct of bytes": pa.array([{"bytes": content} for content in contents]),
        "paths": pa.array([str(tmp_path / f"{row}.png") for row in range(4)]),
    }[stored]
    (tmp_path / "[a] b").mkdir()
    file = tmp_path / "[a] b" / "train.parquet"
    pq.write_table(pa.table({"image": column, "label": [0, 1, 0, 1]}), file)
    train, _ = load_image_dataset(str(file))
    data = make_data(train)
    assert all(torch.equal(data[row]["pixel_values"], to_pixels(image)) for row, image in enumerate(images))


@pytest.mark.parametrize(
    "values, match",
    [
        (["a/0.png"], r"`image_column` 'image' must hold images.*'a/0\.png'.*cast_column\('image', Image\(\)\)"),
        ([[[0, 255]]], "`image_column` 'image' must hold images.*List"),
    ],
)
def test_columns_that_are_no_images(tmp_path, values, match):
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": values}), file)
    with pytest.raises(ValueError, match=match):
        load_image_dataset(str(file))


def test_split_without_rows():
    with pytest.raises(ValueError, match="`train_split` 'train' has no rows"):
        pick_split({"train": make_dataset([])}, "train", "train_split")


def test_files_and_paths_that_cannot_be_read(tmp_path):
    (tmp_path / "x.csv").write_text("image\n")
    with pytest.raises(ValueError, match="`dataset_name` .*x.csv' must be a parquet file"):
        load_image_dataset(str(tmp_path / "x.csv"))
    make_dataset(pictures(1)).to_parquet(tmp_path / "[a]" / "train.parquet")
    with pytest.raises(ValueError, match=r"\[a\]' cannot be read: `datasets` takes brackets"):
        load_image_dataset(str(tmp_path / "[a]"))


# --- labels of two splits ---


def save_splits(folder, **labels):
    """Splits whose labels are given, of any type, or as names with their `ClassLabel`."""
    splits = {}
    for split, values in labels.items():
        feature = None
        if isinstance(values, tuple):
            values, feature = values
        images = {"image": [encode(image) for image in pictures(len(values))]}
        rows = Dataset.from_dict(images, features=Features({"image": datasets.Image()}))
        splits[split] = rows.add_column("label", values, feature=feature)
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize(
    "train, validation, ids",
    [
        (["eel", "cat", "dog", "cat"], ["dog", "eel"], [1, 2]),
        (["eel", "cat", "dog", "cat"], ([0, 1], ClassLabel(names=["dog", "eel"])), [1, 2]),
        (([2, 0, 1, 0], ClassLabel(names=NAMES)), ["dog", "eel"], [1, 2]),
        (([2, 0, 1, 0], ClassLabel(names=NAMES)), ([1, 0], ClassLabel(names=["eel", "dog"])), [1, 2]),
        (([2, 0, 1, 0], ClassLabel(names=NAMES)), ([1, 2], ClassLabel(names=NAMES)), [1, 2]),
    ],
)
def test_names_have_the_ids_of_training(tmp_path, train, validation, ids):
    folder = save_splits(tmp_path / "data", train=train, test=validation)
    for options, drawn in (({}, [2, 0, 1, 0]), ({"max_train_samples": 2, "seed": 3}, None)):
        loaded, other = load_image_dataset(folder, label_column="label", **options)
        assert read_class_names(loaded, "label", other) == dict(enumerate(NAMES))
        assert list(other["label"]) == ids and make_data(other)[1]["class_labels"] == ids[1]
        assert drawn is None or list(loaded["label"]) == drawn
    assert load_image_dataset(folder)[0].features["label"] != other.features["label"] or isinstance(train, tuple)


@pytest.mark.parametrize(
    "train, validation, match",
    [
        (["cat", "dog"], ["cat", "fox"], r"'label' of the split 'test' has classes .*\['fox'\]"),
        ([0, 1], [-1, -1], r"'label' of the split 'test' must hold labels in \[0, 2\).*\[-1, -1\].*keeps to itself"),
        ([0, 1], [0.0, 1.0], r"'label' of the split 'test' must hold integers.*double.*class_encode_column"),
        ([0, 1], [None, 1], r"'label' of the split 'test' must hold integers, got None in 1 rows, first in row 0"),
    ],
)
def test_labels_of_validation_that_cannot_be_used(tmp_path, train, validation, match):
    folder = save_splits(tmp_path / "data", train=train, test=validation)
    with pytest.raises(ValueError, match=f"`label_column` {match}.*`--validation_split none` leaves"):
        loaded, other = load_image_dataset(folder, label_column="label")
        read_class_names(loaded, "label", other)
    loaded, other = load_image_dataset(folder, label_column="label", validation_split="none")
    assert other is None and len(read_class_names(loaded, "label")) == 2


def test_labels_of_drawn_rows_are_read_at_once():
    """In less than a second at the size of ImageNet; row by row it takes minutes."""
    rows = labelled(np.arange(400_000) % 1000)
    start = time.perf_counter()
    for chosen in (rows, rows.shuffle(seed=0).select(range(300_000))):
        assert len(read_class_names(chosen, "label", chosen)) == 1000
    assert time.perf_counter() - start < 2
    assert read_class_names(labelled([7, 1, 0]).select([2, 1]), "label") == {0: "0", 1: "1"}


def test_a_missing_label_is_named_by_its_row_as_it_is_stored(tmp_path):
    features = Features({"image": datasets.Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": pictures(6), "label": [0, 1, 0, 1, None, 1]}, features=features)
    (tmp_path / "rows").mkdir()
    rows.to_parquet(tmp_path / "rows" / "train.parquet")
    for seed in range(4):
        train, _ = load_image_dataset(str(tmp_path / "rows"), label_column="label", max_train_samples=5, seed=seed)
        if None in train["label"][:]:
            with pytest.raises(ValueError, match="first in row 4"):
                read_class_names(train, "label")


@pytest.mark.parametrize("limit", [0, -1, 2.5, "3"])
def test_numbers_of_rows_that_are_none(limit):
    with pytest.raises(ValueError, match="`max_samples` must be an integer"):
        draw(make_dataset(pictures(4)), limit, 0)


@pytest.mark.parametrize("format", ["torch", "numpy", "arrow"])
def test_rows_in_another_format(format):
    images = pictures(3)
    data = make_data(make_dataset(images).with_format(format))
    assert torch.equal(data[1]["pixel_values"], to_pixels(images[1])) and data[1]["class_labels"] == 1


def test_a_dataset_with_a_validation_split_alone_is_not_validated_on_itself(tmp_path):
    DatasetDict({"validation": make_dataset(pictures(4))}).save_to_disk(tmp_path / "rows")
    train, validation = load_image_dataset(str(tmp_path / "rows"))
    assert len(train) == 4 and validation is None


def test_fingerprint_of_rows(tmp_path):
    """The same for the same rows, read again; another for other rows in the same place."""

    def fingerprint(seed, **options):
        make_dataset(pictures(6, seed=seed)).to_parquet(tmp_path / "rows.parquet")
        os.utime(tmp_path / "rows.parquet", (seed, seed))
        return make_data(load_image_dataset(str(tmp_path / "rows.parquet"), **options)[0]).fingerprint

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)
    assert fingerprint(1, max_train_samples=3) == fingerprint(1, max_train_samples=3) != fingerprint(1)
