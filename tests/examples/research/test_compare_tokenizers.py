import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image


EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.slow
def test_the_whole_comparison(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 12)):
        images = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
        rows = Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()}))
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    command = [sys.executable, EXAMPLES / "research" / "compare_tokenizers.py", "--dataset_name", tmp_path / "data"]
    command += ["--bits", "2", "--seeds", "0", "1", "--resolution", "16", "--max_train_steps", "3", "--jobs", "2"]
    command += ["--block_out_channels", "32", "32", "--train_batch_size", "2", "--output_dir", tmp_path / "out"]
    subprocess.run(list(map(str, command)), check=True, timeout=580, capture_output=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    kinds = ["ifsq_2bit", "fsq_2bit", "equal_bins_2bit", "fsp_2bit", "vq", "kl"]
    assert [(result["kind"], result["seed"]) for result in results] == [
        (kind, seed) for seed in (0, 1) for kind in kinds
    ]
    assert all(np.isfinite(result["psnr_db"]) for result in results)
    tables = (tmp_path / "out" / "tables.md").read_text()
    difference = [results[place]["psnr_db"] - results[place + 1]["psnr_db"] for place in (0, len(kinds))]
    assert f"| ifsq_2bit less fsq_2bit | {np.mean(difference):+.3f} ± {np.std(difference, ddof=1):.3f} |" in tables
    assert {path.name for path in (tmp_path / "out").glob("*.*g")} == {"comparison.png", "reconstructions.jpg"}
