"""
Speed of the DiT, beside diffusers' `DiTTransformer2DModel` of the same size and number of tokens.

    python examples/research/benchmarks/benchmark_dit.py --sizes B/1 L/1 --batch_sizes 1 8 32

A step is one call of the transformer; with guidance it has two rows per image. All variants of a setting take turns in
one run, so that whatever else the machine does slows all of them, and medians are reported. Weights are random: they
make no difference to the time.

- `floor`: the matrix products alone, those of the linear layers and of attention, the least that a step can take.
- `ours`, `ours compiled`: `IFSQDiTTransformer2DModel`, with rotary positions and normalized queries and keys.
- `ours, CPU kernels`: the same after `enable_cpu_kernels`, which changes something in float32 on a CPU alone.
- `diffusers`, `diffusers compiled`: `DiTTransformer2DModel`, which has neither.
"""

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from machine import MemoryWatch, describe, linear_layers, matmul_rate, print_table, seconds_of
from transformers import HfArgumentParser

from hf_ifsq import IFSQDiTTransformer2DModel
from hf_ifsq.cpu_kernels import enable_cpu_kernels
from hf_ifsq.training.arguments import argument


VARIANTS = ("floor", "ours", "ours, CPU kernels", "ours compiled", "diffusers", "diffusers compiled")


@dataclass
class BenchmarkArguments:
    """Which settings are measured; each combination is a row of the table."""

    sizes: list[str] = argument(["B/1"], "Named sizes.")
    batch_sizes: list[int] = argument([1, 8], "Images at a time.")
    guidance: bool = argument(True, "Two rows per image.")
    dtypes: list[str] = argument(["float32"], "`float32` or `bfloat16`.")
    variants: list[str] = argument(list(VARIANTS), f"Of {', '.join(VARIANTS)}.")
    sample_size: int = argument(16, "Rows and columns of the latents.")
    num_inference_steps: int = argument(50, "Steps of an image, for the images per second.")
    device: str = argument("cuda" if torch.cuda.is_available() else "cpu", "Device.")
    turns: int = argument(5, "Times that each variant is measured, after one to warm up.")
    output_file: str | None = argument(None, "JSON file for the results.")


def main(args: BenchmarkArguments) -> list[dict[str, object]]:
    unknown = sorted(set(args.variants) - set(VARIANTS))
    if unknown:
        raise ValueError(f"`variants` must be of {VARIANTS}, got {unknown}.")
    device = torch.device(args.device)
    rows = []
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        rate = matmul_rate(device, dtype)
        print(f"{describe(device)}, {dtype_name}: {rate / 1e9:.0f} GFLOP/s\n")
        for size in args.sizes:
            for batch_size in args.batch_sizes:
                rows += measure(args, size, batch_size, device, dtype, rate)
    print_table(rows)
    if args.output_file is not None:
        Path(args.output_file).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


@torch.no_grad()
def measure(
    args: BenchmarkArguments, size: str, batch_size: int, device: torch.device, dtype: torch.dtype, rate: float
) -> list[dict[str, object]]:
    """A row of the table for each variant of a setting."""
    torch.compiler.reset()
    rows = batch_size * (2 if args.guidance else 1)
    model = IFSQDiTTransformer2DModel.from_size(size, sample_size=args.sample_size).eval().to(device, dtype)
    peer = make_peer(model, args.sample_size).to(device, dtype)
    latents = torch.randn(rows, 4, args.sample_size, args.sample_size, device=device, dtype=dtype)
    labels = torch.arange(rows, device=device) % 1000
    t = torch.full((rows,), 0.5, device=device)
    tokens = rows * (args.sample_size // model.config.patch_size) ** 2
    # The condition is one row per image, everything else one per token.
    floor_rows = {"time_embed": rows, "modulation_out": rows, "proj_out": tokens}
    floor_rows |= {f"blocks.{index}.modulation": rows for index in range(len(model.blocks))} | {"blocks": tokens}
    calls = {
        "floor": lambda: matrix_products(model, floor_rows, latents),
        "ours": lambda: partial(model, latents, t, labels),
        "ours, CPU kernels": lambda: partial(with_cpu_kernels(model), latents, t, labels),
        "ours compiled": lambda: partial(compiled(model), latents, t, labels),
        "diffusers": lambda: partial(peer, latents, timestep=1000 * t, class_labels=labels),
        "diffusers compiled": lambda: partial(compiled(peer), latents, timestep=1000 * t, class_labels=labels),
    }
    variants = {name: calls[name]() for name in VARIANTS if name in args.variants}
    measured = {name: [] for name in variants}
    for turn in range(args.turns + 1):
        for name, variant in variants.items():
            memory = MemoryWatch(device)
            seconds = seconds_of(variant, device)
            # The first turn warms up.
            if turn > 0:
                measured[name].append((seconds, memory.peak()))
    operations = count_operations(model, floor_rows)
    table = []
    for name, values in measured.items():
        seconds, memory = (statistics.median(column) for column in zip(*values, strict=True))
        table.append(
            {
                "size": size,
                "dtype": str(dtype).removeprefix("torch."),
                "batch": batch_size,
                "guidance": "yes" if args.guidance else "no",
                "variant": name,
                "per step (ms)": 1e3 * seconds,
                f"images per second, {args.num_inference_steps} steps": batch_size
                / seconds
                / args.num_inference_steps,
                "memory beside weights (MiB)": round(memory),
                "of matmul rate": f"{operations / seconds / rate:.0%}",
            }
        )
    return table


def make_peer(model: IFSQDiTTransformer2DModel, sample_size: int) -> DiTTransformer2DModel:
    """A model of the same layers, width, heads and tokens."""
    return DiTTransformer2DModel(
        num_attention_heads=model.config.num_attention_heads,
        attention_head_dim=model.config.attention_head_dim,
        num_layers=model.config.num_layers,
        in_channels=4,
        out_channels=4,
        patch_size=model.config.patch_size,
        sample_size=sample_size,
    ).eval()


def compiled(model: ModelMixin) -> ModelMixin:
    """A compiled copy of a model."""
    other = type(model).from_config(model.config).eval().to(model.device, model.dtype)
    other.compile(fullgraph=True, dynamic=False)
    return other


def with_cpu_kernels(model: ModelMixin) -> ModelMixin:
    """A copy of a model that multiplies by oneDNN in float32 on a CPU."""
    other = copy.deepcopy(model)
    enable_cpu_kernels(other)
    return other


def matrix_products(
    model: IFSQDiTTransformer2DModel, rows: dict[str, int], latents: torch.Tensor
) -> Callable[[], None]:
    """A function that runs the linear layers once, and the two products of attention in each block."""
    run_linear_layers = linear_layers(model, rows)
    num_heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
    tokens = rows["blocks"] // len(latents)
    query, key, value = (latents.new_ones(len(latents), num_heads, tokens, head_dim) for _ in range(3))

    @torch.no_grad()
    def run() -> None:
        run_linear_layers()
        for _ in model.blocks:
            (query @ key.mT) @ value

    return run


def count_operations(model: IFSQDiTTransformer2DModel, rows: dict[str, int]) -> int:
    """Of the matrix products of a step, a multiplication and an addition each."""
    operations = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            count = next(count for prefix, count in rows.items() if name.startswith(prefix))
            operations += 2 * count * module.weight.numel()
    tokens_of_a_row = rows["blocks"] // rows["time_embed"]
    hidden_size = model.config.num_attention_heads * model.config.attention_head_dim
    return operations + len(model.blocks) * 2 * 2 * rows["blocks"] * tokens_of_a_row * hidden_size


if __name__ == "__main__":
    main(HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()[0])
