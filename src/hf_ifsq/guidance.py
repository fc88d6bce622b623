"""Classifier-free guidance of the AR model and of the DiT: in training the null class, in sampling its use."""

import math

import torch

from .models.checks import describe, is_number


# Strength of guidance over a sequence: from progress in [0, 1] to a share of `guidance_scale - 1` in [0, 1].
GUIDANCE_SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


# Far above any of use; much larger ones would overflow.
MAX_GUIDANCE_SCALE = 1e4


def check_guidance(
    guidance_scale: float,
    guidance_interval: tuple[float, float],
    class_dropout_prob: float,
    schedule: str = "constant",
) -> None:
    """Raise an error that names the argument if one is wrong, or if the model cannot be guided."""
    if not is_number(guidance_scale) or not 1.0 <= guidance_scale <= MAX_GUIDANCE_SCALE:
        raise ValueError(
            f"`guidance_scale` must be a number from 1.0, which turns guidance off, to {MAX_GUIDANCE_SCALE:g}, got "
            f"{describe(guidance_scale)}."
        )
    if guidance_scale > 1.0 and class_dropout_prob == 0:
        raise ValueError(
            f"`guidance_scale` is {guidance_scale}, but this model was trained without class dropout "
            "(`class_dropout_prob=0`) and has no null class: use 1.0."
        )
    numbers = guidance_interval if isinstance(guidance_interval, (list, tuple)) else ()
    # A comparison with NaN is false.
    if len(numbers) != 2 or not all(map(is_number, numbers)) or not 0 <= numbers[0] <= numbers[1] <= 1:
        raise ValueError(
            f"`guidance_interval` must be two increasing numbers in [0, 1], got {describe(guidance_interval)}."
        )
    if not isinstance(schedule, str) or schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"`guidance_schedule` must be one of {list(GUIDANCE_SCHEDULES)}, got {describe(schedule)}.")


def guidance_scales(num_tokens: int, scale: float, schedule: str, interval: tuple[float, float]) -> list[float]:
    """
    Strength of guidance at each of `num_tokens` tokens. The progress of token i is `i / (num_tokens - 1)`: with it the
    strength grows from 1.0 to `scale` as `schedule` says, and it is 1.0 where the progress is not in `interval`.
    """
    scales = []
    for token in range(num_tokens):
        progress = token / max(num_tokens - 1, 1)
        guided = interval[0] <= progress <= interval[1]
        scales.append(1 + guided * (float(scale) - 1) * GUIDANCE_SCHEDULES[schedule](progress))
    return scales


def guide(predictions: torch.Tensor, scale: float) -> torch.Tensor:
    """Of conditional rows and as many unconditional ones after them, `uncond + scale * (cond - uncond)`."""
    cond, uncond = predictions.chunk(2)
    return uncond + scale * (cond - uncond)


def drop_labels(
    class_labels: torch.Tensor, probability: float, null_label: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Labels for training, of any shape, each replaced with `probability` in [0, 1) by that of the null class, or where a
    `mask` of their shape says so.
    """  # noqa: D205
    if mask is None:
        if probability == 0:
            return class_labels
        mask = torch.rand(class_labels.shape, device=class_labels.device) < probability
    return class_labels.masked_fill(mask, null_label)
