"""
Compare a generator trained with and without representation alignment (REPA): the same tokens, steps and random
numbers; only the weight of the alignment differs.

    python examples/research/compare_repa.py --dataset_name DATASET --tokenizer outputs/tokenizer --generator ar

Without `--teacher` a small vision model is trained on the training images and serves as the teacher. A second one of
another seed, which no generator sees, is the judge: it measures the share of generated images that it takes for the
class asked for, and the Fréchet distance of its features to those of the validation images. `output_dir` receives
both vision models and the tokens, which all generators share, and a folder of the generator with `results.json`,
`table.md`, `curves.png` and `samples.png`. What is already there is not made again, and a training that was stopped
goes on.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import PartialState
from diffusers.optimization import get_scheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser, ResNetConfig, ResNetForImageClassification

from hf_ifsq import IFSQARForImageGeneration, IFSQARPipeline, IFSQDiTPipeline, IFSQDiTTransformer2DModel
from hf_ifsq.metrics.frechet import FeatureMoments, frechet_distance
from hf_ifsq.models.image_tokenizer import load_image_tokenizer
from hf_ifsq.pipelines.pipeline_utils import ClassConditionalPipeline
from hf_ifsq.training.arguments import argument
from hf_ifsq.training.data import (
    ImageDataset,
    ImageTransform,
    ResumableSampler,
    load_image_dataset,
    read_class_names,
)
from hf_ifsq.vision.vision_model import IMAGENET_MEAN, IMAGENET_STD, FeatureExtractor


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class ComparisonArguments:
    """What is trained; the defaults take about an hour a generator on one CPU core with images of 32 pixels."""

    dataset_name: str = field(metadata={"help": "Images with labels and a validation or test split."})
    tokenizer: str = field(metadata={"help": "Tokenizer with a codebook: a folder or a Hub name."})
    generator: str = argument("ar", "Generator: autoregressive or diffusion.", choices=["ar", "dit"])
    output_dir: Path = argument(Path("outputs/compare_repa"), "Folder of the results.")
    seed: int = argument(0, "Seed of everything random.")
    resolution: int = argument(32, "Side of the images in pixels.")

    teacher: str | None = argument(None, "Vision model: a folder or Hub name; by default one that is trained here.")
    classifier_steps: int = argument(1600, "Steps of the vision models, of 128 images.")
    num_augmentations: int = argument(2, "Times that each training image is tokenized, flipped at random.")

    hidden_size: int = argument(128, "Width of the generator.")
    num_layers: int = argument(6, "Layers of the generator.")
    num_attention_heads: int = argument(4, "Attention heads of the generator.")
    vocab_sizes: list[int] | None = argument(None, "Factors of a token, for the autoregressive generator.")
    repa_weight: float | None = argument(None, "Weight of the alignment; by default that of the training script.")
    train_batch_size: int = argument(32, "Images per step.")
    max_train_steps: int = argument(1500, "Steps of both generators.")
    learning_rate: float = argument(1e-3, "Learning rate of both, with warmup and cosine schedule.")
    validation_steps: int = argument(300, "Steps between two validations.")
    evaluation_steps: int = argument(300, "Steps between two measurements of generated images.")
    num_images_per_label: int = argument(100, "Generated images of each class that are measured.")
    guidance_scale: float = argument(1.5, "Guidance of the generated images.")
    num_inference_steps: int = argument(25, "Euler steps of the diffusion generator.")

    def __post_init__(self) -> None:
        if self.max_train_steps % self.evaluation_steps:
            got = f"{self.max_train_steps} and {self.evaluation_steps}"
            raise ValueError(f"`max_train_steps` must be a multiple of `evaluation_steps`, got {got}.")


DEVICE = PartialState().device
VARIANTS = {"plain": "without REPA", "repa": "with REPA"}
TITLES = {
    "validation_cross_entropy": "validation loss, nats per token",
    "validation_loss": "validation loss",
    "validation_cknna": "CKNNA with the teacher",
    "recognized": "recognized by the judge",
    "frechet_distance": "Fréchet distance",
}


def main(args: ComparisonArguments) -> None:
    train_classifier(args, "judge", args.seed)
    if args.teacher is None:
        train_classifier(args, "teacher", args.seed + 1)
    teacher = args.teacher or str(args.output_dir / "teacher")
    tokenize(args, teacher)
    for variant in VARIANTS:
        train_generator(args, variant, teacher)

    judge = Judge(args, "judge")
    results = {"validation images": judge.measure(judge.images, judge.labels)}
    if args.teacher is None:
        by_teacher = Judge(args, "teacher").measure(judge.images, judge.labels)
        results["validation images"]["recognized_by_teacher"] = by_teacher["recognized"]
    results["reconstructions"] = judge.measure(reconstruct(args, judge.images), judge.labels)
    results |= {variant: measure(args, variant, judge) for variant in VARIANTS}
    folder = args.output_dir / args.generator
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    names = [name for name in TITLES if name in results["repa"][-1]]
    (folder / "table.md").write_text(table(results, names), encoding="utf-8")
    print(table(results, names))
    plot_curves(results, names, folder / "curves.png")
    draw_samples(args, folder / "samples.png")


def run_script(name: str, **options: Any) -> None:
    """Run a script beside this folder, in a process of its own, with those of the options that are not `None`."""
    argv = []
    for option, value in options.items():
        if value is not None:
            argv += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    subprocess.run([sys.executable, Path(__file__).parents[1] / f"{name}.py", *argv], check=True)


def load_images(args: ComparisonArguments, split: str, **options: Any) -> ImageDataset:
    """Labelled images of a split, transformed by the options."""
    train, validation = load_image_dataset(args.dataset_name)
    rows = train if split == "train" else validation
    return ImageDataset(rows, ImageTransform(args.resolution, **options), label_column="label")


def train_classifier(args: ComparisonArguments, name: str, seed: int) -> None:
    """Train a small convolutional network to tell the classes apart: its features are a grid of stride 4."""
    folder = args.output_dir / name
    if (folder / "config.json").is_file():
        return
    data = load_images(args, "train", seed=seed, random_flip=True, min_crop_scale=0.75)
    batch_size, steps = 128, args.classifier_steps
    sampler = ResumableSampler(len(data), seed, 0, steps * batch_size)
    torch.manual_seed(seed)
    id2label = read_class_names(data.rows, "label")
    config = ResNetConfig(hidden_sizes=[96], depths=[4], layer_type="basic", id2label=id2label)
    model = ResNetForImageClassification(config).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    mean, std = (torch.tensor(value, device=DEVICE).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    progress_bar = tqdm(DataLoader(data, batch_size, sampler=sampler), desc=f"Steps of the {name}")
    for batch in progress_bar:
        # As whoever loads it as a vision model will normalize its images.
        pixel_values = ((batch["pixel_values"].to(DEVICE) + 1) / 2 - mean) / std
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(pixel_values.contiguous(memory_format=torch.channels_last)).logits
        loss = F.cross_entropy(logits.float(), batch["class_labels"].to(DEVICE), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress_bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(folder)


def tokenize(args: ComparisonArguments, teacher: str) -> None:
    """Tokens of the flipped training images, with the features of the teacher."""
    run_script(
        "tokenize_dataset",
        dataset_name=args.dataset_name,
        resolution=args.resolution,
        tokenizer=args.tokenizer,
        teacher=teacher,
        output_dir=args.output_dir / "tokens",
        num_augmentations=args.num_augmentations,
        random_flip=True,
        seed=args.seed,
    )


def folder_of(args: ComparisonArguments, variant: str) -> Path:
    return args.output_dir / args.generator / variant


def train_generator(args: ComparisonArguments, variant: str, teacher: str) -> None:
    folder = folder_of(args, variant)
    if (folder / "README.md").is_file():
        return
    steps, batch_size = args.max_train_steps, args.train_batch_size
    options = {"token_dataset": str(args.output_dir / "tokens"), "teacher": teacher, "output_dir": str(folder)}
    options |= {"seed": args.seed, "resume_from_checkpoint": "latest", "num_images_per_label": 1}
    options |= {"num_attention_heads": args.num_attention_heads, "projector_dim": 4 * args.hidden_size}
    options |= {"train_batch_size": batch_size, "max_train_steps": steps, "use_ema": True, "ema_decay": 0.995}
    options |= {"learning_rate": args.learning_rate, "lr_scheduler": "cosine", "lr_warmup_steps": steps // 10}
    options |= {"validation_steps": args.validation_steps, "checkpointing_steps": args.evaluation_steps}
    # Without alignment its weight is zero: the projector is there, so that both draw the same random numbers.
    if variant == "plain":
        options["repa_weight"] = 0.0
    elif args.repa_weight is not None:
        options["repa_weight"] = args.repa_weight
    if args.generator == "ar":
        size = {"hidden_size": args.hidden_size, "num_hidden_layers": args.num_layers}
        size |= {"vocab_sizes": args.vocab_sizes, "num_factor_layers": 1}
    else:
        size = {"num_layers": args.num_layers, "attention_head_dim": args.hidden_size // args.num_attention_heads}
    run_script(f"train_repa_{args.generator}", **options, **size)


class Judge:
    """A vision model that is trained here, by the name of its folder, and the validation images."""

    def __init__(self, args: ComparisonArguments, name: str):
        folder = str(args.output_dir / name)
        self.extractor = FeatureExtractor(folder, image_size=args.resolution).to(DEVICE)
        self.classifier = ResNetForImageClassification.from_pretrained(folder).classifier.to(DEVICE)
        data = load_images(args, "validation")
        (batch,) = DataLoader(data, batch_size=len(data))
        self.images, self.labels = batch["pixel_values"], batch["class_labels"]
        self.reference_moments = FeatureMoments()
        self.reference_moments.update(self.features(self.images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.extractor(batch.to(DEVICE)) for batch in images.split(100)])

    @torch.no_grad()
    def measure(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Share of images in [-1, 1] that it takes for their class, and Fréchet distance to the validation images."""
        features = self.features(images)
        moments = FeatureMoments()
        moments.update(features)
        recognized = self.classifier(features).argmax(dim=1).cpu() == labels
        distance = frechet_distance(moments, self.reference_moments)
        return {"recognized": recognized.float().mean().item(), "frechet_distance": distance}


@torch.no_grad()
def reconstruct(args: ComparisonArguments, images: torch.Tensor) -> torch.Tensor:
    """What the tokenizer makes of images: the best that a generator of its tokens can come to."""
    tokenizer = load_image_tokenizer(args.tokenizer, sample_size=args.resolution).to(DEVICE)
    decoded = [tokenizer.decode_indices(tokenizer.encode_indices(batch.to(DEVICE))) for batch in images.split(100)]
    return torch.cat(decoded).clamp(-1, 1).cpu()


def load_pipeline(args: ComparisonArguments, variant: str, step: int) -> ClassConditionalPipeline:
    """The generator after some steps."""
    folder = folder_of(args, variant)
    classes = {"ar": (IFSQARPipeline, IFSQARForImageGeneration), "dit": (IFSQDiTPipeline, IFSQDiTTransformer2DModel)}
    pipeline_class, model_class = classes[args.generator]
    model = model_class.from_pretrained(folder / f"checkpoint-{step}" / "model")
    pipeline = pipeline_class.from_pretrained(folder, transformer=model).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(args: ComparisonArguments, pipeline: ClassConditionalPipeline, label: int, count: int) -> torch.Tensor:
    """Images of one class in [-1, 1], from the same random numbers for every model."""
    options = {"num_images_per_label": count, "guidance_scale": args.guidance_scale, "output_type": "pt"}
    if args.generator == "dit":
        options["num_inference_steps"] = args.num_inference_steps
    images = pipeline(label, generator=torch.Generator().manual_seed(args.seed + label), **options).images
    return images.cpu() * 2 - 1


def measure(args: ComparisonArguments, variant: str, judge: Judge) -> list[dict[str, float]]:
    """What the log says of the validations, and the judge of images generated on the way and at the end."""
    results: dict[int, dict[str, float]] = {}
    for line in (folder_of(args, variant) / "training_log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if not TITLES.keys().isdisjoint(entry):
            results[entry["step"]] = {name: value for name, value in entry.items() if name in {"step", *TITLES}}
    for step in range(args.evaluation_steps, args.max_train_steps + 1, args.evaluation_steps):
        pipeline = load_pipeline(args, variant, step)
        labels = range(pipeline.transformer.config.num_classes)
        images = torch.cat([generate(args, pipeline, label, args.num_images_per_label) for label in labels])
        asked = torch.tensor(labels).repeat_interleave(args.num_images_per_label)
        results.setdefault(step, {"step": step}).update(judge.measure(images, asked))
    return [results[step] for step in sorted(results)]


def table(results: dict[str, Any], names: list[str]) -> str:
    """The last measurement of both variants, and what is possible."""
    found = {VARIANTS[variant]: results[variant][-1] for variant in VARIANTS}
    found |= {name: results[name] for name in ("reconstructions", "validation images")}
    rows = [f"| | {' | '.join(TITLES[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for title, values in found.items():
        cells = [f"{values[name]:.3f}" if name in values else "–" for name in names]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def plot_curves(results: dict[str, Any], names: list[str], file: Path) -> None:
    """All that is measured, against the steps."""
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), layout="constrained")
    for axis, name in zip(axes, names):
        for variant, title in VARIANTS.items():
            points = [(result["step"], result[name]) for result in results[variant] if name in result]
            axis.plot(*zip(*points), "o-", markersize=3, label=title)
        axis.set(title=TITLES[name], xlabel="step")
    axes[0].legend()
    figure.savefig(file, dpi=80)


def draw_samples(args: ComparisonArguments, file: Path, count: int = 6) -> None:
    """A row per class, both variants side by side, from the same random numbers."""
    figure, axes = plt.subplots(1, len(VARIANTS), figsize=(6.2, 4.8), layout="constrained")
    for axis, (variant, title) in zip(axes, VARIANTS.items()):
        pipeline = load_pipeline(args, variant, args.max_train_steps)
        names = list(pipeline.transformer.config.id2label.values())[:10]
        rows = [torch.cat(list(generate(args, pipeline, label, count)), dim=2) for label in range(len(names))]
        axis.imshow(torch.cat(rows, dim=1).permute(1, 2, 0).add(1).div(2).numpy(), interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
        if variant == "plain":
            axis.set_yticks([(row + 0.5) * args.resolution for row in range(len(names))], names)
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    main(HfArgumentParser(ComparisonArguments).parse_args_into_dataclasses()[0])
