"""The accelerator of a training, as it was launched and configured, less what training cannot do."""

import os
from pathlib import Path

import torch._inductor
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, ProjectConfiguration, TorchDynamoPlugin


def make_accelerator(
    output_dir: str, gradient_accumulation_steps: int, mixed_precision: str | None, report_to: str
) -> Accelerator:
    """
    An accelerator of which trackers write to `logs/` of the output folder; the arguments are those of the scripts.

    Raises:
        ValueError: before anything is done, if it is configured for what training cannot do.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        mixed_precision=mixed_precision,
        dynamo_plugin=_dynamo_plugin(),
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(output_dir, logging_dir=str(Path(output_dir) / "logs")),
    )
    distributed_type = accelerator.distributed_type
    if distributed_type != DistributedType.NO and not distributed_type.name.startswith("MULTI_"):
        raise ValueError(f"Training runs on one or several devices by data parallelism, not by {distributed_type}.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world_size:
        raise ValueError(
            f"{world_size} processes were launched, but Accelerate finds no device for each and would let each train "
            "by itself: launch one, or on CPUs set `ACCELERATE_USE_CPU=true`."
        )
    configured = accelerator.gradient_accumulation_steps
    if configured < 1 or gradient_accumulation_steps not in (1, configured):
        raise ValueError(
            f"`gradient_accumulation_steps` is {gradient_accumulation_steps}, but Accelerate is configured for "
            f"{configured} (`ACCELERATE_GRADIENT_ACCUMULATION_STEPS`), which it prefers: give one of them, at least 1."
        )
    return accelerator


def _dynamo_plugin() -> TorchDynamoPlugin:
    """The compilation that `accelerate` was configured for, less what is wrong in it."""
    plugin = TorchDynamoPlugin()
    if plugin.backend == DynamoBackend.INDUCTOR:
        # With optimized layouts, inductor's backward of an upsampling to the nearest neighbour reads its buffer before
        # it is filled (torch 2.13): all before it in a tokenizer, encoder included, would get no gradient, unnoticed.
        plugin.options = {**torch._inductor.list_mode_options(plugin.mode), "layout_optimization": False}
        # It is in the options, beside which torch takes none.
        plugin.mode = None
    return plugin
