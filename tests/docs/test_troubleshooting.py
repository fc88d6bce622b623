"""Each message that the page quotes is provoked here, by what the page says that it comes from."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import ClassLabel, Dataset, Features, Value
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from token_dataset_writer import TokenDatasetWriter
from torch import nn

from hf_ifsq import IFSQARPipeline, IFSQDiTPipeline, IFSQDiTTransformer2DModel
from hf_ifsq.conversion import convert_checkpoint
from hf_ifsq.models.image_tokenizer import as_image_tokenizer
from hf_ifsq.training.data import ImageDataset, ImageTransform, load_image_dataset, read_class_names
from hf_ifsq.training.output_folder import lock_folder
from hf_ifsq.training.run import TrainingRun
from hf_ifsq.training.tokens import TokenDatasetInfo, TokenSource, fingerprint


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = dict(re.findall(r"^### (.+)\n\n```text\n(.+)\n```$", PAGE, flags=re.MULTILINE))
PROVOKED = {}


def provokes(title):
    def register(function):
        PROVOKED[title] = function
        return function

    return register


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield tmp_path
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def models(make_autoencoder, make_ar, make_dit):
    return {"tokenizer": make_autoencoder, "ar": make_ar, "dit": make_dit}


@pytest.mark.parametrize("title", MESSAGES)
def test_the_page_quotes_what_happens(title, folder, models):
    quoted = ".*".join(map(re.escape, MESSAGES[title].split("…")))
    with pytest.raises((ValueError, FloatingPointError)) as error:
        PROVOKED[title](folder, models)
    assert re.search(quoted, str(error.value), flags=re.DOTALL), f"{error.value}\nis not what is quoted:\n{quoted}"


def test_nothing_is_provoked_that_the_page_does_not_quote():
    assert len(MESSAGES) > 20 and PROVOKED.keys() == MESSAGES.keys()


def pictures(*names):
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)


def labels_of(folder):
    train, validation = load_image_dataset(train_data_dir=str(folder), label_column="label")
    return read_class_names(train, "label", validation)


@provokes("A picture beside or below the folders of classes")
def _(folder, models):
    pictures("data/ant/0.png", "data/bee/1.png", "data/cover.png")
    labels_of(folder / "data")


@provokes("Folders that may be splits or classes")
def _(folder, models):
    pictures("data/train/0.png", "data/val/1.png")
    labels_of(folder / "data")


@provokes("A validation split without classes")
def _(folder, models):
    pictures("data/train/ant/0.png", "data/train/bee/1.png", "data/val/2.png")
    labels_of(folder / "data")


def parquet(name, labels, feature):
    features = Features({"image": datasets.Image(), "label": feature})
    images = [Image.new("RGB", (16, 16))] * len(labels)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(name)


def labels_of_table(folder):
    train, validation = load_image_dataset(str(folder), label_column="label")
    return read_class_names(train, "label", validation)


@provokes("Labels that a dataset keeps to itself")
def _(folder, models):
    parquet("data/train.parquet", [0, 1, 2], ClassLabel(names=["ant", "bee", "cat"]))
    parquet("data/test.parquet", [-1, -1, -1], ClassLabel(names=["ant", "bee", "cat"]))
    labels_of_table(folder / "data")


@provokes("Labels that are no integers")
def _(folder, models):
    parquet("data/train.parquet", [0.5, 1.5, 2.5], Value("float64"))
    labels_of_table(folder / "data")


@provokes("A picture that cannot be read")
def _(folder, models):
    pictures("data/ant/0.png", "data/ant/1.png")
    Path("data/ant/1.png").write_text("<html>404</html>")
    rows, _ = load_image_dataset(train_data_dir=str(folder / "data"), label_column="label")
    ImageDataset(rows, ImageTransform(8))[1]


@provokes("Brackets in the path")
def _(folder, models):
    parquet("[2024]/train.parquet", [0, 1], ClassLabel(names=["ant", "bee"]))
    load_image_dataset(str(folder / "[2024]"))


@provokes("Images of a size that does not fit")
def _(folder, models):
    models["tokenizer"](sample_size=18)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, key):
        return torch.zeros(1)


def begin(folder, model, **options):
    options = {"train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 1, "logging_steps": 1, **options}
    run = TrainingRun(str(folder / "out"), **options)
    run.dataloader(Numbers())
    run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return run


def leave_checkpoint(folder, model, **options):
    run = begin(folder, model, **options)
    run.end_step(0.1)
    run.finish("")


@provokes("A loss that is no longer finite")
def _(folder, models):
    run = begin(folder, models["ar"]())
    run.record(loss=torch.tensor(torch.nan))
    run.end_step(0.1)


@provokes("Two runs in one folder")
def _(folder, models):
    hold = "from hf_ifsq.training.output_folder import lock_folder; from pathlib import Path; import sys\n"
    hold += f"with lock_folder(Path({str(folder / 'out')!r})): print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            begin(folder, models["ar"]())
        finally:
            other.kill()
    with lock_folder(folder / "out"):
        pass


@provokes("A new run where there are checkpoints")
def _(folder, models):
    leave_checkpoint(folder, models["ar"]())
    begin(folder, models["ar"]())


@provokes("Resuming with another model")
def _(folder, models):
    leave_checkpoint(folder, models["ar"](hidden_size=16, num_attention_heads=2))
    other = models["ar"](hidden_size=32, num_attention_heads=2)
    begin(folder, other, resume_from_checkpoint="latest")


@provokes("Resuming with or without the average")
def _(folder, models):
    leave_checkpoint(folder, models["ar"](), use_ema=True)
    begin(folder, models["ar"](), resume_from_checkpoint="latest")


@provokes("A checkpoint that is damaged")
def _(folder, models):
    leave_checkpoint(folder, models["ar"]())
    (folder / "out" / "checkpoint-1" / "random_states_0.pkl").unlink()
    begin(folder, models["ar"](), resume_from_checkpoint="latest")


@provokes("A tokenizer with a single code")
def _(folder, models):
    import train_tokenizer

    run = begin(folder, models["tokenizer"](alpha=1e-6))
    pictures("data/0.png", "data/1.png", "data/2.png")
    rows, _ = load_image_dataset(train_data_dir=str(folder / "data"))
    train_tokenizer.measure_std(run, ImageDataset(rows, ImageTransform(16)))


def token_dataset(folder, tokenizer, resolution=8):
    tokenizer.save_pretrained(folder / "tokenizer")
    view = as_image_tokenizer(tokenizer)
    info = TokenDatasetInfo(
        tokenizer={"name_or_path": str(folder / "tokenizer"), "revision": None, **fingerprint(view)},
        scaling_factor=1.0,
        resolution=resolution,
        teacher=None,
        num_rows={"train": 2},
        images={},
        shards={"images_per_shard": 2},
        hf_ifsq_version="0",
    )
    writer = TokenDatasetWriter(str(folder / "tokens"), info, ClassLabel(names=["ant", "bee"]))
    writer.begin()
    (shard,) = writer.shards("train")
    with writer.open(shard) as add_rows:
        add_rows(indices=torch.zeros(2, info.num_tokens, dtype=torch.long), label=torch.tensor([0, 1]))
    writer.finish("tokens")
    return writer


@provokes("The tokenizer of a token dataset has moved")
def _(folder, models):
    token_dataset(folder, models["tokenizer"]())
    (folder / "tokenizer").rename(folder / "elsewhere")
    TokenSource.from_token_dataset(str(folder / "tokens"))


@provokes("A tokenization with other settings")
def _(folder, models):
    writer = token_dataset(folder, models["tokenizer"]())
    changed = dataclasses.replace(writer.info, resolution=16)
    TokenDatasetWriter(str(folder / "tokens"), changed, ClassLabel(names=["ant", "bee"])).begin()


@provokes("A generator and a tokenizer that do not belong together")
def _(folder, models):
    IFSQARPipeline(models["ar"](vocab_sizes=[9]), models["tokenizer"](levels=(5, 4, 3)))


@provokes("Another size of images")
def _(folder, models):
    IFSQARPipeline(models["ar"](vocab_sizes=[60], grid_size=[4, 4]), models["tokenizer"](sample_size=32))


def dit_pipeline(models, **config):
    dit = models["dit"](sample_size=4, in_channels=3, **config)
    return IFSQDiTPipeline(dit, models["tokenizer"](), FlowMatchEulerDiscreteScheduler())


@provokes("Guidance of a model that cannot be guided")
def _(folder, models):
    dit_pipeline(models, class_dropout_prob=0.0)(1, guidance_scale=2.0)


@provokes("Numbers that overflow in half precision")
def _(folder, models):
    pipe = dit_pipeline(models)
    nn.init.constant_(pipe.tokenizer.decoder.conv_in.weight, 3e4)
    pipe.tokenizer.half()
    pipe(1, num_inference_steps=1)


@provokes("A name of a class that there is not")
def _(folder, models):
    dit_pipeline(models, num_classes=2, id2label={0: "cat", 1: "dog"})("catt")


@provokes("Weights that do not fit")
def _(folder, models):
    models["dit"]().save_pretrained(folder / "dit")
    (file,) = (folder / "dit").glob("*.safetensors")
    weights = load_file(file)
    weights.pop(next(iter(weights)))
    save_file(weights, file, metadata={"format": "pt"})
    IFSQDiTTransformer2DModel.from_pretrained(folder / "dit")


@provokes("Official files that do not say enough")
def _(folder, models):
    file = ROOT / "tests" / "fixtures" / "llamagen_ar" / "official" / "c2i_tiny.pt"
    convert_checkpoint(file, num_attention_heads=4)
