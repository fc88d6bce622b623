"""
Memory of a training step of the AR model: one head over all tokens, or one for each of two factors.

    python examples/research/benchmarks/benchmark_ar_training.py --size L --batch_size 8

What a forward and a backward pass take beside the weights: activations, scores and gradients. `all scores at once` is
the plain cross-entropy of all scores of a batch, which the model never holds at once.
"""

import time
from dataclasses import dataclass

import torch
from machine import MemoryWatch, describe, print_table, synchronize
from transformers import HfArgumentParser

from hf_ifsq import IFSQARConfig, IFSQARForImageGeneration
from hf_ifsq.models import layers_ifsq_ar
from hf_ifsq.training.arguments import argument


@dataclass
class BenchmarkArguments:
    """What is trained."""

    size: str = argument("L", "Named size.")
    batch_size: int = argument(8, "Images per step.")
    mixed_precision: str = argument("no", "`no` or `bf16`.")
    device: str = argument("cuda" if torch.cuda.is_available() else "cpu", "Device.")


def main(args: BenchmarkArguments) -> list[dict[str, object]]:
    device = torch.device(args.device)
    print(f"{describe(device)}, size {args.size}, {args.batch_size} images, mixed precision {args.mixed_precision}\n")
    usual = layers_ifsq_ar.MAX_SCORES
    rows = []
    for name, vocab_sizes, max_scores in (
        ("two heads over 289", [289, 289], usual),
        ("one head over 83,521", [83521], usual),
        ("one head, all scores at once", [83521], 2**62),
    ):
        layers_ifsq_ar.MAX_SCORES = max_scores
        seconds, memory = measure(args, vocab_sizes, device)
        rows.append({"heads": name, "seconds": seconds, "memory beside weights (MiB)": round(memory)})
    print_table(rows)
    return rows


def measure(args: BenchmarkArguments, vocab_sizes: list[int], device: torch.device) -> tuple[float, float]:
    """Seconds and MiB of a step."""
    config = IFSQARConfig.from_size(args.size, vocab_sizes=vocab_sizes)
    model = IFSQARForImageGeneration(config).to(device).train()
    class_labels = torch.arange(args.batch_size, device=device) % config.num_classes
    indices = torch.randint(config.codebook_size, (args.batch_size, config.num_tokens), device=device)
    memory = MemoryWatch(device)
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        loss = model(class_labels, indices, labels=indices).loss
    loss.backward()
    synchronize(device)
    return time.perf_counter() - start, memory.peak()


if __name__ == "__main__":
    main(HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()[0])
