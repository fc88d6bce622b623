"""Sampling from the autoregressive generator with a key/value cache that is allocated once."""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..randomness import image_generators


# Strength of guidance over the sequence: from progress in [0, 1] to a share of `guidance_scale - 1` in [0, 1].
GUIDANCE_SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}

# Of compiled layers, for as many combinations of rows, dtype and device.
MAX_KEPT_CACHES = 4


class PreallocatedLayer(DynamicLayer):
    """
    Keys and values of one layer in memory that is allocated once. Unlike those of a [`~transformers.StaticLayer`],
    only the positions written so far are given back, so that attention reads no others and needs no mask for them.

    Args:
        length (`int`): positions that it can hold.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.written = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the memory for the batch, heads, dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.length, head_dim)
        self.values = torch.empty_like(self.keys)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of `(batch, heads, positions, head_dim)` and return all that were written so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.written = self.written, self.written + key_states.shape[2]
        self.keys[:, :, start : self.written] = key_states
        self.values[:, :, start : self.written] = value_states
        return self.keys[:, :, : self.written], self.values[:, :, : self.written]

    def get_seq_length(self) -> int:
        """Positions written so far."""
        return self.written

    def reset(self) -> None:
        """Begin a new sequence in the same memory."""
        self.written = 0

    def keep_rows(self, rows: int) -> None:
        """Forget all but the first rows of the batch."""
        self.keys, self.values = self.keys[:rows], self.values[:rows]


def preallocated_cache(num_layers: int, length: int) -> Cache:
    """A key/value cache of `length` positions for each of `num_layers` layers, allocated once on first use."""
    return Cache(layers=[PreallocatedLayer(length) for _ in range(num_layers)])


def static_cache(num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Cache:
    """A cache of `(rows, heads, length, head_dim)` a layer at fixed addresses, as CUDA graphs need it."""
    # What is made in inference mode could not be written to outside.
    with torch.inference_mode(False):
        cache = Cache(layers=[StaticLayer(max_cache_len=shape[2]) for _ in range(num_layers)])
        cache.early_initialization(shape[0], shape[1], shape[3], dtype, device)
    return cache


class CachedLayers:
    """
    Layers that run one position of a sequence at a time, and their cache.

    Args:
        layers (`torch.nn.ModuleList`): decoder layers.
        rotary (`tuple[torch.Tensor, torch.Tensor]`): cosines and sines of each position, `(length, head_dim)`.
        cache ([`~transformers.Cache`]): keys and values.
        mask (`torch.Tensor` of shape `(1, 1, length, length)`, *optional*):
            what a query may see of a cache that gives back its full length, as a term of the scores.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Cache,
        mask: torch.Tensor | None = None,
    ):
        self.layers = layers
        self.rotary = rotary
        self.cache = cache
        self.mask = mask

    def step(self, hidden_states: torch.Tensor, position: int) -> torch.Tensor:
        """Run `(rows, 1, hidden_size)` at a position through the layers, after all positions before it."""
        here = slice(position, position + 1)
        cos, sin = (part[here] for part in self.rotary)
        mask = None if self.mask is None else self.mask[:, :, here]
        return self.layers(hidden_states, (cos, sin), mask, self.cache)[0]

    def keep_rows(self, rows: int) -> None:
        """Go on with the first rows of the batch alone."""
        for layer in self.cache.layers:
            layer.keep_rows(rows)


def sample_from_logits(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    Draw from `softmax(logits)` by inverting the cumulative distribution at the given uniform numbers.

    Args:
        logits (`torch.Tensor` of shape `(batch, vocab_size)`): scores; minus infinity excludes a token.
        uniforms (`torch.Tensor` of shape `(batch,)`): numbers in [0, 1), one a row.

    Returns:
        `torch.Tensor` of shape `(batch,)`, int64: the draws, each a function of its own row and number alone.
    """
    cumulative = F.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1]
    # Rounding may lift the threshold to the total, past the last token that has any probability.
    threshold = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    # Logits that are no numbers find no place at all; `generate` reports them, the id stays a valid one until then.
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def guidance_scales(num_tokens: int, scale: float, schedule: str, interval: tuple[float, float]) -> list[float]:
    """
    Strength of guidance at each token.

    Args:
        num_tokens (`int`): tokens of an image. The progress of token i is `i / (num_tokens - 1)`.
        scale (`float`): strength, or its end where it grows.
        schedule (`str`): `"constant"`, `"linear"` or `"cosine"`: how it grows from 1.0 with progress.
        interval (`tuple[float, float]`): first and last progress with guidance; 1.0 elsewhere.

    Returns:
        `list[float]`: `num_tokens` scales.
    """
    scales = []
    for token in range(num_tokens):
        progress = token / max(num_tokens - 1, 1)
        guided = interval[0] <= progress <= interval[1]
        scales.append(1 + guided * (scale - 1) * GUIDANCE_SCHEDULES[schedule](progress))
    return scales


def processors_of_factors(
    num_factors: int,
    temperature: float | Sequence[float],
    top_k: int | None | Sequence[int | None],
    top_p: float | None | Sequence[float | None],
) -> list[LogitsProcessorList]:
    """
    transformers' processors for the logits of each factor of a token.

    Args:
        num_factors (`int`): factors of a token.
        temperature, top_k, top_p: as in `generate`, one value for all factors or one each.

    Returns:
        `list[LogitsProcessorList]`: one list a factor, empty where nothing changes.

    Raises:
        ValueError: if a list has another length than `num_factors`, or a value is out of its range.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, value in options.items():
        if not isinstance(value, Sequence):
            options[name] = [value] * num_factors
        elif len(value) != num_factors:
            raise ValueError(
                f"`{name}` must be one value or a list with one for each of the {num_factors} factors of a token, got "
                f"{list(value)}."
            )
    factors = []
    for temperature, top_k, top_p in zip(*options.values(), strict=True):
        processors = LogitsProcessorList()
        if temperature != 1.0:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            processors.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            processors.append(TopPLogitsWarper(top_p))
        factors.append(processors)
    return factors


class IFSQARGenerationMixin:
    """`generate` of [`~hf_ifsq.IFSQARForImageGeneration`]."""

    # Compiled layers with their caches, by rows, dtype and device; `None` if the layers are not compiled.
    _compiled_layers: dict[tuple, list[CachedLayers]] | None = None

    @torch.no_grad()
    @apply_forward_hook
    def generate(
        self,
        class_labels: torch.LongTensor,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float | Sequence[float] = 1.0,
        top_k: int | None | Sequence[int | None] = None,
        top_p: float | None | Sequence[float | None] = None,
        do_sample: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[[int, torch.LongTensor], None] | None = None,
    ) -> torch.LongTensor:
        """
        Generate the tokens of one image for each class label.

        Args:
            class_labels (`torch.LongTensor` of shape `(batch,)`): ids in [0, num_classes].
            guidance_scale (`float`, *optional*, defaults to 1.0):
                classifier-free guidance `uncond + scale * (cond - uncond)` of the logits of each factor, at least
                1.0; at 1.0 no unconditional row is computed.
            guidance_schedule (`str`, *optional*, defaults to `"constant"`):
                `"constant"`, or the scale grows from 1.0 at the first token to `guidance_scale` at the last,
                `"linear"` or by half a `"cosine"`.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                first and last token with guidance, in [0, 1] from the first token of the image to its last. After it
                no unconditional row is computed.
            temperature (`float` or `list[float]`, *optional*, defaults to 1.0):
                positive divisor of the logits. Of this and the next two, a list has one value for each factor.
            top_k (`int` or `list[int]`, *optional*): keep only this many most likely values of each factor.
            top_p (`float` or `list[float]`, *optional*):
                keep only the most likely values that together have this probability.
            do_sample (`bool`, *optional*, defaults to `True`): whether to sample; otherwise take the most likely.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                one for all images or one each, see [`~hf_ifsq.randomness.image_generators`]. What is sampled for an
                image depends on its generator and label alone.
            callback (`Callable[[int, torch.LongTensor], None]`, *optional*):
                called after each step with the number of tokens generated and the ids, `(batch, num_tokens)`, which
                it may change, and which change when it goes on.

        Returns:
            `torch.LongTensor` of shape `(batch, num_tokens)`: whole token ids in raster order.

        Raises:
            ValueError: if an argument is out of its range, if the model is in training mode, or if the weights are not
                finite.
        """
        self._check_generate_inputs(class_labels, guidance_scale, guidance_schedule, guidance_interval)
        batch, num_tokens, num_factors = len(class_labels), self.config.num_tokens, len(self.config.vocab_sizes)
        device = class_labels.device
        scales = guidance_scales(num_tokens, guidance_scale, guidance_schedule, guidance_interval)
        num_guided = max((step + 1 for step, scale in enumerate(scales) if scale > 1), default=0)
        if guidance_scale > 1 and not num_guided:
            raise ValueError(
                f"`guidance_interval` {guidance_interval} has none of the {num_tokens} tokens of an image, or "
                f"`guidance_schedule` {guidance_schedule!r} does not begin there: no token would be guided."
            )
        uniforms = None
        if do_sample:
            processors = processors_of_factors(num_factors, temperature, top_k, top_p)
            uniforms = _draw_uniforms(image_generators(generator, batch), num_tokens, num_factors, device)
        if num_guided:
            class_labels = torch.cat([class_labels, torch.full_like(class_labels, self.config.num_classes)])
        rows = len(class_labels)
        grid_layers, factor_layers = cached_layers = self._cached_layers(rows, device)
        indices = torch.zeros(batch, num_tokens, dtype=torch.long, device=device)
        finite = torch.tensor(True, device=device)

        hidden_states = self.model.embed(class_labels)
        for step, scale in enumerate(scales):
            # 1. One position through the transformer: the class first, then the token chosen last.
            hidden_states = grid_layers.step(hidden_states, step)
            # 2. The factors of the next token, one after another.
            factors = []
            factor_layers.cache.reset()
            for position, head in enumerate(self.lm_heads):
                hidden_states = factor_layers.step(hidden_states, position)
                # On another device only where the model is spread over several.
                logits = head(self.norm(hidden_states))[:, -1].float().to(device)
                if scale > 1:
                    cond, uncond = logits.chunk(2)
                    logits = uncond + scale * (cond - uncond)
                logits = logits[:batch]
                finite &= logits.isfinite().all()
                if do_sample:
                    logits = processors[position](None, logits)
                    factors.append(sample_from_logits(logits, uniforms[:, step, position]))
                else:
                    factors.append(logits.argmax(dim=-1))
                if position + 1 < num_factors:
                    chosen = factors[-1].repeat(rows // batch)
                    hidden_states = self.model.embed_tokens[position](chosen[:, None])
            indices[:, step] = self.model.join_factors(factors)
            if callback is not None:
                callback(step + 1, indices)
            # 3. The next input. Unconditional rows are of no use after the last step with guidance; compiled layers
            # take them along, since for another number of rows they would be compiled again.
            if step + 1 == num_guided and self._compiled_layers is None:
                rows = batch
                grid_layers.keep_rows(rows)
                factor_layers.keep_rows(rows)
            hidden_states = self.model.embed(input_ids=indices[:, step : step + 1].repeat(rows // batch, 1))
        # Asked once, at the end: it makes the host wait for the device.
        if not finite:
            raise ValueError(
                "The model's logits are not finite: its weights hold NaN or infinity, or overflow in float16."
            )
        self._keep_for_next_time(cached_layers, rows, device)
        return indices

    def _cached_layers(self, rows: int, device: torch.device) -> list[CachedLayers]:
        """The layers over the grid and those over the factors, with empty caches."""
        lengths = (self.config.num_tokens, len(self.config.vocab_sizes))
        stacks = [
            (layers, tuple(part[:length] for part in self.model.rotary_table(device)))
            for layers, length in zip((self.model.layers, self.factor_layers), lengths, strict=True)
        ]
        if self._compiled_layers is None:
            return [
                CachedLayers(layers, rotary, preallocated_cache(len(layers), len(rotary[0])))
                for layers, rotary in stacks
            ]
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype
        # Taken out while they are in use: a callback that generates must not find them.
        cached_layers = self._compiled_layers.pop((rows, dtype, device), None)
        if cached_layers is None:
            cached_layers = []
            for layers, (cos, sin) in stacks:
                length, head_dim = cos.shape
                cache = static_cache(
                    len(layers), (rows, self.config.num_attention_heads, length, head_dim), dtype, device
                )
                mask = torch.full((1, 1, length, length), -torch.inf, dtype=dtype, device=device).triu(1)
                cached_layers.append(CachedLayers(layers, (cos, sin), cache, mask))
        for layers in cached_layers:
            layers.cache.reset()
        return cached_layers

    def _keep_for_next_time(self, cached_layers: list[CachedLayers], rows: int, device: torch.device) -> None:
        """Compiled layers run faster with a cache at the addresses that they have seen. Only the newest few stay."""
        if self._compiled_layers is not None:
            dtype = cached_layers[0].mask.dtype
            self._compiled_layers[rows, dtype, device] = cached_layers
            while len(self._compiled_layers) > MAX_KEPT_CACHES:
                del self._compiled_layers[next(iter(self._compiled_layers))]

    def _check_generate_inputs(
        self,
        class_labels: torch.Tensor,
        guidance_scale: float,
        guidance_schedule: str,
        guidance_interval: tuple[float, float],
    ) -> None:
        self._check_class_labels(class_labels)
        if self.training:
            raise ValueError("The model is in training mode, with dropout: call `model.eval()` before `generate`.")
        if not 1.0 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be at least 1.0, which turns guidance off, got {guidance_scale}.")
        if guidance_scale > 1.0 and self.config.class_dropout_prob == 0:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but this model was trained without class dropout "
                "(`class_dropout_prob=0`) and has no null class: use 1.0."
            )
        if guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(
                f"`guidance_schedule` must be one of {list(GUIDANCE_SCHEDULES)}, got {guidance_schedule!r}."
            )
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(f"`guidance_interval` must be two increasing numbers in [0, 1], got {guidance_interval}.")


def _draw_uniforms(
    generators: Sequence[torch.Generator], num_tokens: int, num_factors: int, device: torch.device
) -> torch.Tensor:
    """All the random numbers of each image, `(batch, num_tokens, num_factors)` in [0, 1)."""
    draws = [
        torch.rand(num_tokens, num_factors, generator=generator, device=generator.device).to(device)
        for generator in generators
    ]
    return torch.stack(draws)
