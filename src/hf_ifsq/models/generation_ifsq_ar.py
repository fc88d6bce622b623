"""Sampling from the autoregressive generator with a static key/value cache."""

from collections.abc import Callable, Sequence

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch.nn import functional as F
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..randomness import image_generators


def static_cache(num_layers: int, length: int) -> Cache:
    """A key/value cache of `length` positions for each of `num_layers` layers, allocated once on first use."""
    return Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(num_layers)])


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


def _sampling_processors(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(TopPLogitsWarper(top_p))
    return processors


class IFSQARGenerationMixin:
    """`generate` of [`~hf_ifsq.IFSQARForImageGeneration`]."""

    @torch.no_grad()
    @apply_forward_hook
    def generate(
        self,
        class_labels: torch.LongTensor,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[[int, torch.LongTensor], None] | None = None,
    ) -> torch.LongTensor:
        """
        Generate the tokens of one image for each class label.

        Args:
            class_labels (`torch.LongTensor` of shape `(batch,)`): ids in [0, num_classes].
            guidance_scale (`float`, *optional*, defaults to 1.0):
                classifier-free guidance `uncond + scale * (cond - uncond)` of the logits, at least 1.0; at 1.0 no
                unconditional row is computed.
            temperature (`float`, *optional*, defaults to 1.0): positive divisor of the logits.
            top_k (`int`, *optional*): keep only this many most likely values of each factor.
            top_p (`float`, *optional*): keep only the most likely values that together have this probability.
            do_sample (`bool`, *optional*, defaults to `True`): whether to sample; otherwise take the most likely.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                one for all images or one each, see [`~hf_ifsq.randomness.image_generators`]. What is sampled for an
                image depends on its generator and label alone.
            callback (`Callable[[int, torch.LongTensor], None]`, *optional*):
                called after each step with the number of tokens generated and the ids, `(batch, num_tokens)`.

        Returns:
            `torch.LongTensor` of shape `(batch, num_tokens)`: whole token ids in raster order.

        Raises:
            ValueError: if an argument is out of its range, if the model is in training mode, or if the weights are not
                finite.
        """
        guided = self._check_generate_inputs(class_labels, guidance_scale)
        batch, num_tokens, num_factors = len(class_labels), self.config.num_tokens, len(self.config.vocab_sizes)
        device = class_labels.device
        processors = _sampling_processors(temperature, top_k, top_p) if do_sample else LogitsProcessorList()
        uniforms = None
        if do_sample:
            draws = [
                torch.rand(num_tokens, num_factors, generator=generator, device=generator.device).to(device)
                for generator in image_generators(generator, batch)
            ]
            uniforms = torch.stack(draws)
        if guided:
            class_labels = torch.cat([class_labels, torch.full_like(class_labels, self.config.num_classes)])
        cache = static_cache(self.config.num_hidden_layers, num_tokens)
        factor_cache = static_cache(len(self.factor_layers), num_factors)
        indices = torch.zeros(batch, num_tokens, dtype=torch.long, device=device)
        finite = torch.tensor(True, device=device)

        for step in range(num_tokens):
            # 1. One position through the transformer: the class first, then the token chosen last.
            if step == 0:
                inputs = {"class_labels": class_labels}
            else:
                inputs = {"input_ids": indices[:, step - 1 : step].repeat(1 + guided, 1)}
            hidden_states = self.model(**inputs, past_key_values=cache).last_hidden_state
            # 2. The factors of the next token, one after another.
            factors = []
            factor_cache.reset()
            for position, head in enumerate(self.lm_heads):
                if position > 0:
                    chosen = factors[-1][:, None].repeat(1 + guided, 1)
                    hidden_states = self.model.embed_tokens[position - 1](chosen)
                hidden_states = self._run_factor_layers(hidden_states, position, factor_cache)
                logits = head(self.norm(hidden_states))[:, -1].float()
                if guided:
                    cond, uncond = logits.chunk(2)
                    logits = uncond + guidance_scale * (cond - uncond)
                finite &= logits.isfinite().all()
                logits = processors(None, logits)
                if do_sample:
                    factors.append(sample_from_logits(logits, uniforms[:, step, position]))
                else:
                    factors.append(logits.argmax(dim=-1))
            indices[:, step] = self.model.join_factors(factors)
            if callback is not None:
                callback(step + 1, indices)
        # Asked once, at the end: it makes the host wait for the device.
        if not finite:
            raise ValueError("The model's logits are not finite: its weights hold NaN or infinity.")
        return indices

    def _check_generate_inputs(self, class_labels: torch.Tensor, guidance_scale: float) -> bool:
        """Check the inputs of `generate` and return whether there is guidance."""
        self._check_class_labels(class_labels)
        if self.training:
            raise ValueError("The model is in training mode, with dropout: call `model.eval()` before `generate`.")
        if not guidance_scale >= 1.0:
            raise ValueError(f"`guidance_scale` must be at least 1.0, which turns guidance off, got {guidance_scale}.")
        if guidance_scale > 1.0 and self.config.class_dropout_prob == 0:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but this model was trained without class dropout "
                "(`class_dropout_prob=0`) and has no null class: use 1.0."
            )
        return guidance_scale > 1.0
