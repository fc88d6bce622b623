import base64
import hashlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import ClassLabel, Dataset, Features, Value
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from transformers import ViTConfig, ViTModel

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.models.image_tokenizer import as_image_tokenizer
from hf_ifsq.training.arguments import parse_args
from hf_ifsq.training.data import ImageDataset, ImageTransform, load_image_dataset
from hf_ifsq.training.output_folder import LOCK_FILE
from hf_ifsq.training.tokens import (
    TOKENIZER_PATH_FILE,
    TokenDatasetInfo,
    TokenSource,
    fingerprint,
    hash_weights,
    load_token_dataset,
    remember_tokenizer,
)
from hf_ifsq.vision.vision_model import Teacher


SCRIPT = Path(__file__).parents[2] / "examples" / "tokenize_dataset.py"
NAMES = ["ant", "bee", "cat"]
CROPS = ["--num_augmentations", "3", "--random_flip", "--min_crop_scale", "0.6", "--seed", "4"]


def make_images(count, seed, height=20, width=24):
    generator = np.random.default_rng(seed)
    return [Image.fromarray(array) for array in generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)]


def write_images(path, count, seed, label_feature=None, **size):
    features = Features({"image": datasets.Image(), "label": label_feature or ClassLabel(names=NAMES)})
    columns = {"image": make_images(count, seed, **size), "label": [index % 3 for index in range(count)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(path)


def write_teacher(folder, hidden_size):
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    ViTModel(ViTConfig(image_size=28, patch_size=7, **sizes)).save_pretrained(folder)


def make_tokenizer():
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
    model = AutoencoderIFSQ(levels=(17, 9, 5), **sizes)
    torch.nn.init.normal_(model.quant_conv.weight, std=2.0)
    return model


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with 40 training and 7 validation images, a tokenizer of 4 x 4 tokens of 765, and a teacher."""
    root = tmp_path_factory.mktemp("tokenization")
    write_images(root / "data" / "train.parquet", 40, seed=0)
    write_images(root / "data" / "test.parquet", 7, seed=1)
    make_tokenizer().save_pretrained(root / "tokenizer")
    write_teacher(root / "teacher", 12)
    return root


def arguments(workspace, output, *extra):
    common = ["--resolution", "16", "--batch_size", "4", "--images_per_shard", "9"]
    common += ["--tokenizer", str(workspace / "tokenizer"), "--dataset_name", str(workspace / "data")]
    return [*common, "--output_dir", str(output), *extra]


@pytest.fixture
def run(workspace, tmp_path, monkeypatch):
    """Runs the script in this process; returns its output folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    spec = importlib.util.spec_from_file_location("tokenize_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tokenize_dataset", module)
    spec.loader.exec_module(module)

    def run(*extra, output=tmp_path / "out"):
        try:
            module.main(parse_args(module.TokenizationArguments, arguments(workspace, output, *extra)))
        finally:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
        return output

    return run


@pytest.fixture(scope="session")
def reference(workspace):
    """The result of one process that nobody stopped: crops, flips and features."""
    environment = {**os.environ, "HF_HOME": str(workspace / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments(workspace, workspace / "reference", *CROPS)]
    command += ["--teacher", str(workspace / "teacher")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    return workspace / "reference"


def contents(folder):
    """What is uploaded: that does not depend on where the folder lies."""
    local = {folder / TOKENIZER_PATH_FILE, folder / LOCK_FILE}
    files = [path for path in folder.rglob("*") if path.is_file() and path not in local]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def image_data(workspace, **overrides):
    """The training and validation images as the training scripts read them."""
    options = {"max_train_samples": overrides.pop("max_train_samples", None), "seed": overrides.get("seed", 0)}
    transform = ImageTransform(16, **overrides)
    splits = load_image_dataset(str(workspace / "data"), **options)
    return [images and ImageDataset(images, transform, label_column="label") for images in splits]


def encode(workspace, items):
    tokenizer = as_image_tokenizer(AutoencoderIFSQ.from_pretrained(workspace / "tokenizer").eval())
    with torch.no_grad():
        return tokenizer.encode_indices(torch.stack([item["pixel_values"] for item in items])).flatten(1)


# --- the rows ---


def test_plain_images(workspace, run):
    """Compared with squares cut from the images here, with PIL alone."""
    splits = datasets.load_dataset(str(run()))
    assert splits["train"].column_names == ["indices", "label"]
    for split, count, seed in (("train", 40, 0), ("validation", 7, 1)):
        squares = [
            image.resize((16, 16), Image.Resampling.BICUBIC, box=(2, 0, 22, 20)) for image in make_images(count, seed)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(square, dtype=np.float32) for square in squares]))
        items = [{"pixel_values": square / 127.5 - 1} for square in pixels.permute(0, 3, 1, 2)]
        expected = encode(workspace, items)
        assert len(expected.unique()) > 50
        assert torch.equal(torch.tensor(list(splits[split]["indices"])), expected)
        assert list(splits[split]["label"]) == [index % 3 for index in range(count)]
        assert splits[split].features["label"] == ClassLabel(names=NAMES)
        assert splits[split].features["indices"] == datasets.List(Value("uint16"), length=16)


def test_random_crops(workspace, reference, run):
    """Row r is crop r of image r // 3, as the training scripts cut image r // 3 at position r; validation is plain."""
    splits = datasets.load_dataset(str(reference), cache_dir=str(workspace / "cache"))
    train, _ = image_data(workspace, random_flip=True, min_crop_scale=0.6, seed=4)
    _, validation = image_data(workspace)
    for split, items in (
        ("train", [train[row // 3, row] for row in range(120)]),
        ("validation", [validation[row] for row in range(7)]),
    ):
        assert torch.equal(torch.tensor(list(splits[split]["indices"])), encode(workspace, items))
        assert list(splits[split]["label"]) == [item["class_labels"].item() for item in items]
        teacher = Teacher(str(workspace / "teacher"), (4, 4))
        features = teacher(torch.stack([item["pixel_values"] for item in items]))
        stored = torch.tensor(np.array(list(splits[split]["teacher_features"]), dtype=np.float32))
        # Float16 has 11 significant bits.
        torch.testing.assert_close(stored, features, rtol=2**-11, atol=1e-5)
    assert len({tuple(indices) for indices in splits["train"]["indices"]}) == 120


def test_images_drawn_by_the_seed(workspace, run):
    rows = datasets.load_dataset(str(run("--max_train_samples", "5", "--seed", "3")))["train"]
    train, _ = image_data(workspace, max_train_samples=5, seed=3)
    expected = encode(workspace, [train[index] for index in range(5)])
    assert torch.equal(torch.tensor(list(rows["indices"])), expected)
    every, _ = image_data(workspace)
    assert not torch.equal(expected, encode(workspace, [every[index] for index in range(5)]))


def test_all_validation_images(run, tmp_path):
    """More than the training scripts take by default."""
    write_images(tmp_path / "data" / "train.parquet", 3, 0, height=4, width=4)
    write_images(tmp_path / "data" / "validation.parquet", 1003, 1, height=4, width=4)
    options = ["--dataset_name", str(tmp_path / "data"), "--resolution", "4", "--images_per_shard", "700"]
    folder = run(*options, "--batch_size", "100")
    assert TokenDatasetInfo.load(str(folder)).num_rows == {"train": 3, "validation": 1003}
    assert len(datasets.load_dataset(str(folder))["validation"]) == 1003


@pytest.mark.parametrize("workers", ["0", "2"])
def test_tokens_of_a_vq_model(workspace, run, make_baseline, tmp_path, workers):
    model = make_baseline(VQModel)
    model.save_pretrained(tmp_path / "vq")
    folder = run("--tokenizer", str(tmp_path / "vq"), "--dataloader_num_workers", workers)
    info = TokenDatasetInfo.load(str(folder))
    assert info.tokenizer["class"] == "VQModel" and info.tokenizer["levels"] is None
    train, _ = image_data(workspace)
    pixel_values = torch.stack([train[index]["pixel_values"] for index in range(40)])
    with torch.no_grad():
        latents = model.encode(pixel_values).latents.permute(0, 2, 3, 1).reshape(-1, 3).double()
    distances = torch.cdist(latents, model.quantize.embedding.weight.double())
    rows = load_token_dataset(str(folder), info)["train"]
    assert torch.equal(torch.tensor(list(rows["indices"])), distances.argmin(dim=1).view(40, 16))


@pytest.mark.parametrize("feature, stored", [(Value("int32"), Value("int64")), (None, None)])
def test_labels_without_names_and_no_labels(run, tmp_path, feature, stored):
    write_images(tmp_path / "data" / "train.parquet", 5, 0, label_feature=feature)
    if feature is None:
        rows = Dataset.from_parquet(str(tmp_path / "data" / "train.parquet")).remove_columns("label")
        rows.to_parquet(tmp_path / "data" / "train.parquet")
    splits = datasets.load_dataset(str(run("--dataset_name", str(tmp_path / "data"))))
    assert splits.keys() == {"train"} and splits["train"].features.get("label") == stored
    if feature is not None:
        assert list(splits["train"]["label"]) == [0, 1, 2, 0, 1]


def test_description_and_card(workspace, reference):
    content = json.loads((reference / "token_dataset.json").read_text())
    tokenizer = as_image_tokenizer(AutoencoderIFSQ.from_pretrained(workspace / "tokenizer"))
    assert content["tokenizer"] == {
        "name_or_path": "tokenizer",
        "revision": None,
        **fingerprint(tokenizer),
    }
    assert content["tokenizer"]["codebook_size"] == 765 and content["tokenizer"]["grid_size"] == [4, 4]
    weights = hash_weights(Teacher(str(workspace / "teacher"), (4, 4)))
    assert content["teacher"] == {"name_or_path": "teacher", "hidden_size": 12, "weights_sha256": weights}
    assert content["num_rows"] == {"train": 120, "validation": 7} and content["resolution"] == 16
    for name, value in {"num_augmentations": 3, "random_flip": True, "min_crop_scale": 0.6, "seed": 4}.items():
        assert content["images"][name] == value
    card = (reference / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    sizes = {entry["name"]: entry["num_examples"] for entry in metadata["dataset_info"]["splits"]}
    assert sizes == {"train": 120, "validation": 7}
    # The card is for others: it names no folder of this machine.
    assert str(workspace) not in card and "| `tokenizer` |" in card
    assert "train: 120, validation: 7" in card and "{" not in card.split("---")[2]


# --- stopping, going on, and several processes ---


def run_script(workspace, argv, rank=0, num_processes=1, port=0):
    """In a process of its own: the script as the command line runs it, as one of several processes."""
    datasets.config.HF_DATASETS_CACHE = workspace / "cache"
    if num_processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    sys.argv = [str(SCRIPT), *argv]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="module")
def start():
    """Starts the script in one or several processes, which are forks of one that has all modules already."""
    context = multiprocessing.get_context("forkserver")
    modules = ["hf_ifsq.training.arguments", "transformers.models.vit.modeling_vit", "pytest"]
    context.set_forkserver_preload(modules)

    def start(workspace, argv, num_processes=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = range(num_processes)
        processes = [
            context.Process(target=run_script, args=(workspace, argv, rank, num_processes, port)) for rank in ranks
        ]
        for process in processes:
            process.start()
        return processes

    return start


def kill_when(processes, reached):
    while not reached():
        assert all(process.is_alive() for process in processes), "the run ended before it could be killed"
        time.sleep(0.0005)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def finish(processes):
    for process in processes:
        process.join(timeout=100)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def finished_shards(folder):
    """Inode and time of each file that has its name: a file written twice would have others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("data/[tv]*.parquet")}


def test_killed_and_resumed_equals_uninterrupted(workspace, reference, start, tmp_path):
    """Killed in its first shards, in the middle of a later one, and as one appears; by one process and by two."""
    output = tmp_path / "out"
    argv = [*arguments(workspace, output, *CROPS), "--teacher", str(workspace / "teacher")]

    def begun():
        return any(output.glob("data/partial-*"))

    moments = [
        (1, begun),
        (2, lambda: len(finished_shards(output)) >= 4 and begun()),
        (1, lambda: len(finished_shards(output)) >= 9),
    ]
    before = {}
    for num_processes, reached in moments:
        kill_when(start(workspace, argv, num_processes), reached)
        after = finished_shards(output)
        assert before.items() <= after.items() and len(after) < 15
        assert not (output / "token_dataset.json").exists()
        before = after
    finish(start(workspace, argv, 2))
    after = finished_shards(output)
    assert before.items() <= after.items() and len(after) == 15
    assert contents(output) == contents(reference)
    # Once more: there is nothing left to do.
    finish(start(workspace, argv))
    assert finished_shards(output) == after and contents(output) == contents(reference)


def test_two_processes_equal_one(workspace, reference, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += [*arguments(workspace, tmp_path / "out", *CROPS), "--teacher", str(workspace / "teacher")]
    environment["ACCELERATE_USE_CPU"] = "true"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(tmp_path / "out") == contents(reference)


def test_memory_does_not_grow_with_the_data(workspace, start, tmp_path):
    """Four times as many images, whose features take 16 KB each in the result: 20 MB more if they were kept."""
    write_teacher(tmp_path / "teacher", 512)
    peaks = []
    for count in (400, 1600):
        data = tmp_path / f"data{count}"
        write_images(data / "train.parquet", count, 0, height=16, width=16)
        argv = arguments(workspace, tmp_path / f"out{count}", "--dataset_name", str(data))
        argv += ["--teacher", str(tmp_path / "teacher"), "--images_per_shard", "100", "--batch_size", "20"]
        (process,) = start(tmp_path, argv)
        peak = 0
        while process.is_alive():
            # Memory of its own, without files that are mapped. The process may end at any moment.
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                break
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.005)
        finish([process])
        assert TokenDatasetInfo.load(str(tmp_path / f"out{count}")).num_rows == {"train": count}
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 8, peaks


# --- the Hub ---

COMMIT = "0" * 40

PUSH_AND_LOAD = """
import pathlib, runpy, sys
import torch
_, file, repo, *sys.argv = sys.argv
runpy.run_path(sys.argv[0], run_name="__main__")
pathlib.Path(repo).rename(repo + "-gone")  # what is cached of its revision is left
from hf_ifsq.training.tokens import TokenSource
source = TokenSource.from_token_dataset(token_dataset="someone/tokens")
torch.save([source.train_data[index]["indices"] for index in range(len(source.train_data))], file)
"""


class Hub(BaseHTTPRequestHandler):
    """A server on this machine: repositories are the folders `models/user/name` and `datasets/user/name`."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if "resolve" in parts:
            place = parts.index("resolve")
            repo = parts[:place] if parts[0] == "datasets" else ["models", *parts[:place]]
            path = Path(self.server.root, *repo, *parts[place + 2 :])
            self.answer(path.read_bytes() if path.is_file() else None)
        elif parts[0] == "api" and "tree" in parts:
            place = parts.index("tree")
            repo = Path(self.server.root, *parts[1:place])
            entries = sorted(Path(repo, *parts[place + 2 :]).iterdir())
            self.answer_json(
                [
                    {
                        "type": "directory" if path.is_dir() else "file",
                        "path": path.relative_to(repo).as_posix(),
                        "size": path.stat().st_size,
                        "oid": COMMIT,
                    }
                    for path in entries
                ]
            )
        elif parts[0] == "api" and len(parts) > 3:
            self.answer_json({"id": "/".join(parts[2:4]), "sha": COMMIT, "tags": [], "siblings": []})
        else:
            self.answer(None)

    def do_POST(self):
        address = f"http://127.0.0.1:{self.server.server_port}/datasets/someone/tokens"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/create"):
            request = json.loads(body)
            assert (request["name"], request["type"]) == ("tokens", "dataset")
            self.answer_json({"url": address})
        elif self.path.endswith("/validate-yaml"):
            self.answer_json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": entry["path"], "uploadMode": "regular"} for entry in json.loads(body)["files"]]
            self.answer_json({"files": [{**file, "shouldIgnore": False} for file in files]})
        else:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    path = self.server.root / "datasets" / "someone" / "tokens" / entry["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(entry["value"]["content"]))
            self.answer_json({"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT})

    def answer_json(self, content):
        self.answer(json.dumps(content).encode())

    def answer(self, content):
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        content = content or b""
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Address of the server and the folder that it serves."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root = tmp_path / "hub"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server.root
    server.shutdown()
    server.server_close()


def test_push_to_the_hub_and_load_from_there(workspace, hub, tmp_path):
    """The tokenizer comes from the Hub too, and is found there again under its revision."""
    address, root = hub
    repo = root / "models" / "someone" / "tokenizer"
    make_tokenizer().save_pretrained(repo)
    argv = arguments(workspace, tmp_path / "out", "--tokenizer", "someone/tokenizer")
    argv += ["--push_to_hub", "--hub_dataset_id", "tokens"]
    remember_tokenizer(str(tmp_path / "out"), str(workspace / "tokenizer"))
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_any", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    # What Python adds by itself where a script is the program.
    environment["PYTHONPATH"] = str(SCRIPT.parent)
    command = [sys.executable, "-c", PUSH_AND_LOAD, str(tmp_path / "indices.pt"), str(repo), str(SCRIPT), *argv]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(root / "datasets" / "someone" / "tokens") == contents(tmp_path / "out")
    assert not (root / "datasets" / "someone" / "tokens" / ".cache").exists()
    assert TokenDatasetInfo.load(str(tmp_path / "out")).tokenizer["revision"] == COMMIT
    train, _ = image_data(workspace)
    expected = encode(workspace, [train[index] for index in range(40)])
    assert torch.equal(torch.stack(torch.load(tmp_path / "indices.pt")), expected)


# --- what goes wrong ---


def test_other_settings_than_those_of_the_first_run(run, workspace):
    folder = run()
    before = contents(folder)
    for name, *options in (
        ("images.seed", "--seed", "1"),
        ("images.num_augmentations", "--num_augmentations", "1"),
        ("shards.batch_size", "--batch_size", "5"),
        ("teacher.name_or_path", "--teacher", str(workspace / "teacher")),
    ):
        with pytest.raises(ValueError, match=f"other settings.*`{name}` .*another folder"):
            run(*options)
    assert contents(folder) == before
    run()
    assert contents(folder) == before


def write_pictures(folder, *names):
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make_images(1, seed)[0].save(path)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_other_images_than_those_of_the_first_run(run, tmp_path, kind):
    """Exchanged, one of them or all, or with other labels; elsewhere and written anew they are the same."""
    data = tmp_path / "data"
    if kind == "parquet":
        write_images(data / "train.parquet", 6, seed=0)
    else:
        write_pictures(data, "a/0.png", "a/1.png", "b/0.png")
    folder = run("--dataset_name", str(data))
    before = contents(folder)
    shutil.copytree(data, tmp_path / "copies" / "data", copy_function=shutil.copy)
    run("--dataset_name", str(tmp_path / "copies" / "data"))
    if kind == "parquet":
        write_images(data / "train.parquet", 6, seed=1)
    else:
        make_images(1, 9)[0].save(data / "b" / "0.png")
    with pytest.raises(ValueError, match="other settings.*`images.train_sha256` .*files themselves are others"):
        run("--dataset_name", str(data))
    if kind == "folder":
        (tmp_path / "copies" / "data" / "b").rename(tmp_path / "copies" / "data" / "c")
        (tmp_path / "copies" / "data" / "c" / "0.png").rename(tmp_path / "copies" / "data" / "a" / "2.png")
        with pytest.raises(ValueError, match="other settings.*`images.train_sha256`"):
            run("--dataset_name", str(tmp_path / "copies" / "data"))
    assert contents(folder) == before


def test_another_teacher_of_the_same_name(run, tmp_path):
    write_teacher(tmp_path / "teacher", 12)
    run("--teacher", str(tmp_path / "teacher"))
    model = ViTModel.from_pretrained(tmp_path / "teacher")
    next(model.parameters()).data += 1
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="other settings.*`teacher.weights_sha256`"):
        run("--teacher", str(tmp_path / "teacher"))


def test_nothing_names_a_folder_of_this_machine(workspace, run, tmp_path):
    folder = run("--teacher", str(workspace / "teacher"))
    for path in folder.rglob("*"):
        assert path.is_dir() or str(workspace).encode() not in path.read_bytes(), path
        assert path.is_dir() or workspace.name.encode() not in path.read_bytes() or path.suffix == ".txt", path
    content = json.loads((folder / "token_dataset.json").read_text())
    assert content["images"]["dataset_name"] == "data" and content["tokenizer"]["name_or_path"] == "tokenizer"
    source = TokenSource.from_token_dataset(str(folder), teacher=str(workspace / "teacher"))
    assert source.tokenizer.codebook_size == 765 and source.teacher_hidden_size == 12


def test_labels_and_splits_that_are_left_out(run, tmp_path):
    data = tmp_path / "data"
    write_pictures(data, "train/a/0.png", "train/b/1.png", "val/2.png", "val/3.png")
    with pytest.raises(ValueError, match="split 'validation'.*--validation_split none"):
        run("--dataset_name", str(data))
    splits = datasets.load_dataset(str(run("--dataset_name", str(data), "--validation_split", "none")))
    assert splits.keys() == {"train"} and list(splits["train"]["label"]) == [0, 1]
    folder = run("--dataset_name", str(data), "--label_column", "none", output=tmp_path / "unlabelled")
    assert TokenDatasetInfo.load(str(folder)).num_rows == {"train": 2, "validation": 2}
    assert datasets.load_dataset(str(folder))["train"].column_names == ["indices"]


@pytest.mark.parametrize(
    "options, match",
    [
        (["--random_flip"], "`random_flip`.*`num_augmentations` is 0"),
        (["--min_crop_scale", "0.5"], "`min_crop_scale`.*`num_augmentations` is 0"),
        (["--num_augmentations", "-1"], "`num_augmentations` must be at least 0, got -1"),
        (["--batch_size", "0"], "`batch_size` must be at least 1, got 0"),
        (["--images_per_shard", "0"], "`images_per_shard` must be at least 1, got 0"),
        (["--train_data_dir", "photos"], "exactly one of `dataset_name` or `train_data_dir`"),
        (["--label_column", "kind"], r"`label_column` 'kind' is none of the columns"),
        (["--resolution", "18"], "multiple of the downsampling factor 4.*18"),
    ],
)
def test_bad_arguments(run, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        run(*options)
    assert not (tmp_path / "out").exists()


def test_tokenizer_without_tokens(run, make_baseline, tmp_path):
    make_baseline(AutoencoderKL).save_pretrained(tmp_path / "kl")
    with pytest.raises(ValueError, match="`tokenizer` is an AutoencoderKL.*no tokens"):
        run("--tokenizer", str(tmp_path / "kl"))
    assert not (tmp_path / "out").exists()


def test_script_stays_short():
    assert len(SCRIPT.read_text().splitlines()) <= 200
