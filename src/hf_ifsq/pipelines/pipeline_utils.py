"""What the two class-conditional pipelines share: labels, the match of model and tokenizer, pictures."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import nn

from ..cpu_kernels import enable_cpu_kernels
from ..models.image_tokenizer import ImageTokenizer, as_image_tokenizer


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
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

    def __init__(self, **components: Any):
        super().__init__()
        self.register_modules(**components)
        for name, component in components.items():
            if isinstance(component, nn.Module):
                check_finite_weights(component, name)
        self._check_match()
        self.image_processor = VaeImageProcessor(vae_scale_factor=self._image_tokenizer.downsampling_factor)

    @property
    def _image_tokenizer(self) -> ImageTokenizer:
        return as_image_tokenizer(self.tokenizer)

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

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """The ids of one or more of the names in `labels`; an unknown one is an error that suggests the closest."""
        labels = self.labels
        names = [names] if isinstance(names, str) else list(names)
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
        self, class_labels: ClassLabels, num_images_per_label: int, batch_size: int | None, output_type: str
    ) -> tuple[torch.Tensor, list[slice]]:
        """Check the inputs of both pipelines. Gives each image's label and the images that are generated together."""
        self._check_match()
        for name in ("transformer", "tokenizer"):
            if getattr(self, name).training:
                raise ValueError(f"`{name}` is in training mode: call `pipe.{name}.eval()` before generating.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if num_images_per_label < 1:
            raise ValueError(f"`num_images_per_label` must be at least 1, got {num_images_per_label}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        ids = self._class_ids(class_labels)
        labels = torch.tensor(ids, device=self._execution_device).repeat_interleave(num_images_per_label)
        step = batch_size or len(labels)
        return labels, [slice(start, start + step) for start in range(0, len(labels), step)]

    def _class_ids(self, class_labels: ClassLabels) -> list[int]:
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.flatten().tolist()
        elif isinstance(class_labels, str) or not isinstance(class_labels, (Sequence, np.ndarray)):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError("`class_labels` is empty: give at least one class.")
        num_classes = self.transformer.config.num_classes
        ids = []
        for label in class_labels:
            if isinstance(label, str):
                label = self.get_label_ids(label)[0]
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < num_classes:
                raise ValueError(f"`class_labels` must be names or integers in [0, {num_classes}), got {label!r}.")
            ids.append(int(label))
        return ids

    def _call_back(
        self, callback: Callable[..., dict], step: int, timestep: Any, name: str, values: torch.Tensor
    ) -> torch.Tensor:
        """Show values to the user's function and return what it makes of them."""
        changed = callback(self, step, timestep, {name: values.clone()}).get(name, values)
        if changed.shape != values.shape or (name == "indices" and changed.dtype != values.dtype):
            raise ValueError(
                f"`callback_on_step_end` must return `{name}` of shape {tuple(values.shape)} and {values.dtype}, got "
                f"{tuple(changed.shape)} and {changed.dtype}."
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


def check_finite_weights(model: nn.Module, name: str) -> None:
    """Raise a `ValueError` if a weight of a model is NaN or infinite: the picture would be noise, or none."""
    bad = [
        key
        for key, weight in model.named_parameters()
        # Numbers of 8 bits have no `isfinite` of their own.
        if weight.is_floating_point() and not weight.is_meta
        if not torch.isfinite(weight.float() if weight.itemsize == 1 else weight).all()
    ]
    if bad:
        raise ValueError(
            f"`{name}` has {len(bad)} weights with NaN or infinite values, the first being {bad[:3]}: the checkpoint "
            "is broken or its training diverged."
        )
