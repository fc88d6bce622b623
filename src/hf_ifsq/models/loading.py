"""Loading that fails on a checkpoint that does not fit, instead of going on with random weights."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel


# diffusers warns on every cast of every model that modules should be kept in float32, and lists none where there are
# none: `ModelMixin.to` asks whether the list is None after it made it `[]`.
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "should be kept in float32: []" not in record.getMessage()
)


class StrictLoadingMixin:
    """In front of a model base class: missing, unexpected and misshapen weights are errors of `from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs: Any
    ) -> Any:
        """Load a model as the library's `from_pretrained` does; checkpoint and model must have the same weights."""
        # The error of transformers does not name misshapen weights: they are let through to be named here.
        let_through = ignore_mismatched_sizes or issubclass(cls, PreTrainedModel)
        model, loading_info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, ignore_mismatched_sizes=let_through, **kwargs
        )
        check_loading_info(model, loading_info, ignore_mismatched_sizes)
        return (model, loading_info) if output_loading_info else model


def check_loading_info(
    model: nn.Module, loading_info: Mapping[str, Any], ignore_mismatched_sizes: bool = False
) -> None:
    """
    Raise a `ValueError` with the first names of each misfit if a checkpoint and its loaded model have not the same
    weights, by what `from_pretrained` gives with `output_loading_info=True`.
    """
    kinds = ["missing_keys", "unexpected_keys"] + ([] if ignore_mismatched_sizes else ["mismatched_keys"])
    misfits = {kind: sorted(map(str, loading_info[kind])) for kind in kinds}
    if not getattr(model, "hf_device_map", None):
        empty = [name for name, weight in model.named_parameters() if weight.is_meta]
        misfits["weights that no file holds"] = empty
    problems = [f"{len(names)} {kind}: {names[:3]}" for kind, names in misfits.items() if names]
    if problems:
        raise ValueError(f"The checkpoint does not fit {type(model).__name__} with its config. {'; '.join(problems)}.")
