"""Learned perceptual distance (LPIPS) of reconstructed images, as a module of `evaluate`."""

import statistics

import datasets
import evaluate
import torch

from hf_ifsq.metrics import images
from hf_ifsq.vision.lpips import LPIPS


DESCRIPTION = """
Learned perceptual distance (LPIPS) of images to their originals, on the features of VGG16.
"""

INPUTS = """
Args:
    predictions: images, each an array of shape (1 or 3, height, width) with values in [-1, 1], at least 16 pixels a
        side.
    references: their originals, of the same shapes and range.
    vgg: safetensors of an ImageNet VGG16 under torchvision's names: a repository on the Hub or a folder with a
        `model.safetensors`, or the file itself. By default `timm/vgg16.tv_in1k`.
    device: where to compute, by default `cpu`.

Returns:
    lpips: mean over the images of the distance, at least 0.
    lpips_of_images: the distances of the images, in their order.

Example:
    >>> from importlib.resources import files
    >>> import evaluate
    >>> import numpy as np
    >>> lpips = evaluate.load(str(files("hf_ifsq.metrics") / "lpips"))
    >>> originals = np.zeros((2, 3, 16, 16))
    >>> lpips.compute(predictions=originals, references=originals)["lpips"]
    0.0
"""

CITATION = """
@inproceedings{zhang2018unreasonable,
  title={The Unreasonable Effectiveness of Deep Features as a Perceptual Metric},
  author={Zhang, Richard and Isola, Phillip and Efros, Alexei A. and Shechtman, Eli and Wang, Oliver},
  booktitle={CVPR},
  year={2018}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Lpips(evaluate.Metric):
    """LPIPS of images of any sizes."""

    def _info(self) -> evaluate.MetricInfo:
        image = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
        info = evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": image, "references": image}),
            codebase_urls=["https://github.com/richzhang/PerceptualSimilarity"],
            reference_urls=["https://arxiv.org/abs/1801.03924"],
        )
        # Not among the arguments, which refuse it for nested features. Lists would take eight times the memory.
        info.format = "numpy"
        return info

    @torch.no_grad()
    def _compute(
        self, predictions, references, vgg: str = "timm/vgg16.tv_in1k", device: str = "cpu"
    ) -> dict[str, float | list[float]]:
        lpips = LPIPS(vgg).to(device)
        distances = []
        for prediction, reference in zip(predictions, references, strict=True):
            pair = torch.from_numpy(prediction)[None].to(device), torch.from_numpy(reference)[None].to(device)
            images.check_image_pair(*pair)
            distances.append(lpips(*pair).item())
        return {"lpips": statistics.fmean(distances), "lpips_of_images": distances}
