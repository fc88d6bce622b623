"""Loading that fails on a checkpoint that does not fit, instead of going on with random weights."""

import inspect
import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from transformers import PreTrainedModel


# diffusers warns on every cast of every model that modules should be kept in float32, and lists none where there are
# none: `ModelMixin.to` asks whether the list is None after it made it `[]`.
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "should be kept in float32: []" not in record.getMessage()
)

# Where a checkpoint lies.
HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


class StrictLoadingMixin:
    """In front of a model base class: missing, unexpected and misshapen weights are errors of `from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None = None,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Load a model as the library's `from_pretrained` does; checkpoint and model must have the same weights. With
        `ignore_mismatched_sizes`, those that do not fit because `kwargs` change the config, such as the embeddings of
        another `num_classes`, begin as in a new model; the library's warning names them. A checkpoint that does not
        fit its own config stays an error.
        """
        # The error of transformers does not name misshapen weights: they are let through to be named here.
        let_through = ignore_mismatched_sizes or issubclass(cls, PreTrainedModel)
        model, loading_info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=let_through,
            **kwargs,
        )
        misfits = loading_info
        found_some = any(_names_of_misfits(loading_info).values())
        if ignore_mismatched_sizes and found_some and pretrained_model_name_or_path is not None:
            hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            with torch.device("meta"):
                stored = cls._with_stored_config(pretrained_model_name_or_path, hub_options).state_dict()
            misfits = {
                "missing_keys": [name for name in loading_info["missing_keys"] if name in stored],
                "unexpected_keys": [name for name in loading_info["unexpected_keys"] if name not in stored],
                "mismatched_keys": [
                    (name, found, *_)
                    for name, found, *_ in loading_info["mismatched_keys"]
                    if name not in stored or stored[name].shape != torch.Size(found)
                ],
            }
            misshapen = [name for name, *_ in loading_info["mismatched_keys"]]
            model._initialize_anew([*loading_info["missing_keys"], *misshapen])
        check_loading_info(model, misfits)
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _with_stored_config(cls, name_or_path: Any, hub_options: dict[str, Any]) -> nn.Module:
        """A new model of the config that lies beside the weights."""
        return cls(cls.config_class.from_pretrained(name_or_path, **hub_options))  # type: ignore

    def _initialize_anew(self, names: list[str]) -> None:
        """Initialize weights as in a new model, where the library's own `from_pretrained` does not."""


class DiffusersLoadingMixin(StrictLoadingMixin):
    """[`StrictLoadingMixin`] for models of diffusers. Unknown arguments, which diffusers ignores, are errors, too."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of [`StrictLoadingMixin`]."""
        if kwargs.get("ignore_mismatched_sizes") and kwargs.get("device_map") is not None:
            raise ValueError(
                "`device_map` must be left out with `ignore_mismatched_sizes`: move the model after it was loaded."
            )
        try:
            return super().from_pretrained(*args, **kwargs)
        except RuntimeError as error:
            # So says diffusers with `low_cpu_mem_usage=False` what is a `ValueError` without.
            if "size mismatch" in str(error):
                raise ValueError(str(error)) from error
            raise

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A model of a config, with random weights; `kwargs` override the config."""
        known = inspect.signature(cls.__init__).parameters
        unknown = [name for name in kwargs if name not in known and not name.startswith("_")]
        if unknown and not return_unused_kwargs:
            raise TypeError(f"{cls.__name__} has no `{unknown[0]}`: its arguments are {[*known][1:]}.")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]

    @classmethod
    def _with_stored_config(cls, name_or_path: Any, hub_options: dict[str, Any]) -> nn.Module:
        return cls.from_config(cls.load_config(name_or_path, **hub_options))  # type: ignore[attr-defined]

    def _initialize_anew(self, names: list[str]) -> None:
        fresh = self.from_config(self.config).state_dict()  # type: ignore[attr-defined]
        for name in names:
            dtype = self.get_parameter(name).dtype  # type: ignore[attr-defined]
            set_module_tensor_to_device(self, name, "cpu", value=fresh[name], dtype=dtype)


def _names_of_misfits(loading_info: Mapping[str, Any]) -> dict[str, list[str]]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {kind: sorted(map(str, loading_info[kind])) for kind in kinds}


def check_loading_info(model: nn.Module, loading_info: Mapping[str, Any]) -> None:
    """
    Raise a `ValueError` with the first names of each misfit if a checkpoint and its loaded model have not the same
    weights, by what `from_pretrained` gives with `output_loading_info=True`.
    """
    misfits = _names_of_misfits(loading_info)
    if not getattr(model, "hf_device_map", None):
        empty = [name for name, weight in model.named_parameters() if weight.is_meta]
        misfits["weights that no file holds"] = empty
    problems = [f"{len(names)} {kind}: {names[:3]}" for kind, names in misfits.items() if names]
    if misfits["mismatched_keys"]:
        problems[-1] += "; what other arguments make misfit begins anew with `ignore_mismatched_sizes=True`"
    if problems:
        raise ValueError(f"The checkpoint does not fit {type(model).__name__} with its config. {'; '.join(problems)}.")


def forget_place(model: ConfigMixin, name_or_path: str | PathLike[str]) -> None:
    """Keep of the folder that a model was loaded from the name alone: it is saved with the config, for others."""
    if Path(name_or_path).exists():
        model.register_to_config(_name_or_path=Path(name_or_path).name)
