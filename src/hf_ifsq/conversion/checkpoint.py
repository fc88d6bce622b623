"""Official checkpoint files: reading them, telling their format, choosing and loading their weights."""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn


Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CheckpointFormat:
    """
    One format of official checkpoints. `outer.inner` names an entry of a dictionary in the file.

    Args:
        name (`str`): what the files hold, for messages and model cards.
        telltales (`tuple[str, ...]`): names of weights that together occur in no other format.
        convert (`Callable`):
            takes all weights under their official names, the config or `None`, and `options` as keyword arguments;
            returns the model.
        raw_entry (`str`): entry with the weights as trained.
        ema_entry (`str`): entry with their moving average.
        default_weights (`tuple[str, ...]`, *optional*, defaults to `("ema", "raw")`):
            sets of weights to take if none is asked for: the first that the file has.
        dropped_entries (`tuple[str, ...]`, *optional*): entries that the model does not need.
        config_files (`tuple[str, ...]`, *optional*): names of the config beside the checkpoint, which must be there.
        config_entry (`str`, *optional*): entry with the config, which may be missing.
        options (`tuple[str, ...]`, *optional*): names of further arguments that `convert` takes.
    """

    name: str
    telltales: tuple[str, ...]
    convert: Callable[..., nn.Module]
    raw_entry: str = "model"
    ema_entry: str = "ema"
    default_weights: tuple[str, ...] = ("ema", "raw")
    dropped_entries: tuple[str, ...] = ()
    config_files: tuple[str, ...] = ()
    config_entry: str | None = None
    options: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """
    Read a file of `torch.save` or safetensors. No code of the file is run, and tensors stay on disk until used.

    Args:
        path (`pathlib.Path`): the file.

    Returns:
        `dict[str, Any]`: the entries, or the tensors of a bare set of weights. Where an entry is a dictionary of sets
        of weights, these take its place as `outer.inner`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another type, is damaged, or holds objects beside tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint` must be a file, but there is none at {path}.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Files of the time before torch 1.6 are no zip archives and cannot be mapped into memory.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # On a damaged file, the unpickler fails in any way.
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit is None:
            raise ValueError(f"`checkpoint` {path} is damaged, or no file of `torch.save` or safetensors.") from error
        # Not chained: the message of torch advises to run the code of the file.
        raise ValueError(
            f"`checkpoint` {path} must hold tensors, numbers, text, lists and dictionaries alone, but it holds "
            f"{culprit[1]}, and reading other objects can run code. If you trust the file, load it yourself and save "
            "it again without them."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"`checkpoint` {path} must hold a dictionary, got {type(content).__name__}.")
    entries = {}
    for outer, entry in content.items():
        if isinstance(entry, dict) and any(map(_is_table_of_tensors, entry.values())):
            entries.update({f"{outer}.{inner}": value for inner, value in entry.items()})
        else:
            entries[outer] = entry
    return entries


def recognize_format(path: Path, entries: Mapping[str, Any], formats: Sequence[CheckpointFormat]) -> CheckpointFormat:
    """
    The format of a file, by the names of its weights.

    Args:
        path (`pathlib.Path`): the file, for the message.
        entries (`dict[str, Any]`): its content.
        formats (`list[CheckpointFormat]`): known formats.

    Returns:
        [`CheckpointFormat`].

    Raises:
        ValueError: if the file is of none of the formats.
    """
    for candidate in formats:
        tables = (entries, entries.get(candidate.raw_entry), entries.get(candidate.ema_entry))
        names = [set(_without_prefixes(table)) for table in tables if _is_table_of_tensors(table)]
        if any(set(candidate.telltales) <= some for some in names):
            return candidate
    listing = "\n".join(
        f"- {known.name}: weights {list(known.telltales)} under `{known.raw_entry}` or `{known.ema_entry}`, or alone"
        for known in formats
    )
    tables = {name: entry for name, entry in entries.items() if _is_table_of_tensors(entry)}
    first_weights = {name: list(table)[:3] for name, table in tables.items()}
    raise ValueError(
        f"`checkpoint` {path} is of no known format. Known are\n{listing}\nThe file has {len(entries)} entries: "
        f"{list(entries)[:10]}" + (f", and in them weights such as {first_weights}." if tables else ".")
    )


def select_weights(
    path: Path, entries: Mapping[str, Any], source: CheckpointFormat, weights: Literal["ema", "raw"] | None
) -> tuple[Weights, str | None]:
    """
    Choose a set of weights of a file and free its names from the prefixes of wrapped models.

    Args:
        path (`pathlib.Path`): the file, for messages.
        entries (`dict[str, Any]`): its content.
        source ([`CheckpointFormat`]): its format.
        weights (`str`, *optional*): `ema`, `raw`, or the default of the format.

    Returns:
        `tuple[dict[str, torch.Tensor], str | None]`: the weights, and the entry they are from; `None` if the file is a
        bare set of weights.

    Raises:
        ValueError: if the file lacks these weights, has unknown entries, or names that differ by a prefix only.
    """
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"`weights` must be 'ema' or 'raw', got {weights!r}.")
    if _is_table_of_tensors(entries):
        if weights is not None:
            raise ValueError(
                f"`weights` must be left out for {path}: it holds one set of weights and does not say which, got "
                f"{weights!r}."
            )
        return _without_prefixes(entries), None
    names = {"ema": source.ema_entry, "raw": source.raw_entry}
    known = {*names.values(), *source.dropped_entries}
    if source.config_entry is not None:
        known.add(source.config_entry)
    unknown = [name for name in entries if name not in known]
    if unknown:
        raise ValueError(f"`checkpoint` {path} has entries {unknown}; those of {source.name} are {sorted(known)}.")
    choices = source.default_weights if weights is None else (weights,)
    # Training without a moving average may write an empty one.
    for choice in choices:
        if _is_table_of_tensors(entries.get(names[choice])):
            return _without_prefixes(entries[names[choice]]), names[choice]
    other = "raw" if "ema" in choices else "ema"
    raise ValueError(
        f"`checkpoint` {path} has no weights under `{names[choices[0]]}`: ask for those under `{names[other]}` by "
        f"`weights` {other!r}."
    )


def size_of(weights: Weights, name: str, axis: int, model_class: type) -> int:
    """
    Size of a weight along an axis, from which a size of the model is read.

    Raises:
        ValueError: if there is no such weight, or if it has no such axis.
    """
    if name not in weights or weights[name].ndim <= axis:
        raise ValueError(
            f"The weights of `checkpoint` do not fit {model_class.__name__}. 1 missing or misshapen: {[name]}."
        )
    return weights[name].shape[axis]


def count_indices(weights: Weights, pattern: str) -> int:
    """Number of different indices, the group of `pattern`, at the start of names: of layers, blocks, factors."""
    matches = (re.match(pattern, name) for name in weights)
    return len({match[1] for match in matches if match})


def load_exactly(
    model: nn.Module, weights: Weights, official_names: Callable[[str], list[str]], dropped: Sequence[str] = ()
) -> None:
    """
    Fill a model with weights that fit it one to one. They are copied, in float32.

    Args:
        model (`torch.nn.Module`): the model, whose parameters may be without storage.
        weights (`dict[str, torch.Tensor]`): the weights by their official names.
        official_names (`Callable[[str], list[str]]`):
            maps the name of a weight of the model to the official one, or to those of equal size that it is made of
            one below the other.
        dropped (`list[str]`, *optional*): patterns of official names that the model has no use for.

    Raises:
        ValueError: if weights are missing, unexpected, misshapen or not finite.
    """
    own = model.state_dict()
    parts = {name: official_names(name) for name in own}
    shapes = {
        official: (weight.shape[0] // len(parts[name]), *weight.shape[1:])
        for name, weight in own.items()
        for official in parts[name]
    }
    shared = [name for name in shapes if name in weights]
    extra = [name for name in weights if name not in shapes]
    problems = {
        "missing": [name for name in shapes if name not in weights],
        "unexpected": [name for name in extra if not any(re.fullmatch(pattern, name) for pattern in dropped)],
        "misshapen": [
            f"{name} of shape {tuple(weights[name].shape)} instead of {shapes[name]}"
            for name in shared
            if tuple(weights[name].shape) != shapes[name]
        ],
        "not finite": [name for name in shared if not torch.isfinite(weights[name]).all()],
    }
    found = [f"{len(names)} {kind}: {names[:3]}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"The weights of `checkpoint` do not fit {type(model).__name__}. {'; '.join(found)}.")
    state = {
        name: torch.cat([weights[official].to(torch.float32) for official in officials])
        for name, officials in parts.items()
    }
    model.load_state_dict(state, assign=True)


def rename(name: str, rules: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]) -> str:
    """Apply pairs of a pattern and its replacement to a name, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _is_table_of_tensors(entry: Any) -> bool:
    if not isinstance(entry, dict) or not entry:
        return False
    return all(isinstance(name, str) and torch.is_tensor(value) for name, value in entry.items())


def _without_prefixes(weights: Mapping[str, torch.Tensor]) -> Weights:
    """Names without `_orig_mod.`, which compiled modules add anywhere, and `module.`, which wrappers add in front."""
    result = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): weights[name] for name in weights}
    if len(result) < len(weights):
        raise ValueError("`checkpoint` holds weights whose names differ in `module.` or `_orig_mod.` alone.")
    return result
