"""Loading that fails on a checkpoint that does not fit, instead of going on with random weights."""

from typing import Any


class StrictLoadingMixin:
    """In front of a model base class: missing, unexpected and misshapen weights are errors of `from_pretrained`."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """
        Load a model as the library's `from_pretrained` does.

        Raises:
            ValueError: if the checkpoint and the model have not the same weights.
        """
        model, loading_info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        problems = {
            name: sorted(map(str, loading_info[name]))
            for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if loading_info[name]
        }
        if problems:
            listed = "; ".join(f"{len(keys)} {name}: {keys[:3]}" for name, keys in problems.items())
            raise ValueError(f"The checkpoint does not fit {cls.__name__} with its config. {listed}.")
        return (model, loading_info) if output_loading_info else model
