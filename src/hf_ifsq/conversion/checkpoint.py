"""The content of official checkpoint files: telling their format, choosing and loading their weights."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from .reading import has_tensors, is_table


# Entries that hold tensors, but none of the model.
TRAINING_STATE = (
    r"(\w+_)?(opt|optim|optimizers?|schedulers?|scaler|rng|random)(_(states?|gen|disc|[dg]|\d+))*|sampler_states?"
)

# What else comes as such a file: names, of weights or of entries, that tell it.
LOOKALIKES = {
    "a text-conditional model of LlamaGen, of which class-conditional ones alone convert": (
        "cls_embedding.cap_proj.fc1.weight",
    ),
    "the state of an optimizer, beside which LlamaGen writes the weights as `consolidated.pth`": ("param_groups",),
    "an autoencoder such as that of VQGAN, latent diffusion, VA-VAE or VAR": ("encoder.mid.block_1.conv1.weight",),
    "a tokenizer of the iFSQ repository without scalar quantization": ("encoder.mid_block.0.conv1.weight",),
    "the generator model of VAR": ("pos_1LC", "lvl_embed.weight"),
    "a model that needs no conversion, but `from_pretrained`": ("encoder.mid_block.resnets.0.conv1.weight",),
    "an AR model that needs no conversion, but `from_pretrained`": ("model.embed_classes.weight",),
    "a diffusion transformer that needs no conversion, but `from_pretrained`": ("time_embed.linear_1.weight",),
}

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
    # The first is that of the official trainer, and the others are what the official samplers read as well.
    raw_entries: tuple[str, ...] = ("model", "module", "state_dict")
    ema_entry: str = "ema"
    # Sets of weights to take if none is asked for: the first that the file has.
    default_weights: tuple[str, ...] = ("ema", "raw")
    # What else the official trainer writes. The model needs nothing of it but `config` and `args`, if they are there.
    other_entries: tuple[str, ...] = ()
    # Names of the config where it is a file beside the checkpoint, which must be there.
    config_files: tuple[str, ...] = ()


def recognize_format(path: Path, entries: dict[str, Any], formats: Iterable[CheckpointFormat]) -> CheckpointFormat:
    """The format of a file, by the names of its weights."""
    tables = (
        {"": entries} if is_table(entries) else {name: entry for name, entry in entries.items() if is_table(entry)}
    )
    names = {entry: set(map(_without_prefix, table)) for entry, table in tables.items()}
    for known in formats:
        for entry in ("", *known.raw_entries, known.ema_entry):
            if names.get(entry, set()).issuperset(known.telltales):
                return known
    everything = set(entries).union(*names.values())
    looks = [description for description, telltales in LOOKALIKES.items() if everything.issuperset(telltales)]
    listing = "\n".join(
        f"- {known.name}: weights {list(known.telltales)} under `{known.raw_entries[0]}` or `{known.ema_entry}`, or "
        "alone"
        for known in formats
    )
    first_weights = {entry: list(table)[:3] for entry, table in tables.items() if entry}
    raise ValueError(
        f"`checkpoint` {path} is of no known format{f', and looks like {looks[0]}' if looks else ''}. Known are\n"
        f"{listing}\nThe file has {len(entries)} entries: {list(entries)[:10]}"
        + (f", and in them weights such as {first_weights}." if first_weights else ".")
    )


def select_weights(
    path: Path, entries: dict[str, Any], source: CheckpointFormat, weights: Literal["ema", "raw"] | None
) -> tuple[Weights, str | None]:
    """A set of weights of a file, and the entry that it is from: `None` if the file is a bare set of weights."""
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"`weights` must be 'ema' or 'raw', got {weights!r}.")
    if is_table(entries):
        if weights is not None:
            raise ValueError(
                f"`weights` must be left out for {path}: it holds one set of weights and does not say which, got "
                f"{weights!r}."
            )
        return Weights(_without_prefixes(entries), source.model_class), None
    raw_entry = next((name for name in source.raw_entries if name in entries), source.raw_entries[0])
    names = {"ema": source.ema_entry, "raw": raw_entry}
    known = sorted((*names.values(), *source.other_entries))
    unknown = [
        name
        for name, entry in entries.items()
        if name not in names.values() and not _is_training_state(name, source.other_entries) and has_tensors(entry)
    ]
    if unknown:
        raise ValueError(f"`checkpoint` {path} has entries {unknown}; those of {source.name} are {known}.")
    if weights is None and is_table(entries.get(names["ema"])) and config_value(entries, "args.ema") is False:
        raise ValueError(
            f"`weights` must be given for {path}, got None: it has weights under `{names['ema']}`, but by its `args` "
            "it was trained without averaging."
        )
    choices = source.default_weights if weights is None else (weights,)
    for name in (names[choice] for choice in choices):
        table = entries.get(name)
        if is_table(table):
            return Weights(_without_prefixes(table), source.model_class), name
        # Training without a moving average may write an empty one.
        if has_tensors(table):
            raise ValueError(f"`checkpoint` {path} must have weights by their names under `{name}`, got others.")
    other = "raw" if "ema" in choices else "ema"
    raise ValueError(
        f"`checkpoint` {path} has no weights under `{names[choices[0]]}`: ask for those under `{names[other]}` by "
        f"`weights` {other!r}."
    )


def config_value(config: Mapping[str, Any], path: str) -> Any:
    """A value in dictionaries of dictionaries, by its keys with dots between them; `None` where there is none."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


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
        "of another type": [
            f"{name} of {weight.dtype}"
            for name, weight in weights.items()
            if name in shapes and not weight.is_floating_point()
        ],
        "not finite": [
            name for name, weight in weights.items() if name in shapes and not weight.float().isfinite().all()
        ],
    }
    found = [f"{len(names)} {kind}: {names[:3]}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"The weights of `checkpoint` do not fit {type(model).__name__}. {'; '.join(found)}.")
    state = {name: torch.cat([weights[part].float() for part in officials]) for name, officials in parts.items()}
    model.load_state_dict(state, assign=True)


def _is_training_state(name: object, other_entries: Sequence[str]) -> bool:
    """Whether an entry, or the one that it is in, is among those that a trainer keeps for itself."""
    outer = str(name).split(".")[0]
    return name in other_entries or outer in other_entries or re.fullmatch(TRAINING_STATE, outer) is not None


def _without_prefix(name: str) -> str:
    """A name without `_orig_mod.`, which compiled modules add anywhere, and `module.`, which wrappers add in front."""
    return re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))


def _without_prefixes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {_without_prefix(name): weight for name, weight in weights.items()}
    if len(result) < len(weights):
        raise ValueError("`checkpoint` holds weights whose names differ in `module.` or `_orig_mod.` alone.")
    return result
