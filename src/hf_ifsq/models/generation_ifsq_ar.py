"""Sampling from the AR model, one position at a time."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..guidance import check_guidance, guidance_scales, guide
from ..randomness import draw, image_generators
from .checks import as_ids, check_has_values, check_integer
from .layers_ifsq_ar import Decoder
from .loading import HUB_OPTIONS
from .sampling_ifsq_ar import AS_CONFIGURED, IFSQARGenerationConfig, processors_of_factors, sampling_options


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


class IFSQARGenerationMixin(IFSQARPreTrainedModel):
    """`generate` of [`~hf_ifsq.IFSQARForImageGeneration`]."""

    if TYPE_CHECKING:
        model: "IFSQARModel"
        factor_layers: nn.ModuleList
        norm: nn.RMSNorm
        lm_heads: nn.ModuleList

    generation_config_class = IFSQARGenerationConfig

    # Those of `setup_cache`, over the grid and over the factors. A tuple: they are no part of the model.
    decoders: tuple[Decoder, ...] = ()

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str | None,
        **kwargs: Any,
    ) -> None:
        """What `from_pretrained` calls: take a generation config, or load that of the checkpoint if it has one."""
        if generation_config is None and pretrained_model_name_or_path is not None:
            hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            # A missing one is as good as an empty one.
            missing = {"_raise_exceptions_for_missing_entries": False}
            if cached_file(pretrained_model_name_or_path, GENERATION_CONFIG_NAME, **hub_options, **missing):
                generation_config = self.generation_config_class.from_pretrained(
                    pretrained_model_name_or_path, **hub_options
                )
        if generation_config is not None:
            self.generation_config = generation_config

    def setup_cache(self, max_rows: int) -> None:
        """
        Allocate once, at addresses that do not change, what `generate` keeps of earlier tokens, as compiled decoding
        needs it: after this, `compile` each of `decoders`. `max_rows` at a time are images, or twice as many with
        guidance; more set it up again, larger.
        """
        check_integer(max_rows, "max_rows")
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
        guidance_scale: float = AS_CONFIGURED,
        guidance_schedule: str = AS_CONFIGURED,
        guidance_interval: tuple[float, float] = AS_CONFIGURED,
        temperature: float | Sequence[float] = AS_CONFIGURED,
        top_k: int | None | Sequence[int | None] = AS_CONFIGURED,
        top_p: float | None | Sequence[float | None] = AS_CONFIGURED,
        do_sample: bool = AS_CONFIGURED,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[[int, torch.Tensor], bool | None] | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> torch.Tensor:
        """
        Generate the tokens of one image for each class label. Options that are not given are those of
        `generation_config`, or else of the model's own `generation_config`, or else as said here.

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
            top_k (`int` or `list[int]`, *optional*, defaults to `None`):
                keep only this many most likely values of each factor, or all.
            top_p (`float` or `list[float]`, *optional*, defaults to `None`):
                keep only the most likely values that together have this probability, or all.
            do_sample (`bool`, *optional*, defaults to `True`): whether to sample; otherwise take the most likely.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                one for all images or one each, see [`~hf_ifsq.randomness.image_generators`]. What is sampled for an
                image depends on its generator and label alone.
            callback (`Callable[[int, torch.Tensor], bool | None]`, *optional*):
                called after each step with the number of tokens generated and the ids, `(batch, num_tokens)`, which
                it may change, and which change when it goes on. If it returns `True`, the ids to come stay 0.
            generation_config ([`~transformers.GenerationConfig`], *optional*):
                options, with `guidance_schedule` and `guidance_interval` as additional ones.

        Returns:
            `torch.LongTensor` of shape `(batch, num_tokens)`: whole token ids in raster order.
        """
        class_labels = self._check_can_generate(class_labels)
        if callback is not None and not callable(callback):
            raise TypeError(f"`callback` must be a function, got {callback!r}.")
        batch, num_tokens, num_factors = len(class_labels), self.config.num_tokens, len(self.config.vocab_sizes)
        given = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "guidance_interval": guidance_interval,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "do_sample": do_sample,
        }
        options = sampling_options(given, generation_config, self.generation_config, num_factors)
        scales = self._guidance_scales(*(options[f"guidance_{name}"] for name in ("scale", "schedule", "interval")))
        processors, uniforms = None, None
        if options["do_sample"]:
            warpers = {name: options[name] for name in ("temperature", "top_k", "top_p")}
            processors = processors_of_factors(num_factors, **warpers)
            generators = image_generators(generator, batch)
            uniforms = draw(torch.rand, (num_tokens, num_factors), generators, class_labels.device)
        if self.decoders:
            self.setup_cache(batch * (2 if max(scales) > 1 else 1))
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
                    hidden_states = self.model.embed_tokens.embed_factor(position, chosen[:, None])
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

    def _guidance_scales(self, scale: float, schedule: str, interval: tuple[float, float]) -> list[float]:
        """Strength of guidance at each token, of options that are checked here."""
        check_guidance(scale, interval, self.config.class_dropout_prob, schedule)
        scales = guidance_scales(self.config.num_tokens, scale, schedule, interval)
        if scale > 1 and max(scales) <= 1:
            raise ValueError(
                f"`guidance_interval` {interval} has none of the {len(scales)} tokens of an image, or "
                f"`guidance_schedule` {schedule!r} does not begin there: no token would be guided."
            )
        return scales

    def _check_class_labels(self, class_labels: torch.Tensor) -> None:
        as_ids(class_labels, "class_labels")
        if class_labels.ndim != 1 or class_labels.numel() == 0:
            raise ValueError(
                f"`class_labels` must be one or more integers of shape (batch,), got {class_labels.dtype} of shape "
                f"{tuple(class_labels.shape)}."
            )

    def _check_can_generate(self, class_labels: torch.Tensor) -> torch.Tensor:
        self._check_class_labels(class_labels)
        check_has_values(class_labels, "class_labels")
        class_labels = class_labels.long()
        # The null class is one more.
        last = self.config.num_classes - (self.config.class_dropout_prob == 0)
        if class_labels.min() < 0 or class_labels.max() > last:
            raise ValueError(
                f"`class_labels` must be in [0, {last}] for a model of {self.config.num_classes} classes, got "
                f"{class_labels.tolist()}."
            )
        if self.training:
            raise ValueError("The model is in training mode, with dropout: call `model.eval()` before `generate`.")
        return class_labels
