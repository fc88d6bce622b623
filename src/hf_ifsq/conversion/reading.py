"""Checkpoint files without running any code of theirs."""

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file


class Unread:
    """In place of an object of a class that torch does not read, so that nothing of that class is run."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __repr__(self) -> str:
        return "an object that is not read"


class UnreadArray(Unread):
    """In place of an array of NumPy, which may hold weights."""


# Of what a script may keep of its run, what torch does not read by itself and no conversion needs.
PATH_CLASSES = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
UNREAD_CLASSES = {
    "pathlib": PATH_CLASSES,
    "pathlib._local": PATH_CLASSES,
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
}

# With their names, these are other items than a caller's own in the list of torch, which stays as it was.
SAFE_GLOBALS: list[Any] = [
    # Parsed arguments, which take attributes and run nothing.
    (argparse.Namespace, "argparse.Namespace"),
    *(
        (UnreadArray if name == "_reconstruct" else Unread, f"{module}.{name}")
        for module, names in UNREAD_CLASSES.items()
        for name in names
    ),
]

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """
    Entries of a file of `torch.save` or safetensors, or the tensors of a bare set of weights; `outer.inner` where an
    entry is a dictionary of sets of weights. No code of the file is run, and tensors stay on disk until used. Parsed
    arguments become a dictionary.
    """
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        raise FileNotFoundError(f"`checkpoint` must be a file, but {path} is a folder, with the files {files[:10]}.")
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint` must be a file, but there is none at {path}.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Files of the time before torch 1.6 are not zip archives and cannot be mapped into memory.
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # On a damaged file, the unpickler fails in any way.
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit is None:
            raise ValueError(
                f"`checkpoint` {path} is damaged, or no file of `torch.save`, in its default pickle protocol, or of "
                "safetensors."
            ) from error
        # Not chained: the message of torch advises to run the code of the file.
        raise ValueError(
            f"`checkpoint` {path} must hold tensors, numbers, text, lists and dictionaries alone, but it holds "
            f"{culprit[1]}, and reading other objects can run code. If you trust the file, load it yourself and save "
            "it again without them, a model as its `state_dict()`."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"`checkpoint` {path} must hold a dictionary, got {type(content).__name__}.")
    entries: dict[str, Any] = {}
    for outer, entry in content.items():
        if isinstance(entry, argparse.Namespace):
            entries[outer] = vars(entry)
        elif isinstance(entry, dict) and any(map(is_table, entry.values())):
            entries.update({f"{outer}.{inner}": value for inner, value in entry.items()})
        else:
            entries[outer] = entry
    return entries


def is_table(entry: object) -> TypeGuard[dict[str, torch.Tensor]]:
    """Whether an entry is a set of weights by their names."""
    items = entry.items() if isinstance(entry, dict) else ()
    return bool(items) and all(isinstance(name, str) and torch.is_tensor(value) for name, value in items)


def has_tensors(entry: object) -> bool:
    """Whether there are tensors, or arrays, anywhere in an entry."""
    found: list[object] = [entry]
    seen: set[int] = set()
    while found:
        value = found.pop()
        if torch.is_tensor(value) or isinstance(value, UnreadArray):
            return True
        # A list of a pickle can hold itself.
        if isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            found.extend(value.values() if isinstance(value, dict) else value)
    return False
