"""What carries state in a training run: accelerator, moving average, checkpoints, position in the data, log, Hub."""

import contextlib
import copy
import importlib.util
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import (
    set_seed,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, upload_folder
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .checkpoints import STATE_FILE, Checkpoints, load_state, read_state, report_changes, run_settings
from .data import ResumableSampler, collate
from .launching import make_accelerator
from .log import TrainingLog
from .model_card import without_local_paths
from .optimization import kept_settings, resume_schedule
from .output_folder import NOT_UPLOADED, lock_folder, remove_partial, written_whole


logger = get_logger(__name__)


@dataclass
class TrainingRun:
    """
    One run of a training script: it starts or resumes, counts optimizer steps, and keeps all that a resumed run needs
    to end bit-equal to an uninterrupted one.

    A script gets its data from `dataloader`, hands all that it trains to `prepare`, calls `record` after each forward
    pass and `end_step` after each optimizer step. At the end it calls `save` at once, and does all else, `finish` the
    last, within `after_training`.

    Args:
        output_dir (`str`): where everything is written.
        arguments (`Mapping[str, Any]`, *optional*):
            all arguments of the script, for the tracker, and for a resumed run to tell which of them have changed.
        others: as in [`~hf_ifsq.training.arguments.TrainingArguments`].

    Attributes:
        accelerator ([`~accelerate.Accelerator`]): devices, processes, mixed precision, gradient accumulation.
        global_step (`int`): optimizer steps done.
        saved_model (`ModelMixin` or `PreTrainedModel`):
            known after `prepare`: what is validated, saved and pushed. It is a plain model beside the trained one, in
            evaluation mode and in the precision of its weights, whatever wrappers of autocast, compilation or several
            processes the trained one is in. It holds the moving average or, without one, the very weights that train.
    """

    output_dir: str
    seed: int = 0
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 100
    max_train_steps: int | None = None
    mixed_precision: str | None = None
    dataloader_num_workers: int = 0
    use_ema: bool = False
    ema_decay: float = 0.9999
    logging_steps: int = 10
    validation_steps: int = 1000
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    report_to: str = "none"
    tracker_project_name: str = "hf-ifsq"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise ImportError(f"`report_to` {self.report_to!r} needs its package: `pip install {self.report_to}`.")
        self.folder = Path(self.output_dir)
        self.accelerator = make_accelerator(
            self.output_dir, self.gradient_accumulation_steps, self.mixed_precision, self.report_to
        )
        logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
        # The same weights on all processes, the moving average of which is not distributed.
        set_seed(self.seed)
        self._lock = contextlib.ExitStack()
        if self.accelerator.is_main_process:
            self._lock.enter_context(lock_folder(self.folder))
            remove_partial(self.folder)
        self.accelerator.wait_for_everyone()
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._ema: EMAModel | None = None
        self._saved_model: Any = None
        self._data: dict[str, Any] = {}
        self._hashes: dict[str, str] = {}
        self._unwritten: tuple[dict[str, float], bool] | None = None
        self.checkpoints = Checkpoints(self.folder, self.checkpoints_total_limit)
        self._checkpoint = self.checkpoints.find(self.resume_from_checkpoint, self.accelerator)
        self._state = read_state(self._checkpoint)
        self.global_step, self.samples_seen = self._state["global_step"], self._state["samples_seen"]
        self.checkpoints.refuse_later(self.global_step)
        self.accelerator.wait_for_everyone()
        self.repo_id: str | None = None
        if self.accelerator.is_main_process and self.push_to_hub:
            name = self.hub_model_id or self.folder.resolve().name
            self.repo_id = create_repo(name, private=self.hub_private_repo, exist_ok=True).repo_id
        if self.report_to != "none":
            config = {name: str(without_local_paths(value)) for name, value in self.arguments.items()}
            self.accelerator.init_trackers(self.tracker_project_name, config=config)

    @property
    def model_name(self) -> str:
        """What the result is called for others: its repository on the Hub if it is pushed, or else its folder."""
        return self.repo_id or without_local_paths(self.output_dir)

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step."""
        return self.train_batch_size * self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def num_steps(self) -> int:
        """Optimizer steps to do. Where epochs are counted they are known after `dataloader`."""
        if self.max_train_steps is None:
            raise RuntimeError("The number of steps is not known before `dataloader` was called.")
        return self.max_train_steps

    @property
    def saved_model(self) -> Any:
        """See above."""
        if self._saved_model is None:
            raise RuntimeError("`saved_model` is not there before `prepare` was called.")
        return self._saved_model

    def facts(self) -> dict[str, str]:
        """Steps, batch, precision, averaging and seed, for the model card."""
        precision = self.accelerator.mixed_precision
        return {
            "steps": f"{self.global_step:,}",
            "images per step": f"{self.global_batch_size:,}",
            "precision": "fp32" if precision == "no" else precision,
            "averaging": f"EMA of {self.ema_decay}" if self.use_ema else "none",
            "seed": f"{self.seed}",
        }

    def dataloader(self, dataset: Dataset) -> DataLoader:
        """
        The rest of the shuffled stream over training rows, read by `(index, position)`, that this run has still to
        read: as many batches as there are forward passes to come.
        """
        count, batch_size = len(dataset), self.global_batch_size  # type: ignore[arg-type]  # `Dataset` has no length
        self._data = {"num_images": count, "data_fingerprint": getattr(dataset, "fingerprint", None)}
        if self.max_train_steps is None:
            # A resumed run may take more or fewer images a step than the one before.
            images_to_come = max(0, self.num_train_epochs * count - self.samples_seen)
            self.max_train_steps = self.global_step + math.ceil(images_to_come / batch_size)
        stop = self.samples_seen + (self.num_steps - self.global_step) * batch_size
        logger.info(f"{count} images, {batch_size} per step, steps {self.global_step} to {self.num_steps}.")
        sampler = ResumableSampler(count, self.seed, self.samples_seen, stop)
        options = {"persistent_workers": self.dataloader_num_workers > 0, "collate_fn": collate}
        return self._loader(dataset, sampler=sampler, **options)

    def evaluation_dataloader(self, dataset: Dataset) -> DataLoader:
        """
        A prepared pass over a dataset in its order, for `accelerator.gather_for_metrics`. It leaves the global random
        states alone, so that a run resumed after a validation goes on as if it had done it.
        """
        return self.accelerator.prepare(self._loader(dataset, collate_fn=collate))

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        # Seeds of the workers, which use none: without a generator each new loader would advance the global one.
        options |= {"num_workers": self.dataloader_num_workers, "generator": torch.Generator()}
        return DataLoader(dataset, batch_size=self.train_batch_size, **options)

    def prepare(
        self,
        model: nn.Module,
        *others: Any,
        saved: ModelMixin | PreTrainedModel | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> tuple:
        """
        Prepare the trained model and whatever goes with it (optimizers, schedules, dataloader, further trained
        modules) for the devices, make `saved_model` of `saved`, by default of the model itself, and load the
        checkpoint to resume from, if any. Its training must have had the same `hashes`, of the frozen models that the
        trained one learns from. Gives all but `saved` and `hashes`, prepared.
        """
        self._hashes = {f"{name}_sha256": value for name, value in (hashes or {}).items()}
        source = model if saved is None else saved
        model.to(self.accelerator.device)
        # Made before the trained model is wrapped in anything.
        shared = () if self.use_ema else (*source.parameters(), *source.buffers())
        self._saved_model = copy.deepcopy(source, {id(tensor): tensor for tensor in shared}).eval()
        self._trained_parameters = list(source.parameters())
        if self.use_ema:
            self.saved_model.requires_grad_(False)
            self._ema = EMAModel(self.saved_model.parameters(), decay=self.ema_decay, foreach=True)
            self._ema.shadow_params = list(self.saved_model.parameters())
        prepared = self.accelerator.prepare(model, *others)
        # Now that all have the same weights, dropout may differ.
        set_seed(self.seed, device_specific=True)
        if self._checkpoint is not None:
            self._load_checkpoint(self._checkpoint, prepared)
        # Not before all else has gone well: it removes the log of an earlier run.
        self._log = TrainingLog(self.folder, self.accelerator, None if self._checkpoint is None else self.global_step)
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
            model_changed (`bool`, *optional*, defaults to `True`): whether it was the model's, not its adversary's.
            tokens_per_image (`int`, *optional*):
                to log `tokens_per_second` in place of `images_per_second`: throughput of all processes since the last
                entry, without the time of checkpoints and of what is `untimed`.

        Raises:
            FloatingPointError: if a recorded metric is no longer finite.
        """
        self.global_step += 1
        self.samples_seen += self.global_batch_size
        if self._ema is not None and model_changed:
            self._ema.step(self._trained_parameters)
        self._progress_bar.update()
        checkpoint_due = self.global_step % self.checkpointing_steps == 0
        # A checkpoint is logged too: it is only written of a run that has not diverged.
        if checkpoint_due or self.global_step % self.logging_steps == 0 or self.global_step == self.num_steps:
            means = self.accelerator.reduce(
                {name: torch.stack(values).mean() for name, values in self._sums.items()}, reduction="mean"
            )
            metrics = {name: value.item() for name, value in means.items()}
            self._sums.clear()
            if not all(map(math.isfinite, metrics.values())):
                raise FloatingPointError(f"Training diverged at step {self.global_step}: {metrics}.")
            self._progress_bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
            # The metrics are here, and so the device has done the steps.
            rate = (self.samples_seen - self._samples_logged) / (time.perf_counter() - self._logged_at)
            unit = "images" if tokens_per_image is None else "tokens"
            metrics |= {"learning_rate": learning_rate, f"{unit}_per_second": rate * (tokens_per_image or 1)}
            self._unwritten = (metrics, checkpoint_due)
            # After the last step the result comes first.
            if self.global_step < self.num_steps:
                self._write()
            self._samples_logged, self._logged_at = self.samples_seen, time.perf_counter()

    def _write(self) -> None:
        if self._unwritten is not None:
            (metrics, checkpoint_due), self._unwritten = self._unwritten, None
            self.log(metrics)
            if checkpoint_due:
                self._save_checkpoint()

    @property
    def validation_due(self) -> bool:
        """
        Whether to validate now: every `validation_steps`, but not at the end, where the result is saved first. A
        resumed run asks before its first step too, for the run before it may have been stopped in its validation.
        """  # noqa: D205
        return 0 < self.global_step < self.num_steps and self.global_step % self.validation_steps == 0

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Leave the time of what happens in it, such as a validation, out of the throughput."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._logged_at += time.perf_counter() - start

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write metrics of the current step to `training_log.jsonl` and to the tracker."""
        self._log.write(self.global_step, metrics)

    def log_images(self, name: str, images: list[Image.Image], columns: int) -> None:
        """Write a grid of images of the current step to `validation/` and to a tracker that takes images."""
        self._log.write_images(self.global_step, name, images, columns)

    def save(self, result: ModelMixin | DiffusionPipeline) -> None:
        """
        Write a model or pipeline to `output_dir`, in one process, so that it is there as a whole or not at all, and
        then the log and the checkpoint of the last step.
        """  # noqa: D205
        if self.accelerator.is_main_process:
            with written_whole(self.folder) as folder:
                result.save_pretrained(folder)
            # That of an earlier result says what is no longer true.
            (self.folder / "README.md").unlink(missing_ok=True)
        # Another process may fail in what comes next, and all are ended then.
        self.accelerator.wait_for_everyone()
        with self.after_training():
            self._write()

    @contextlib.contextmanager
    def after_training(self) -> Iterator[None]:
        """What comes after the last step and `save`; an error in it says where the trained model is."""
        try:
            yield
        except BaseException as error:
            error.add_note(
                f"The training is done, and its model is in {self.folder}: only what came after has failed."
            )
            raise

    def finish(self, model_card: str) -> None:
        """End the run: write the model card beside the saved model, push both if asked for, close trackers."""
        self._progress_bar.close()
        if self.accelerator.is_main_process:
            (self.folder / "README.md").write_text(model_card, encoding="utf-8")
            if self.repo_id is not None:
                upload_folder(
                    repo_id=self.repo_id,
                    folder_path=self.folder,
                    commit_message=f"Training, {self.global_step} steps",
                    ignore_patterns=NOT_UPLOADED,
                )
        self.accelerator.end_training()
        self._lock.close()

    def _save_checkpoint(self) -> None:
        with self.checkpoints.write(self.global_step, self.accelerator) as folder:
            self.accelerator.save_state(str(folder))
            if self.accelerator.is_main_process:
                self.saved_model.save_pretrained(folder / "model")
                state = {"global_step": self.global_step, "samples_seen": self.samples_seen, **self._run_settings}
                if self._ema is not None:
                    state["ema_steps"] = self._ema.optimization_step
                (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    @property
    def _run_settings(self) -> dict[str, Any]:
        return run_settings(
            self.saved_model,
            self.arguments,
            self._hashes,
            num_processes=self.accelerator.num_processes,
            gradient_accumulation_steps=self.accelerator.gradient_accumulation_steps,
            precision=self.accelerator.mixed_precision,
            **self._data,
        )

    def _load_checkpoint(self, path: Path, prepared: tuple) -> None:
        logger.info(f"Resuming from {path.name}.")
        report_changes(path, self._state, self._run_settings, self.use_ema)
        optimizers = [each for each in prepared if isinstance(each, AcceleratedOptimizer)]
        num_processes = self._state.get("facts", {}).get("num_processes", self.accelerator.num_processes)
        # The learning rate and so on are those of this run, not those of the checkpoint.
        with kept_settings(optimizers):
            load_state(path, self.accelerator, num_processes, self.saved_model if self._ema is not None else None)
        if self._ema is not None:
            self._ema.optimization_step = self._state["ema_steps"]
        for schedule in prepared:
            if isinstance(schedule, AcceleratedScheduler):
                # Accelerate counts a step once for each process.
                num_steps = schedule.scheduler.last_epoch // num_processes
                resume_schedule(schedule.scheduler, num_steps * self.accelerator.num_processes)
