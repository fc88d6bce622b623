"""Sampling from the AR model, one position at a time."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..guidance import check_guidance, guidance_scales, guide
from ..randomness import draw, image_generators
from .layers_ifsq_ar import Decoder


if TYPE_CHECKING:
    from .modeling_ifsq_ar import IFSQARModel, IFSQARPreTrainedModel
else:
    # What is mixed in brings no base of its own.
    IFSQARPreTrainedModel = object


def sample_from_logits(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    Draw from `softmax(logits)`, `(batch, vocab_size)`, by inverting the cumulative distribution at uniform numbers in
    [0, 1), `(batch,)`. Gives int64 ids, `(batch,)`, each a function of its own row and number alone.
    """
    cumulative = F.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1]
    # Rounding may lift the threshold to the total, past the last token that has any probability.
    threshold = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    # Logits that are no numbers find no place at all; `generate` reports them, the id stays a valid one until then.
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def processors_of_factors(
    num_factors: int,
    temperature: float | Sequence[float],
    top_k: int | None | Sequence[int | None],
    top_p: float | None | Sequence[float | None],
) -> list[LogitsProcessorList]:
    """transformers' processors for the logits of each factor of a token; the options are those of `generate`."""
    options: list[Sequence[Any]] = []
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        options.append(value if isinstance(value, Sequence) else [value] * num_factors)
        if len(options[-1]) != num_factors:
            raise ValueError(
                f"`{name}` must be one value or a list with one for each of the {num_factors} factors of a token, got "
                f"{list(options[-1])}."
            )
    factors = []
    for factor_temperature, factor_top_k, factor_top_p in zip(*options):
        processors = LogitsProcessorList()
        if factor_temperature != 1.0:
            processors.append(TemperatureLogitsWarper(float(factor_temperature)))
        if factor_top_k is not None:
            processors.append(TopKLogitsWarper(factor_top_k))
        if factor_top_p is not None:
            processors.append(TopPLogitsWarper(factor_top_p))
        factors.append(processors)
    return factors


class IFSQARGenerationMixin(IFSQARPreTrainedModel):
    """`generate` of [`~hf_ifsq.IFSQARForImageGeneration`]."""

    if TYPE_CHECKING:
        model: "IFSQARModel"
        factor_layers: nn.ModuleList
        norm: nn.RMSNorm
        lm_heads: nn.ModuleList

    # Those of `setup_cache`, over the grid and over the factors. A tuple: they are no part of the model.
    decoders: tuple[Decoder, ...] = ()

    def setup_cache(self, max_rows: int) -> None:
        """
        Allocate once, at addresses that do not change, what `generate` keeps of earlier tokens, as compiled decoding
        needs it: after this, `compile` each of `decoders`. `max_rows` at a time are images, or twice as many with
        guidance; more set it up again, larger.
        """
        device = self.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype
        with torch.inference_mode(False):
            self.decoders = self.decoders or self._new_decoders(device)
            for decoder in self.decoders:
                decoder.setup(max_rows, self.config.num_attention_heads, dtype, device)

    @torch.no_grad()
    @apply_forward_hook
    def generate(
        self,
        class_labels: torch.Tensor,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float | Sequence[float] = 1.0,
        top_k: int | None | Sequence[int | None] = None,
        top_p: float | None | Sequence[float | None] = None,
        do_sample: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[[int, torch.Tensor], bool | None] | None = None,
    ) -> torch.Tensor:
        """
        Generate the tokens of one image for each class label.

        Args:
            class_labels (`torch.LongTensor` of shape `(batch,)`): ids in [0, num_classes].
            guidance_scale (`float`, *optional*, defaults to 1.0):
                strength, at least 1.0, of classifier-free guidance `uncond + scale * (cond - uncond)` of the logits
                of each factor; at 1.0 no unconditional row is computed.
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
            callback (`Callable[[int, torch.Tensor], bool | None]`, *optional*):
                called after each step with the number of tokens generated and the ids, `(batch, num_tokens)`, which
                it may change, and which change when it goes on. If it returns `True`, the ids to come stay 0.

        Returns:
            `torch.LongTensor` of shape `(batch, num_tokens)`: whole token ids in raster order.
        """
        self._check_can_generate(class_labels)
        check_guidance(guidance_scale, guidance_interval, self.config.class_dropout_prob, guidance_schedule)
        batch, num_tokens, num_factors = len(class_labels), self.config.num_tokens, len(self.config.vocab_sizes)
        scales = guidance_scales(num_tokens, guidance_scale, guidance_schedule, guidance_interval)
        if guidance_scale > 1 and max(scales) <= 1:
            raise ValueError(
                f"`guidance_interval` {guidance_interval} has none of the {num_tokens} tokens of an image, or "
                f"`guidance_schedule` {guidance_schedule!r} does not begin there: no token would be guided."
            )
        processors, uniforms = None, None
        if do_sample:
            processors = processors_of_factors(num_factors, temperature, top_k, top_p)
            generators = image_generators(generator, batch)
            uniforms = draw(torch.rand, (num_tokens, num_factors), generators, class_labels.device)
        if self.decoders:
            self.setup_cache(batch * (2 if guidance_scale > 1 else 1))
        # Taken away while they are in use: a callback that generates must not find them.
        kept, self.decoders = self.decoders, ()
        try:
            return self._decode(kept, class_labels, scales, processors, uniforms, callback)
        finally:
            self.decoders = kept

    def _decode(
        self,
        kept: tuple[Decoder, ...],
        class_labels: torch.Tensor,
        scales: list[float],
        processors: list[LogitsProcessorList] | None,
        uniforms: torch.Tensor | None,
        callback: Callable[[int, torch.Tensor], bool | None] | None,
    ) -> torch.Tensor:
        batch, num_factors, device = len(class_labels), len(self.config.vocab_sizes), class_labels.device
        num_guided = max((step + 1 for step, scale in enumerate(scales) if scale > 1), default=0)
        if num_guided:
            class_labels = torch.cat([class_labels, torch.full_like(class_labels, self.config.num_classes)])
        rows = len(class_labels)
        grid_decoder, factor_decoder = kept or self._new_decoders(device)
        indices = torch.zeros(batch, len(scales), dtype=torch.long, device=device)
        finite = torch.tensor(True, device=device)

        hidden_states = self.model.embed(class_labels)
        for step, scale in enumerate(scales):
            # 1. One position through the transformer: the class first, then the token chosen last.
            hidden_states = grid_decoder.step(hidden_states, step)
            # 2. The factors of the next token, one after another.
            factors: list[torch.Tensor] = []
            for position, head in enumerate(self.lm_heads):
                if num_factors > 1:
                    hidden_states = factor_decoder.step(hidden_states, position)
                # On another device only where the model is spread over several.
                logits = head(self.norm(hidden_states))[:, -1].float().to(device)
                if scale > 1:
                    logits = guide(logits, scale)
                logits = logits[:batch]
                finite &= logits.isfinite().all()
                if processors is None or uniforms is None:
                    factors.append(logits.argmax(dim=-1))
                else:
                    logits = processors[position](indices, logits)  # type: ignore[arg-type]
                    factors.append(sample_from_logits(logits, uniforms[:, step, position]))
                if position + 1 < num_factors:
                    chosen = factors[-1].repeat(rows // batch)
                    hidden_states = self.model.embed_tokens[position](chosen[:, None])
            indices[:, step] = self.model.join_factors(factors)
            if callback is not None and callback(step + 1, indices):
                break
            # 3. The next input. Unconditional rows are of no use after the last step with guidance; compiled layers
            # take them along, since for another number of rows they would be compiled again.
            if step + 1 == num_guided and not kept:
                rows = batch
            hidden_states = self.model.embed(input_ids=indices[:, step : step + 1].repeat(rows // batch, 1))
        # Asked once, at the end: it makes the host wait for the device.
        if not finite:
            raise ValueError(
                "The model's logits are not finite: its weights hold NaN or infinity, or overflow in float16."
            )
        return indices

    def _new_decoders(self, device: torch.device) -> tuple[Decoder, ...]:
        """Of the layers over the grid and of those over the factors, which take the first rows of the same table."""
        cos, sin = self.model.rotary_table(device)
        stacks = ((self.model.layers, self.config.num_tokens), (self.factor_layers, len(self.config.vocab_sizes)))
        return tuple(Decoder(layers, (cos[:length], sin[:length])) for layers, length in stacks)

    def _check_class_labels(self, class_labels: torch.Tensor) -> None:
        if class_labels.ndim != 1 or class_labels.numel() == 0 or class_labels.is_floating_point():
            raise ValueError(
                f"`class_labels` must be one or more integers of shape (batch,), got {class_labels.dtype} of shape "
                f"{tuple(class_labels.shape)}."
            )

    def _check_can_generate(self, class_labels: torch.Tensor) -> None:
        self._check_class_labels(class_labels)
        last = self.model.embed_classes.num_embeddings - 1
        if class_labels.min() < 0 or class_labels.max() > last:
            raise ValueError(
                f"`class_labels` must be in [0, {last}] for a model of {self.config.num_classes} classes, got "
                f"{class_labels.tolist()}."
            )
        if self.training:
            raise ValueError("The model is in training mode, with dropout: call `model.eval()` before `generate`.")
