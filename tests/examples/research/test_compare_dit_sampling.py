import importlib
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from hf_ifsq import IFSQDiTPipeline


EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "research")
    return importlib.import_module("compare_dit_sampling")


def write_images(folder):
    """16 training images of two classes and 2 others."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["ant", "bee"])})
    for split, count in (("train", 16), ("test", 2)):
        images = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
        columns = {"image": images, "label": [index % 2 for index in range(count)]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def test_the_whole_comparison(module, tmp_path, make_autoencoder, make_dit, capsys):
    write_images(tmp_path / "data")
    tokenizer = make_autoencoder(scaling_factor=1.5)
    pipeline = IFSQDiTPipeline(make_dit(sample_size=4, num_classes=2), tokenizer, FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(tmp_path / "dit")
    config = ResNetConfig(hidden_sizes=[8], depths=[1], layer_type="basic", embedding_size=8, num_labels=2)
    classifier = ResNetForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "classifier")

    options = {"steps": [2, 3], "num_images_per_label": 6, "batch_size": 5, "output_dir": tmp_path / "out"}
    names = {name: str(tmp_path / folder) for name, folder in (("pipeline", "dit"), ("classifier", "classifier"))}
    module.main(module.SamplingArguments(dataset_name=str(tmp_path / "data"), **names, **options))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    settings = results["settings"]
    assert results["training_images"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert [(setting["scheduler"], setting["steps"], setting["model_calls"]) for setting in settings] == [
        *[("Euler", 2, 2), ("Euler", 3, 3), ("Heun", 2, 3), ("Heun", 3, 5)],
        *[("DPM-Solver++", 2, 2), ("DPM-Solver++", 3, 3), ("UniPC", 2, 2), ("UniPC", 3, 3)],
    ]
    assert (tmp_path / "out" / "tables.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "out" / "curves.png").is_file()

    # One setting again by the pipeline alone.
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipeline = IFSQDiTPipeline(pipeline.transformer, pipeline.tokenizer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(2).repeat_interleave(6)
    images = {}
    for name in ("snapped", "unsnapped"):
        options = {"generator": torch.Generator().manual_seed(0), "snap_to_codes": name == "snapped"}
        images[name] = pipeline(labels, num_inference_steps=3, output_type="pt", **options).images
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            logits = classifier((images[name] - mean[:, None, None]) / std[:, None, None]).logits
        recognized = (logits.argmax(1) == labels).float().mean().item()
        assert settings[5][name]["recognized"] == pytest.approx(recognized)
        assert settings[5][name]["frechet_distance"] > 0
    # Of images in [0, 1].
    errors = (images["snapped"] - images["unsnapped"]).square().mean(dim=(1, 2, 3))
    assert settings[5]["psnr_of_snapping_db"] == pytest.approx((-10 * errors.log10()).mean().item(), abs=0.01)
    assert settings[5]["distance_to_codes"] > 0


def test_recognizer_of_digits(module):
    recognizer = module.DigitRecognizer()
    _, digits, _, labels = runpy.run_path(str(EXAMPLES / "demo.py"))["load_data"]()
    images = torch.from_numpy(digits).float()[:, None] * 2 - 1
    assert (recognizer.predict(images).numpy() == labels).mean() > 0.98
    features = recognizer.features(images)
    assert features.shape == (len(digits), 64)
    assert features[3, 8 * 2 + 5].item() == pytest.approx(images[3, 0, 4:6, 10:12].mean().item())
