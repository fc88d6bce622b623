"""Class labels to images through the AR model."""

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import VQModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..models.autoencoder_ifsq import AutoencoderIFSQ
from ..models.grid import as_grid
from ..models.modeling_ifsq_ar import IFSQARForImageGeneration
from ..models.sampling_ifsq_ar import AS_CONFIGURED, sampling_options
from ..randomness import image_generators
from .pipeline_utils import ClassConditionalPipeline


class IFSQARPipeline(ClassConditionalPipeline):
    """
    Generates images of given classes, token by token.

    Args:
        transformer ([`IFSQARForImageGeneration`]): the AR model.
        tokenizer ([`AutoencoderIFSQ`] or [`~diffusers.VQModel`]): the tokenizer that the model was trained with.

    Example:

    ```py
    >>> pipe = IFSQARPipeline.from_pretrained("outputs/demo/ar")
    >>> images = pipe(["three", 7], num_images_per_label=4, generator=torch.Generator().manual_seed(0)).images
    ```
    """

    _component_classes = {"transformer": IFSQARForImageGeneration}
    _callback_tensor_inputs = ["indices"]

    def __init__(self, transformer: IFSQARForImageGeneration, tokenizer: AutoencoderIFSQ | VQModel):
        super().__init__(transformer=transformer, tokenizer=tokenizer)

    def _check_match(self) -> None:
        config, tokenizer = self.transformer.config, self._image_tokenizer
        if config.codebook_size != tokenizer.require_codebook():
            levels = f" (`levels` {tokenizer.levels})" if tokenizer.levels else ""
            raise ValueError(
                f"`transformer` predicts {config.codebook_size} tokens (`vocab_sizes` {config.vocab_sizes}), but "
                f"`tokenizer` has a codebook of {tokenizer.codebook_size}{levels}: use the tokenizer that the "
                "generator was trained with."
            )
        grid_size = as_grid(config.grid_size)
        if grid_size != tokenizer.grid_size:
            raise ValueError(
                f"`transformer` has a `grid_size` of {list(grid_size)} tokens, but `tokenizer` "
                f"gives {list(tokenizer.grid_size)} (its `sample_size` is {self.tokenizer.config.sample_size}): load "
                "the tokenizer with the `sample_size` of the images that the generator was trained on."
            )

    def compile(self, **kwargs: Any) -> None:
        """
        Compile decoding by [`torch.compile`], with `fullgraph=True` and `kwargs`, such as `mode="reduce-overhead"` for
        CUDA graphs. The first calls take their time, and the cache of [`~IFSQARForImageGeneration.setup_cache`] stays
        in memory from then on.
        """
        # The first call makes it as large as it needs.
        self.transformer.setup_cache(max_rows=1)
        for decoder in self.transformer.decoders:
            decoder.compile(**{"fullgraph": True, **kwargs})

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        num_images_per_label: int = 1,
        guidance_scale: float = AS_CONFIGURED,
        guidance_schedule: str = AS_CONFIGURED,
        guidance_interval: tuple[float, float] = AS_CONFIGURED,
        temperature: float | Sequence[float] = AS_CONFIGURED,
        top_k: int | None | Sequence[int | None] = AS_CONFIGURED,
        top_p: float | None | Sequence[float | None] = AS_CONFIGURED,
        do_sample: bool = AS_CONFIGURED,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("indices",),
    ) -> ImagePipelineOutput | tuple:
        """
        Generate images.

        Args:
            class_labels (`int`, `str`, or a list of them):
                classes as ids in [0, num_classes) or as names of the model's `id2label`.
            num_images_per_label (`int`, *optional*, defaults to 1): images of each class, next to each other.
            guidance_scale, guidance_schedule, guidance_interval, temperature, top_k, top_p, do_sample, generator:
                as in [`~IFSQARForImageGeneration.generate`], by default as in its generation config.
            batch_size (`int`, *optional*):
                images to generate at a time, if memory has no room for all. It does not change what they look like.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` images; `"np"` array of shape `(batch, height, width, channels)` or `"pt"` tensor of shape
                `(batch, channels, height, width)` in [0, 1]; `"latent"` for the token ids, `(batch, rows, columns)`.
            return_dict (`bool`, *optional*, defaults to `True`): whether to return a named output or a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                called after each token with the pipeline, the step, the step again (where diffusion pipelines give
                the timestep), and a dictionary with `"indices"`, the ids `(batch, num_tokens)` of the images generated
                at the time, zero where they are still to come. It returns such a dictionary; changes are taken over.
                If it sets `pipe._interrupt = True`, no token follows: what there is of these images is decoded, with
                token 0 in place of the others, and the images of batches to come are left out.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["indices"]`):
                what the dictionary is to hold, `[]` for nothing.
        """
        # 1. Check and prepare the inputs.
        labels, batches = self._prepare(
            class_labels, num_images_per_label, batch_size, generator, output_type, return_dict
        )
        shown = self._shown_to_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        config = self.transformer.config
        given = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "guidance_interval": guidance_interval,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "do_sample": do_sample,
        }
        options = sampling_options(given, None, self.transformer.generation_config, len(config.vocab_sizes))
        generators = image_generators(generator, len(labels)) if options["do_sample"] else None
        self._guidance_scale, self._num_timesteps = options["guidance_scale"], config.num_tokens
        self._interrupt = False

        # 2. Generate the tokens and decode them.
        outputs = []
        with self.progress_bar(total=config.num_tokens * len(batches)) as progress_bar:

            def on_step_end(num_generated: int, indices: torch.Tensor) -> bool:
                if callback_on_step_end is not None:
                    step = num_generated - 1
                    changed = self._call_back(callback_on_step_end, shown, step, step, indices)
                    if changed.min() < 0 or changed.max() >= config.codebook_size:
                        raise ValueError(
                            f"`callback_on_step_end` must return `indices` in [0, {config.codebook_size}), "
                            f"but they span [{changed.min().item()}, {changed.max().item()}]."
                        )
                    indices.copy_(changed)
                    if self._guidance_scale != options["guidance_scale"]:
                        raise ValueError(
                            "`callback_on_step_end` must leave the guidance scale alone, whose rows are laid out "
                            "beforehand: give `guidance_interval`."
                        )
                progress_bar.update()
                return self._interrupt

            for batch in batches:
                indices = self.transformer.generate(
                    labels[batch],
                    **options,
                    generator=None if generators is None else generators[batch],
                    callback=on_step_end,
                ).unflatten(1, as_grid(config.grid_size))
                outputs.append(indices if output_type == "latent" else self._image_tokenizer.decode_indices(indices))
                if self._interrupt:
                    break

        # 3. Make pictures.
        return self._finish(outputs, output_type, return_dict)


# `DiffusionPipeline.from_pretrained` looks up the class that a pipeline was saved from in diffusers itself.
diffusers.IFSQARPipeline = IFSQARPipeline  # type: ignore[attr-defined]
