"""The folder of the checkpoints of a training run."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, load
from diffusers.models.modeling_utils import ModelMixin
from transformers import PreTrainedModel

from .model_card import without_local_paths
from .output_folder import PARTIAL, reset_permissions


logger = get_logger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "training_state.json"

# Arguments and entries of a config that have no part in what is trained.
OPERATIONAL = ("config", "output_dir", "resume_from_checkpoint")
ABOUT_FILES = ("architectures", "dtype", "transformers_version")

# What of a model's config is about training alone and may change on the way.
TRAINING_SETTINGS = ("dropout", "class_dropout_prob", "noise_prob")


@dataclass(frozen=True)
class Checkpoints:
    """
    Folders `checkpoint-N`, each of which is there as a whole or not at all and has a `training_state.json`. With a
    `total_limit` the oldest are removed.
    """

    output_dir: Path
    total_limit: int | None = None

    def __iter__(self) -> Iterator[tuple[int, Path]]:
        """Steps and folders, the oldest first."""
        matches = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in self.output_dir.glob("checkpoint-*"))
        return iter(sorted((int(match[1]), path) for match, path in matches if match))

    def find(self, name: str | None, accelerator: Accelerator) -> Path | None:
        """
        The checkpoint to resume from: a folder, here or anywhere, or `latest` for the last one here, if any. The main
        process decides for all: others may see a folder later, or not at all, which is a `ValueError`.
        """  # noqa: D205
        (path,) = broadcast_object_list([self._find(name) if accelerator.is_main_process else None])
        if path is not None and not path.is_dir():
            raise ValueError(
                f"`output_dir` must be on a disk that all processes share, but {path} is not there for the process "
                f"{accelerator.process_index}."
            )
        return path

    def _find(self, name: str | None) -> Path | None:
        paths = [path for _, path in self]
        if name is None:
            return None
        if name == "latest":
            if not paths:
                logger.info("No checkpoint in `output_dir` to resume from: starting a new run.")
            return paths[-1] if paths else None
        for path in (self.output_dir / name, Path(name)):
            if (path / STATE_FILE).is_file():
                return path
        raise ValueError(
            f"`resume_from_checkpoint` must be `latest` or a checkpoint folder, but there is none at {name!r} nor in "
            f"{self.output_dir}, which has {[path.name for path in paths]}."
        )

    def refuse_later(self, step: int) -> None:
        """Raise a `ValueError` if there are checkpoints after a step: a run from there would mix with another."""
        later = [path.name for number, path in self if number > step]
        if later:
            raise ValueError(
                f"`output_dir` {self.output_dir} has checkpoints beyond step {step}, where this run starts: {later}. "
                "Give `--resume_from_checkpoint latest`, remove them, or choose another folder."
            )

    @contextlib.contextmanager
    def write(self, step: int, accelerator: Accelerator) -> Iterator[Path]:
        """A folder for all processes to write to, which at the end becomes the checkpoint of that step."""
        # Under another name: a run killed meanwhile leaves no half checkpoint to resume from.
        partial, final = (self.output_dir / f"{prefix}checkpoint-{step}" for prefix in (PARTIAL, ""))
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        yield partial
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            reset_permissions(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            if self.total_limit is not None:
                for _, path in [*self][: -self.total_limit]:
                    # Under another name: a run killed meanwhile leaves no half checkpoint.
                    shutil.rmtree(path.rename(path.with_name(f"{PARTIAL}{path.name}")))
        accelerator.wait_for_everyone()


def read_state(checkpoint: Path | None) -> dict[str, Any]:
    """The counters of a checkpoint and what it was trained with, or the counters of a new run."""
    if checkpoint is None:
        return {"global_step": 0, "samples_seen": 0}
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return {"global_step": state["global_step"], "samples_seen": state["samples_seen"], **state}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(checkpoint, error) from error


def load_state(
    checkpoint: Path, accelerator: Accelerator, num_processes: int, average: ModelMixin | PreTrainedModel | None
) -> None:
    """
    Load what `accelerator` prepared, the random states of this process if the checkpoint is of as many processes, and
    the moving `average` into the model that holds it, if there is one.

    Raises:
        ValueError: if something in the checkpoint is missing, damaged or does not fit.
    """
    if num_processes == accelerator.num_processes:
        try:
            # `accelerate` would go on without them.
            load(checkpoint / f"random_states_{accelerator.process_index}.pkl")
        except Exception as error:  # The unpickler fails in any way on a damaged file.
            raise _unreadable(checkpoint, error, "the random states of this process are missing or damaged") from error
    try:
        if average is not None:
            average.load_state_dict(type(average).from_pretrained(checkpoint / "model").state_dict())
        accelerator.load_state(str(checkpoint))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _unreadable(checkpoint, error) from error


def run_settings(model: Any, arguments: Mapping[str, Any], hashes: Mapping[str, str], **facts: Any) -> dict[str, Any]:
    """
    What a run is trained with, as its checkpoints store it: arguments, other `facts`, the config of the model, and the
    hashes of the frozen models that it learns from.
    """  # noqa: D205
    config = model.config.to_dict() if isinstance(model, PreTrainedModel) else dict(model.config)
    config = {**config, **hashes}
    values = {
        "arguments": {name: _shown(arguments[name]) for name in arguments if name not in OPERATIONAL},
        "config": {name: config[name] for name in config if name[0] != "_" and name not in ABOUT_FILES},
        "facts": facts,
    }
    # As it is read back: with lists for tuples and with strings for integer keys.
    return json.loads(json.dumps(values, default=str))


def report_changes(checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any], use_ema: bool) -> None:
    """
    Say what has changed since a checkpoint with the state `before`; `now` are the [`run_settings`].

    Raises:
        ValueError: if it has a moving average and the run has none, or the other way round, or if the config of the
            model is another, which the weights may fit all the same, or it learned from other frozen models.
    """
    has_average = "ema_steps" in before
    if use_ema != has_average:
        raise ValueError(
            f"`use_ema` is {use_ema}, but the checkpoint {checkpoint} has {'a' if has_average else 'no'} moving "
            "average: give the same, or begin a new run with its weights."
        )
    changes = {name: differences(before.get(name, {}), now[name]) for name in now}
    refused = [text for name, text in changes["config"].items() if name not in TRAINING_SETTINGS]
    if refused:
        raise ValueError(
            f"`resume_from_checkpoint` {checkpoint} is of another model: {', '.join(refused)}. Give the arguments of "
            "before, or begin a new run with its weights."
        )
    told = [*changes["arguments"].values(), *changes["facts"].values()]
    if told:
        logger.warning(f"Changed since {checkpoint.name}, and in effect from now on: {', '.join(told)}.")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Values that are others than before, as text, of the names that both have."""
    names = [name for name in now if name in before and before[name] != now[name]]
    return {name: f"`{name}` ({before[name]}, now {now[name]})" for name in names}


def _shown(value: Any) -> Any:
    """A value without the place of a folder on this machine, of which a few digits tell whether it is another."""
    shown = without_local_paths(value)
    return shown if shown == value else f"{shown} #{hashlib.sha256(str(value).encode()).hexdigest()[:6]}"


def _unreadable(
    checkpoint: Path, error: Exception, problem: str = "it is damaged, or of another training"
) -> ValueError:
    return ValueError(
        f"`resume_from_checkpoint` {checkpoint} cannot be resumed from: {problem} ({type(error).__name__}: {error})."
    )
