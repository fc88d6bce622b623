"""What a machine can do at best, and how a benchmark is timed on it."""

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the work that was given to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device, turns: int = 1) -> float:
    """Median seconds of a call over some turns."""
    seconds = []
    for _ in range(turns):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that are read from and written to memory in copying 256 MiB, far more than any cache."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device, turns=9)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of large square matrices."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / seconds_of(lambda: left @ right, device, turns=9)


@torch.no_grad()
def linear_layers(model: torch.nn.Module, rows: dict[str, int]) -> Callable[[], None]:
    """
    A function that runs the linear layers of a model once on random inputs, and nothing else: the floor of its time.

    Args:
        model (`torch.nn.Module`): a model.
        rows (`dict[str, int]`): rows that go through the layers whose names begin so; others are left out.
    """
    products = []
    for name, module in model.named_modules():
        count = next((count for prefix, count in rows.items() if name.startswith(prefix)), None)
        if count is not None and isinstance(module, torch.nn.Linear):
            weight = module.weight
            products.append((module, torch.randn(count, weight.shape[1], device=weight.device, dtype=weight.dtype)))

    @torch.no_grad()
    def run() -> None:
        for module, inputs in products:
            module(inputs)

    return run


class MemoryWatch:
    """
    How much more memory than at the beginning is in use at most: on a GPU that of tensors, on the CPU that of the
    process, which Linux tells.

    Args:
        device (`torch.device`): whose memory.
    """

    def __init__(self, device: torch.device):
        gc.collect()
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif Path("/proc/self/clear_refs").exists():
            # What was freed but kept for later use would hide what is used next.
            with contextlib.suppress(AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._peak()

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status")
        if not status.exists():
            return float("nan")
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10

    def peak(self) -> float:
        """MiB; NaN on the CPU of another system than Linux."""
        return self._peak() - self.before


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(rows: list[dict[str, object]]) -> None:
    """Print rows of equal keys as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |")
