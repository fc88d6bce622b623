"""
What the `evaluate` modules in the folders beside this file share. `evaluate.load` copies a module's file and takes the
first class in it that is one of its own: import this module from there, not its class.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
import torch


TOKENS = datasets.List(datasets.Value("int64"))
VECTOR = datasets.List(datasets.Value("float64"))
IMAGE = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))


class Metric(evaluate.Metric):
    """A metric with the texts of the `README.md` beside it; `inputs` are the features of what it takes."""

    inputs: ClassVar[dict[str, Any]]

    def _info(self) -> evaluate.MetricInfo:
        # The folder has the name of the module, also where `evaluate` copies this to.
        folder = Path(__file__).parent / type(self).__module__.rpartition(".")[2]
        card = (folder / "README.md").read_text(encoding="utf-8")
        sections = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", card, flags=re.MULTILINE | re.DOTALL))
        info = evaluate.MetricInfo(
            description=sections["Description"].strip(),
            citation=re.sub(r"```(bibtex)?\n?", "", sections["Citation"]).strip(),
            inputs_description=sections["How to use"].strip(),
            features=datasets.Features(self.inputs),
        )
        # Not an argument: it is refused for nested features. Lists would take four times the memory or more.
        info.format = "numpy"
        return info


def image_pairs(
    predictions: Iterable[np.ndarray], references: Iterable[np.ndarray], device: str = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of one image and of its original, of any sizes."""
    for prediction, reference in zip(predictions, references, strict=True):
        yield torch.from_numpy(prediction)[None].to(device), torch.from_numpy(reference)[None].to(device)
