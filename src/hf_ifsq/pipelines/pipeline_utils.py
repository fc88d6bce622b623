"""What the two class-conditional pipelines share: labels, the match of model and tokenizer, callbacks, pictures."""

import difflib
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES, _unwrap_model
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import nn

from ..cpu_kernels import enable_cpu_kernels
from ..models.checks import as_integer, check_flag, describe, is_tensor
from ..models.image_tokenizer import ImageTokenizer, as_image_tokenizer
from ..randomness import check_generator


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_IMAGES_PER_LABEL = 100_000
ClassLabels = int | str | Sequence[int | str] | torch.Tensor

# Pipelines on the Hub are only downloaded if diffusers knows the modules of their components.
for module in ("autoencoder_ifsq", "modeling_ifsq_ar", "transformer_ifsq_dit"):
    LOADABLE_CLASSES.setdefault(f"hf_ifsq.models.{module}", {})


class ClassConditionalPipeline(DiffusionPipeline, ABC):
    """
    Base of pipelines of a class-conditional AR model or DiT, `transformer`, and an image tokenizer, `tokenizer`. The
    names of the classes come from the `id2label` of the `transformer`'s config.
    """

    model_cpu_offload_seq = "transformer->tokenizer"  # type: ignore[assignment]
    # Beside the tokenizer.
    _component_classes: ClassVar[dict[str, type]]
    # What a `callback_on_step_end` may see and change.
    _callback_tensor_inputs: ClassVar[list[str]]

    _interrupt = False
    _num_timesteps = 0
    _guidance_scale = 1.0
    _num_calls = 0

    def __init__(self, **components: Any):
        super().__init__()
        self._check_classes(components)
        self.register_modules(**components)
        for name, component in components.items():
            if isinstance(component, nn.Module):
                check_finite_weights(component, name)
        self._check_match()
        self.image_processor = VaeImageProcessor(vae_scale_factor=self._image_tokenizer.downsampling_factor)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As of [`~diffusers.DiffusionPipeline`], which would leave a component out that it cannot save."""
        for name, component in self.components.items():
            if hasattr(component, "merge_and_unload"):
                raise ValueError(
                    f"`{name}` is a {type(component).__name__}, which a pipeline cannot hold when it is saved: save "
                    f"the adapter by itself, or first `pipe.{name} = pipe.{name}.merge_and_unload()`."
                )
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Whether the call ends after this step: so it does if `_interrupt` is set to `True`, until the next call."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Calls of `callback_on_step_end` for a batch."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """That of the last call."""
        return self._guidance_scale

    @property
    def _image_tokenizer(self) -> ImageTokenizer:
        return as_image_tokenizer(self.tokenizer)

    def _check_classes(self, components: Mapping[str, Any]) -> None:
        """Raises a `ValueError` if a component is missing or of a wrong class. Models may be compiled or adapted."""
        for name, component_class in self._component_classes.items():
            if not isinstance(_unwrap_model(components[name]), component_class):
                raise ValueError(
                    f"`{name}` must be an {component_class.__name__}, which {type(self).__name__} cannot do without, "
                    f"got {type(components[name]).__name__}."
                )
        as_image_tokenizer(components["tokenizer"])

    @abstractmethod
    def _check_match(self) -> None:
        """Raises a `ValueError` if `transformer` and `tokenizer` disagree."""

    def enable_cpu_kernels(self) -> None:
        """Faster products in float32 on some CPUs: [`~hf_ifsq.cpu_kernels.enable_cpu_kernels`] of `transformer`."""
        enable_cpu_kernels(self.transformer)

    @property
    def labels(self) -> dict[str, int]:
        """Class names and their ids, in the order of the ids; empty if the config has no `id2label`."""
        id2label = self.transformer.config.id2label or {}
        return {name: class_id for class_id, name in sorted((int(key), name) for key, name in id2label.items())}

    def get_label_ids(self, class_labels: str | Sequence[str]) -> list[int]:
        """The ids of one or more of the names in `labels`; an unknown one is an error that suggests the closest."""
        labels = self.labels
        names = [class_labels] if isinstance(class_labels, str) else class_labels
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"`class_labels` must be one or more names of classes, got {describe(class_labels)}.")
        id2label = self.transformer.config.id2label or {}
        for name in names:
            ids = [class_id for class_id, other in id2label.items() if other == name]
            if len(ids) > 1:
                raise ValueError(f"`class_labels` has {name!r}, the name of several classes: give one of {ids}.")
            if not ids:
                containing = [other for other in labels if name and name.lower() in other.lower()]
                similar = difflib.get_close_matches(name, labels, n=5, cutoff=0.3)
                close = (containing or similar or list(labels))[:5]
                hint = f"Did you mean one of {close}?" if labels else "The model's config has no `id2label`."
                raise ValueError(
                    f"`class_labels` has {name!r}, which is none of the {len(labels)} class names. {hint}"
                )
        return [labels[name] for name in names]

    def _prepare(
        self,
        class_labels: ClassLabels,
        num_images_per_label: int,
        batch_size: int | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
    ) -> tuple[torch.Tensor, list[slice]]:
        """Check the inputs of both pipelines. Gives each image's label and the images that are generated together."""
        self._num_calls += 1
        self._check_classes(self.components)
        self._check_match()
        for name in ("transformer", "tokenizer"):
            if getattr(self, name).training:
                raise ValueError(f"`{name}` is in training mode: call `pipe.{name}.eval()` before generating.")
        device = self._execution_device
        if device.type == "meta":
            raise ValueError("The pipeline is on the meta device, where models have no weights: load it again.")
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {describe(output_type)}.")
        check_flag(return_dict, "return_dict")
        repeats = as_integer(num_images_per_label, "num_images_per_label", maximum=MAX_IMAGES_PER_LABEL)
        labels = torch.tensor(self._class_ids(class_labels), device=device).repeat_interleave(repeats)
        check_generator(generator, len(labels))
        step = len(labels) if batch_size is None else min(as_integer(batch_size, "batch_size"), len(labels))
        return labels, [slice(start, start + step) for start in range(0, len(labels), step)]

    def _class_ids(self, class_labels: ClassLabels) -> list[int]:
        num_classes = self.transformer.config.num_classes
        expected = f"`class_labels` must be names or integers in [0, {num_classes}), one or a list of them"
        labels: Any = class_labels
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            if class_labels.ndim > 1 or not (isinstance(class_labels, np.ndarray) or is_tensor(class_labels)):
                raise ValueError(f"{expected}, got {describe(class_labels)}.")
            labels = class_labels.tolist()
        # Bytes are a sequence of integers too.
        if isinstance(labels, (str, bytes, bytearray)) or not isinstance(labels, Sequence):
            labels = [labels]
        if len(labels) == 0:
            raise ValueError("`class_labels` is empty: give at least one class.")
        ids = []
        for label in labels:
            if isinstance(label, str):
                label = self.get_label_ids(label)[0]
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < num_classes:
                raise ValueError(f"{expected}, got {describe(label)}.")
            ids.append(int(label))
        return ids

    def _shown_to_callback(self, callback: Any, tensor_inputs: Sequence[str]) -> list[str]:
        """Check the two arguments on callbacks. Gives the names of what is shown, which diffusers' own ones know."""
        if callback is not None and not _takes_four_arguments(callback):
            raise TypeError(
                "`callback_on_step_end` must be a function of the pipeline, the step, the timestep and a dictionary, "
                f"got {describe(callback)}."
            )
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        known = self._callback_tensor_inputs
        if not isinstance(tensor_inputs, (list, tuple)) or any(name not in known for name in tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be a list of names among {known}, got "
                f"{describe(tensor_inputs)}."
            )
        return list(tensor_inputs)

    def _call_back(
        self,
        callback: Callable[..., Mapping[str, torch.Tensor]],
        shown: list[str],
        step: int,
        timestep: Any,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Show values to the user's function, if it is to see them, and return what it makes of them."""
        (name,) = self._callback_tensor_inputs
        num_calls, state = self._num_calls, (self._guidance_scale, self._num_timesteps, self._interrupt)
        returned = callback(self, step, timestep, {key: values.clone() for key in shown})
        if self._num_calls > num_calls:
            # It has called the pipeline itself, for a preview say: what it has set is that call's.
            self._guidance_scale, self._num_timesteps, self._interrupt = state
        if not isinstance(returned, Mapping) or any(key != name for key in returned):
            raise TypeError(
                f"`callback_on_step_end` must return a dictionary, empty or with `{name}`, got {describe(returned)}."
            )
        changed = returned.get(name, values)
        if (
            not is_tensor(changed)
            or changed.shape != values.shape
            or changed.dtype == torch.bool
            or changed.is_complex()
            or changed.is_floating_point() != values.is_floating_point()
        ):
            raise ValueError(
                f"`callback_on_step_end` must return `{name}` of shape {tuple(values.shape)} and {values.dtype}, got "
                f"{describe(changed)}."
            )
        return changed.to(values)

    def _finish(self, outputs: list[torch.Tensor], output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Batches of images in [-1, 1] as PIL images, or as an array or tensor in [0, 1]; latents as they are."""
        images = torch.cat(outputs)
        if output_type != "latent":
            images = self.image_processor.postprocess(images.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        # diffusers says nothing of tensors, which its own pipelines give too.
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[arg-type]


def _takes_four_arguments(function: Any) -> bool:
    if not callable(function):
        return False
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Compiled ones do not tell.
        return True
    try:
        signature.bind(*range(4))
    except TypeError:
        return False
    return True


def check_finite_weights(model: nn.Module, name: str) -> None:
    """Raise a `ValueError` if a weight of a model is NaN or infinite: the picture would be noise, or none."""
    bad = [key for key, weight in model.named_parameters() if not all(map(_is_finite, _plain_tensors(weight)))]
    if bad:
        raise ValueError(
            f"`{name}` has {len(bad)} weights with NaN or infinite values, the first being {bad[:3]}: the checkpoint "
            "is broken or its training diverged."
        )


def _plain_tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    """A weight itself, or the integers, scales and so on that a quantized one is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [tensor for name in names for tensor in _plain_tensors(getattr(weight, name))]


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or weight.is_meta:
        return True
    # Numbers of 8 bits have no `isfinite` of their own.
    return bool(torch.isfinite(weight.float() if weight.itemsize == 1 else weight).all())
