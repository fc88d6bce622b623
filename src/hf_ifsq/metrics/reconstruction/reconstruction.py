"""PSNR and SSIM of reconstructed images, as a module of `evaluate`."""

import statistics

import datasets
import evaluate
import torch

from hf_ifsq.metrics import images


DESCRIPTION = """
How close reconstructed images are to their originals: PSNR in decibels, and SSIM with a Gaussian window of 11 pixels.
"""

INPUTS = """
Args:
    predictions: reconstructions, each an array of shape (1 or 3, height, width) with values in [-1, 1], at least 11
        pixels a side.
    references: their originals, of the same shapes and range.

Returns:
    psnr_db: mean over the images of the PSNR in decibels.
    ssim: mean over the images of the SSIM.
    psnr_db_of_images, ssim_of_images: the values of the images, in their order.

Example:
    >>> from importlib.resources import files
    >>> import evaluate
    >>> import numpy as np
    >>> reconstruction = evaluate.load(str(files("hf_ifsq.metrics") / "reconstruction"))
    >>> originals = np.zeros((2, 3, 16, 16))
    >>> reconstruction.compute(predictions=originals + 0.2, references=originals)["psnr_db"]
    20.0
"""

CITATION = """
@article{wang2004image,
  title={Image quality assessment: from error visibility to structural similarity},
  author={Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.},
  journal={IEEE Transactions on Image Processing},
  volume={13},
  number={4},
  pages={600--612},
  year={2004}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Reconstruction(evaluate.Metric):
    """PSNR and SSIM of images of any sizes."""

    def _info(self) -> evaluate.MetricInfo:
        image = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
        info = evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": image, "references": image}),
            reference_urls=["https://doi.org/10.1109/TIP.2003.819861"],
        )
        # Not among the arguments, which refuse it for nested features. Lists would take eight times the memory.
        info.format = "numpy"
        return info

    def _compute(self, predictions, references) -> dict[str, float | list[float]]:
        psnrs, ssims = [], []
        for prediction, reference in zip(predictions, references, strict=True):
            pair = torch.from_numpy(prediction)[None], torch.from_numpy(reference)[None]
            psnrs.append(images.peak_signal_noise_ratio(*pair).item())
            ssims.append(images.structural_similarity(*pair).item())
        return {
            "psnr_db": statistics.fmean(psnrs),
            "ssim": statistics.fmean(ssims),
            "psnr_db_of_images": psnrs,
            "ssim_of_images": ssims,
        }
