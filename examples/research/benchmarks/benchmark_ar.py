"""
Speed and memory of the AR model, beside transformers' `LlamaForCausalLM` of the same dimensions.

    python examples/research/benchmarks/benchmark_ar.py --sizes B L --batch_sizes 1 8 32 --guidance_scales 1 2

All variants of a setting take turns in one run, so that whatever else the machine does slows all of them, and medians
are reported. Weights are random: they make no difference to the time.

- `floor`: the matrix products of the linear layers alone, the least that the time of a token can be.
- `ours`, `ours compiled`: `IFSQARForImageGeneration.generate`.
- `ours, CPU kernels`: the same after `enable_cpu_kernels`, which changes something in float32 on a CPU alone.
- `Llama`: `LlamaForCausalLM.generate` with its key/value cache.
- `no cache`: a forward pass of ours over all tokens so far for each token; measured at nine lengths and summed up.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import (
    MemoryWatch,
    describe,
    linear_layers,
    matmul_rate,
    memory_bandwidth,
    print_table,
    seconds_of,
)
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from hf_ifsq import IFSQARConfig, IFSQARForImageGeneration
from hf_ifsq.cpu_kernels import enable_cpu_kernels
from hf_ifsq.training.arguments import argument


VARIANTS = ("floor", "ours", "ours, CPU kernels", "ours compiled", "Llama", "no cache")


@dataclass
class BenchmarkArguments:
    """Which settings are measured; each combination is a row of the table."""

    sizes: list[str] = argument(["B"], "Named sizes.")
    batch_sizes: list[int] = argument([1, 8], "Images at a time.")
    guidance_scales: list[float] = argument([1.0, 2.0], "1.0 is without guidance.")
    dtypes: list[str] = argument(["float32"], "`float32` or `bfloat16`.")
    variants: list[str] = argument(list(VARIANTS[:5]), f"Of {', '.join(VARIANTS)}.")
    vocab_sizes: list[int] = argument([16384], "Sizes of the factors of a token; `Llama` has their sum.")
    grid_size: list[int] = argument([16, 16], "Rows and columns of tokens.")
    device: str = argument("cuda" if torch.cuda.is_available() else "cpu", "Device.")
    compile_mode: str = argument("default", "`mode` of `torch.compile`; on a GPU `reduce-overhead`.")
    turns: int = argument(3, "Times that each variant is measured, after one to warm up.")
    output_file: str | None = argument(None, "JSON file for the results.")


def main(args: BenchmarkArguments) -> list[dict[str, object]]:
    unknown = sorted(set(args.variants) - set(VARIANTS))
    if unknown:
        raise ValueError(f"`variants` must be of {VARIANTS}, got {unknown}.")
    device = torch.device(args.device)
    rows = []
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        bandwidth, rate = memory_bandwidth(device), matmul_rate(device, dtype)
        print(f"{describe(device)}, {dtype_name}: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s\n")
        for size in args.sizes:
            for batch_size in args.batch_sizes:
                for guidance_scale in args.guidance_scales:
                    setting = Setting(args, size, batch_size, guidance_scale, device, dtype)
                    rows += setting.measure(bandwidth, rate)
    print_table(rows)
    if args.output_file is not None:
        Path(args.output_file).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


class Setting:
    """The variants of one size, batch size, guidance and dtype."""

    def __init__(
        self,
        args: BenchmarkArguments,
        size: str,
        batch_size: int,
        guidance_scale: float,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.args, self.size, self.batch_size, self.device, self.dtype = args, size, batch_size, device, dtype
        self.guidance_scale = guidance_scale
        self.rows = batch_size * (2 if guidance_scale > 1 else 1)
        self.config = IFSQARConfig.from_size(size, vocab_sizes=args.vocab_sizes, grid_size=args.grid_size)
        self.class_labels = torch.arange(batch_size, device=device) % self.config.num_classes
        self.model = self._new_model()

    def _new_model(self) -> IFSQARForImageGeneration:
        model = IFSQARForImageGeneration(self.config).eval().to(self.device, self.dtype)
        for head in model.lm_heads:
            torch.nn.init.normal_(head.weight, std=0.02)
        return model

    def measure(self, bandwidth: float, rate: float) -> list[dict[str, object]]:
        """A row of the table for each variant."""
        makers = {
            "floor": self.floor,
            "ours": self.ours,
            "ours, CPU kernels": self.ours_with_cpu_kernels,
            "ours compiled": self.ours_compiled,
            "Llama": self.llama,
            "no cache": self.no_cache,
        }
        variants = {name: makers[name]() for name in VARIANTS if name in self.args.variants}
        measured = {name: [] for name in variants}
        for turn in range(self.args.turns + 1):
            for name, variant in variants.items():
                memory = MemoryWatch(self.device)
                total, first = variant()
                # The first turn warms up.
                if turn > 0:
                    measured[name].append((total, first, memory.peak()))
        table = []
        for name, values in measured.items():
            total, first, memory = (statistics.median(column) for column in zip(*values, strict=True))
            num_tokens = self.config.num_tokens
            table.append(
                {
                    "size": self.size,
                    "dtype": str(self.dtype).removeprefix("torch."),
                    "batch": self.batch_size,
                    "guidance": "yes" if self.guidance_scale > 1 else "no",
                    "variant": name,
                    "images per second": self.batch_size / total,
                    "first token (ms)": 1e3 * first,
                    "each next (ms)": 1e3 * (total - first) / (num_tokens - 1),
                    "memory beside weights (MiB)": round(memory),
                    "of bandwidth": f"{self.bytes_moved() / total / bandwidth:.0%}",
                    "of matmul rate": f"{self.operations() / total / rate:.0%}",
                }
            )
        return table

    def bytes_moved(self) -> int:
        """By all steps at least: the weights once per step, and the keys and values of the tokens before it."""
        weights = sum(weight.numel() for name, weight in self.model.named_parameters() if "embed" not in name)
        num_tokens, config = self.config.num_tokens, self.config
        cached = num_tokens * (num_tokens + 1) // 2 * self.rows * config.num_hidden_layers * 2 * config.hidden_size
        return (num_tokens * weights + cached) * self.dtype.itemsize

    def operations(self) -> int:
        """Of the linear layers in all steps, a multiplication and an addition each."""
        # The layers over the factors run once for each of them.
        times = {"factor_layers": len(self.config.vocab_sizes)}
        weights = sum(
            module.weight.numel() * times.get(name.split(".")[0], 1)
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear)
        )
        return 2 * self.config.num_tokens * self.rows * weights

    def floor(self) -> Callable[[], tuple[float, float]]:
        run_once = linear_layers(self.model, {"model.": self.rows, "lm_heads.": self.rows})
        run_for_each_factor = linear_layers(self.model, {"factor_layers.": self.rows})

        def run() -> None:
            run_once()
            for _ in self.config.vocab_sizes:
                run_for_each_factor()

        def measure() -> tuple[float, float]:
            step = seconds_of(run, self.device, turns=16)
            return self.config.num_tokens * step, step

        return measure

    def ours(self, model: IFSQARForImageGeneration | None = None) -> Callable[[], tuple[float, float]]:
        model = model or self.model

        def measure() -> tuple[float, float]:
            first = []

            def callback(num_generated: int, indices: torch.Tensor) -> None:
                if num_generated == 1:
                    # Reading a token waits for it.
                    indices[0, 0].item()
                    first.append(time.perf_counter() - start)

            start = time.perf_counter()
            indices = model.generate(self.class_labels, guidance_scale=self.guidance_scale, callback=callback)
            indices.cpu()
            return time.perf_counter() - start, first[0]

        return measure

    def ours_with_cpu_kernels(self) -> Callable[[], tuple[float, float]]:
        model = self._new_model()
        enable_cpu_kernels(model)
        return self.ours(model)

    def ours_compiled(self) -> Callable[[], tuple[float, float]]:
        torch.compiler.reset()
        model = self._new_model()
        model.setup_cache(self.rows)
        for decoder in model.decoders:
            decoder.compile(fullgraph=True, dynamic=False, mode=self.args.compile_mode)
        return self.ours(model)

    def llama(self) -> Callable[[], tuple[float, float]]:
        num_tokens, config = self.config.num_tokens, self.config
        llama_config = LlamaConfig(
            vocab_size=sum(config.vocab_sizes),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            max_position_embeddings=num_tokens + 1,
        )
        model = LlamaForCausalLM(llama_config).eval().to(self.device, self.dtype)
        # Which tokens stand for the classes makes no difference to the time.
        prompt = self.class_labels[:, None] % model.vocab_size

        def measure() -> tuple[float, float]:
            # The image tokens are any tokens but none ends the sequence.
            options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": model.vocab_size - 1}
            if self.guidance_scale > 1:
                options["guidance_scale"] = self.guidance_scale
                options["negative_prompt_ids"] = torch.zeros_like(prompt)
            seconds = []
            for new_tokens in (1, num_tokens):
                start = time.perf_counter()
                model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options).cpu()
                seconds.append(time.perf_counter() - start)
            first, total = seconds
            return total, first

        return measure

    def no_cache(self) -> Callable[[], tuple[float, float]]:
        num_tokens = self.config.num_tokens
        labels = self.class_labels.repeat(self.rows // self.batch_size)
        lengths = sorted({round(1 + (num_tokens - 1) * part / 8) for part in range(9)})

        @torch.no_grad()
        def measure() -> tuple[float, float]:
            seconds = []
            for length in lengths:
                ids = torch.zeros(self.rows, length, dtype=torch.long, device=self.device)
                seconds.append(seconds_of(lambda ids=ids: self.model(labels, ids), self.device))
            # The trapezoidal rule, in whole tokens.
            total = seconds[0] + sum(
                (stop - start) * (before + after) / 2
                for start, stop, before, after in zip(lengths, lengths[1:], seconds, seconds[1:])
            )
            return total, seconds[0]

        return measure


if __name__ == "__main__":
    main(HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()[0])
