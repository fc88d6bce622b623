"""
Training steps per second of AR model and DiT, from images that are tokenized on the way and from their token dataset.

    python examples/research/benchmarks/benchmark_token_dataset.py --dataset_name DATASET \\
        --tokenizer outputs/tokenizer --resolution 256 --hidden_size 768 --num_layers 12 --train_batch_size 64 \\
        --mixed_precision bf16

Without a dataset and a tokenizer it makes some of random pixels and weights. The four trainings take turns, so that
whatever else the machine does slows all of them, and the median over the turns is reported.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from hf_ifsq import AutoencoderIFSQ, IFSQARConfig, IFSQARForImageGeneration, IFSQDiTTransformer2DModel
from hf_ifsq.models.image_tokenizer import load_image_tokenizer
from hf_ifsq.training.arguments import argument
from hf_ifsq.training.data import ImageTransform, ResumableSampler, load_image_dataset
from hf_ifsq.training.losses import velocity_loss
from hf_ifsq.training.tokens import TokenSource


TOKENIZE = Path(__file__).parents[2] / "tokenize_dataset.py"


@dataclass
class BenchmarkArguments:
    """What is trained on what, and for how long."""

    dataset_name: str | None = argument(None, "Images; by default 256 of random pixels.")
    tokenizer: str | None = argument(None, "Tokenizer; by default a small one.")
    max_train_samples: int = argument(4096, "Images at most.")
    resolution: int = argument(64, "Side in pixels of the images.")
    hidden_size: int = argument(128, "Width of the generators, a multiple of 64.")
    num_layers: int = argument(4, "Layers of the generators.")
    train_batch_size: int = argument(16, "Images per step.")
    dataloader_num_workers: int = argument(0, "Processes that load images or tokens.")
    mixed_precision: str = argument("no", "`no`, `fp16` or `bf16`, of the generators.")
    num_turns: int = argument(7, "Times that each training is timed.")
    num_steps: int = argument(5, "Steps of a turn.")


def main(args: BenchmarkArguments) -> dict[str, dict[str, float]]:
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    with tempfile.TemporaryDirectory() as folder:
        images = args.dataset_name or write_images(args, folder)
        tokenizer = args.tokenizer or write_tokenizer(args, folder)
        same = ["--max_train_samples", str(args.max_train_samples), "--resolution", str(args.resolution)]
        command = [sys.executable, TOKENIZE, "--dataset_name", images, "--tokenizer", tokenizer, *same]
        subprocess.run([*command, "--output_dir", f"{folder}/tokens"], check=True)
        sources = {
            "images": load_images(images, tokenizer, args.max_train_samples, args.resolution),
            "tokens": TokenSource.from_token_dataset(f"{folder}/tokens", tokenizer),
        }
        sources["images"].tokenizer.to(accelerator.device)
        trainings = {
            (generator, name): make_step(args, accelerator, generator, source)
            for generator in ("AR", "DiT")
            for name, source in sources.items()
        }
        rates = {key: [] for key in trainings}
        for turn in range(args.num_turns + 1):
            for key, step in trainings.items():
                seconds = time_steps(step, args.num_steps)
                # The first turn warms up.
                if turn > 0:
                    rates[key].append(args.num_steps / seconds)
    medians = {key: statistics.median(values) for key, values in rates.items()}
    print(f"Steps per second, {args.train_batch_size} images per step, on {accelerator.device}:\n")
    print("| generator | from images | from tokens | ratio |\n|---|---|---|---|")
    for generator in ("AR", "DiT"):
        slow, fast = medians[generator, "images"], medians[generator, "tokens"]
        print(f"| {generator} | {slow:.2f} | {fast:.2f} | {fast / slow:.2f} |")
    return medians


def load_images(dataset_name: str, tokenizer: str, max_samples: int, resolution: int) -> TokenSource:
    """Images that are tokenized on the way."""
    rows, _ = load_image_dataset(dataset_name, max_train_samples=max_samples)
    loaded = load_image_tokenizer(tokenizer, sample_size=resolution)
    return TokenSource.from_images(rows, None, loaded, ImageTransform(resolution, loaded.in_channels))


def make_step(
    args: BenchmarkArguments, accelerator: Accelerator, generator: str, source: TokenSource
) -> Callable[[], None]:
    """A function that trains a new model by a step."""
    tokenizer, num_classes = source.tokenizer, len(source.id2label)
    if generator == "AR":
        config = IFSQARConfig(
            vocab_sizes=[tokenizer.require_codebook()],
            num_classes=num_classes,
            grid_size=tokenizer.grid_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 64,
        )
        model = IFSQARForImageGeneration(config)
    else:
        model = IFSQDiTTransformer2DModel(
            sample_size=tokenizer.grid_size,
            in_channels=tokenizer.latent_channels,
            num_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 64,
            attention_head_dim=64,
            num_classes=num_classes,
        )
    loader = DataLoader(
        source.train_data,
        batch_size=args.train_batch_size,
        sampler=ResumableSampler(len(source.train_data), 0, 0, 2**40),
        num_workers=args.dataloader_num_workers,
    )
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    batches = iter(loader)

    def step() -> None:
        batch = next(batches)
        if generator == "AR":
            indices = source.indices(batch)
            loss = model(batch["class_labels"], indices, labels=indices).loss
        else:
            latents = tokenizer.codes_to_latents(source.codes(batch))
            noise = torch.randn_like(latents)
            t = torch.randn(len(latents), device=latents.device).sigmoid()
            velocity = model(torch.lerp(noise, latents, t.view(-1, 1, 1, 1)), t, batch["class_labels"]).sample
            loss = sum(velocity_loss(velocity, latents - noise)).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(step: Callable[[], None], num_steps: int) -> float:
    """Seconds of some steps, work still on the device included."""
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def write_images(args: BenchmarkArguments, folder: str) -> str:
    """256 images of random pixels in 10 classes."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (256, args.resolution, args.resolution, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": list(map(Image.fromarray, pixels)), "label": [number % 10 for number in range(256)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(f"{folder}/images.parquet")
    return f"{folder}/images.parquet"


def write_tokenizer(args: BenchmarkArguments, folder: str) -> str:
    """Random weights: 8 x 8 pixels per token, and 625 tokens."""
    sizes = {"block_out_channels": (32, 64, 64, 128), "layers_per_block": 1, "sample_size": args.resolution}
    AutoencoderIFSQ(levels=(5, 5, 5, 5), **sizes).save_pretrained(f"{folder}/tokenizer")
    return f"{folder}/tokenizer"


if __name__ == "__main__":
    main(HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()[0])
