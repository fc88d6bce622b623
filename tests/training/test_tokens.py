import json
import math
import re
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Value
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from token_dataset_writer import ShardBatches, TokenDatasetWriter
from transformers import ViTConfig, ViTModel

import hf_ifsq
from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.models.image_tokenizer import as_image_tokenizer
from hf_ifsq.randomness import generators_at
from hf_ifsq.training.arguments import GeneratorArguments
from hf_ifsq.training.tokens import (
    TokenDataset,
    TokenDatasetInfo,
    fingerprint,
    load_token_dataset,
    remember_tokenizer,
)
from hf_ifsq.vision.vision_model import Teacher


NAMES = [f"class {number}" for number in range(10)]


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_info(num_rows, tokenizer=None, teacher=None, images_per_shard=10**6, **overrides):
    tokenizer = tokenizer or {"codebook_size": 60, "levels": [5, 4, 3], "grid_size": [4, 4]}
    content = {
        "tokenizer": {"name_or_path": "outputs/tokenizer", "revision": None, **tokenizer},
        "scaling_factor": 1.5,
        "resolution": 16,
        "teacher": teacher,
        "num_rows": num_rows,
        "images": {"dataset_name": "photos", "seed": 0},
        "shards": {"batch_size": 8, "images_per_shard": images_per_shard},
        "hf_ifsq_version": hf_ifsq.__version__,
    }
    return TokenDatasetInfo(**{**content, **overrides})


def write(folder, info, splits, label_feature=None):
    """Write splits given as columns of tensors, whole shards at once."""
    writer = TokenDatasetWriter(folder, info, label_feature)
    writer.begin()
    for split, columns in splits.items():
        for shard in writer.shards(split):
            with writer.open(shard) as add_rows:
                add_rows(**{name: column[shard.start : shard.stop] for name, column in columns.items()})
    writer.finish("Tokens of photos")
    return str(folder)


def random_columns(count, codebook_size=60, num_tokens=16, width=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = {
        "indices": torch.randint(codebook_size, (count, num_tokens), generator=generator),
        "label": torch.randint(len(NAMES), (count,), generator=generator),
    }
    if width is not None:
        columns["teacher_features"] = 20 * torch.randn(count, num_tokens, width, generator=generator)
    return columns


# --- the format ---


@pytest.mark.parametrize("grid_size, count", [((16, 16), 8000), ((8, 8), 20000)])
@pytest.mark.parametrize("codebook_size", [5**4, 9**4, 17**4, 33**4, 16384])
def test_size_on_disk(tmp_path, codebook_size, grid_size, count):
    """At most a tenth above the entropy of uniformly random tokens, their worst case, labels and all else included."""
    num_tokens = math.prod(grid_size)
    tokenizer = {"codebook_size": codebook_size, "levels": None, "grid_size": list(grid_size)}
    columns = random_columns(count, codebook_size, num_tokens)
    folder = write(
        tmp_path / "tokens", make_info({"train": count}, tokenizer), {"train": columns}, ClassLabel(names=NAMES)
    )
    size = sum(path.stat().st_size for path in (tmp_path / "tokens").rglob("*") if path.is_file())
    entropy = count * num_tokens * math.log2(codebook_size) / 8
    print(f"{num_tokens} tokens of {codebook_size}: {size / count:.0f} bytes per image")  # For the docs.
    assert entropy < size <= 1.1 * entropy
    rows = datasets.load_dataset(folder)["train"]
    assert rows.features["label"] == ClassLabel(names=NAMES)
    assert rows.features["indices"].length == num_tokens
    stored = rows.data.column("indices").combine_chunks().flatten().to_numpy()
    assert np.array_equal(stored.reshape(count, num_tokens), columns["indices"].numpy())
    assert np.array_equal(rows.data.column("label").to_numpy(), columns["label"].numpy())


@pytest.mark.parametrize(
    "codebook_size, dtype", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")]
)
def test_smallest_integer_type(tmp_path, codebook_size, dtype):
    tokenizer = {"codebook_size": codebook_size, "levels": None, "grid_size": [1, 2]}
    indices = torch.tensor([[0, codebook_size - 1], [codebook_size // 2, 0]])
    folder = write(tmp_path / "tokens", make_info({"train": 2}, tokenizer), {"train": {"indices": indices}})
    rows = datasets.load_dataset(folder)["train"]
    assert rows.features["indices"].feature == Value(dtype) and rows.column_names == ["indices"]
    assert list(rows["indices"]) == indices.tolist()


def test_splits_and_shards(tmp_path):
    """Plain `datasets`, without any code of this package, gets all rows of both splits in their order."""
    splits = {"train": random_columns(23, width=6), "validation": random_columns(5, width=6, seed=1)}
    info = make_info(
        {"train": 23, "validation": 5}, teacher={"name_or_path": "vit", "hidden_size": 6}, images_per_shard=10
    )
    folder = write(tmp_path / "tokens", info, splits, ClassLabel(names=NAMES))
    assert sorted(path.name for path in (tmp_path / "tokens").rglob("*") if path.is_file()) == [
        ".lock",
        "README.md",
        "token_dataset.json",
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "validation-00000-of-00001.parquet",
    ]
    loaded = datasets.load_dataset(folder)
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 23, "validation": 5}
    for name, columns in splits.items():
        assert loaded[name].column_names == ["indices", "label", "teacher_features"]
        assert list(loaded[name]["indices"]) == columns["indices"].tolist()
        assert list(loaded[name]["label"]) == columns["label"].tolist()
        features = np.array(list(loaded[name]["teacher_features"]))
        assert np.array_equal(features, columns["teacher_features"].half().numpy())
    content = json.loads((tmp_path / "tokens" / "token_dataset.json").read_text())
    assert content["tokenizer"]["name_or_path"] == "outputs/tokenizer" and content["num_rows"]["train"] == 23
    card = (tmp_path / "tokens" / "README.md").read_text()
    assert "`outputs/tokenizer`" in card and "60 tokens, levels [5, 4, 3]" in card and "`vit`" in card


def test_cached_rows_are_never_those_of_another_folder_or_time(tmp_path):
    """`datasets` keeps what it has loaded under the name of the folder."""
    for number, place in enumerate(["one", "other", "one"]):
        folder, columns = tmp_path / place / "tokens", random_columns(4, seed=number)
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, make_info({"train": 4}), {"train": columns}, ClassLabel(names=NAMES))
        assert list(datasets.load_dataset(str(folder))["train"]["indices"]) == columns["indices"].tolist()
        loaded = load_token_dataset(str(folder), TokenDatasetInfo.load(str(folder)))
        assert list(loaded["train"]["indices"]) == columns["indices"].tolist()


def test_shards_have_several_row_groups_where_rows_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr("token_dataset_writer.ROW_GROUP_BYTES", 4000)
    info = make_info({"train": 40}, teacher={"name_or_path": "vit", "hidden_size": 6})
    columns = random_columns(40, width=6)
    writer = TokenDatasetWriter(tmp_path / "tokens", info, ClassLabel(names=NAMES))
    writer.begin()
    (shard,) = writer.shards("train")
    with writer.open(shard) as add_rows:
        for start in range(0, 40, 5):
            add_rows(**{name: column[start : start + 5] for name, column in columns.items()})
    writer.finish("Tokens of photos")
    # A row has 16 tokens of a byte, 96 features of two bytes and a label of eight: 216 bytes, a batch 1080.
    assert pq.read_metadata(shard.path).num_row_groups == 2
    assert list(datasets.load_dataset(str(tmp_path / "tokens"))["train"]["indices"]) == columns["indices"].tolist()


@pytest.mark.parametrize("value", [math.nan, 7e4])
def test_features_beyond_float16(tmp_path, value):
    columns = random_columns(3, width=6)
    columns["teacher_features"][1, 2, 3] = value
    info = make_info({"train": 3}, teacher={"name_or_path": "vit", "hidden_size": 6})
    with pytest.raises(ValueError, match="`teacher_features` must be finite in float16"):
        write(tmp_path / "tokens", info, {"train": columns}, ClassLabel(names=NAMES))
    assert not list((tmp_path / "tokens" / "data").glob("train-*"))


def test_batches_never_span_shards(tmp_path):
    writer = TokenDatasetWriter(tmp_path, make_info({"train": 26}, images_per_shard=10), None)
    shards = writer.shards("train")
    plain = ShardBatches(shards, 4, 0)
    assert [len(batch) for batch in plain] == [4, 4, 2, 4, 4, 2, 4, 2] and len(plain) == 8
    assert [row for batch in plain for row in batch] == list(range(26))
    # Two rows of each of 13 images, each with a position of its own.
    augmented = ShardBatches(shards[1:2], 4, 2)
    assert [key for batch in augmented for key in batch] == [(row // 2, row) for row in range(10, 20)]


# --- the folder of an earlier run ---


def test_settings_that_differ_are_named(tmp_path):
    info = make_info({"train": 3})
    write(tmp_path / "tokens", info, {"train": random_columns(3)}, ClassLabel(names=NAMES))
    changed = {
        "tokenizer.levels": make_info({"train": 3}, {**info.tokenizer, "levels": [3, 4, 5]}),
        "num_rows.train": make_info({"train": 4}),
        "images.seed": make_info({"train": 3}, images={"dataset_name": "photos", "seed": 1}),
        "shards.images_per_shard": make_info({"train": 3}, images_per_shard=2),
        "teacher": make_info({"train": 3}, teacher={"name_or_path": "vit", "hidden_size": 6}),
        "hf_ifsq_version": make_info({"train": 3}, hf_ifsq_version="0"),
    }
    for name, other in changed.items():
        with pytest.raises(ValueError, match=f"`output_dir`.*other settings: .*`{name}") as error:
            TokenDatasetWriter(tmp_path / "tokens", other, None).begin()
        assert all(f"`{unchanged}" not in str(error.value) for unchanged in changed if unchanged != name)
    TokenDatasetWriter(tmp_path / "tokens", info, None).begin()


def test_folder_of_something_else(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"pictures")
    with pytest.raises(ValueError, match="`output_dir`.*something else"):
        TokenDatasetWriter(tmp_path, make_info({"train": 3}), None).begin()


# --- reading ---


@pytest.fixture
def token_folder(tmp_path):
    """A token dataset of two shards and two splits, with features, and its description."""
    splits = {"train": random_columns(23, width=6), "validation": random_columns(5, width=6, seed=1)}
    info = make_info(
        {"train": 23, "validation": 5}, teacher={"name_or_path": "vit", "hidden_size": 6}, images_per_shard=12
    )
    return write(tmp_path / "tokens", info, splits, ClassLabel(names=NAMES)), info, splits


@pytest.mark.parametrize("with_features", [False, True])
def test_items(token_folder, with_features):
    folder, info, splits = token_folder
    for split, columns in splits.items():
        data = TokenDataset(load_token_dataset(folder, info)[split], with_teacher_features=with_features)
        assert len(data) == info.num_rows[split]
        for index in range(len(data)):
            item = data[index]
            names = {"indices", "class_labels", "position"} | ({"teacher_features"} if with_features else set())
            assert item.keys() == names and item["position"] == index
            assert item["indices"].dtype == item["class_labels"].dtype == torch.int64
            assert torch.equal(item["indices"], columns["indices"][index])
            assert torch.equal(item["class_labels"], columns["label"][index])
            if with_features:
                assert torch.equal(item["teacher_features"], columns["teacher_features"][index].half())
        assert torch.equal(data[3, 17]["indices"], data[3]["indices"]) and data[3, 17]["position"] == 17


def test_shuffled_rows_and_workers(token_folder):
    folder, info, splits = token_folder
    rows = load_token_dataset(folder, info)["train"].select([20, 3, 14, 7])
    data = TokenDataset(rows, with_teacher_features=True)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=workers)
        read = torch.cat([batch["indices"] for batch in loader])
        assert torch.equal(read, splits["train"]["indices"][[20, 3, 14, 7]])


def rewrite(path, **columns):
    """Replace columns of a parquet file, under the schema that it has."""
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), table.schema.field(name), values)
    pq.write_table(table, path)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tokens_out_of_the_codebook(token_folder, tmp_path, split):
    folder, info, splits = token_folder
    path = max((tmp_path / "tokens" / "data").glob(f"{split}-*"))
    column = pq.read_table(path).column("indices").combine_chunks()
    values = column.flatten().to_numpy().copy()
    values[-3] = 60
    rewrite(path, indices=pa.FixedSizeListArray.from_arrays(pa.array(values), 16))
    with pytest.raises(ValueError, match=rf"`indices` in \[0, 60\).*'{split}' span \[0, 60\]"):
        load_token_dataset(folder, info)


def test_missing_tokens(token_folder, tmp_path):
    folder, info, _ = token_folder
    path = tmp_path / "tokens" / "data" / "train-00000-of-00002.parquet"
    rows = pq.read_table(path).column("indices").to_pylist()
    for broken in ([None, *rows[1:]], [[None, *rows[0][1:]], *rows[1:]]):
        rewrite(path, indices=pa.array(broken, pa.list_(pa.uint8(), 16)))
        with pytest.raises(ValueError, match="missing tokens in the split 'train'"):
            load_token_dataset(folder, info)


def test_rows_of_another_length(token_folder):
    folder, info, _ = token_folder
    other = make_info(info.num_rows, {**info.tokenizer, "grid_size": [2, 4]})
    with pytest.raises(ValueError, match="`indices` of 8 tokens per row.*length=16"):
        load_token_dataset(folder, other)


def test_missing_shard(token_folder, tmp_path):
    folder, info, _ = token_folder
    (tmp_path / "tokens" / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(datasets.exceptions.NonMatchingSplitsSizesError):
        datasets.load_dataset(folder)
    with pytest.raises(
        ValueError, match="rows {'train': 23, 'validation': 5}, but has {'train': 12, 'validation': 5}"
    ):
        load_token_dataset(folder, info)


def test_folders_that_are_no_finished_token_dataset(token_folder, tmp_path, monkeypatch):
    folder, info, _ = token_folder
    assert TokenDatasetInfo.load(folder) == info and info.num_tokens == 16
    file = tmp_path / "tokens" / "token_dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "colour": "red"}))
    with pytest.raises(ValueError, match="another version.*colour"):
        TokenDatasetInfo.load(folder)
    file.rename(file.with_name("partial-token_dataset.json"))
    with pytest.raises(ValueError, match="`token_dataset`.*no token_dataset.json.*not finished"):
        TokenDatasetInfo.load(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=f"`token_dataset` must be a folder .* got '{re.escape(name)}'"):
            TokenDatasetInfo.load(name)


# --- the source of the training scripts ---


@pytest.mark.parametrize("model_class", [AutoencoderIFSQ, VQModel, AutoencoderKL])
def test_fingerprint_tells_weights_apart(make_autoencoder, make_baseline, model_class):
    model = make_autoencoder() if model_class is AutoencoderIFSQ else make_baseline(model_class)
    before = fingerprint(as_image_tokenizer(model))
    assert before["class"] == type(model).__name__ and before["grid_size"] == [4, 4]
    assert fingerprint(as_image_tokenizer(model)) == before
    with torch.no_grad():
        model.decoder.conv_out.bias[1] += 1e-3
    after = fingerprint(as_image_tokenizer(model))
    assert [name for name in before if before[name] != after[name]] == ["weights_sha256"]


@pytest.mark.parametrize("name, value", [("alpha", 2.0), ("bound", "normal"), ("equal_bins", True)])
def test_fingerprint_tells_options_of_the_quantizer_apart(make_autoencoder, name, value):
    """None of them is in the weights."""
    model = make_autoencoder()
    other = make_autoencoder(**{name: value})
    other.load_state_dict(model.state_dict())
    before, after = (fingerprint(as_image_tokenizer(tokenizer)) for tokenizer in (model, other))
    assert [key for key in before if before[key] != after[key]] == [name] and after[name] == value


@pytest.fixture
def make_source(tmp_path, make_autoencoder):
    """Factory of sources over 30 images tokenized by `make_autoencoder`; arguments override those of training."""
    folder = str(tmp_path / "tokenizer")
    make_autoencoder(scaling_factor=2.5).save_pretrained(folder)
    tokenizer = as_image_tokenizer(hf_ifsq.AutoencoderIFSQ.from_pretrained(folder).eval())
    description = {**fingerprint(tokenizer), "name_or_path": folder}
    info = make_info({"train": 30, "validation": 12}, description, {"name_or_path": "vit", "hidden_size": 6})
    splits = {"train": random_columns(30, width=6), "validation": random_columns(12, width=6, seed=1)}
    tokens = write(tmp_path / "tokens", info, splits, ClassLabel(names=NAMES))

    def make(patch_size=1, **overrides):
        args = GeneratorArguments(**{"token_dataset": tokens, **overrides})
        return args.load_source(torch.device("cpu"), patch_size)

    make.splits, make.tokenizer, make.folder, make.tokens = splits, tokenizer, folder, tokens
    return make


def read_batch(data, count):
    return torch.utils.data.default_collate([data[index] for index in range(count)])


def test_source_of_tokens(make_source):
    source = make_source()
    assert source.tokenizer.model.config.sample_size == 16 and source.teacher_hidden_size is None
    assert source.id2label == dict(enumerate(NAMES))
    batch = read_batch(source.validation_data, 12)
    indices = make_source.splits["validation"]["indices"]
    assert torch.equal(source.indices(batch), indices)
    digits = torch.stack([indices % 5 / 2 - 1, indices // 5 % 4 / 2 - 1, indices // 20 - 1], dim=1)
    assert torch.equal(source.codes(batch), digits.view(12, 3, 4, 4))
    assert source.tokenizer.scaling_factor == 2.5


def test_stored_features_in_place_of_the_teacher(make_source):
    source = make_source(teacher="vit")  # there is no such model to load
    assert source.teacher_hidden_size == 6
    for split, data in (("train", source.train_data), ("validation", source.validation_data)):
        columns = make_source.splits[split]
        features = source.teacher_features(read_batch(data, len(columns["label"])))
        assert torch.equal(features, columns["teacher_features"].half().float())
    without = make_source()
    assert "teacher_features" not in without.train_data[0] and "teacher_features" not in without.validation_data[0]


@pytest.mark.parametrize("count, measured", [(10, False), (11, True)])
def test_too_few_validation_images_for_cknna_are_said_beforehand(make_source, caplog, count, measured):
    source = make_source(teacher="vit", max_validation_samples=count)
    assert source.measures_cknna == measured
    said = (
        "Validations leave out CKNNA, which takes more than 10 images, its number of nearest neighbours: there are 10."
    )
    assert (said in caplog.messages) != measured
    assert not make_source().measures_cknna


def test_tokenizer_stays_on_the_cpu(make_source):
    source = GeneratorArguments(token_dataset=make_source.tokens).load_source(torch.device("meta"))
    assert {parameter.device.type for parameter in source.tokenizer.parameters()} == {"cpu"}


def test_limits_draw_the_rows_that_images_would_be(make_source):
    source = make_source(max_train_samples=7, max_validation_samples=3, seed=5)
    order = datasets.Dataset.from_dict({"row": range(30)}).shuffle(seed=5)["row"][:7]
    assert len(source.train_data) == 7 and len(source.validation_data) == 3
    assert torch.equal(read_batch(source.train_data, 7)["indices"], make_source.splits["train"]["indices"][order])


def test_source_of_images(tmp_path, make_source):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    ViTModel(ViTConfig(image_size=28, patch_size=7, **sizes)).save_pretrained(tmp_path / "vit")
    generator = np.random.default_rng(0)
    images = [Image.fromarray(array) for array in generator.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 3}).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": rows, "test": rows.select([4])}).save_to_disk(tmp_path / "images")
    source = make_source(
        token_dataset=None,
        dataset_name=str(tmp_path / "images"),
        tokenizer=make_source.folder,
        resolution=16,
        teacher=str(tmp_path / "vit"),
        patch_size=2,
    )
    assert len(source.train_data) == 6 and len(source.validation_data) == 1 and source.id2label == {0: "0", 1: "1"}
    batch = read_batch(source.train_data, 6)
    pixel_values = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = make_source.tokenizer.model.encode(pixel_values)
    assert torch.equal(source.indices(batch), expected.indices.flatten(1))
    assert torch.equal(source.codes(batch), expected.codes)
    features = Teacher(str(tmp_path / "vit"), (2, 2))(pixel_values)
    torch.testing.assert_close(source.teacher_features(batch), features)
    assert source.teacher_hidden_size == 12


def test_codes_of_an_autoencoder_kl_are_drawn_if_asked_for(tmp_path, make_source, make_baseline):
    make_baseline(AutoencoderKL).save_pretrained(tmp_path / "kl")
    images = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "images")
    names = {"dataset_name": str(tmp_path / "images"), "tokenizer": str(tmp_path / "kl")}
    source = make_source(token_dataset=None, resolution=16, **names)
    assert source.validation_data is None
    batch = read_batch(source.train_data, 2)
    mode = source.codes(batch)
    assert mode.shape == (2, 3, 4, 4) and torch.equal(mode, source.codes(batch))
    drawn = [source.codes(batch, generators_at(seed, [4, 5])) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], mode)
    with pytest.raises(ValueError, match="AutoencoderKL.*continuous.*no tokens"):
        source.tokenizer.require_codebook()
    with pytest.raises(ValueError, match="AutoencoderKL.*continuous.*no tokens"):
        source.indices(batch)


# --- what does not go together ---


def test_tokenizers_that_disagree(tmp_path, make_source, make_autoencoder, make_baseline):
    others = {
        "levels": make_autoencoder(levels=(3, 4, 5)),
        "codebook_size": make_autoencoder(levels=(5, 4, 4)),
        "grid_size": make_autoencoder(block_out_channels=(8, 16)),
        "weights_sha256": make_autoencoder(scaling_factor=2.5),
        "class": make_baseline(VQModel),
    }
    for name, other in others.items():
        other.save_pretrained(tmp_path / name)
        match = f"`token_dataset`.*tokens'.* and `tokenizer` .*{name}'.* disagree on .*`{name}`"
        with pytest.raises(ValueError, match=match) as error:
            make_source(tokenizer=str(tmp_path / name))
        assert make_source.folder in str(error.value)
    make_source(tokenizer=make_source.folder)


def test_named_tokenizer_is_gone_or_was_trained_further(tmp_path, make_source):
    tokenizer = hf_ifsq.AutoencoderIFSQ.from_pretrained(make_source.folder)
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="tokenizer .*tokenizer'.*cannot be loaded.*`--tokenizer`"):
        make_source()
    make_source(tokenizer=str(tmp_path / "moved"))
    tokenizer.quant_conv.bias.data += 1
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="disagree on `weights_sha256`"):
        make_source()


def test_a_local_tokenizer_is_found_again(tmp_path, make_source, monkeypatch):
    """By its path from the tokens, from any working folder and after both were moved; the description has its name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "tokens" / "token_dataset.json"
    content = json.loads(file.read_text())
    content["tokenizer"]["name_or_path"] = "tokenizer"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'tokenizer'.*cannot be loaded.*give `--tokenizer`"):
        make_source()
    monkeypatch.chdir(tmp_path)
    remember_tokenizer("tokens", "tokenizer")
    monkeypatch.chdir("/")
    make_source()
    (tmp_path / "elsewhere").mkdir()
    for name in ("tokens", "tokenizer"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    make_source(token_dataset=str(tmp_path / "elsewhere" / "tokens"))
    (tmp_path / "elsewhere" / "tokenizer").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="'tokenizer'.*cannot be loaded.*give `--tokenizer`"):
        make_source(token_dataset=str(tmp_path / "elsewhere" / "tokens"))


def test_resolution(make_source):
    make_source(resolution=16)
    with pytest.raises(ValueError, match="`resolution` is 32, but `token_dataset` .* of images of 16 pixels"):
        make_source(resolution=32)


def test_other_teachers(tmp_path, make_source):
    assert make_source(teacher="/models/vit").teacher_hidden_size == 6
    with pytest.raises(ValueError, match="`teacher` is 'dino'.* features of 'vit'.*--teacher dino"):
        make_source(teacher="dino")
    with pytest.raises(ValueError, match="`teacher` features .* single codes.*`patch_size` is 2"):
        make_source(teacher="vit", patch_size=2)
    file = tmp_path / "tokens" / "token_dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "teacher": None}))
    with pytest.raises(ValueError, match="`teacher` is 'vit'.* no teacher features.*--teacher vit"):
        make_source(teacher="vit")


def test_tokens_without_labels(tmp_path, make_source):
    info = TokenDatasetInfo.load(str(tmp_path / "tokens"))
    info = make_info({"train": 4}, {**info.tokenizer})
    folder = write(tmp_path / "unlabelled", info, {"train": {"indices": random_columns(4)["indices"]}})
    with pytest.raises(
        ValueError, match=r"`label_column` 'label' is none of the columns of the split 'train' \['indices'\]"
    ):
        make_source(token_dataset=folder)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({}, r"exactly one of `token_dataset`, `dataset_name` or `train_data_dir`, got \[None, None, None\]"),
        ({"token_dataset": "t", "dataset_name": "d"}, r"exactly one of `token_dataset`.*got \['t', 'd', None\]"),
        ({"token_dataset": "t", "train_data_dir": "d"}, r"exactly one of `token_dataset`.*got \['t', None, 'd'\]"),
        ({"dataset_name": "d"}, "Give `tokenizer`, or a `token_dataset`"),
        ({"token_dataset": "t", "random_flip": True}, "`random_flip` is about images.*got True"),
        ({"token_dataset": "t", "min_crop_scale": 0.5}, "`min_crop_scale` is about images.*got 0.5"),
        ({"token_dataset": "t", "center_crop": True}, "`center_crop` is about images.*got True"),
        ({"token_dataset": "t", "train_split": "a"}, "`train_split` is about images.*got 'a'"),
        ({"token_dataset": "t", "label_column": "a"}, "`label_column` is about images.*got 'a'"),
        ({"token_dataset": "t", "resolution": 0}, "`resolution` must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, match):
    with pytest.raises(ValueError, match=match):
        GeneratorArguments(**arguments)


def test_resolution_by_default():
    assert GeneratorArguments(token_dataset="t").resolution is None
    assert GeneratorArguments(dataset_name="d", tokenizer="t").resolution == 256
