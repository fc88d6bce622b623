"""
The whole package on real handwritten digits, in minutes on a CPU: `make demo`.

It trains a tokenizer, an autoregressive and a diffusion generator by the training scripts, generates digits with both,
and writes pictures and `report.md` to `outputs/demo`.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from hf_ifsq import AutoencoderIFSQ, IFSQARPipeline, IFSQDiTPipeline
from hf_ifsq.pipelines.pipeline_utils import ClassConditionalPipeline


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


EXAMPLES = Path(__file__).parent
OUTPUT = Path("outputs/demo")
CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZE = 16
COPIES = 32
IMAGES_PER_LABEL = 100
GUIDANCE_SCALE = 2.0


def main() -> None:
    start = time.perf_counter()
    train_digits, test_digits, train_labels, test_labels = load_data()
    write_dataset(train_digits, train_labels, test_digits, test_labels)

    # Models this small gain nothing from several cores: each generator gets half of them, and both train at once.
    cores = os.cpu_count() or 1
    seconds = {"tokenizer": train("train_tokenizer", "digits_tokenizer", cores)}
    with ThreadPoolExecutor() as pool:
        runs = {name: pool.submit(train, f"train_repa_{name}", f"digits_{name}", cores // 2) for name in ("ar", "dit")}
        seconds |= {name: run.result() for name, run in runs.items()}

    tokenizer = AutoencoderIFSQ.from_pretrained(OUTPUT / "tokenizer").eval()
    ar = IFSQARPipeline.from_pretrained(OUTPUT / "ar")
    dit = IFSQDiTPipeline.from_pretrained(OUTPUT / "dit")
    for pipeline in (ar, dit):
        pipeline.enable_cpu_kernels()
    classifier = fit_recognizer(train_digits, train_labels)

    report = {
        **measure_tokenizer(tokenizer, test_digits),
        "ar_recognized": generate(ar, classifier, "ar", top_p=0.95),
        "dit_recognized": generate(dit, classifier, "dit", num_inference_steps=25),
        "real_recognized": float(classifier.score(test_digits.reshape(len(test_digits), -1), test_labels)),
        "tokenizer_parameters": tokenizer.num_parameters(),
        "ar_parameters": ar.transformer.num_parameters(),
        "dit_parameters": dit.transformer.num_parameters(),
        **{f"{name}_training_seconds": value for name, value in seconds.items()},
    }
    plot_losses()
    report["seconds"] = time.perf_counter() - start
    write_report(report)


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The digits of scikit-learn, upsampled to 16 x 16 pixels in [0, 1]; a fifth is held out."""
    digits = load_digits()
    images = np.stack([np.asarray(to_image(image / 16)) for image in digits.images]) / 255
    return train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Pixels in [0, 1] as a grey image of 16 x 16."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def write_dataset(
    train_digits: np.ndarray, train_labels: np.ndarray, test_digits: np.ndarray, test_labels: np.ndarray
) -> None:
    """Parquet files of the held-out digits as they are, and of slightly turned, shifted and scaled training digits."""
    generator = np.random.default_rng(0)
    copies = [
        (distort(digit, generator), label) for digit, label in zip(train_digits, train_labels) for _ in range(COPIES)
    ]
    originals = [(to_image(digit), label) for digit, label in zip(test_digits, test_labels)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASS_NAMES)})
    folder = OUTPUT / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", copies), ("test", originals)):
        columns = {"image": [image for image, _ in rows], "label": [int(label) for _, label in rows]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def distort(digit: np.ndarray, generator: np.random.Generator) -> Image.Image:
    """Turn by up to 10 degrees, scale by up to 10 % and shift by up to one pixel."""
    angle = np.deg2rad(generator.uniform(-10, 10))
    scale = generator.uniform(0.9, 1.1)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    center = (SIZE - 1) / 2
    shift_x, shift_y = center + generator.uniform(-1, 1, size=2)
    # PIL maps each output pixel (x, y) to (a x + b y + c, d x + e y + f) of the input.
    matrix = (cos, sin, center - cos * shift_x - sin * shift_y, -sin, cos, center + sin * shift_x - cos * shift_y)
    return to_image(digit).transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def train(script: str, recipe: str, num_threads: int) -> float:
    """Run a training script as a user would, and return its seconds."""
    start = time.perf_counter()
    command = [sys.executable, EXAMPLES / f"{script}.py", "--config", EXAMPLES / "recipes" / f"{recipe}.yaml"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(max(1, num_threads))})
    return time.perf_counter() - start


@torch.no_grad()
def measure_tokenizer(tokenizer: AutoencoderIFSQ, digits: np.ndarray) -> dict[str, float]:
    """Mean PSNR on held-out digits and entropy of a channel of the codes; pictures of both."""
    pixel_values = torch.from_numpy(digits).float()[:, None] * 2 - 1
    output = tokenizer(pixel_values)
    reconstructions = (output.sample.clamp(-1, 1) + 1) / 2
    psnr = -10 * torch.log10((reconstructions - (pixel_values + 1) / 2).square().mean(dim=(1, 2, 3)))

    entropies = []
    levels = tokenizer.config.levels
    figure, axes = plt.subplots(1, len(levels), figsize=(3 * len(levels), 2.5), sharey=True)
    for channel, (axis, level) in enumerate(zip(axes, levels)):
        values, counts = output.codes[:, channel].unique(return_counts=True)
        shares = counts / counts.sum()
        entropies.append(-(shares * shares.log2()).sum().item())
        axis.bar(values, shares, width=1.6 / (level - 1))
        axis.axhline(1 / level, color="black", linewidth=0.5)
        axis.set_title(f"channel {channel}: {entropies[-1]:.2f} of {np.log2(level):.2f} bits", fontsize=9)
    save_figure(figure, "codes")

    count = 16
    pairs = np.concatenate([digits[:count], reconstructions[:count, 0].numpy()])
    save_grid(pairs, columns=count, name="reconstructions")
    return {"psnr_db": psnr.mean().item(), "code_entropy_bits": float(np.mean(entropies))}


def fit_recognizer(digits: np.ndarray, labels: np.ndarray) -> SVC:
    """A support vector machine that recognizes digits, `(count, height, width)`."""
    return SVC(C=10, gamma="scale").fit(digits.reshape(len(digits), -1), labels)


def generate(pipeline: ClassConditionalPipeline, classifier: SVC, name: str, **options: float) -> float:
    """Generate 100 digits of each class, draw ten of each, and return the share that is recognized as asked for."""
    images = pipeline(
        CLASS_NAMES,
        num_images_per_label=IMAGES_PER_LABEL,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **options,
    ).images[..., 0]
    save_grid(images.reshape(10, IMAGES_PER_LABEL, SIZE, SIZE)[:, :10].reshape(-1, SIZE, SIZE), columns=10, name=name)
    asked = np.repeat(np.arange(10), IMAGES_PER_LABEL)
    return float((classifier.predict(images.reshape(len(images), -1)) == asked).mean())


def save_grid(images: np.ndarray, columns: int, name: str, zoom: int = 3) -> None:
    rows = images.reshape(-1, columns, SIZE, SIZE)
    grid = rows.transpose(0, 2, 1, 3).reshape(len(rows) * SIZE, columns * SIZE)
    grid = grid.repeat(zoom, axis=0).repeat(zoom, axis=1)
    Image.fromarray((grid.clip(0, 1) * 255).round().astype(np.uint8)).save(OUTPUT / f"{name}.png")


def save_figure(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(OUTPUT / f"{name}.png", dpi=100)
    plt.close(figure)


def plot_losses() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3))
    for axis, (folder, keys) in zip(
        axes,
        {
            "tokenizer": ["loss"],
            "ar": ["loss", "validation_cross_entropy"],
            "dit": ["loss", "validation_loss"],
        }.items(),
    ):
        entries = [json.loads(line) for line in (OUTPUT / folder / "training_log.jsonl").read_text().splitlines()]
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            axis.plot(*zip(*points), label=key.replace("_", " "), marker="o" if "validation" in key else None)
        axis.set_title(folder)
        axis.set_xlabel("step")
        axis.legend()
    save_figure(figure, "losses")


def write_report(report: dict[str, float]) -> None:
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {f'{value:,}' if isinstance(value, int) else f'{value:.3f}'} |"
        for name, value in report.items()
    )
    (OUTPUT / "report.md").write_text(f"""# Digits: one tokenizer, two generators

| | |
|---|---|
{rows}

`psnr db` and `code entropy bits` (mean over the channels) are of digits held out from all training. `ar recognized`
and `dit recognized` are the shares of 1,000 generated digits that a support vector machine, fitted on real digits
alone, assigns to the class that was asked for; `real recognized` is its score on held-out real digits.

Held-out digits above their reconstructions:

![reconstructions](reconstructions.png)

Shares of the codes in each channel; the line is a uniform distribution:

![codes](codes.png)

Generated token by token with guidance 2.0 and top-p 0.95, one row per class:

![ar](ar.png)

Generated by flow matching in 25 steps with guidance 2.0, one row per class:

![dit](dit.png)

Losses:

![losses](losses.png)
""")
    print((OUTPUT / "report.md").resolve())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
