"""The log of a training run and the pictures of its validations."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from PIL import Image

from .output_folder import PARTIAL


LOG_FILE = "training_log.jsonl"
PICTURE_NAME = re.compile(r"(?:reconstructions|samples)-(\d{7,})\.png")


class TrainingLog:
    """
    Entries in `training_log.jsonl`, pictures in `validation/`, and both in the tracker of an accelerator. What an
    earlier run has left is removed: all of it, or for a resumed run what is after the step that it resumes from.

    Args:
        folder (`pathlib.Path`): where the log is.
        accelerator ([`~accelerate.Accelerator`]): its main process writes.
        resumed_step (`int`, *optional*): the step that a run resumes from.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, resumed_step: int | None = None):
        self.file, self.pictures, self.accelerator = folder / LOG_FILE, folder / "validation", accelerator
        # The metrics in each entry of the step that is resumed from.
        self._resumed_step, self._written = resumed_step, list[set[str]]()
        if accelerator.is_main_process:
            self._cut(-1 if resumed_step is None else resumed_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write an entry."""
        self.accelerator.log(dict(metrics), step=step)
        entry = {"step": step, **metrics}
        # A resumed run may repeat the validation of the step that it resumes from.
        repeated = step == self._resumed_step and set(entry) in self._written
        if self.accelerator.is_main_process and not repeated:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def write_images(self, step: int, name: str, images: list[Image.Image], columns: int) -> None:
        """Write a grid of images."""
        if not self.accelerator.is_main_process:
            return
        self.pictures.mkdir(exist_ok=True)
        grid = make_image_grid(images, rows=len(images) // columns, cols=columns)
        grid.save(self.pictures / f"{name}-{step:07d}.png")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(grid.convert("RGB"))[None]}, step=step, **options)

    def _cut(self, last_step: int) -> None:
        for picture in self.pictures.glob("*.png"):
            match = PICTURE_NAME.fullmatch(picture.name)
            if match and int(match[1]) > last_step:
                picture.unlink()
        if not self.file.is_file():
            return
        # The last line may be half written if the run was killed.
        lines = [line for line in self.file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        entries = [entry for entry in map(json.loads, lines) if entry["step"] <= last_step]
        partial = self.file.with_name(f"{PARTIAL}{LOG_FILE}")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        partial.replace(self.file)
        self._written = [set(entry) for entry in entries if entry["step"] == last_step]
