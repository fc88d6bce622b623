import statistics

from hf_ifsq.metrics import evaluation, images


class Reconstruction(evaluation.Metric):
    """PSNR and SSIM of images of any sizes, see the card beside this file."""

    inputs = {"predictions": evaluation.IMAGE, "references": evaluation.IMAGE}

    def _compute(self, predictions, references) -> dict[str, float | list[float]]:
        pairs = list(evaluation.image_pairs(predictions, references))
        psnrs = [images.peak_signal_noise_ratio(*pair).item() for pair in pairs]
        ssims = [images.structural_similarity(*pair).item() for pair in pairs]
        return {
            "psnr_db": statistics.fmean(psnrs),
            "ssim": statistics.fmean(ssims),
            "psnr_db_of_images": psnrs,
            "ssim_of_images": ssims,
        }
