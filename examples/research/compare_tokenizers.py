"""
Compare bottlenecks under one encoder and decoder: iFSQ, FSQ, FSP, VQ and KL tokenizers of the same size, trained for
the same steps on the same images in the same order.

    python examples/research/compare_tokenizers.py --dataset_name DATASET

It trains the scalar quantizers at several bits per dimension, with several seeds each, and writes a table, pictures
and `results.json` to `output_dir`. A model that is already there is not trained again.
"""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_ifsq.metrics.codebook import CodebookUsage, bounded_values
from hf_ifsq.metrics.images import peak_signal_noise_ratio, structural_similarity
from hf_ifsq.models.image_tokenizer import ImageTokenizer, load_image_tokenizer
from hf_ifsq.training.arguments import argument
from hf_ifsq.training.data import ImageDataset, ImageTransform, draw, load_image_dataset


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


TRAINING_SCRIPT = Path(__file__).parents[1] / "train_tokenizer.py"


@dataclass
class ComparisonArguments:
    """What is trained; the defaults take about two minutes per model on one CPU core."""

    dataset_name: str = field(metadata={"help": "Images with a validation or test split, as for the training script."})
    output_dir: Path = argument(Path("outputs/compare_tokenizers"), "Folder of the results.")
    bits: list[int] = argument([2, 3, 4, 5], "Bits per dimension: 2**bits + 1 levels.")
    seeds: list[int] = argument([0, 1, 2], "One model of each kind per seed.")
    resolution: int = argument(32, "Side of the images in pixels.")
    block_out_channels: list[int] = argument([32, 32, 64], "Widths of the resolutions of every model.")
    layers_per_block: int = argument(1, "Residual blocks at each resolution.")
    latent_channels: int = argument(4, "Dimensions of the codes of every model.")
    train_batch_size: int = argument(16, "Images per step.")
    max_train_steps: int = argument(500, "Steps of every model.")
    learning_rate: float = argument(2e-3, "Learning rate, with warmup and cosine schedule.")
    max_validation_samples: int = argument(1000, "Images that the models are measured on.")
    jobs: int = argument(1, "Models that are trained at the same time.")


@dataclass(frozen=True)
class Kind:
    """One kind of tokenizer: the arguments of the training script that tell it from the others."""

    name: str
    options: tuple[str, ...]
    bits: int | None = None


def kinds(args: ComparisonArguments) -> list[Kind]:
    """All kinds that are compared."""
    scalar = {
        "ifsq": (),
        "fsq": ("--bottleneck", "fsq"),
        "equal_bins": ("--equal_bins",),
        "fsp": ("--bound", "normal", "--equal_bins", "--noise_prob", "1.0"),
        "alpha1.702": ("--alpha", "1.702"),
    }
    found = []
    for bits in args.bits:
        levels = ("--levels", *[str(2**bits + 1)] * args.latent_channels)
        found += [
            Kind(f"{name}_{bits}bit", (*options, *levels), bits)
            for name, options in scalar.items()
            if name != "alpha1.702" or bits == 4
        ]
    latent_channels = ("--latent_channels", str(args.latent_channels))
    return [*found, *[Kind(name, ("--bottleneck", name, *latent_channels)) for name in ("vq", "kl")]]


def main(args: ComparisonArguments) -> None:
    runs = [(kind, seed) for seed in args.seeds for kind in kinds(args)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(args, *run), runs))
    images = load_images(args)
    results = [measure(args, kind, seed, images) for kind, seed in tqdm(runs, desc="Measuring")]
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    tables = f"{table_of_kinds(args, results)}\n\n{table_of_differences(args, results)}\n"
    (args.output_dir / "tables.md").write_text(tables, encoding="utf-8")
    plot_results(args, results)
    draw_reconstructions(args, images[:12])


def folder_of(args: ComparisonArguments, kind: Kind, seed: int) -> Path:
    return args.output_dir / f"{kind.name}_seed{seed}"


def train(args: ComparisonArguments, kind: Kind, seed: int) -> None:
    """Train one model in a process of its own, which has its share of the cores."""
    if (folder_of(args, kind, seed) / "README.md").is_file():
        return
    options = {
        "dataset_name": args.dataset_name,
        "output_dir": folder_of(args, kind, seed),
        "seed": seed,
        "resolution": args.resolution,
        "layers_per_block": args.layers_per_block,
        "train_batch_size": args.train_batch_size,
        "max_train_steps": args.max_train_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": args.max_train_steps // 10,
        "max_validation_samples": args.max_validation_samples,
        "ema_decay": 0.99,
        "perceptual_weight": 0,
        "checkpointing_steps": args.max_train_steps + 1,
    }
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    argv += ["--random_flip", "--use_ema", "--block_out_channels", *map(str, args.block_out_channels), *kind.options]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, str(TRAINING_SCRIPT), *argv], check=True, env=environment)


def load_images(args: ComparisonArguments) -> torch.Tensor:
    """The validation images, `(count, 3, resolution, resolution)` in [-1, 1]."""
    _, rows = load_image_dataset(args.dataset_name)
    if rows is None:
        raise ValueError(f"`dataset_name` {args.dataset_name!r} must have a validation or test split.")
    data = ImageDataset(draw(rows, args.max_validation_samples, seed=0), ImageTransform(args.resolution))
    return torch.stack([data[index]["pixel_values"] for index in range(len(data))])


def load(args: ComparisonArguments, kind: Kind, seed: int) -> ImageTokenizer:
    return load_image_tokenizer(str(folder_of(args, kind, seed)))


@torch.no_grad()
def measure(args: ComparisonArguments, kind: Kind, seed: int, images: torch.Tensor) -> dict[str, Any]:
    """Quality of the reconstructions, and how evenly the codes are used."""
    tokenizer = load(args, kind, seed)
    usage = None
    if tokenizer.codebook_size is not None:
        usage = CodebookUsage(tokenizer.codebook_size, tokenizer.levels)
    psnr, ssim = [], []
    for batch in images.split(100):
        if tokenizer.levels is not None:
            encoded = tokenizer.model.encode(batch)
            codes = encoded.codes
            usage.update(encoded.indices, bounded_values(tokenizer.model.quantizer, encoded.unquantized))
        elif usage is not None:
            indices = tokenizer.encode_indices(batch)
            codes = tokenizer.indices_to_codes(indices)
            usage.update(indices)
        else:
            codes = tokenizer.encode_codes(batch)
        reconstructions = tokenizer.decode_codes(codes).clamp(-1, 1)
        psnr.append(peak_signal_noise_ratio(reconstructions, batch))
        ssim.append(structural_similarity(reconstructions, batch))
    result = {"kind": kind.name, "bits": kind.bits, "seed": seed, "levels": tokenizer.levels}
    result |= {"psnr_db": torch.cat(psnr).mean().item(), "ssim": torch.cat(ssim).mean().item()}
    if usage is not None:
        counted = usage.compute()
        result["usage"] = counted["usage"]
        result["token_entropy_bits"] = counted["entropy_bits"]
        if tokenizer.levels is not None:
            result["entropy_bits"] = float(np.mean(counted["dimension_entropies_bits"]))
            result["ks_distance"] = float(np.mean(counted["dimension_ks_distances"]))
    return result


def values_of(results: list[dict[str, Any]], kind: Kind, name: str) -> np.ndarray:
    """One value per seed; empty for a kind that has no such value."""
    return np.array([result[name] for result in results if result["kind"] == kind.name and name in result])


def mean_and_spread(values: np.ndarray, digits: int, sign: str = "") -> str:
    if not len(values):
        return "–"
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.{digits}f}{spread}"


def table_of_kinds(args: ComparisonArguments, results: list[dict[str, Any]]) -> str:
    """Means over the seeds, and standard deviations: share of the codes that occur, entropies in bits."""
    rows = [
        "| tokenizer | PSNR, dB | SSIM | codes used | bits per token | bits per dimension | of at most | KS distance |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|")
    for kind in kinds(args):
        cells = [
            mean_and_spread(values_of(results, kind, name), digits)
            for name, digits in (
                ("psnr_db", 2),
                ("ssim", 4),
                ("usage", 3),
                ("token_entropy_bits", 2),
                ("entropy_bits", 3),
                ("ks_distance", 3),
            )
        ]
        most = f"{math.log2(2**kind.bits + 1):.3f}" if kind.bits else "–"
        rows.append(f"| {kind.name} | {' | '.join([*cells[:5], most, cells[5]])} |")
    return "\n".join(rows)


def table_of_differences(args: ComparisonArguments, results: list[dict[str, Any]]) -> str:
    """Differences between two kinds that were trained with the same seeds, with the spread of the difference."""
    rows = ["| difference | PSNR, dB | SSIM | entropy, bits per dimension | KS distance |", "|---|---|---|---|---|"]
    by_name = {kind.name: kind for kind in kinds(args)}
    for bits in args.bits:
        for one, other in (("ifsq", "fsq"), ("equal_bins", "ifsq"), ("fsp", "ifsq"), ("alpha1.702", "ifsq")):
            pair = [by_name.get(f"{name}_{bits}bit") for name in (one, other)]
            if None in pair:
                continue
            cells = []
            for name, digits in (("psnr_db", 3), ("ssim", 4), ("entropy_bits", 4), ("ks_distance", 4)):
                difference = values_of(results, pair[0], name) - values_of(results, pair[1], name)
                cells.append(mean_and_spread(difference, digits, sign="+"))
            rows.append(f"| {pair[0].name} less {pair[1].name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot_results(args: ComparisonArguments, results: list[dict[str, Any]]) -> None:
    """PSNR, share of the possible entropy and uniformity against the bits per dimension."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    titles = {"psnr_db": "PSNR, dB", "entropy_bits": "entropy, share of the possible", "ks_distance": "KS distance"}
    for axis, (name, title) in zip(axes, titles.items()):
        for number, family in enumerate(("ifsq", "fsq", "equal_bins", "fsp", "alpha1.702")):
            found = [kind for kind in kinds(args) if kind.name.startswith(f"{family}_")]
            values = [values_of(results, kind, name) for kind in found]
            if name == "entropy_bits":
                values = [value / math.log2(2**kind.bits + 1) for kind, value in zip(found, values)]
            # Side by side, so that the error bars can be told apart.
            places = [kind.bits + 0.06 * (number - 2) for kind in found]
            spreads = [value.std(ddof=1) if len(value) > 1 else 0 for value in values]
            axis.errorbar(places, [value.mean() for value in values], spreads, fmt="o-", capsize=3, label=family)
        for name_of_baseline, style in (("vq", "--"), ("kl", ":")):
            values = values_of(results, Kind(name_of_baseline, ()), name)
            if len(values):
                axis.axhline(values.mean(), color="gray", linestyle=style, label=name_of_baseline)
        axis.set(title=title, xlabel="bits per dimension", xticks=args.bits)
    axes[0].legend(fontsize=8)
    figure.savefig(args.output_dir / "comparison.png", dpi=80)
    plt.close(figure)


@torch.no_grad()
def draw_reconstructions(args: ComparisonArguments, images: torch.Tensor) -> None:
    """Originals in the first row, and a row of reconstructions for each kind, of the first seed."""
    rows = {"original": images}
    for kind in kinds(args):
        tokenizer = load(args, kind, args.seeds[0])
        rows[kind.name] = tokenizer.decode_codes(tokenizer.encode_codes(images)).clamp(-1, 1)
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 0.85 * len(rows)), layout="constrained")
    for axis, (name, row) in zip(axes, rows.items()):
        axis.imshow(torch.cat(list(row), dim=2).permute(1, 2, 0).add(1).div(2).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=8, loc="left", pad=2)
        axis.set(xticks=[], yticks=[])
    figure.savefig(args.output_dir / "reconstructions.jpg", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main(HfArgumentParser(ComparisonArguments).parse_args_into_dataclasses()[0])
