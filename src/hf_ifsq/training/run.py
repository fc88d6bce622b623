"""What carries state in a training run: accelerator, moving average, checkpoints, position in the data, log, Hub."""

import contextlib
import importlib.util
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from huggingface_hub import create_repo, upload_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .arguments import TrainingArguments
from .data import ImageDataset, ResumableSampler


logger = get_logger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
LOG_FILE = "training_log.jsonl"
STATE_FILE = "training_state.json"


class TrainingRun:
    """
    One run of a training script: it starts or resumes, counts optimizer steps, and keeps all that a resumed run needs
    to end bit-equal to an uninterrupted one.

    The script calls, in this order, `dataloader`, `prepare`, and in its loop `record` after each forward pass and
    `end_step` after each optimizer step; at the end it saves its model under `averaged` and calls `finish`.

    Args:
        args ([`TrainingArguments`]): the script's arguments.

    Attributes:
        accelerator ([`~accelerate.Accelerator`]): devices, processes, mixed precision, gradient accumulation.
        global_step (`int`): optimizer steps done.
        max_train_steps (`int`): optimizer steps to do, known after `dataloader`.
        output_dir (`pathlib.Path`): where everything is written.

    Raises:
        ImportError: if the tracker in `report_to` is not installed.
        ValueError: if the checkpoint to resume from does not exist, if the output folder has checkpoints beyond where
            this run starts, or if processes share one model (FSDP, DeepSpeed).
    """

    def __init__(self, args: TrainingArguments):
        if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
            raise ImportError(f"`report_to` {args.report_to!r} needs its package: `pip install {args.report_to}`.")
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(str(self.output_dir), logging_dir=str(self.output_dir / "logs")),
        )
        logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
        distributed_type = self.accelerator.distributed_type
        if distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
            raise ValueError(
                f"Training runs on one or several devices by data parallelism, not by {distributed_type}."
            )
        set_seed(args.seed, device_specific=True)
        self.repo_id: str | None = None
        self.global_step = 0
        self.samples_seen = 0
        self.max_train_steps: int | None = None
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._checkpoint = self._find_checkpoint()
        if self._checkpoint is not None:
            state = json.loads((self._checkpoint / STATE_FILE).read_text(encoding="utf-8"))
            self.global_step, self.samples_seen = state["global_step"], state["samples_seen"]
        later = [path.name for path in self._checkpoints() if _step_of(path) > self.global_step]
        if later:
            raise ValueError(
                f"`output_dir` {self.output_dir} has checkpoints beyond step {self.global_step}, where this run "
                f"starts: {later}. Give `--resume_from_checkpoint latest`, remove them, or choose another folder."
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._cut_log()
            if args.push_to_hub:
                name = args.hub_model_id or self.output_dir.resolve().name
                self.repo_id = create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        if args.report_to != "none":
            config = {name: str(value) for name, value in vars(args).items()}
            self.accelerator.init_trackers(args.tracker_project_name, config=config)

    @property
    def model_name(self) -> str:
        """Where the result can be loaded from: its repository on the Hub if it is pushed, or else `output_dir`."""
        return self.repo_id or self.args.output_dir

    @property
    def global_batch_size(self) -> int:
        """Images an optimizer step."""
        forward_passes = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return self.args.train_batch_size * forward_passes

    def dataloader(self, dataset: ImageDataset) -> DataLoader:
        """
        The rest of the shuffled stream over `dataset` that this run has still to read. Sets `max_train_steps`.

        Args:
            dataset ([`ImageDataset`]): training images.

        Returns:
            `torch.utils.data.DataLoader`: as many batches as there are forward passes to come.
        """
        args = self.args
        steps_of_epochs = math.ceil(args.num_train_epochs * len(dataset) / self.global_batch_size)
        self.max_train_steps = args.max_train_steps or steps_of_epochs
        stop = self.samples_seen + (self.max_train_steps - self.global_step) * self.global_batch_size
        logger.info(
            f"{len(dataset)} images, {self.global_batch_size} a step, steps {self.global_step} to "
            f"{self.max_train_steps}."
        )
        return DataLoader(
            dataset,
            batch_size=args.train_batch_size,
            sampler=ResumableSampler(len(dataset), args.seed, self.samples_seen, stop),
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_num_workers > 0,
            # Seeds of the workers, which use none: without it each new loader would advance the global generator.
            generator=torch.Generator(),
        )

    def evaluation_dataloader(self, dataset: torch.utils.data.Dataset) -> DataLoader:
        """
        A prepared pass over a dataset in its order, for `accelerator.gather_for_metrics`. It leaves the global random
        states alone, so that a run resumed after a validation goes on as if it had done it.
        """
        loader = DataLoader(
            dataset,
            batch_size=self.args.train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),
        )
        return self.accelerator.prepare(loader)

    def prepare(self, model: nn.Module, *others: Any, saved: nn.Module | None = None) -> tuple[Any, ...]:
        """
        Prepare the trained model and whatever goes with it for the devices, start the moving average, and load the
        checkpoint to resume from, if any.

        Args:
            model (`torch.nn.Module`): the trained model.
            others: optimizers, learning-rate schedulers, dataloader and further trained modules.
            saved (`torch.nn.Module`, *optional*):
                the model that is averaged and saved, where `model` is a wrapper around it.

        Returns:
            `tuple`: all of them, prepared.
        """
        prepared = self.accelerator.prepare(model, *others)
        self._model = self.accelerator.unwrap_model(prepared[0]) if saved is None else saved
        self._ema = None
        if self.args.use_ema:
            self._ema = EMAModel(self._model.parameters(), decay=self.args.ema_decay, foreach=True)
        if self._checkpoint is not None:
            self._load_checkpoint(self._checkpoint)
        # Where the throughput is measured from; validations move the time.
        self._samples_logged, self._logged_at = self.samples_seen, time.perf_counter()
        self._progress_bar = tqdm(
            total=self.max_train_steps,
            initial=self.global_step,
            desc="Steps",
            disable=not self.accelerator.is_local_main_process,
        )
        return prepared

    def record(self, **metrics: torch.Tensor) -> None:
        """Take scalars of a forward pass into the log, where they are averaged over passes and processes."""
        for name, value in metrics.items():
            self._sums.setdefault(name, []).append(value.detach().float())

    def end_step(self, learning_rate: float, model_changed: bool = True, tokens_per_image: int | None = None) -> None:
        """
        Count an optimizer step: update the moving average, and write the log and a checkpoint where they are due.

        Args:
            learning_rate (`float`): the learning rate of the step, for the log.
            model_changed (`bool`, *optional*, defaults to `True`):
                whether the step was one of the model that is averaged, and not of its adversary.
            tokens_per_image (`int`, *optional*):
                to log `tokens_per_second` in place of `images_per_second`: the throughput of all processes since the
                last entry, without the time of validations and checkpoints.

        Raises:
            FloatingPointError: if a recorded metric is no longer finite.
        """
        args = self.args
        self.global_step += 1
        self.samples_seen += self.global_batch_size
        if self._ema is not None and model_changed:
            self._ema.step(self._model.parameters())
        self._progress_bar.update()
        checkpoint_due = self.global_step % args.checkpointing_steps == 0
        # A checkpoint is logged too: it is only written of a run that has not diverged.
        if checkpoint_due or self.global_step % args.logging_steps == 0 or self.global_step == self.max_train_steps:
            means = self.accelerator.reduce(
                {name: torch.stack(values).mean() for name, values in self._sums.items()}, reduction="mean"
            )
            metrics = {name: value.item() for name, value in means.items()}
            self._sums.clear()
            if not all(map(math.isfinite, metrics.values())):
                raise FloatingPointError(f"Training diverged at step {self.global_step}: {metrics}.")
            self._progress_bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
            self.log({**metrics, "learning_rate": learning_rate, **self._throughput(tokens_per_image)})
            if checkpoint_due:
                self._save_checkpoint()
            self._samples_logged, self._logged_at = self.samples_seen, time.perf_counter()

    def _throughput(self, tokens_per_image: int | None) -> dict[str, float]:
        """Since the last entry; called when the metrics are here, and so the device has done the steps."""
        rate = (self.samples_seen - self._samples_logged) / (time.perf_counter() - self._logged_at)
        if tokens_per_image is None:
            return {"images_per_second": rate}
        return {"tokens_per_second": rate * tokens_per_image}

    @property
    def validation_due(self) -> bool:
        """Whether to validate now: every `validation_steps` and at the end."""
        return self.global_step % self.args.validation_steps == 0 or self.global_step == self.max_train_steps

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """
        The unwrapped model for a while in evaluation mode, in the precision of its weights as whoever loads it would
        run it, and with averaged weights if there is a moving average.
        """
        start = time.perf_counter()
        was_training = self._model.training
        # Accelerate keeps the forward pass as it was before it was wrapped in autocast.
        autocast_forward = self._model.__dict__.get("forward")
        if autocast_forward is not None:
            self._model.forward = self._model._original_forward
        if self._ema is not None:
            self._ema.store(self._model.parameters())
            self._ema.copy_to(self._model.parameters())
        self._model.eval()
        try:
            yield self._model
        finally:
            self._model.train(was_training)
            if autocast_forward is not None:
                self._model.forward = autocast_forward
            if self._ema is not None:
                self._ema.restore(self._model.parameters())
            self._logged_at += time.perf_counter() - start

    def log(self, metrics: dict[str, float]) -> None:
        """Write metrics of the current step to `training_log.jsonl` and to the tracker."""
        self.accelerator.log(metrics, step=self.global_step)
        if self.accelerator.is_main_process:
            with open(self.output_dir / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.global_step, **metrics}) + "\n")

    def log_images(self, name: str, images: list[Image.Image], columns: int) -> None:
        """Write a grid of images of the current step to `validation/` and to a tracker that takes images."""
        if not self.accelerator.is_main_process:
            return
        folder = self.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        grid = make_image_grid(images, rows=len(images) // columns, cols=columns)
        grid.save(folder / f"{name}-{self.global_step:07d}.png")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                pixels = torch.frombuffer(bytearray(grid.convert("RGB").tobytes()), dtype=torch.uint8)
                values = {name: pixels.view(1, grid.height, grid.width, 3).numpy()}
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(values, step=self.global_step, **options)

    def finish(self, model_card: str) -> None:
        """
        End the run: write the model card beside the saved model, push both to the Hub if asked for, close trackers.

        Args:
            model_card (`str`): text of the `README.md`.
        """
        self._progress_bar.close()
        if self.accelerator.is_main_process:
            (self.output_dir / "README.md").write_text(model_card, encoding="utf-8")
            if self.args.push_to_hub:
                upload_folder(
                    repo_id=self.repo_id,
                    folder_path=self.output_dir,
                    commit_message=f"Training, {self.global_step} steps",
                    ignore_patterns=["*checkpoint-*", "logs/*"],
                )
        self.accelerator.end_training()

    def _find_checkpoint(self) -> Path | None:
        name = self.args.resume_from_checkpoint
        if name is None:
            return None
        if name == "latest":
            checkpoints = self._checkpoints()
            if not checkpoints:
                logger.info(f"No checkpoint in {self.output_dir} to resume from: starting a new run.")
            return checkpoints[-1] if checkpoints else None
        for path in (self.output_dir / name, Path(name)):
            if (path / STATE_FILE).is_file():
                return path
        raise ValueError(
            f"`resume_from_checkpoint` must be `latest` or a checkpoint folder, but there is none at {name!r} nor in "
            f"{self.output_dir}, which has {[path.name for path in self._checkpoints()]}."
        )

    def _checkpoints(self) -> list[Path]:
        """Checkpoints in the output folder, the oldest first."""
        paths = [path for path in self.output_dir.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
        return sorted(paths, key=_step_of)

    def _save_checkpoint(self) -> None:
        # Written under another name first: a run killed meanwhile leaves no half checkpoint to resume from.
        partial = self.output_dir / f"partial-checkpoint-{self.global_step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            if self._ema is not None:
                shadow = {str(index): weight for index, weight in enumerate(self._ema.shadow_params)}
                save_file(shadow, partial / "ema.safetensors")
            with self.averaged() as model:
                model.save_pretrained(partial / "model")
            state = {"global_step": self.global_step, "samples_seen": self.samples_seen}
            if self._ema is not None:
                state["ema_steps"] = self._ema.optimization_step
            (partial / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            final = self.output_dir / f"checkpoint-{self.global_step}"
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            if self.args.checkpoints_total_limit is not None:
                for path in self._checkpoints()[: -self.args.checkpoints_total_limit]:
                    shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def _load_checkpoint(self, path: Path) -> None:
        logger.info(f"Resuming from {path}.")
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        self.accelerator.load_state(str(path))
        if self._ema is not None:
            file = path / "ema.safetensors"
            if not file.is_file():
                raise ValueError(f"`use_ema` is set, but the checkpoint {path} was saved without a moving average.")
            shadow = load_file(file, device=str(self.accelerator.device))
            self._ema.shadow_params = [shadow[str(index)] for index in range(len(shadow))]
            self._ema.optimization_step = state["ema_steps"]

    def _cut_log(self) -> None:
        """Drop entries of an earlier run: all in a new run, those after the checkpoint in a resumed one."""
        file = self.output_dir / LOG_FILE
        if self._checkpoint is None:
            file.unlink(missing_ok=True)
        elif file.is_file():
            # The last line may be half written if the run was killed.
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= self.global_step]
            file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(checkpoint: Path) -> int:
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])
