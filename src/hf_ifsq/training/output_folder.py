"""The folder that a run writes to: one run at a time, what is in it is whole, and others may read it."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


LOCK_FILE = ".lock"
# Before the name of what is not whole yet.
PARTIAL = "partial-"
PARTIAL_RESULT = f"{PARTIAL}result"
REPLACED = f"{PARTIAL}replaced-"

# Those of a model, and of the root of a pipeline, as the libraries call them.
MODEL_FILES = ["*config.json", "model_index.json", "diffusion_pytorch_model*.safetensors*", "model*.safetensors*"]

# What a result on the Hub does without.
NOT_UPLOADED = [LOCK_FILE, f"{PARTIAL}*", "checkpoint-*", "logs/*"]


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; a `ValueError` if one is in it. The lock of a killed process is void."""
    folder.mkdir(parents=True, exist_ok=True)
    # Another cell of a notebook is in the same process, and may go on after an error in the first.
    lock = FileLock(folder / LOCK_FILE, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"`output_dir` {folder} is in use by another run, which would mix with this one: wait for its end, or "
            "choose another folder."
        ) from None
    try:
        yield
    finally:
        # The file stays: removed, it would be another one for whoever locks it meanwhile.
        lock.release()


def remove_partial(folder: Path) -> None:
    """Remove what a killed run left unfinished in a folder, and put back what it was about to replace."""
    for path in folder.glob(f"{REPLACED}*"):
        original = folder / path.name.removeprefix(REPLACED)
        if not original.exists():
            path.rename(original)
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """
    A new folder to write a model or pipeline to, whose files and folders at the end take the places of those in
    `folder`; what an earlier one had besides is removed. A process that is killed meanwhile leaves nothing half
    written there, but what [`remove_partial`] clears up.
    """
    partial = folder / PARTIAL_RESULT
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        reset_permissions(partial)
        stale = _names_of_result(folder) - {path.name for path in partial.iterdir()}
        for path in sorted(partial.iterdir()):
            target, replaced = folder / path.name, folder / f"{REPLACED}{path.name}"
            if target.is_dir():
                target.rename(replaced)
            path.replace(target)
            shutil.rmtree(replaced, ignore_errors=True)
        for path in map(folder.joinpath, stale):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        remove_partial(folder)


def _names_of_result(folder: Path) -> set[str]:
    """What is in a folder of the model or pipeline that was saved there."""
    paths = [path for pattern in MODEL_FILES for path in folder.glob(pattern)]
    names = {path.name for path in paths}
    if "model_index.json" in names:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        names |= {name for name, value in index.items() if isinstance(value, list) and (folder / name).is_dir()}
    return names


def reset_permissions(folder: Path) -> None:
    """Give all files in a folder the rights of new files: those of safetensors are readable by their owner alone."""
    new_file = folder / f"{PARTIAL}file"
    new_file.touch()
    mode = new_file.stat().st_mode & 0o777
    new_file.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
