import statistics

import torch

from hf_ifsq.metrics import evaluation
from hf_ifsq.vision.lpips import LPIPS, check_image_pair


class Lpips(evaluation.Metric):
    """LPIPS of images of any sizes, see the card beside this file."""

    inputs = {"predictions": evaluation.IMAGE, "references": evaluation.IMAGE}

    @torch.no_grad()
    def _compute(
        self, predictions, references, vgg: str = "timm/vgg16.tv_in1k", device: str = "cpu"
    ) -> dict[str, float | list[float]]:
        lpips = LPIPS(vgg).to(device)
        distances = []
        for pair in evaluation.image_pairs(predictions, references, device):
            check_image_pair(*pair)
            distances.append(lpips(*pair).item())
        return {"lpips": statistics.fmean(distances), "lpips_of_images": distances}
