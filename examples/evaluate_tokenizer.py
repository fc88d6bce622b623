"""
Measure an image tokenizer: how close its reconstructions are to the images, and how it uses its codes.

    accelerate launch examples/evaluate_tokenizer.py --tokenizer outputs/tokenizer --dataset_name DATASET \\
        --lpips_vgg timm/vgg16.tv_in1k --feature_extractor facebook/dinov2-base --feature_image_size 224

It takes AutoencoderIFSQ and diffusers' VQModel and AutoencoderKL, and writes `report.md`, `report.json` and pictures
to `output_dir`. Any number of processes gives the same numbers. All arguments: `--help`.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.metrics.codebook import CodebookUsage, bounded_values
from hf_ifsq.metrics.frechet import FeatureMoments, frechet_distance
from hf_ifsq.metrics.images import peak_signal_noise_ratio, structural_similarity
from hf_ifsq.models.image_tokenizer import ImageTokenizer, load_image_tokenizer
from hf_ifsq.training.arguments import argument, expand_home, values_for
from hf_ifsq.training.data import ImageDataset, draw, load_splits, pick_split
from hf_ifsq.training.image_transform import ImageTransform
from hf_ifsq.training.tokens import fingerprint
from hf_ifsq.vision.lpips import LPIPS
from hf_ifsq.vision.vision_model import FeatureExtractor


LIBRARIES = ("hf-ifsq", "torch", "diffusers", "transformers", "datasets", "numpy", "pillow")


@dataclass
class EvaluationArguments:
    tokenizer: str = field(metadata={"help": "Tokenizer: a folder or a Hub name."})
    output_dir: str = argument("outputs/evaluation", "Folder of the report.")
    dataset_name: str | None = argument(None, "Images: a dataset of the Hub, or a local folder or parquet file.")
    dataset_config_name: str | None = argument(None, "Configuration of the dataset, if it has several.")
    train_data_dir: str | None = argument(None, "Images: a folder of pictures, with or without class folders.")
    split: str | None = argument(None, "Split to measure on; by default `validation` or `test`, or else `train`.")
    image_column: str = argument("image", "Column of the dataset with the images.")
    max_samples: int | None = argument(None, "Measure on at most this many images, drawn by a fixed seed.")
    resolution: int = argument(256, "Side in pixels of the square images.")
    batch_size: int = argument(16, "Images per device and forward pass.")
    dataloader_num_workers: int = argument(0, "Processes that load images, for each process of the script.")
    lpips_vgg: str | None = argument(None, "VGG16 for LPIPS: a Hub name, a folder or a safetensors file.")
    feature_extractor: str | None = argument(None, "Vision model for the Fréchet distance: a folder or Hub name.")
    feature_image_size: int | None = argument(None, "Side in pixels of what it sees; by default that of its config.")
    num_pictures: int = argument(8, "Images in the picture of reconstructions.")

    def __post_init__(self) -> None:
        expand_home(self)
        for name in ("max_samples", "batch_size", "num_pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.feature_image_size is not None and self.feature_extractor is None:
            raise ValueError("`feature_image_size` is for a `feature_extractor`, but none is given.")


class Measurements:
    """Sums over some of the images, small enough to be sent between processes."""

    def __init__(self, tokenizer: ImageTokenizer):
        self.of_images: dict[str, list[float]] = {}
        self.usage = None
        if tokenizer.codebook_size is not None:
            self.usage = CodebookUsage(tokenizer.codebook_size, tokenizer.levels)
        self.moments, self.original_moments = FeatureMoments(), FeatureMoments()

    def add(self, name: str, values: torch.Tensor) -> None:
        self.of_images.setdefault(name, []).extend(values.tolist())

    def merge(self, other: "Measurements") -> None:
        for name, values in other.of_images.items():
            self.of_images.setdefault(name, []).extend(values)
        if self.usage is not None:
            self.usage.merge(other.usage)
        self.moments.merge(other.moments)
        self.original_moments.merge(other.original_moments)

    def results(self) -> dict[str, Any]:
        # The sum behind this mean is exact, so that it does not depend on the order of the images.
        results: dict[str, Any] = {name: statistics.fmean(values) for name, values in self.of_images.items()}
        if self.moments.count:
            results["frechet_distance"] = frechet_distance(self.moments, self.original_moments)
        return results | ({} if self.usage is None else self.usage.compute())


@torch.no_grad()
def main(args: EvaluationArguments) -> dict[str, Any]:
    accelerator = Accelerator(mixed_precision="no")

    # 1. Tokenizer, images, and the models that judge.
    tokenizer = load_image_tokenizer(args.tokenizer, sample_size=args.resolution).to(accelerator.device)
    with accelerator.main_process_first():
        splits = load_splits(**values_for(load_splits, args))
    usual = next((name for name in ("validation", "test", "train") if name in splits), None)
    rows = draw(pick_split(splits, args.split or usual, "split", args.image_column), args.max_samples, seed=0)
    data = ImageDataset(rows, ImageTransform(args.resolution, tokenizer.in_channels), args.image_column)
    lpips = None if args.lpips_vgg is None else LPIPS(args.lpips_vgg).to(accelerator.device)
    extractor = None
    if args.feature_extractor is not None:
        extractor = FeatureExtractor(args.feature_extractor, args.feature_image_size).to(accelerator.device)

    # 2. Measurements. Each process takes its own images: none is counted twice to fill up a batch.
    measurements = Measurements(tokenizer)
    own_images = Subset(data, range(accelerator.process_index, len(data), accelerator.num_processes))
    loader = DataLoader(own_images, batch_size=args.batch_size, num_workers=args.dataloader_num_workers)
    for batch in tqdm(loader, desc="Batches", disable=not accelerator.is_local_main_process):
        pixel_values = batch["pixel_values"].to(accelerator.device)
        reconstructions, indices, bounded = reconstruct(tokenizer, pixel_values)
        measurements.add("psnr_db", peak_signal_noise_ratio(reconstructions, pixel_values))
        measurements.add("ssim", structural_similarity(reconstructions, pixel_values))
        if lpips is not None:
            measurements.add("lpips", lpips(reconstructions, pixel_values))
        if extractor is not None:
            measurements.moments.update(extractor(reconstructions))
            measurements.original_moments.update(extractor(pixel_values))
        if indices is not None:
            measurements.usage.update(indices, bounded)
    measurements, *others = gather_object([measurements])
    for other in others:
        measurements.merge(other)

    # 3. Report.
    report = {
        "tokenizer": {"name": args.tokenizer, **fingerprint(tokenizer)},
        "data": {
            "name": args.dataset_name or args.train_data_dir,
            "split": args.split or (rows.split and str(rows.split)),
            "num_images": len(data),
            "resolution": args.resolution,
            "preprocessing": "square from the middle, resized with PIL's antialiased bicubic filter",
        },
        "judges": {
            "lpips_vgg": args.lpips_vgg,
            "feature_extractor": args.feature_extractor,
            "feature_image_size": None if extractor is None else extractor.image_size,
        },
        "versions": {name: version(name) for name in LIBRARIES},
        "results": measurements.results(),
    }
    if accelerator.is_main_process:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        shown = torch.stack([data[index]["pixel_values"] for index in range(min(args.num_pictures, len(data)))])
        reconstructions, _, _ = reconstruct(tokenizer, shown.to(accelerator.device))
        draw_reconstructions(shown, reconstructions.cpu()).save(folder / "reconstructions.png")
        if measurements.usage is not None:
            draw_codes(measurements.usage).savefig(folder / "codes.png")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(write_report(report), encoding="utf-8")
    accelerator.end_training()
    return report


def reconstruct(
    tokenizer: ImageTokenizer, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Reconstructions within [-1, 1]; the tokens, if there are any; and for an AutoencoderIFSQ what was rounded."""
    if tokenizer.codebook_size is None:
        codes = tokenizer.encode_codes(pixel_values)
        return tokenizer.decode_codes(codes).float().clamp(-1, 1), None, None
    bounded = None
    if isinstance(tokenizer.model, AutoencoderIFSQ):
        encoded = tokenizer.model.encode(pixel_values)
        indices, bounded = encoded.indices, bounded_values(tokenizer.model.quantizer, encoded.unquantized)
    else:
        indices = tokenizer.encode_indices(pixel_values)
    return tokenizer.decode_indices(indices).float().clamp(-1, 1), indices, bounded


def draw_reconstructions(originals: torch.Tensor, reconstructions: torch.Tensor) -> Image.Image:
    """Originals above reconstructions above the absolute error, at twice its brightness; small images are enlarged."""
    errors = (originals - reconstructions).abs().clamp(max=1) * 2 - 1
    rows = VaeImageProcessor().postprocess(torch.cat([originals, reconstructions, errors]), output_type="pil")
    scale = math.ceil(128 / originals.shape[-1])
    rows = [image.resize([scale * side for side in image.size], Image.Resampling.NEAREST) for image in rows]
    return make_image_grid(rows, rows=3, cols=len(originals))


def draw_codes(usage: CodebookUsage) -> Figure:
    """Histogram of the levels of each dimension, or where there are none the frequency of the tokens by their rank."""
    histograms = usage.compute().get("dimension_histograms", [])
    figure = Figure(figsize=(max(6, 3 * len(histograms)), 3), layout="constrained")
    for number, histogram in enumerate(histograms):
        axes = figure.add_subplot(1, len(histograms), number + 1, title=f"dimension {number}", xlabel="level")
        axes.bar(range(len(histogram)), [count / sum(histogram) for count in histogram])
    if not histograms:
        axes = figure.add_subplot(xlabel=f"rank among {usage.codebook_size} codes", ylabel="share of the tokens")
        axes.loglog(range(1, len(usage.counts) + 1), usage.counts / usage.counts.sum(), label="tokens")
        axes.axhline(1 / usage.codebook_size, color="gray", linestyle="--", label="all codes alike")
        axes.legend()
    return figure


def write_report(report: dict[str, Any]) -> str:
    sections = ("tokenizer", "data", "judges", "versions")
    facts = [(f"{section} {name}", value) for section in sections for name, value in report[section].items() if value]
    results, levels = report["results"], report["tokenizer"]["levels"]
    values = [(name, f"{value:.6g}") for name, value in results.items() if not isinstance(value, list)]
    parts = [f"# Evaluation of {report['tokenizer']['name']}", table(("", ""), facts), table(("result", ""), values)]
    if levels is not None:
        columns = zip(levels, results["dimension_entropies_bits"], results["dimension_ks_distances"])
        dimensions = [(i, level, f"{bits:.4f}", f"{ks:.4f}") for i, (level, bits, ks) in enumerate(columns)]
        parts.append(table(("dimension", "levels", "entropy in bits", "KS distance before rounding"), dimensions))
    parts.append("![Originals, reconstructions, absolute error at twice its brightness](reconstructions.png)")
    if report["tokenizer"]["codebook_size"] is not None:
        parts.append("![Frequencies of the codes](codes.png)")
    return "\n\n".join(parts) + "\n"


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ("---",) * len(header), *rows))


if __name__ == "__main__":
    main(HfArgumentParser(EvaluationArguments, allow_abbrev=False).parse_args_into_dataclasses()[0])
