import doctest
import re
from importlib.resources import files
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from hf_ifsq.metrics.alignment import cknna
from hf_ifsq.metrics.codebook import CodebookUsage
from hf_ifsq.metrics.frechet import FeatureMoments, frechet_distance
from hf_ifsq.metrics.images import peak_signal_noise_ratio, structural_similarity
from hf_ifsq.vision.lpips import LPIPS, STAGES


METRICS = Path(str(files("hf_ifsq.metrics")))
NAMES = ["reconstruction", "lpips", "codebook_usage", "frechet_distance", "cknna"]


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Where `evaluate` copies modules and stores inputs."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(folder / "metrics"))
        yield


def load(name):
    return evaluate.load(str(METRICS / name))


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    torch.manual_seed(0)
    weights, number, in_channels = {}, 0, 3
    for widths in STAGES:
        for width in widths:
            std = (2 / (9 * in_channels)) ** 0.5
            weights[f"features.{number}.weight"] = torch.randn(width, in_channels, 3, 3) * std
            weights[f"features.{number}.bias"] = torch.zeros(width)
            in_channels, number = width, number + 2
        number += 1
    file = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file(weights, file)
    return str(file)


@pytest.mark.parametrize("name", NAMES)
def test_loads_as_a_metric(name):
    metric = load(name)
    assert isinstance(metric, evaluate.Metric) and metric.name == name
    assert metric.description and metric.inputs_description and metric.module_type == "metric"


def test_reconstruction():
    originals = torch.rand(3, 3, 16, 20) * 2 - 1
    images = (originals + 0.1 * torch.randn(originals.shape)).clamp(-1, 1)
    psnrs, ssims = peak_signal_noise_ratio(images, originals), structural_similarity(images, originals)
    # A list of tensors, arrays, and one image after the other.
    metric = load("reconstruction")
    result = metric.compute(predictions=list(images), references=originals.numpy())
    assert result["psnr_db_of_images"] == pytest.approx(psnrs.tolist(), rel=1e-6)
    assert result["ssim_of_images"] == pytest.approx(ssims.tolist(), rel=1e-6)
    assert result["psnr_db"] == pytest.approx(psnrs.mean().item(), rel=1e-6)
    assert result["ssim"] == pytest.approx(ssims.mean().item(), rel=1e-6)
    for image, original in zip(images, originals):
        metric.add(prediction=image.numpy(), reference=original.numpy())
    assert metric.compute() == result


def test_reconstruction_of_images_of_several_sizes():
    shapes = [(3, 16, 20), (3, 16, 12), (1, 30, 12)]
    originals = [np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32) for shape in shapes]
    result = load("reconstruction").compute(predictions=[0.9 * image for image in originals], references=originals)
    for original, psnr in zip(originals, result["psnr_db_of_images"]):
        assert psnr == pytest.approx(10 * np.log10(4 / (0.01 * np.square(original).mean())), rel=1e-5)


def test_reconstruction_of_pixels_that_were_not_scaled():
    pixels = np.full((1, 3, 16, 16), 255, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], but it spans \[255"):
        load("reconstruction").compute(predictions=pixels, references=pixels)


def test_lpips(vgg):
    originals = torch.rand(2, 1, 32, 32) * 2 - 1
    images = (originals + 0.1 * torch.randn(originals.shape)).clamp(-1, 1)
    expected = LPIPS(vgg)(images, originals)
    result = load("lpips").compute(predictions=images, references=originals, vgg=vgg)
    assert result["lpips_of_images"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert result["lpips"] == pytest.approx(expected.mean().item(), rel=1e-4) and result["lpips"] > 0.001
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\]"):
        load("lpips").compute(predictions=2 * originals + 1, references=originals, vgg=vgg)


def test_codebook_usage():
    indices, bounded = torch.randint(0, 15, (4, 6)), torch.rand(4, 2, 6) * 2 - 1
    usage = CodebookUsage(levels=[5, 3])
    usage.update(indices, bounded)
    metric = load("codebook_usage")
    assert metric.compute(predictions=indices.tolist(), levels=[5, 3], bounded=bounded) == usage.compute()
    # Images of different numbers of tokens.
    assert metric.compute(predictions=[[1, 2], [3]], codebook_size=2**62)["num_tokens"] == 3
    with pytest.raises(ValueError, match=r"`indices` must be in \[0, 15\)"):
        metric.compute(predictions=[[15]], levels=[5, 3])


def test_frechet_distance():
    features, references = torch.randn(2, 30, 5)
    moments, reference_moments = FeatureMoments(), FeatureMoments()
    moments.update(features)
    reference_moments.update(references)
    metric = load("frechet_distance")
    for part in range(3):
        metric.add_batch(predictions=features[part::3], references=references[part::3])
    expected = frechet_distance(moments, reference_moments)
    assert metric.compute()["frechet_distance"] == pytest.approx(expected, rel=1e-9)


def test_cknna():
    features, references = torch.randn(30, 5), torch.randn(30, 7)
    metric = load("cknna")
    for k in ({}, {"k": 4}):
        for part in (slice(0, 20), slice(20, 30)):
            metric.add_batch(predictions=features[part], references=references[part])
        assert metric.compute(**k)["cknna"] == pytest.approx(cknna(features, references, **k), abs=1e-9)
    with pytest.raises(ValueError, match=r"`k` must be in \[1, images\).*got `k` 10 for 5"):
        metric.compute(predictions=features[:5], references=references[:5])


@pytest.mark.parametrize("name", NAMES)
def test_cards(name):
    card = (METRICS / name / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["title"] and metadata["sdk"] == "static" and metadata["description"]
    assert metadata["tags"] == ["evaluate", "metric"]
    headings = re.findall(r"^##+ (.*)", card, flags=re.MULTILINE)
    assert headings == ["Description", "How to use", "Inputs", "Outputs", "Limitations and bias", "Citation"]
    assert (METRICS / name / "requirements.txt").read_text() == "hf-ifsq[eval]\n"
    assert (METRICS / name / "index.html").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_cards(name, vgg):
    card = (METRICS / name / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(>>> from importlib.*?)```", card, flags=re.DOTALL)[1]
    metric = load(name)
    assert example in metric.inputs_description and "Outputs" in metric.inputs_description
    assert metric.description in card and metric.citation.startswith("@") and metric.citation in card
    if name == "lpips":
        # Random weights instead of a download.
        assert card.count("references=originals)") == 2
        card = card.replace("references=originals)", f"references=originals, vgg={vgg!r})")
    check_examples(card)


def check_examples(text):
    test = doctest.DocTestParser().get_doctest(text, {}, "example", None, 0)
    assert test.examples
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.summarize().failed == 0
