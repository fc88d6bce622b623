import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification


EXAMPLES = Path(__file__).parents[3] / "examples"
OPTIONS = (
    "--resolution 16 --classifier_steps 2 --hidden_size 16 --num_layers 2 "
    "--num_attention_heads 2 --train_batch_size 2 --max_train_steps 4 --validation_steps 1 --evaluation_steps 2 "
    "--num_images_per_label 3 --num_inference_steps 2"
)


def write_images(folder):
    """Two classes of different colors."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["ant", "bee"])})
    for split, count in (("train", 8), ("test", 14)):
        labels = [index % 2 for index in range(count)]
        pixels = generator.integers(0, 128, (count, 16, 16, 3), dtype=np.uint8)
        pixels[np.array(labels) == 1] += 127
        columns = {"image": [Image.fromarray(image) for image in pixels], "label": labels}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.mark.slow
def test_the_whole_comparison(tmp_path, make_autoencoder):
    write_images(tmp_path / "data")
    make_autoencoder().save_pretrained(tmp_path / "tokenizer")
    output_dir = tmp_path / "out"

    def run(*options):
        command = [sys.executable, EXAMPLES / "research" / "compare_repa.py", "--dataset_name", tmp_path / "data"]
        command += ["--tokenizer", tmp_path / "tokenizer", "--output_dir", output_dir, *OPTIONS.split(), *options]
        return subprocess.run(list(map(str, command)), check=True, timeout=280, capture_output=True, text=True).stdout

    def logged(variant, name):
        lines = (output_dir / generator / variant / "training_log.jsonl").read_text().splitlines()
        return [entry[name] for entry in map(json.loads, lines) if name in entry]

    for generator, loss in (("ar", "validation_cross_entropy"), ("dit", "validation_loss")):
        table = run("--generator", generator)
        folder = output_dir / generator
        results = json.loads((folder / "results.json").read_text())
        assert results["validation images"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
        for variant in ("plain", "repa"):
            assert [result["step"] for result in results[variant]] == [1, 2, 3, 4]
            assert [result[loss] for result in results[variant]] == logged(variant, loss)
            measured = [result for result in results[variant] if "recognized" in result]
            assert [result["step"] for result in measured] == [2, 4]
            for result in measured:
                # Six images.
                assert result["recognized"] * 6 == pytest.approx(round(result["recognized"] * 6), abs=1e-5)
                assert np.isfinite(result["frechet_distance"])
        assert f"| with REPA | {results['repa'][-1][loss]:.3f} |" in table
        assert {path.name for path in folder.glob("*.png")} == {"curves.png", "samples.png"}
    judge = AutoModelForImageClassification.from_pretrained(output_dir / "judge")
    assert judge.config.id2label == {0: "ant", 1: "bee"}

    # Nothing that is there is trained again.
    trained = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*.safetensors")}
    assert run("--generator", "ar") == (output_dir / "ar" / "table.md").read_text() + "\n"
    assert trained == {path: path.stat().st_mtime_ns for path in output_dir.rglob("*.safetensors")}

    # But for the weight of the alignment nothing differs; here with a teacher that is there already.
    same_dir = tmp_path / "same"
    run("--generator", "ar", "--repa_weight", "0", "--teacher", output_dir / "teacher", "--output_dir", same_dir)
    plain, repa, other = (
        load_file(folder / "ar" / variant / "transformer" / "model.safetensors")
        for folder, variant in ((same_dir, "plain"), (same_dir, "repa"), (output_dir, "repa"))
    )
    assert all(torch.equal(plain[name], repa[name]) for name in plain)
    assert not all(torch.equal(plain[name], other[name]) for name in plain)
    assert not (same_dir / "teacher").exists()
