"""Randomness by image: what an image looks like depends on its own generator, never on its neighbours."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .models.checks import describe


def check_generator(generator: Any, num_images: int) -> None:
    """Raise an error unless it is `None`, a `torch.Generator`, or a list of one for each of `num_images` images."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, Sequence) or not all(isinstance(each, torch.Generator) for each in generator):
        raise TypeError(f"`generator` must be a `torch.Generator` or a list of these, got {describe(generator)}.")
    if len(generator) != num_images:
        raise ValueError(
            f"`generator` must be one `torch.Generator` or a list of one for each of the {num_images} images, got "
            f"a list of {len(generator)}."
        )


def image_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int
) -> list[torch.Generator]:
    """
    One random generator for each of `num_images` images. A list of them, or a single one for a single image, is used
    as it is. From a single one for several images, or from the global one if there is none, seeds are drawn first.
    """
    check_generator(generator, num_images)
    if generator is None or (isinstance(generator, torch.Generator) and num_images != 1):
        device = None if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, (num_images,), generator=generator, device=device)
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    return [generator] if isinstance(generator, torch.Generator) else list(generator)


def draw(
    distribution: Callable[..., torch.Tensor],
    shape: tuple[int, ...],
    generators: Sequence[torch.Generator],
    device: torch.device,
) -> torch.Tensor:
    """Numbers of `shape` by each image's generator, from `torch.rand` or `torch.randn`: `(images, *shape)`."""
    draws = [distribution(shape, generator=generator, device=generator.device) for generator in generators]
    # One copy to the device, as a rule from the CPU.
    return torch.stack([numbers.to(draws[0].device) for numbers in draws]).to(device)


def generators_at(seed: int, positions: Iterable[int]) -> list[torch.Generator]:
    """
    One random generator for each image of a training batch, a function of the run's seed and of the image's position
    in the stream of all images alone: on any number of processes an image gets the same noise.
    """  # noqa: D205
    states = (np.random.SeedSequence([seed, position]).generate_state(1, np.uint64) for position in positions)
    return [torch.Generator().manual_seed(int(state[0] >> 1)) for state in states]
