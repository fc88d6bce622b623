"""Class labels to images through flow matching."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
    VQModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..guidance import check_guidance, guide
from ..models.autoencoder_ifsq import AutoencoderIFSQ
from ..models.checks import as_integer, check_flag, describe, is_tensor
from ..models.grid import as_grid
from ..models.transformer_ifsq_dit import IFSQDiTTransformer2DModel
from ..randomness import draw, image_generators
from .pipeline_utils import ClassConditionalPipeline


FLOW_MATCHING_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
# Far above any of use, and far beyond what a normal distribution gives.
MAX_STEPS = 10_000
MAX_NOISE = 1000
MULTISTEP_SCHEDULERS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)


class IFSQDiTPipeline(ClassConditionalPipeline):
    """
    Generates images of given classes by following the velocity of flow matching from noise to a tokenizer's codes.

    Args:
        transformer ([`IFSQDiTTransformer2DModel`]): the model of the velocity.
        tokenizer ([`AutoencoderIFSQ`], [`~diffusers.VQModel`] or [`~diffusers.AutoencoderKL`]):
            the tokenizer that the model was trained with.
        scheduler ([`~diffusers.SchedulerMixin`]):
            a scheduler for flow matching: [`~diffusers.FlowMatchEulerDiscreteScheduler`] or
            [`~diffusers.FlowMatchHeunDiscreteScheduler`], or with `use_flow_sigmas=True` and
            `prediction_type="flow_prediction"` a [`~diffusers.DPMSolverMultistepScheduler`] or
            [`~diffusers.UniPCMultistepScheduler`]. Its `shift` (`flow_shift` of the last two) takes even steps in
            sigma = 1 - t to `shift * sigma / (1 + (shift - 1) * sigma)`: above 1, more of them are near the noise.

    Example:

    ```py
    >>> pipe = IFSQDiTPipeline.from_pretrained("outputs/demo/dit")
    >>> images = pipe(["three", 7], num_images_per_label=4, generator=torch.Generator().manual_seed(0)).images
    ```
    """

    _component_classes = {"transformer": IFSQDiTTransformer2DModel, "scheduler": SchedulerMixin}
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: IFSQDiTTransformer2DModel,
        tokenizer: AutoencoderIFSQ | VQModel | AutoencoderKL,
        scheduler: SchedulerMixin,
    ):
        super().__init__(transformer=transformer, tokenizer=tokenizer, scheduler=scheduler)

    def _check_match(self) -> None:
        config, tokenizer = self.transformer.config, self._image_tokenizer
        if config.in_channels != tokenizer.latent_channels:
            raise ValueError(
                f"`transformer` has {config.in_channels} `in_channels`, but the codes of `tokenizer` have "
                f"{tokenizer.latent_channels}: use the tokenizer that the model was trained with."
            )
        for name in ("levels", "equal_bins", "scaling_factor"):
            expected, got = config[name], getattr(tokenizer, name)
            # Tuples of a config come back from JSON as lists.
            if expected is not None and np.asarray(expected).tolist() != np.asarray(got).tolist():
                raise ValueError(
                    f"`transformer` was trained on codes with the `{name}` {expected}, but `tokenizer` has {got}: use "
                    "the tokenizer that the model was trained with."
                )
        size = as_grid(config.sample_size)
        if size != tokenizer.grid_size:
            raise ValueError(
                f"`transformer` has a `sample_size` of {list(size)}, but `tokenizer` gives a grid of "
                f"{list(tokenizer.grid_size)} (its `sample_size` is {self.tokenizer.config.sample_size}): load "
                "the tokenizer with the `sample_size` of the images that the model was trained on."
            )

    def compile(self, **kwargs: Any) -> None:
        """
        Compile the model by [`torch.compile`], with `fullgraph=True`, `dynamic=False` and `kwargs`, such as
        `mode="reduce-overhead"` for CUDA graphs. The first call for each number of rows takes its time; guidance in a
        part of the steps makes two such numbers, and more than eight need `dynamic=True`.
        """
        self.transformer.compile(**{"fullgraph": True, "dynamic": False, **kwargs})

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        snap_to_codes: bool = True,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Generate images.

        Args:
            class_labels, num_images_per_label, batch_size, generator, return_dict: as in [`IFSQARPipeline`].
            num_inference_steps (`int`, *optional*, defaults to 50):
                steps of the scheduler, at most 10,000. Heun's method calls the model twice in each but the last.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                strength of classifier-free guidance, on all channels; at least 1.0, which turns it off.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                first and last t, in [0, 1] from noise to data, of the model's calls with guidance.
            snap_to_codes (`bool`, *optional*, defaults to `True`):
                whether to round the final latents to the nearest codes, of a tokenizer that has any.
            latents (`torch.Tensor` of shape `(batch, channels, rows, columns)`, *optional*):
                standard normal noise to start from instead of what `generator` draws.
            output_type (`str`, *optional*, defaults to `"pil"`):
                as in [`IFSQARPipeline`], but `"latent"` for the final latents, codes times `scaling_factor`.
            callback_on_step_end (`Callable`, *optional*):
                as in [`IFSQARPipeline`], with the scheduler's timestep of the model's last call and with `"latents"`.
                If it sets `pipe._interrupt = True`, the latents as they are then are decoded. If it sets
                `pipe._guidance_scale`, the next steps take that; 1.0 turns guidance off.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                what the dictionary is to hold, `[]` for nothing.
        """
        # 1. Check and prepare the inputs.
        labels, batches = self._prepare(
            class_labels, num_images_per_label, batch_size, generator, output_type, return_dict
        )
        check_flag(snap_to_codes, "snap_to_codes")
        num_inference_steps = as_integer(num_inference_steps, "num_inference_steps", maximum=MAX_STEPS)
        check_guidance(guidance_scale, guidance_interval, self.transformer.config.class_dropout_prob)
        shown = self._shown_to_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_scheduler()
        tokenizer = self._image_tokenizer
        shape = (len(labels), self.transformer.config.in_channels, *tokenizer.grid_size)
        if latents is None:
            latents = draw(torch.randn, shape[1:], image_generators(generator, len(labels)), labels.device)
        elif not is_tensor(latents) or not latents.is_floating_point() or tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must be a tensor of floats of shape {shape}, got {describe(latents)}.")
        # The path is followed in float32 whatever the dtype of the model.
        latents = latents.to(labels.device, torch.float32)
        if not (latents.abs() <= MAX_NOISE).all():
            raise ValueError(
                f"`latents` must be standard normal noise, but holds NaN or values beyond {MAX_NOISE} in size."
            )
        self._num_timesteps, self._interrupt = num_inference_steps, False

        # 2. Follow the velocity from noise to latents and decode them.
        outputs = []
        with self.progress_bar(total=num_inference_steps * len(batches)) as progress_bar:

            def on_step_end(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                progress_bar.update()
                if callback_on_step_end is None:
                    return latents
                changed = self._call_back(callback_on_step_end, shown, step, timestep, latents)
                if isinstance(scheduler, UniPCMultistepScheduler) and not torch.equal(changed, latents):
                    # It would go back to the latents before this step, to correct it, and so undo the change.
                    scheduler.last_sample = None  # type: ignore[attr-defined]
                return changed

            for batch in batches:
                # Where callbacks look for it, until the next call makes another.
                self.scheduler = scheduler = self._prepare_scheduler(num_inference_steps)
                self._guidance_scale = float(guidance_scale)
                final_latents = self._follow_velocity(
                    scheduler, latents[batch], labels[batch], guidance_interval, on_step_end
                )
                codes = tokenizer.latents_to_codes(final_latents)
                if snap_to_codes:
                    codes = tokenizer.nearest_codes(codes)
                finish = tokenizer.codes_to_latents if output_type == "latent" else tokenizer.decode_codes
                outputs.append(finish(codes))
                if self._interrupt:
                    break

        # 3. Make pictures.
        return self._finish(outputs, output_type, return_dict)

    def _follow_velocity(
        self,
        scheduler: Any,
        latents: torch.Tensor,
        labels: torch.Tensor,
        guidance_interval: tuple[float, float],
        on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Noise to latents by the steps that the scheduler is set to. Sigma is the share of noise in them, 1 - t."""
        transformer = self.transformer
        sigmas = scheduler.sigmas.tolist()
        num_calls = len(scheduler.timesteps)
        labels_and_null = torch.cat([labels, torch.full_like(labels, transformer.config.num_classes)])
        for call, timestep in enumerate(scheduler.timesteps):
            t, guidance_scale = 1 - sigmas[call], self._guidance_scale
            # Sigmas are rounded to float32: 1 - 0.7 is not quite 0.3.
            guided = guidance_scale > 1 and guidance_interval[0] - 1e-6 <= t <= guidance_interval[1] + 1e-6
            rows = (latents.repeat(2, 1, 1, 1) if guided else latents).to(transformer.dtype)
            times = torch.full((len(rows),), t, device=rows.device)
            velocity = transformer(rows, times, labels_and_null[: len(rows)]).sample.float()
            if guided:
                velocity = guide(velocity, guidance_scale)
            if call == 0 and not torch.isfinite(velocity).all():
                raise ValueError(
                    "The predicted velocity is not finite: the weights or `latents` hold NaN, or `transformer` "
                    f"overflows in {transformer.dtype}."
                )
            # The model's velocity points to the data, a scheduler's to the noise.
            latents = scheduler.step(-velocity, timestep, latents, return_dict=False)[0]
            # A scheduler of order 2 makes a step of two calls, and the last one of one.
            if (call + 1) % scheduler.order == 0 or call + 1 == num_calls:
                latents = on_step_end(call // scheduler.order, timestep, latents)
                # A callback may change it; those of diffusers turn it off by 0.
                changed = 1.0 if self._guidance_scale == 0 else self._guidance_scale
                check_guidance(changed, guidance_interval, transformer.config.class_dropout_prob)
                if self._interrupt:
                    break
        # The nearest code of NaN would be some code, and give a picture.
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"The latents are not finite any more: `transformer` overflows in {transformer.dtype}, or "
                "`callback_on_step_end` returned NaN."
            )
        return latents

    def _prepare_scheduler(self, num_inference_steps: int) -> Any:
        """A scheduler of a call's own: it has a state, and a callback or a thread may call the pipeline too."""
        scheduler, device = copy.deepcopy(self.scheduler), self._execution_device
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            # Even steps over all of [0, 1]; a scheduler's own grid may stop short of the data.
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
            scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
        sigmas = scheduler.sigmas
        # A shift may round the first one above 1.
        if not 0.9 <= sigmas[0] <= 1 + 1e-5 or sigmas[-1] != 0 or (sigmas.diff() > 0).any():
            raise ValueError(
                f"`scheduler` must go from noise (sigma 1) to data (sigma 0), but its sigmas are {sigmas.tolist()}: "
                f"check the config of {type(scheduler).__name__}."
            )
        # Solvers that take the logarithm of 1 - sigma begin at 0.999, where noise holds some data already: from pure
        # noise that is an error that no number of steps makes smaller.
        sigmas[0] = min(max(sigmas[0].item(), 1 - 1e-5), 1.0)
        # Otherwise it looks up the first timestep, which may be rounded to the same number as the second.
        scheduler.set_begin_index(0)
        return scheduler

    def _check_scheduler(self) -> None:
        """Only deterministic solvers: the noise of others would not depend on an image's own generator alone."""
        scheduler, config = self.scheduler, self.scheduler.config
        if isinstance(scheduler, FLOW_MATCHING_SCHEDULERS):
            fits = not config.get("stochastic_sampling") and not config.get("invert_sigmas")
        else:
            fits = isinstance(scheduler, MULTISTEP_SCHEDULERS) and config.use_flow_sigmas
            fits = fits and config.prediction_type == "flow_prediction"
            fits = fits and not str(config.get("algorithm_type")).startswith("sde")
        if not fits or config.get("use_dynamic_shifting"):
            raise ValueError(
                "`scheduler` must be a deterministic one for flow matching with a fixed shift, one of "
                f"{[cls.__name__ for cls in FLOW_MATCHING_SCHEDULERS]}, or with `use_flow_sigmas=True` and "
                f"`prediction_type='flow_prediction'` one of {[cls.__name__ for cls in MULTISTEP_SCHEDULERS]}, got "
                f"{type(scheduler).__name__} with {dict(config)}."
            )


# `DiffusionPipeline.from_pretrained` looks up the class that a pipeline was saved from in diffusers itself.
diffusers.IFSQDiTPipeline = IFSQDiTPipeline  # type: ignore[attr-defined]
