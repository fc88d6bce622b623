"""Checks of arguments, whose errors name the argument, what it got and what it takes. None reads a tensor's values."""

import math
import reprlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch


# More channels, classes or cells per side than any model has; far less than what no memory can hold.
MAX_SIZE = 2**20

INTEGER_DTYPES = {
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
}


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


def as_integer(value: Any, name: str, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
    """As an `int`, an integer in [minimum, maximum], of numpy too; anything else is a `ValueError`."""
    integer = int(value) if isinstance(value, np.integer) else value
    check_integer(integer, name, minimum, maximum)
    return integer


def check_integer(value: Any, name: str, minimum: int = 1, maximum: int = MAX_SIZE) -> None:
    """Raise a `ValueError` unless it is an `int` in [minimum, maximum]; a `bool` is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ValueError(f"`{name}` must be an integer in [{minimum}, {maximum}], got {describe(value)}.")


def check_integers(values: Any, name: str, minimum: int = 1, maximum: int = MAX_SIZE) -> None:
    """Raise a `ValueError` unless it is a list or tuple of one or more `int` in [minimum, maximum]."""
    right = isinstance(values, (list, tuple)) and len(values) > 0
    if not right or any(type(value) is not int or not minimum <= value <= maximum for value in values):
        raise ValueError(f"`{name}` must be one or more integers in [{minimum}, {maximum}], got {values!r}.")


def check_number(value: Any, name: str, minimum: float, maximum: float, below: bool = False) -> None:
    """Raise a `ValueError` unless it is a number in [minimum, maximum], or `below` the maximum; NaN is none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # A comparison with NaN is false.
    if not number or not minimum <= value <= maximum or (below and value == maximum):
        raise ValueError(f"`{name}` must be in [{minimum:g}, {maximum:g}{')' if below else ']'}, got {value!r}.")


def check_positive(value: Any, name: str) -> None:
    """Raise a `ValueError` unless it is a positive number that float32 holds with its inverse."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 1e-30 <= value <= 1e30:
        raise ValueError(f"`{name}` must be a positive finite number, got {value!r}.")


def check_flag(value: Any, name: str) -> None:
    """Raise a `ValueError` unless it is `True` or `False`."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False, got {describe(value)}.")


def check_choice(value: Any, name: str, choices: Collection[Any]) -> None:
    """Raise a `ValueError` unless it is one of the choices, strings as a rule."""
    # Of another type than any choice, it might not even be comparable.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def as_class_names(id2label: Any, num_classes: int) -> dict[int, str]:
    """Names of the ids 0 to num_classes - 1, whose keys may be strings, as JSON makes them; else a `ValueError`."""
    items = id2label.items() if isinstance(id2label, dict) else [(None, None)]
    if not all(str(class_id).isdecimal() and isinstance(name, str) for class_id, name in items):
        raise ValueError(f"`id2label` must be a dictionary of ids and names of classes, got {id2label!r}.")
    names = {int(class_id): name for class_id, name in id2label.items()}
    if len(names) != num_classes:
        raise ValueError(f"`id2label` names {len(names)} classes, but `num_classes` is {num_classes}.")
    if set(names) != set(range(num_classes)):
        raise ValueError(f"`id2label` must name the ids 0 to {num_classes - 1}, got {sorted(names)}.")
    return names


def check_codebook(sizes: Sequence[int], name: str) -> None:
    """Raise a `ValueError` if numbers of values of each part of a token make more tokens than int64 can count."""
    if math.prod(sizes) > 2**63 - 1:
        raise ValueError(
            f"`{name}` {list(sizes)} make a codebook of {math.prod(sizes)} entries, but an int64 index can count only "
            f"2**63 - 1 = {2**63 - 1}: use fewer or smaller ones."
        )


def check_tensor(value: Any, name: str) -> None:
    """Raise a `TypeError` unless it is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a `torch.Tensor`, got {type(value).__name__}.")


def check_has_values(tensor: torch.Tensor, name: str) -> None:
    """Raise an error unless it is a tensor whose values can be read: one on the device `meta` has none."""
    check_tensor(tensor, name)
    if tensor.is_meta:
        raise ValueError(f"`{name}` has no values: it is on the device meta.")


def as_ids(values: torch.Tensor, name: str) -> torch.Tensor:
    """Ids in a tensor of integers of any type, as int64; another tensor is a `ValueError`, `bool` and floats too."""
    check_tensor(values, name)
    if values.dtype not in INTEGER_DTYPES:
        raise ValueError(
            f"`{name}` must be integers, got a tensor of dtype {values.dtype} and shape {tuple(values.shape)}."
        )
    return values.long()
