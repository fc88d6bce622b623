"""Class labels to images through the autoregressive generator."""

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import ImagePipelineOutput, VQModel

from ..models.autoencoder_ifsq import AutoencoderIFSQ
from ..models.modeling_ifsq_ar import IFSQARForImageGeneration
from ..randomness import image_generators
from .pipeline_utils import ClassConditionalPipeline


class IFSQARPipeline(ClassConditionalPipeline):
    """
    Generates images of given classes, token by token.

    Args:
        transformer ([`IFSQARForImageGeneration`]): the generator.
        tokenizer ([`AutoencoderIFSQ`] or [`~diffusers.VQModel`]):
            the tokenizer that the generator was trained with.

    Raises:
        ValueError: if the two disagree on the codebook or the grid, or if a weight is not finite.

    Example:

    ```py
    >>> import torch
    >>> from hf_ifsq import IFSQARPipeline

    >>> pipe = IFSQARPipeline.from_pretrained("outputs/demo/ar")
    >>> pipe(["three", 7], num_images_per_label=4, generator=torch.Generator().manual_seed(0)).images[0]
    ```
    """

    def __init__(self, transformer: IFSQARForImageGeneration, tokenizer: AutoencoderIFSQ | VQModel):
        super().__init__()
        self._register(transformer=transformer, tokenizer=tokenizer)

    def _check_match(self) -> None:
        transformer, tokenizer = self.transformer, self._image_tokenizer
        if transformer.config.codebook_size != tokenizer.require_codebook():
            raise ValueError(
                f"`transformer` predicts {transformer.config.codebook_size} tokens (`vocab_sizes` "
                f"{transformer.config.vocab_sizes}), but `tokenizer` has a codebook of {tokenizer.codebook_size}"
                f"{f' (`levels` {tokenizer.levels})' if tokenizer.levels else ''}: use the tokenizer that the "
                "generator was trained with."
            )
        if tuple(transformer.config.grid_size) != tokenizer.grid_size:
            raise ValueError(
                f"`transformer` has a `grid_size` of {list(transformer.config.grid_size)} tokens, but `tokenizer` "
                f"gives {list(tokenizer.grid_size)} (its `sample_size` is {self.tokenizer.config.sample_size}): load "
                "the tokenizer with the `sample_size` of the images that the generator was trained on."
            )

    def compile(self, **kwargs: Any) -> None:
        """
        Compile the generator's layers by [`torch.compile`]: the first calls take their time, later ones are faster, on
        GPUs most of all.

        Args:
            kwargs: arguments of `torch.compile` beside `fullgraph=True`; on a GPU, `mode="reduce-overhead"` records
                CUDA graphs.
        """
        self.transformer.compile(**{"fullgraph": True, **kwargs})

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        num_images_per_label: int = 1,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        temperature: float | Sequence[float] = 1.0,
        top_k: int | None | Sequence[int | None] = None,
        top_p: float | None | Sequence[float | None] = None,
        do_sample: bool = True,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """
        Generate images.

        Args:
            class_labels (`int`, `str`, or a list of them):
                classes as ids in [0, num_classes) or as names of the generator's `id2label`.
            num_images_per_label (`int`, *optional*, defaults to 1): images of each class, next to each other.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                strength of classifier-free guidance, at least 1.0, which turns it off.
            guidance_schedule (`str`, *optional*, defaults to `"constant"`):
                `"constant"`, or guidance grows from none at the first token to `guidance_scale` at the last,
                `"linear"` or by half a `"cosine"`.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                first and last token with guidance, in [0, 1] from the first token of the image to its last.
            temperature (`float` or `list[float]`, *optional*, defaults to 1.0):
                positive divisor of the logits. Of this and the next two, a list has one value for each factor of a
                token.
            top_k (`int` or `list[int]`, *optional*): keep only this many most likely values of each factor.
            top_p (`float` or `list[float]`, *optional*):
                keep only the most likely values that together have this probability.
            do_sample (`bool`, *optional*, defaults to `True`): whether to sample; otherwise take the most likely.
            batch_size (`int`, *optional*):
                images to generate at a time, if memory has no room for all. It does not change what they look like.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                one for all images or one each. An image depends on its own generator and label alone.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` images; `"np"` array of shape `(batch, height, width, channels)` or `"pt"` tensor of shape
                `(batch, channels, height, width)` in [0, 1]; `"latent"` for the token ids, `(batch, rows, columns)`.
            return_dict (`bool`, *optional*, defaults to `True`): whether to return a named output or a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                called after each token with the pipeline, the step, the step again (where diffusion pipelines give
                the timestep), and a dictionary with `"indices"`, the ids `(batch, num_tokens)`, zero where they are
                still to come. It returns such a dictionary; changed ids are taken over. With a `batch_size` the ids
                are those of the images generated at the time.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the `images`.

        Raises:
            ValueError: if an argument is out of its range.
        """
        # 1. Check and prepare the inputs.
        self._check_common_inputs(output_type)
        labels = self._prepare_labels(class_labels, num_images_per_label)
        batches = self._split(len(labels), batch_size)
        generators = image_generators(generator, len(labels)) if do_sample else None

        # 2. Generate the tokens and decode them.
        images = []
        num_tokens = self.transformer.config.num_tokens
        with self.progress_bar(total=num_tokens * len(batches)) as progress_bar:

            def on_step_end(num_generated: int, indices: torch.Tensor) -> None:
                if callback_on_step_end is not None:
                    self._call_back(callback_on_step_end, num_generated - 1, indices)
                progress_bar.update()

            for batch in batches:
                indices = self.transformer.generate(
                    labels[batch],
                    guidance_scale=guidance_scale,
                    guidance_schedule=guidance_schedule,
                    guidance_interval=guidance_interval,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    do_sample=do_sample,
                    generator=generators[batch] if do_sample else None,
                    callback=on_step_end,
                ).unflatten(1, tuple(self.transformer.config.grid_size))
                images.append(indices if output_type == "latent" else self._image_tokenizer.decode_indices(indices))

        # 3. Make pictures.
        images = torch.cat(images)
        if output_type != "latent":
            images = self._postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _call_back(self, callback: Callable[[Any, int, int, dict], dict], step: int, indices: torch.Tensor) -> None:
        """Show the ids to the user's function and take over what it changes."""
        codebook_size = self.transformer.config.codebook_size
        changed = callback(self, step, step, {"indices": indices.clone()}).get("indices", indices)
        if changed.shape != indices.shape or changed.dtype != indices.dtype:
            raise ValueError(
                f"`callback_on_step_end` must return `indices` of shape {tuple(indices.shape)} and {indices.dtype}, "
                f"got {tuple(changed.shape)} and {changed.dtype}."
            )
        if changed.min() < 0 or changed.max() >= codebook_size:
            raise ValueError(
                f"`callback_on_step_end` must return `indices` in [0, {codebook_size}), "
                f"but they span [{changed.min().item()}, {changed.max().item()}]."
            )
        indices.copy_(changed)


# `DiffusionPipeline.from_pretrained` looks up the class that a pipeline was saved from in diffusers itself.
diffusers.IFSQARPipeline = IFSQARPipeline
