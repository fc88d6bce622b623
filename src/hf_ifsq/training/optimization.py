"""The optimizer of all trainings and the schedule of its learning rate."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from diffusers.optimization import get_scheduler
from torch import nn


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    num_training_steps: int,
    num_processes: int = 1,
    *,
    learning_rate: float = 1e-4,
    lr_scheduler: str = "constant",
    lr_warmup_steps: int = 0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.95,
    adam_weight_decay: float = 0.0,
    adam_epsilon: float = 1e-8,
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """
    AdamW and a schedule of its learning rate.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): what is trained.
        num_training_steps (`int`): optimizer steps, over which the schedule runs.
        num_processes (`int`, *optional*, defaults to 1): Accelerate advances a schedule once for each of them.
        lr_scheduler (`str`, *optional*, defaults to `"constant"`): a name of `diffusers.optimization`.
        others: as their names say; the learning rate is that after the steps of warmup from zero.
    """
    betas = (adam_beta1, adam_beta2)
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=adam_weight_decay, eps=adam_epsilon
    )
    schedule = get_scheduler(
        lr_scheduler,
        optimizer,
        num_warmup_steps=lr_warmup_steps * num_processes,
        num_training_steps=num_training_steps * num_processes,
    )
    return optimizer, schedule


@contextlib.contextmanager
def kept_settings(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Keep the learning rate, betas and so on of optimizers while their states are loaded, which hold those of old."""
    optimizers = list(optimizers)
    kept = [[{**group, "params": ()} for group in optimizer.param_groups] for optimizer in optimizers]
    yield
    for optimizer, groups in zip(optimizers, kept, strict=True):
        # Loading makes new groups.
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update({**values, "params": group["params"]})


def resume_schedule(schedule: torch.optim.lr_scheduler.LambdaLR, num_steps: int) -> None:
    """Put a schedule to the place after `num_steps` of its steps, with the `initial_lr` that its optimizer has now."""
    schedule.base_lrs = [group["initial_lr"] for group in schedule.optimizer.param_groups]
    schedule.last_epoch = num_steps - 1
    # It counts on and sets the learning rates.
    schedule.step()
