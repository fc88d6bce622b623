"""The options of sampling from the AR model: where they come from, and what they make of logits."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import GENERATION_CONFIG_NAME

from .checks import check_flag


# Of what neither the caller nor a generation config sets.
DEFAULTS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "guidance_interval": (0.0, 1.0),
}


# Values without effect of options that only transformers' own models have.
NEUTRAL: dict[str, list[Any]] = {
    "num_beams": [1],
    "num_return_sequences": [1],
    "repetition_penalty": [1.0],
    "use_cache": [True, False],
}


class _AsConfigured:
    def __repr__(self) -> str:
        return "<as configured>"


# The default of an argument that the generation config decides on. `None` is a value: it turns an option off.
AS_CONFIGURED: Any = _AsConfigured()


class IFSQARGenerationConfig(GenerationConfig):
    """
    transformers' generation config, of which `do_sample`, `temperature`, `top_k`, `top_p` and `guidance_scale`, and in
    addition `guidance_schedule` and `guidance_interval`, are what [`~hf_ifsq.IFSQARForImageGeneration.generate`] does
    where its caller says nothing. What is not set here is as if there were no generation config: unlike with
    transformers' own models, sampling is on. `top_k=0` says that there is none.
    """

    def __init__(self, **kwargs: Any):
        # With this mark, which generation configs made by transformers bear, it would drop what is not its own.
        kwargs.pop("_from_model_config", None)
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "IFSQARGenerationConfig":
        """An empty one: the config of a model says nothing of sampling."""
        return cls()

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Raises a `ValueError` that names a wrong value. transformers' own check takes sampling to be off."""
        check_sampling(_options_of(self))

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes a file only if there is anything to say."""
        if _options_of(self):
            super().save_pretrained(save_directory, *args, **kwargs)
        else:
            Path(save_directory, GENERATION_CONFIG_NAME).unlink(missing_ok=True)


def sampling_options(
    given: Mapping[str, Any],
    generation_config: GenerationConfig | None,
    configured: GenerationConfig,
    num_factors: int,
) -> dict[str, Any]:
    """
    A value for each of `DEFAULTS`: that given by the caller, or else of the caller's generation config, or else of the
    model's, `configured`. Raises a `ValueError` that names a wrong one.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise TypeError(
            f"`generation_config` must be a `transformers.GenerationConfig`, got {type(generation_config).__name__}."
        )
    options = {**DEFAULTS, **_options_of(configured)}
    if generation_config is not None:
        options.update(_options_of(generation_config))
    options.update({name: value for name, value in given.items() if value is not AS_CONFIGURED})
    check_sampling(options, num_factors)
    return options


def _options_of(generation_config: GenerationConfig) -> dict[str, Any]:
    """What is set; another field that would change what is generated is a `ValueError`."""
    options = {}
    for name, value in vars(generation_config).items():
        if name in DEFAULTS and value is not None:
            options[name] = None if name == "top_k" and value == 0 else value
        elif (
            name not in DEFAULTS
            and name[0] != "_"
            and name != "transformers_version"
            and not any(value is neutral or value == neutral for neutral in (None, *NEUTRAL.get(name, ())))
        ):
            raise ValueError(
                f"The generation config has `{name}` {value!r}, which has no meaning for this model: it knows "
                f"{list(DEFAULTS)}."
            )
    return options


def check_sampling(options: Mapping[str, Any], num_factors: int | None = None) -> None:
    """Raise a `ValueError` if one of the options of sampling, guidance aside, is of a wrong type or out of range."""
    if "do_sample" in options:
        check_flag(options["do_sample"], "do_sample")
    ranges = {
        "temperature": "a positive finite number",
        "top_k": "a positive integer, or None to keep all values",
        "top_p": "a number in [0, 1], or None to keep all values",
    }
    for name in ranges.keys() & options.keys():
        values = as_list(options[name])
        if num_factors is not None and isinstance(options[name], (list, tuple)) and len(values) != num_factors:
            raise ValueError(
                f"`{name}` must be one value or a list with one for each of the {num_factors} factors of a token, got "
                f"{values}."
            )
        if not values or not all(_in_range(name, value) for value in values):
            raise ValueError(f"`{name}` must be {ranges[name]}, or a list of them, got {options[name]!r}.")


def as_list(value: Any) -> list[Any]:
    """The entries of a list or tuple, or a list of one value."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _in_range(name: str, value: Any) -> bool:
    if value is None:
        return name != "temperature"
    if isinstance(value, bool) or not isinstance(value, Integral if name == "top_k" else Real):
        return False
    # Beyond, float32 does not hold what logits are divided by.
    least, most = {"temperature": (1e-30, 1e30), "top_k": (1, math.inf), "top_p": (0, 1)}[name]
    return least <= cast(float, value) <= most


def processors_of_factors(
    num_factors: int,
    temperature: float | Sequence[float],
    top_k: int | None | Sequence[int | None],
    top_p: float | None | Sequence[float | None],
) -> list[LogitsProcessorList]:
    """transformers' processors for the logits of each factor of a token; the options are those of `generate`."""
    factors = []
    for factor in range(num_factors):
        values = [as_list(option) for option in (temperature, top_k, top_p)]
        factor_temperature, factor_top_k, factor_top_p = (entries[factor % len(entries)] for entries in values)
        processors = LogitsProcessorList()
        if factor_temperature != 1.0:
            processors.append(TemperatureLogitsWarper(float(factor_temperature)))
        if factor_top_k is not None:
            processors.append(TopKLogitsWarper(int(cast(int, factor_top_k))))
        if factor_top_p is not None:
            processors.append(TopPLogitsWarper(float(factor_top_p)))
        factors.append(processors)
    return factors
