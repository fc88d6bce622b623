from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image


PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_from_images_to_a_loss_in_a_notebook(tmp_path, monkeypatch, make_autoencoder):
    """The block of the page as it stands, on a folder like that of the demo."""
    monkeypatch.chdir(tmp_path)
    levels = {"levels": (17, 17, 17, 17), "in_channels": 1, "out_channels": 1}
    make_autoencoder(**levels).save_pretrained("outputs/demo/tokenizer")
    Path("outputs/demo/data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 16), dtype=np.uint8)
    columns = {"image": list(map(Image.fromarray, pixels)), "label": [number % 10 for number in range(12)]}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list("0123456789"))})
    Dataset.from_dict(columns, features=features).to_parquet("outputs/demo/data/train.parquet")

    block = PAGE.read_text(encoding="utf-8").split("## In a notebook")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in block.splitlines() if line]) <= 12
    names = {}
    exec(block, names)
    assert names["batch"]["pixel_values"].shape == (8, 1, 16, 16)
    assert names["indices"].shape == (8, 16) and names["indices"].unique().numel() > 16
    # A new model predicts evenly.
    assert torch.isclose(names["loss"], torch.tensor(17.0**4).log(), atol=1e-4)
