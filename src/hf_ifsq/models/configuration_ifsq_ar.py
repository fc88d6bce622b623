"""Configuration of the AR model."""

import functools
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from .checks import (
    as_class_names,
    check_choice,
    check_codebook,
    check_integer,
    check_integers,
    check_number,
    check_positive,
)
from .grid import as_grid


# Layers, width and attention heads of the models of LlamaGen and of iFSQ (S).
SIZES = {
    "S": (12, 384, 12),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (36, 1280, 20),
    "XXL": (48, 1536, 24),
    "3B": (24, 3200, 32),
}


class InvalidConfigError(StrictDataclassClassValidationError, ValueError):
    """The error of a strict dataclass, and a `ValueError` that names the argument as all others do."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


def _with_value_errors(config_class: type) -> type:
    """Let the errors of `strict`, which are no `ValueError`, be one."""

    def translated(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            try:
                method(self, *args, **kwargs)
            except InvalidConfigError:
                raise
            except (StrictDataclassError, ValueError) as error:
                # `__setattr__` gets the name of a field.
                name = f"`{args[0]}`: " if args else ""
                raise InvalidConfigError(f"{name}{error.__cause__ or error}") from (error.__cause__ or error)

        return call

    for name in ("__post_init__", "__setattr__", "validate"):
        setattr(config_class, name, translated(getattr(config_class, name)))
    return config_class


@_with_value_errors
@strict
class IFSQARConfig(PreTrainedConfig):
    r"""
    Configuration of [`IFSQARModel`] and [`IFSQARForImageGeneration`], LlamaGen's architecture
    (https://arxiv.org/abs/2406.06525). The defaults are size B for iFSQ tokens of 17 levels in 4 channels, read as two
    factors.

    Args:
        vocab_sizes (`list[int]`, *optional*, defaults to `[289, 289]`):
            number of values of each factor of a token, the least significant first; their product is the size of the
            codebook. One entry is one head over all of it.
        num_classes (`int`, *optional*, defaults to 1000):
            number of class labels. `num_labels` is another name of it.
        grid_size (`int` or `list[int]`, *optional*, defaults to `[16, 16]`):
            rows and columns of the token grid, or the side of a square.
        hidden_size (`int`, *optional*, defaults to 768): width of the hidden states.
        intermediate_size (`int`, *optional*):
            width of the feed-forward layers, by default `2/3 * 4 * hidden_size` rounded up to a multiple of 256.
        num_hidden_layers (`int`, *optional*, defaults to 12): transformer layers over the grid.
        num_factor_layers (`int`, *optional*, defaults to 2):
            transformer layers over the factors of one token; without effect for one factor.
        num_attention_heads (`int`, *optional*, defaults to 12): attention heads of each layer.
        rope_theta (`float`, *optional*, defaults to 10000.0): base of the rotary frequencies.
        rms_norm_eps (`float`, *optional*, defaults to 1e-5): epsilon of the normalizations.
        dropout (`float`, *optional*, defaults to 0.1):
            dropout probability of token embeddings and of the outputs of attention and feed-forward layers.
        class_dropout_prob (`float`, *optional*, defaults to 0.1):
            probability in training of replacing a class label by the null class `num_classes`, for classifier-free
            guidance. With 0.0 the model has no null class and cannot be guided.
        initializer_range (`float`, *optional*, defaults to 0.02): standard deviation of the initial weights.
        use_cache (`bool`, *optional*, defaults to `False`):
            whether a forward pass without `past_key_values` makes and returns a cache.
        id2label (`dict[int, str]`, *optional*):
            names of the classes. With another `num_classes` alone, `from_pretrained` does not keep those of before.
    """

    model_type = "ifsq_ar"
    # `Trainer.predict` keeps what is left: the logits.
    keys_to_ignore_at_inference = ["factor_losses", "past_key_values", "hidden_states"]

    vocab_sizes: list[int] | tuple[int, ...] = (289, 289)
    num_classes: int = 1000
    grid_size: int | list[int] | tuple[int, ...] = (16, 16)
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_factor_layers: int = 2
    num_attention_heads: int = 12
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-5
    dropout: float | int = 0.1
    class_dropout_prob: float | int = 0.1
    initializer_range: float = 0.02
    use_cache: bool = False

    def __post_init__(self, **kwargs):
        num_labels = kwargs.pop("num_labels", None)
        if num_labels is not None:
            check_integer(num_labels, "num_labels")
            if self.num_classes not in (type(self).num_classes, num_labels):
                raise ValueError(
                    f"`num_labels` {num_labels!r} is another name of `num_classes`, which is {self.num_classes}."
                )
            self.num_classes = num_labels
        check_integer(self.num_classes, "num_classes")
        self.vocab_sizes = list(self.vocab_sizes)
        self.grid_size = list(as_grid(self.grid_size, "grid_size"))
        if self.intermediate_size is None:
            self.intermediate_size = -(-(8 * self.hidden_size // 3) // 256) * 256
        if self.id2label is not None:
            self.id2label = as_class_names(self.id2label, self.num_classes)
        super().__post_init__(**kwargs)

    @property
    def num_labels(self) -> int:
        """transformers' name of `num_classes`. Setting another number leaves none of the old names of classes."""
        return self.num_classes

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        check_integer(num_labels, "num_labels")
        self.num_classes = num_labels
        if self.id2label is None or len(self.id2label) != num_labels:
            self.id2label = {class_id: f"LABEL_{class_id}" for class_id in range(num_labels)}
            self.label2id = {name: class_id for class_id, name in self.id2label.items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As of [`~transformers.PreTrainedConfig`], but what `kwargs` change is checked together with all else."""
        names = {"num_labels", *(field.name for field in fields(cls))}
        changed = {name: kwargs.pop(name) for name in names & kwargs.keys() if name != "dtype"}
        if changed.get("num_labels") is not None:
            num_labels = changed.pop("num_labels")
            if changed.setdefault("num_classes", num_labels) != num_labels:
                raise ValueError(
                    f"`num_labels` {num_labels!r} is another name of `num_classes`, which is {changed['num_classes']}."
                )
        if changed.get("num_classes", config_dict.get("num_classes")) != config_dict.get("num_classes"):
            # The names of other classes.
            changed.setdefault("id2label", None)
        if "id2label" in changed:
            changed.setdefault("label2id", None)
        return super().from_dict({**config_dict, **changed}, **kwargs)

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> "IFSQARConfig":
        """
        The config of a named size of LlamaGen (table 1): `"S"`, `"B"`, `"L"`, `"XL"`, `"XXL"` or `"3B"`, with about
        21, 85, 308, 731, 1,359 and 2,989 million parameters in the layers; embeddings and heads come on top. Further
        arguments of the class override those of the size.
        """
        check_choice(size, "size", SIZES)
        sizes = zip(("num_hidden_layers", "hidden_size", "num_attention_heads"), SIZES[size], strict=True)
        return cls(**{**dict(sizes), **kwargs})

    def validate_architecture(self):
        """Raises a `ValueError` if the sizes contradict each other; run on construction."""
        check_integers(self.vocab_sizes, "vocab_sizes", minimum=2, maximum=2**31)
        check_codebook(self.vocab_sizes, "vocab_sizes")
        as_grid(self.grid_size, "grid_size")
        for name in ("num_classes", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            check_integer(getattr(self, name), name)
        check_integer(self.num_factor_layers, "num_factor_layers", minimum=0)
        for name in ("rope_theta", "rms_norm_eps"):
            check_positive(getattr(self, name), name)
        check_number(self.initializer_range, "initializer_range", 0, 1e3)
        if len(self.vocab_sizes) > self.num_tokens + 1:
            raise ValueError(
                f"`vocab_sizes` has {len(self.vocab_sizes)} factors, but the rotary table of a grid of "
                f"{self.grid_size} has positions for only {self.num_tokens + 1}."
            )
        if len(self.vocab_sizes) > 1 and self.num_factor_layers < 1:
            raise ValueError(
                f"`num_factor_layers` must be at least 1 for {len(self.vocab_sizes)} factors, which would not see one "
                f"another, got {self.num_factor_layers}."
            )
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of 4 * `num_attention_heads` "
                f"(4 * {self.num_attention_heads}), for rotary positions in two dimensions."
            )
        for name in ("dropout", "class_dropout_prob"):
            check_number(getattr(self, name), name, 0, 1, below=True)
        as_class_names(self.id2label, self.num_classes)

    @property
    def codebook_size(self) -> int:
        """Number of different whole token ids."""
        return math.prod(self.vocab_sizes)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image: the cells of the grid."""
        return math.prod(as_grid(self.grid_size))


AutoConfig.register("ifsq_ar", IFSQARConfig)
