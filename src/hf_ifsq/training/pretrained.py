"""The model that a training begins with, of a folder or of the Hub, fitted to other classes and tokens."""

import json
import logging
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..models.autoencoder_ifsq import AutoencoderIFSQ
from ..models.image_tokenizer import load_image_tokenizer
from ..models.loading import forget_place
from .checkpoints import differences


logger = logging.getLogger(__name__)


class Pretrained:
    """
    A model in a folder or on the Hub, or a part of a pipeline.

    Args:
        name_or_path (`str`): the folder, or a name on the Hub.
        component (`str`): what the model is called in a pipeline.
        model_classes (`Iterable[type]`): the classes of which the model may be.
        subfolder (`str`, *optional*):
            where it is in there; by default under the name of the component, or at the root of what is no pipeline.

    Attributes:
        config (`dict[str, Any]`): the config of the model, as it is stored.
    """

    def __init__(self, name_or_path: str, component: str, model_classes: Iterable[type], subfolder: str | None = None):
        self.name_or_path = name_or_path
        if subfolder is None:
            try:
                DiffusionPipeline.load_config(name_or_path)
            except OSError:
                # It is no pipeline, or nothing at all, as the model's own config tells.
                component = ""
            subfolder = component
        self.options = {"subfolder": subfolder} if subfolder else {}
        try:
            self.config: dict[str, Any] = AutoencoderIFSQ.load_config(name_or_path, **self.options)
        except OSError as error:
            raise ValueError(
                f"`pretrained_model_name_or_path` {name_or_path!r} must be a folder or a name on the Hub of a model "
                f"or pipeline, but there is no config of one{f' in {subfolder!r}' * bool(subfolder)}: {error}"
            ) from error
        classes = self.config.get("architectures") or [self.config.get("_class_name")]
        if not {model_class.__name__ for model_class in model_classes}.issuperset(classes):
            raise ValueError(
                f"`pretrained_model_name_or_path` {name_or_path!r} must be a model of the class "
                f"{' or '.join(model_class.__name__ for model_class in model_classes)}, got {classes[0]}."
            )

    def load_tokenizer(self, sample_size: int, **options: Any) -> ModelMixin:
        """
        Load an image tokenizer in float32 to train it further, on images of so many pixels a side; `options` is the
        `noise_prob` of an [`AutoencoderIFSQ`].
        """  # noqa: D205
        if options and self.config.get("_class_name") != AutoencoderIFSQ.__name__:
            raise ValueError(f"`{next(iter(options))}` is for an AutoencoderIFSQ, got a {self.config['_class_name']}.")
        options |= {"dtype": torch.float32, **self.options}
        return load_image_tokenizer(self.name_or_path, sample_size, **options).model.requires_grad_(True)

    def load(self, model_class: Any, **config: Any) -> Any:
        """
        Load a generator model of a class in float32 to train it further, with `config` in place of entries of its own,
        such as the classes and the size of the codebook. Weights that do not fit are initialized anew. The log names
        both.
        """  # noqa: D205
        options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, **self.options, **config}
        model, info = model_class.from_pretrained(self.name_or_path, output_loading_info=True, **options)
        changes = differences(self.config, json.loads(json.dumps(config)))
        if changes:
            logger.info(f"{self.name_or_path} is changed to fit: {', '.join(changes.values())}.")
        keys = [*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])]
        for names, fate in ((keys, "initialized anew"), (info["unexpected_keys"], "left out")):
            if names:
                logger.warning(f"{self.name_or_path} does not fit; {fate} are {', '.join(sorted(names))}.")
        if isinstance(model, ConfigMixin):
            forget_place(model, self.name_or_path)
        return model
