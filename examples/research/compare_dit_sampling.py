"""
Measure how a diffusion generator is best sampled: four schedulers at several numbers of steps, and latents decoded as
they are or snapped to the nearest codes. All of them start from the same noise.

    python examples/research/compare_dit_sampling.py --pipeline outputs/demo/dit --dataset_name outputs/demo/data
    python examples/research/compare_dit_sampling.py --pipeline outputs/compare_repa/dit/plain \\
        --dataset_name DATASET --classifier outputs/compare_repa/judge

The judge measures the share of generated images that it takes for the class asked for, and the Fréchet distance of
its features to those of training images. It is a classifier of transformers, or for the digits of `demo.py` the
recognizer that is fitted there. `output_dir` receives `results.json`, `tables.md` and `curves.png`.
"""

import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import PartialState
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, HfArgumentParser

from hf_ifsq import IFSQDiTPipeline
from hf_ifsq.metrics.frechet import FeatureMoments, frechet_distance
from hf_ifsq.metrics.images import peak_signal_noise_ratio
from hf_ifsq.models.grid import as_grid
from hf_ifsq.models.image_tokenizer import ImageTokenizer, as_image_tokenizer
from hf_ifsq.training.arguments import argument
from hf_ifsq.training.data import ImageDataset, ImageTransform, load_image_dataset
from hf_ifsq.vision.vision_model import FeatureExtractor


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class SamplingArguments:
    pipeline: str = field(metadata={"help": "Diffusion pipeline: a folder or a Hub name."})
    dataset_name: str = field(metadata={"help": "Images with labels that the generator was trained on."})
    classifier: str | None = argument(
        None,
        "Classifier of images of the generator's size, normalized by ImageNet's statistics, with its class ids: a "
        "folder or a Hub name. By default the recognizer of digits of `demo.py`.",
    )
    output_dir: Path = argument(Path("outputs/compare_dit_sampling"), "Folder of the results.")
    steps: list[int] = argument([5, 10, 25, 50, 100], "Numbers of steps.")
    num_images_per_label: int = argument(50, "Generated images of each class.")
    guidance_scale: float = argument(1.0, "Guidance of the generated images.")
    batch_size: int = argument(100, "Images at a time.")
    max_train_samples: int = argument(10_000, "Training images that generated ones are compared with.")
    seed: int = argument(0, "Seed of the noise and of the choice of training images.")


DEVICE = PartialState().device
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "Euler": FlowMatchEulerDiscreteScheduler(),
    "Heun": FlowMatchHeunDiscreteScheduler(),
    "DPM-Solver++": DPMSolverMultistepScheduler(**FLOW),
    "UniPC": UniPCMultistepScheduler(**FLOW),
}


@torch.no_grad()
def main(args: SamplingArguments) -> None:
    pipeline = IFSQDiTPipeline.from_pretrained(args.pipeline).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    tokenizer = as_image_tokenizer(pipeline.tokenizer)
    images, labels = load_images(args, tokenizer)
    judge = DigitRecognizer() if args.classifier is None else Classifier(args.classifier, images.shape[-1])
    reference = moments_of(judge, images)
    reconstructions = [
        tokenizer.decode_codes(tokenizer.encode_codes(batch.to(DEVICE))).clamp(-1, 1).cpu()
        for batch in images.split(args.batch_size)
    ]
    results = {
        "training_images": measure(judge, images, labels, reference),
        "reconstructions": measure(judge, torch.cat(reconstructions), labels, reference),
        "settings": [],
    }
    for name, scheduler in tqdm(SCHEDULERS.items(), desc="Schedulers"):
        pipeline.scheduler = scheduler
        for steps in tqdm(args.steps, desc=name, leave=False):
            setting = {
                "scheduler": name,
                "steps": steps,
                **sample_and_measure(args, pipeline, judge, reference, steps),
            }
            results["settings"].append(setting)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    tables = make_tables(results)
    (args.output_dir / "tables.md").write_text(tables, encoding="utf-8")
    print(tables)
    plot_curves(results, args.output_dir / "curves.png")


def load_images(args: SamplingArguments, tokenizer: ImageTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images in [-1, 1], `(count, channels, size, size)`, and their labels."""
    size = tokenizer.model.config.sample_size
    rows, _ = load_image_dataset(args.dataset_name, max_train_samples=args.max_train_samples, seed=args.seed)
    transform = ImageTransform(as_grid(size)[0], tokenizer.in_channels)
    data = ImageDataset(rows, transform, label_column="label")
    items = [data[index] for index in range(len(data))]
    return torch.stack([item["pixel_values"] for item in items]), torch.stack([item["class_labels"] for item in items])


class DigitRecognizer:
    """The support vector machine of `demo.py`, fitted on real digits; its features are the pixels, 2 x 2 averaged."""

    def __init__(self) -> None:
        demo = runpy.run_path(str(Path(__file__).parents[1] / "demo.py"))
        digits, _, labels, _ = demo["load_data"]()
        self.classifier = demo["fit_recognizer"](digits, labels)

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.classifier.predict(images.flatten(1).add(1).div(2).numpy()))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images, 2).flatten(1)


class Classifier:
    """A model of transformers for image classification."""

    def __init__(self, name_or_path: str, image_size: int):
        self.extractor = FeatureExtractor(name_or_path, image_size).to(DEVICE)
        self.classifier = AutoModelForImageClassification.from_pretrained(name_or_path).to(DEVICE).eval()

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        pixel_values = (
            images.to(DEVICE).expand(-1, 3, -1, -1).add(1).div(2) - self.extractor.mean
        ) / self.extractor.std
        return self.classifier(pixel_values).logits.argmax(dim=1).cpu()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.extractor(images.to(DEVICE)).cpu()


def moments_of(judge: DigitRecognizer | Classifier, images: torch.Tensor) -> FeatureMoments:
    moments = FeatureMoments()
    for batch in images.split(100):
        moments.update(judge.features(batch))
    return moments


def measure(
    judge: DigitRecognizer | Classifier, images: torch.Tensor, labels: torch.Tensor, reference: FeatureMoments
) -> dict[str, float]:
    """Share of images in [-1, 1] that are taken for their class, and Fréchet distance to the training images."""
    predicted = torch.cat([judge.predict(batch) for batch in images.split(100)])
    return {
        "recognized": (predicted == labels).float().mean().item(),
        "frechet_distance": frechet_distance(moments_of(judge, images), reference),
    }


def sample_and_measure(
    args: SamplingArguments,
    pipeline: IFSQDiTPipeline,
    judge: DigitRecognizer | Classifier,
    reference: FeatureMoments,
    steps: int,
) -> dict[str, Any]:
    """Generate once, and measure the images decoded with and without snapping."""
    tokenizer = as_image_tokenizer(pipeline.tokenizer)
    labels = torch.arange(pipeline.transformer.config.num_classes).repeat_interleave(args.num_images_per_label)
    latents = pipeline(
        labels,
        num_inference_steps=steps,
        guidance_scale=args.guidance_scale,
        batch_size=args.batch_size,
        generator=torch.Generator().manual_seed(args.seed),
        snap_to_codes=False,
        output_type="latent",
    ).images
    codes = tokenizer.latents_to_codes(latents)
    snapped_codes = tokenizer.nearest_codes(codes)
    images, snapped_images = (
        torch.cat([tokenizer.decode_codes(batch).clamp(-1, 1).cpu() for batch in values.split(args.batch_size)])
        for values in (codes, snapped_codes)
    )
    return {
        "model_calls": len(pipeline.scheduler.timesteps),
        "snapped": measure(judge, snapped_images, labels, reference),
        "unsnapped": measure(judge, images, labels, reference),
        "distance_to_codes": (codes - snapped_codes).square().mean().sqrt().item(),
        "psnr_of_snapping_db": peak_signal_noise_ratio(images, snapped_images).mean().item(),
    }


def make_tables(results: dict[str, Any]) -> str:
    """What is real, then a row for each setting."""
    lines = ["| | recognized | Fréchet distance |", "|---|---|---|"]
    for name in ("training_images", "reconstructions"):
        values = results[name]
        lines.append(f"| {name.replace('_', ' ')} | {values['recognized']:.3f} | {values['frechet_distance']:.3f} |")
    lines += [
        "",
        "| scheduler | steps | model calls | recognized | without snapping | Fréchet distance | without snapping "
        "| distance to codes | PSNR of snapping, dB |",
        "|---" * 9 + "|",
    ]
    for setting in results["settings"]:
        snapped, unsnapped = setting["snapped"], setting["unsnapped"]
        lines.append(
            f"| {setting['scheduler']} | {setting['steps']} | {setting['model_calls']} "
            f"| {snapped['recognized']:.3f} | {unsnapped['recognized']:.3f} "
            f"| {snapped['frechet_distance']:.3f} | {unsnapped['frechet_distance']:.3f} "
            f"| {setting['distance_to_codes']:.4f} | {setting['psnr_of_snapping_db']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot_curves(results: dict[str, Any], file: Path) -> None:
    """Everything against the model's calls, which is what costs time."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    steps = sorted({setting["steps"] for setting in results["settings"]})
    for color, scheduler in enumerate(SCHEDULERS):
        settings = [setting for setting in results["settings"] if setting["scheduler"] == scheduler]
        calls = [setting["model_calls"] for setting in settings]
        options = {"color": f"C{color}", "markersize": 3}
        for axis, name in zip(axes, ("recognized", "frechet_distance")):
            axis.plot(calls, [setting["snapped"][name] for setting in settings], "o-", label=scheduler, **options)
            axis.plot(calls, [setting["unsnapped"][name] for setting in settings], "x:", **options)
        axes[2].plot(calls, [setting["psnr_of_snapping_db"] for setting in settings], "o-", **options)
    for axis, name in zip(axes, ("recognized", "frechet_distance")):
        axis.axhline(results["reconstructions"][name], color="gray", linewidth=0.8, label="reconstructions")
    titles = ("recognized by the judge", "Fréchet distance", "PSNR of snapped to unsnapped, dB")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="model calls", xscale="log")
        axis.set_xticks(steps, steps)
        axis.minorticks_off()
    axes[0].plot([], [], "x:", color="black", markersize=3, label="without snapping")
    axes[0].legend()
    figure.savefig(file, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main(HfArgumentParser(SamplingArguments).parse_args_into_dataclasses()[0])
