"""The folder of the checkpoints of a training run."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger


logger = get_logger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "training_state.json"


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

    def find(self, name: str | None) -> Path | None:
        """The checkpoint to resume from: a folder, here or anywhere, or `latest` for the last one here, if any."""
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
        partial, final = (self.output_dir / f"{prefix}checkpoint-{step}" for prefix in ("partial-", ""))
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        yield partial
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            if self.total_limit is not None:
                for _, path in [*self][: -self.total_limit]:
                    shutil.rmtree(path)
        accelerator.wait_for_everyone()


def read_state(checkpoint: Path | None) -> dict[str, int]:
    """The counters in a checkpoint, or those of a new run."""
    if checkpoint is None:
        return {"global_step": 0, "samples_seen": 0}
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
