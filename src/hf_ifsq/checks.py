"""Checks of arguments by type and range: each error names the argument, what it got and what it takes."""

import reprlib
from typing import Any

import numpy as np
import torch


def describe(value: Any) -> str:
    """What an error says of a value that it got: kind and shape of a tensor, the beginning of anything long."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, int) and value.bit_length() > 1000:
        # Python refuses to print the largest.
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float, of numpy too. `True` and `False` are none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor whose values can be read: neither sparse nor on the meta device."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta


def check_bool(name: str, value: Any) -> None:
    """Raise a `TypeError` unless `value` is `True` or `False`: numbers and strings would be one or the other too."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {describe(value)}.")


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """An integer, of numpy too, as an `int`; a `TypeError` or, out of its range, a `ValueError` otherwise."""
    span = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
    if not is_number(value) or isinstance(value, (float, np.floating)):
        raise TypeError(f"`{name}` must be {span}, got {describe(value)}.")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"`{name}` must be {span}, got {describe(value)}.")
    return int(value)
