"""Official checkpoint files: reading them, telling their format, choosing and loading their weights."""

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel


# Patterns and their replacements, applied one after the other to our name of a weight to get the official one.
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


class Weights(dict[str, torch.Tensor]):
    """Weights by their official names, to be loaded into a class whose sizes are read from them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], model_class: type):
        super().__init__(tensors)
        self.model_class = model_class

    def size(self, name: str, axis: int) -> int:
        """Size of a weight along an axis."""
        if name not in self or self[name].ndim <= axis:
            fit = self.model_class.__name__
            raise ValueError(f"The weights of `checkpoint` do not fit {fit}. 1 missing or misshapen: {[name]}.")
        return self[name].shape[axis]

    def count(self, pattern: str) -> int:
        """Number of different indices, the group of `pattern`, at the start of names: of layers, blocks, factors."""
        return len({match[1] for name in self if (match := re.match(pattern, name))})


@dataclass(frozen=True)
class CheckpointFormat:
    """One format of official checkpoints. `outer.inner` names an entry of a dictionary in the file."""

    name: str
    # Names of weights that together occur in no other format.
    telltales: tuple[str, ...]
    model_class: type
    # Takes the weights, the config, and the `options` as keyword arguments.
    convert: Callable[..., ModelMixin | PreTrainedModel]
    options: tuple[str, ...] = ()
    raw_entry: str = "model"
    ema_entry: str = "ema"
    # Sets of weights to take if none is asked for: the first that the file has.
    default_weights: tuple[str, ...] = ("ema", "raw")
    # What else a file may hold. The model needs nothing of it but `config`, if it is there.
    other_entries: tuple[str, ...] = ()
    # Names of the config where it is a file beside the checkpoint, which must be there.
    config_files: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """
    Entries of a file of `torch.save` or safetensors, or the tensors of a bare set of weights; `outer.inner` where an
    entry is a dictionary of sets of weights. No code of the file is run, and tensors stay on disk until used.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint` must be a file, but there is none at {path}.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Files of the time before torch 1.6 are not zip archives and cannot be mapped into memory.
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
    entries: dict[str, Any] = {}
    for outer, entry in content.items():
        if isinstance(entry, dict) and any(map(_is_table, entry.values())):
            entries.update({f"{outer}.{inner}": value for inner, value in entry.items()})
        else:
            entries[outer] = entry
    return entries


def recognize_format(path: Path, entries: dict[str, Any], formats: Iterable[CheckpointFormat]) -> CheckpointFormat:
    """The format of a file, by the names of its weights."""
    for known in formats:
        for table in (entries, entries.get(known.raw_entry), entries.get(known.ema_entry)):
            if _is_table(table) and set(known.telltales) <= set(_without_prefixes(table)):
                return known
    listing = "\n".join(
        f"- {known.name}: weights {list(known.telltales)} under `{known.raw_entry}` or `{known.ema_entry}`, or alone"
        for known in formats
    )
    first_weights = {name: list(table)[:3] for name, table in entries.items() if _is_table(table)}
    raise ValueError(
        f"`checkpoint` {path} is of no known format. Known are\n{listing}\nThe file has {len(entries)} entries: "
        f"{list(entries)[:10]}" + (f", and in them weights such as {first_weights}." if first_weights else ".")
    )


def select_weights(
    path: Path, entries: dict[str, Any], source: CheckpointFormat, weights: Literal["ema", "raw"] | None
) -> tuple[Weights, str | None]:
    """A set of weights of a file, and the entry that it is from: `None` if the file is a bare set of weights."""
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"`weights` must be 'ema' or 'raw', got {weights!r}.")
    if _is_table(entries):
        if weights is not None:
            raise ValueError(
                f"`weights` must be left out for {path}: it holds one set of weights and does not say which, got "
                f"{weights!r}."
            )
        return Weights(_without_prefixes(entries), source.model_class), None
    names = {"ema": source.ema_entry, "raw": source.raw_entry}
    known = sorted((*names.values(), *source.other_entries))
    unknown = [name for name in entries if name not in known]
    if unknown:
        raise ValueError(f"`checkpoint` {path} has entries {unknown}; those of {source.name} are {known}.")
    choices = source.default_weights if weights is None else (weights,)
    for name in (names[choice] for choice in choices):
        table = entries.get(name)
        # Training without a moving average may write an empty one.
        if _is_table(table):
            return Weights(_without_prefixes(table), source.model_class), name
    other = "raw" if "ema" in choices else "ema"
    raise ValueError(
        f"`checkpoint` {path} has no weights under `{names[choices[0]]}`: ask for those under `{names[other]}` by "
        f"`weights` {other!r}."
    )


def load_exactly(model: nn.Module, weights: Mapping[str, torch.Tensor], rules: Rules, dropped: str = "") -> None:
    """
    Fill a model, whose parameters may be without storage, with copies in float32 of weights that fit it one to one.
    The rules may lead to several names with `|` between them, for weights of equal size to be put one below the other.
    The model has no use for names that match `dropped`.
    """
    parts, shapes = {}, {}
    for name, weight in model.state_dict().items():
        officials = name
        for pattern, replacement in rules:
            officials = re.sub(pattern, replacement, officials)
        parts[name] = officials.split("|")
        shapes.update(dict.fromkeys(parts[name], (weight.shape[0] // len(parts[name]), *weight.shape[1:])))
    problems = {
        "missing": [name for name in shapes if name not in weights],
        "unexpected": [name for name in weights if name not in shapes and not re.fullmatch(dropped, name)],
        "misshapen": [
            f"{name} of shape {tuple(weight.shape)} instead of {shapes[name]}"
            for name, weight in weights.items()
            if name in shapes and weight.shape != shapes[name]
        ],
        "not finite": [name for name, weight in weights.items() if name in shapes and not weight.isfinite().all()],
    }
    found = [f"{len(names)} {kind}: {names[:3]}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"The weights of `checkpoint` do not fit {type(model).__name__}. {'; '.join(found)}.")
    state = {name: torch.cat([weights[part].float() for part in officials]) for name, officials in parts.items()}
    model.load_state_dict(state, assign=True)


def _is_table(entry: object) -> TypeGuard[dict[str, torch.Tensor]]:
    items = entry.items() if isinstance(entry, dict) else ()
    return bool(items) and all(isinstance(name, str) and torch.is_tensor(value) for name, value in items)


def _without_prefixes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without `_orig_mod.`, which compiled modules add anywhere, and `module.`, which wrappers add in front."""
    result = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): weights[name] for name in weights}
    if len(result) < len(weights):
        raise ValueError("`checkpoint` holds weights whose names differ in `module.` or `_orig_mod.` alone.")
    return result
