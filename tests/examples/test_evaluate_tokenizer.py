import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import skimage
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from transformers import AutoModel, ViTConfig, ViTModel

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.vision.lpips import LPIPS, STAGES


SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate_tokenizer.py"
SIDE = 16
LEVELS = (5, 4, 3)


def make_images(count, seed):
    """Crops of a photo, 20 x 24 pixels."""
    photo, generator = skimage.data.astronaut()[::4, ::4], np.random.default_rng(seed)
    corners = generator.integers(0, 100, (count, 2))
    return [Image.fromarray(photo[top : top + 20, left : left + 24]) for top, left in corners]


def write_parquet(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()})).to_parquet(path)


class Workspace:
    """A folder with images, a tokenizer, the models that judge, and the reports on them."""

    def __init__(self, root):
        torch.manual_seed(0)
        self.root = root
        self.images = make_images(7, seed=0)
        write_parquet(root / "data" / "train.parquet", make_images(3, seed=1))
        write_parquet(root / "data" / "test.parquet", self.images)
        model = AutoencoderIFSQ(
            block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, levels=LEVELS, sample_size=32
        )
        torch.nn.init.normal_(model.quant_conv.weight, std=2.0)
        model.save_pretrained(root / "tokenizer")
        sizes = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(root / "vit")
        weights, number, in_channels = {}, 0, 3
        for widths in STAGES:
            for width in widths:
                std = (2 / (9 * in_channels)) ** 0.5
                weights[f"features.{number}.weight"] = torch.randn(width, in_channels, 3, 3) * std
                weights[f"features.{number}.bias"] = torch.zeros(width)
                in_channels, number = width, number + 2
            number += 1
        save_file(weights, root / "vgg.safetensors")

    def report(self, name, launcher=()):
        """Folder of the report, made in processes of their own."""
        output = self.root / name
        arguments = f"--tokenizer {self.root}/tokenizer --dataset_name {self.root}/data --resolution {SIDE}".split()
        arguments += f"--lpips_vgg {self.root}/vgg.safetensors --feature_extractor {self.root}/vit".split()
        arguments += f"--batch_size 3 --num_pictures 4 --output_dir {output}".split()
        environment = {**os.environ, "HF_HOME": f"{self.root}/hf", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), *arguments],
            env={**environment, "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            cwd=self.root,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return output


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def folder(workspace):
    return workspace.report("report")


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "report.json").read_text())["results"]


@pytest.fixture(scope="module")
def originals(workspace):
    """The validation images as their square middles, in [-1, 1]."""
    squares = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(2, 0, 22, 20)) for image in workspace.images]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def model(workspace):
    return AutoencoderIFSQ.from_pretrained(workspace.root / "tokenizer").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reconstructions(model, originals):
    return model(originals).sample.clamp(-1, 1)


def test_errors_of_reconstructions(results, originals, reconstructions):
    pairs = [
        [(image.double().numpy().transpose(1, 2, 0) + 1) / 2 for image in pair]
        for pair in zip(originals, reconstructions)
    ]
    psnrs = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    ssims = [structural_similarity(*pair, channel_axis=-1, **options) for pair in pairs]
    assert results["psnr_db"] == pytest.approx(np.mean(psnrs), abs=1e-4)
    assert results["ssim"] == pytest.approx(np.mean(ssims), abs=1e-5)


def test_lpips(results, workspace, originals, reconstructions):
    distances = LPIPS(str(workspace.root / "vgg.safetensors"))(reconstructions, originals)
    assert results["lpips"] == pytest.approx(distances.mean().item(), rel=1e-4)


def test_frechet_distance(results, workspace, originals, reconstructions):
    vit = AutoModel.from_pretrained(workspace.root / "vit").eval().requires_grad_(False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    features = []
    for images in (reconstructions, originals):
        normalized = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        features.append(vit(normalized).last_hidden_state[:, 0].double().numpy())
    covariances = [np.cov(values.T) for values in features]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    difference = features[0].mean(axis=0) - features[1].mean(axis=0)
    expected = difference @ difference + np.trace(sum(covariances) - 2 * root)
    assert results["frechet_distance"] == pytest.approx(expected, rel=1e-3)


def test_codes(results, model, originals):
    indices = model.encode(originals).indices.flatten().numpy()
    _, counts = np.unique(indices, return_counts=True)
    assert results["num_tokens"] == 7 * 16 and results["num_codes_used"] == len(counts)
    assert results["usage"] == pytest.approx(len(counts) / 60)
    assert results["entropy_bits"] == pytest.approx(scipy.stats.entropy(counts, base=2))
    assert results["perplexity"] == pytest.approx(math.exp(scipy.stats.entropy(counts)))
    first_digits = np.bincount(indices % 5, minlength=5)
    assert results["dimension_histograms"][0] == first_digits.tolist()
    assert results["dimension_entropies_bits"][0] == pytest.approx(scipy.stats.entropy(first_digits, base=2))


def test_values_before_rounding(results, model, originals):
    latent = model.quant_conv(model.encoder(originals))
    for dimension in (0, 2):
        values = (2 * torch.sigmoid(1.6 * latent[:, dimension]) - 1).flatten().double().numpy()
        expected = scipy.stats.kstest(values, scipy.stats.uniform(-1, 2).cdf).statistic
        assert results["dimension_ks_distances"][dimension] == pytest.approx(expected, abs=1e-4)
    assert len(results["dimension_ks_distances"]) == 3


def test_report(folder, workspace):
    report = json.loads((folder / "report.json").read_text())
    data = report["data"]
    assert (data["name"], data["split"], data["num_images"]) == (str(workspace.root / "data"), "test", 7)
    assert data["resolution"] == SIDE and "bicubic" in data["preprocessing"]
    assert report["tokenizer"]["class"] == "AutoencoderIFSQ" and report["tokenizer"]["levels"] == list(LEVELS)
    assert report["tokenizer"]["grid_size"] == [4, 4] and len(report["tokenizer"]["weights_sha256"]) == 64
    assert report["judges"]["feature_image_size"] == 16 and report["versions"]["torch"] == torch.__version__
    text = (folder / "report.md").read_text()
    for row in (
        f"| tokenizer name | {workspace.root}/tokenizer |",
        "| data split | test |",
        "| data num_images | 7 |",
        f"| psnr_db | {report['results']['psnr_db']:.6g} |",
        f"| frechet_distance | {report['results']['frechet_distance']:.6g} |",
        f"| 0 | 5 | {report['results']['dimension_entropies_bits'][0]:.4f} |",
        "(reconstructions.png)",
        "(codes.png)",
    ):
        assert row in text


def test_pictures(folder, originals, reconstructions):
    picture = np.asarray(Image.open(folder / "reconstructions.png"), dtype=float)
    assert picture.shape == (3 * 128, 4 * 128, 3)
    # Each pixel is enlarged to 8 x 8.
    tiles = picture[::8, ::8].reshape(3, SIDE, 4, SIDE, 3).transpose(0, 2, 4, 1, 3)
    np.testing.assert_array_equal(picture[:8, :8], np.broadcast_to(picture[0, 0], (8, 8, 3)))
    expected = [(images[:4].numpy() + 1) * 127.5 for images in (originals, reconstructions)]
    expected.append(np.clip(2 * np.abs(expected[0] - expected[1]), 0, 255))
    assert np.abs(tiles - np.stack(expected)).max() < 0.51
    codes = np.asarray(Image.open(folder / "codes.png"))
    assert codes.shape[0] >= 200 and codes.shape[1] >= 600 and codes[..., :3].std() > 10


def test_two_processes_give_the_same_numbers(workspace, folder):
    """Seven images in batches of three, which do not divide by two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    parallel = workspace.report("parallel", launcher)
    reports = [json.loads((path / "report.json").read_text()) for path in (folder, parallel)]
    one, two = [report.pop("results") for report in reports]
    assert reports[0] == reports[1] and set(one) == set(two)
    for name, value in one.items():
        if name == "dimension_histograms":
            assert value == two[name]
        else:
            assert two[name] == pytest.approx(value, rel=1e-6, abs=1e-6)
    pictures = [(path / "reconstructions.png").read_bytes() for path in (folder, parallel)]
    assert pictures[0] == pictures[1]


# --- in this process ---


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_tokenizer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def evaluate(script, monkeypatch, tmp_path):
    """Runs the script on a tokenizer and images that are saved without a cache."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    images = {"train": make_images(4, seed=3), "test": make_images(2, seed=4)}
    features = Features({"image": ImageFeature()})
    data = {name: Dataset.from_dict({"image": images[name]}, features=features) for name in images}
    DatasetDict(data).save_to_disk(tmp_path / "data")

    def reset():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    def run(model, **options):
        reset()
        model.save_pretrained(tmp_path / "tokenizer")
        options = {"resolution": SIDE, "dataset_name": str(tmp_path / "data"), **options}
        arguments = script.EvaluationArguments(
            tokenizer=str(tmp_path / "tokenizer"), output_dir=str(tmp_path / "report"), **options
        )
        script.main(arguments)
        return tmp_path / "report", json.loads((tmp_path / "report" / "report.json").read_text())

    yield run
    reset()


def test_vq(evaluate, make_baseline):
    folder, report = evaluate(make_baseline(VQModel), split="train", batch_size=3)
    results = report["results"]
    assert set(results) == {
        "psnr_db",
        "ssim",
        "num_tokens",
        "num_codes_used",
        "usage",
        "entropy_bits",
        "perplexity",
    }
    assert results["num_tokens"] == 4 * 16 and results["usage"] == results["num_codes_used"] / 20 > 0.1
    assert (report["data"]["split"], report["data"]["num_images"]) == ("train", 4)
    assert report["tokenizer"]["class"] == "VQModel" and report["tokenizer"]["codebook_size"] == 20
    assert np.asarray(Image.open(folder / "codes.png")).std() > 10
    # Fewer images than pictures asked for.
    assert Image.open(folder / "reconstructions.png").size == (4 * 128, 3 * 128)


def test_kl_on_grey_images(evaluate, make_baseline):
    folder, report = evaluate(make_baseline(AutoencoderKL, in_channels=1, out_channels=1), max_samples=1)
    assert set(report["results"]) == {"psnr_db", "ssim"} and report["data"]["num_images"] == 1
    assert report["tokenizer"]["codebook_size"] is None
    assert not (folder / "codes.png").exists() and "codes.png" not in (folder / "report.md").read_text()
    picture = np.asarray(Image.open(folder / "reconstructions.png"))
    assert picture.shape == (3 * 128, 128, 3) and picture.std() > 10 and (picture[..., 0] == picture[..., 2]).all()


def test_bad_arguments(script, evaluate, make_autoencoder):
    for name in ("max_samples", "batch_size", "num_pictures"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            script.EvaluationArguments(tokenizer="", **{name: 0})
    with pytest.raises(ValueError, match="`feature_image_size` is for a `feature_extractor`"):
        script.EvaluationArguments(tokenizer="", feature_image_size=224)
    model = make_autoencoder()
    for options, message in (
        ({"train_data_dir": "images"}, "`dataset_name` or `train_data_dir`"),
        ({"split": "dev"}, r"split` must be one of.*'train', 'test'.*'dev'"),
        ({"image_column": "photo"}, "`image_column` 'photo'"),
        ({"resolution": 18}, "multiple of.*18"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, **options)
