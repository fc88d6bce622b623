import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from hf_ifsq.training.arguments import TrainingArguments, values_for
from hf_ifsq.training.model_card import make_model_card, without_local_paths
from hf_ifsq.training.optimization import make_optimizer
from hf_ifsq.training.run import TrainingRun


class Linear(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, size: int = 3):
        super().__init__()
        self.layer = nn.Linear(size, 1, bias=False)
        self.dropout = nn.Dropout(0.3)

    def forward(self, values):
        return self.layer(self.dropout(values))


class Numbers(Dataset):
    """Item (index, position) is a function of both."""

    def __len__(self):
        return 11

    def __getitem__(self, key):
        return torch.tensor([*key, 1.0]) / 11


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def start(tmp_path):
    def make(**overrides):
        arguments = {
            "dataset_name": "images",
            "output_dir": str(tmp_path / "out"),
            "train_batch_size": 2,
            "max_train_steps": 12,
            "learning_rate": 0.05,
            "logging_steps": 1,
            "checkpointing_steps": 100,
            "mixed_precision": "no",
        }
        args = TrainingArguments(**{**arguments, **overrides})
        return TrainingRun(**values_for(TrainingRun, args), arguments=asdict(args))

    return make


def train(run, until=None, poison_step=None):
    """Train a linear model; returns it, and a copy of its weights after each step."""
    torch.manual_seed(3)
    model = Linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loader = run.dataloader(Numbers())
    model, optimizer, loader = run.prepare(model, optimizer, loader)
    model.train()
    weights = [model.layer.weight.detach().clone()]
    for batch in loader:
        with run.accelerator.accumulate(model):
            loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
            if poison_step == run.global_step:
                loss = loss * torch.nan
            run.accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        run.record(loss=loss)
        if run.accelerator.sync_gradients:
            run.end_step(learning_rate=0.5)
            weights.append(model.layer.weight.detach().clone())
            if run.global_step == until:
                break
    if run.global_step == run.num_steps:
        run.save(run.saved_model)
    return model, weights


def begin(run):
    """What a script does before its loop, for tests that count steps without training."""
    run.dataloader(Numbers())
    model = Linear()
    run.prepare(model, torch.optim.SGD(model.parameters()))


def read_log(run):
    """Entries without the throughput, in which no two runs agree."""
    entries = [json.loads(line) for line in (run.folder / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if "_per_second" not in name} for entry in entries]


def folders(run):
    return sorted(path.name for path in run.folder.iterdir() if path.is_dir())


# --- steps and batches ---


@pytest.mark.parametrize(
    "overrides, steps",
    [
        ({"max_train_steps": 4, "num_train_epochs": 50}, 4),
        ({"max_train_steps": None, "num_train_epochs": 2}, 11),
        ({"max_train_steps": None, "num_train_epochs": 1}, 6),
        ({"max_train_steps": None, "num_train_epochs": 0.5}, 3),
        ({"max_train_steps": None, "num_train_epochs": 2, "gradient_accumulation_steps": 3}, 4),
    ],
)
def test_number_of_steps(start, overrides, steps):
    run = start(**overrides)
    train(run)
    assert run.global_step == run.num_steps == steps == read_log(run)[-1]["step"]
    assert run.global_batch_size == 2 * overrides.get("gradient_accumulation_steps", 1)
    assert run.samples_seen == steps * run.global_batch_size


def test_metrics_are_means_over_the_steps_and_passes_between_two_entries(start):
    run = start(logging_steps=2, gradient_accumulation_steps=2, max_train_steps=3)
    begin(run)
    for value in (1.0, 2.0, 3.0, 6.0, 10.0, 20.0):
        run.record(loss=torch.tensor(value), half=torch.tensor(value / 2, dtype=torch.bfloat16))
        if value in (2.0, 6.0, 20.0):
            run.end_step(learning_rate=0.25)
    # That of the last step comes after the result.
    assert [entry["step"] for entry in read_log(run)] == [2]
    run.save(run.saved_model)
    assert read_log(run) == [
        {"step": 2, "loss": 3.0, "half": 1.5, "learning_rate": 0.25},
        {"step": 3, "loss": 15.0, "half": 7.5, "learning_rate": 0.25},
    ]


@pytest.mark.parametrize("tokens_per_image, unit", [(None, "images"), (256, "tokens")])
def test_throughput_leaves_out_validations_and_checkpoints(start, monkeypatch, tokens_per_image, unit):
    seconds = 50.0
    monkeypatch.setattr("hf_ifsq.training.run.time.perf_counter", lambda: seconds)
    run = start(logging_steps=2, checkpointing_steps=3, max_train_steps=6, train_batch_size=8)
    save_checkpoint = run._save_checkpoint

    def save_for_a_thousand_seconds():
        nonlocal seconds
        save_checkpoint()
        seconds += 1000

    run._save_checkpoint = save_for_a_thousand_seconds
    begin(run)
    for step in range(1, 7):
        seconds += step
        run.end_step(learning_rate=0.1, tokens_per_image=tokens_per_image)
        with run.untimed():
            seconds += 100
    run.save(run.saved_model)
    lines = (run.folder / "training_log.jsonl").read_text().splitlines()
    rates = {entry["step"]: entry[f"{unit}_per_second"] for entry in map(json.loads, lines)}
    per_image = tokens_per_image or 1
    # Entries are after steps 2, 4 and 6, and before the checkpoint after step 3.
    expected = {2: 16 / (1 + 2), 3: 8 / 3, 4: 8 / 4, 6: 16 / (5 + 6)}
    assert rates == pytest.approx({step: rate * per_image for step, rate in expected.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverging_loss_is_an_error(start, value):
    run = start(logging_steps=1)
    begin(run)
    run.record(loss=torch.tensor(1.0))
    run.end_step(learning_rate=0.1)
    run.record(loss=torch.tensor(value))
    with pytest.raises(FloatingPointError, match=f"diverged at step 2.*loss.*{value}"):
        run.end_step(learning_rate=0.1)
    assert len(read_log(run)) == 1


def test_a_diverged_run_leaves_no_checkpoint_of_broken_weights(start):
    run = start(logging_steps=10, checkpointing_steps=1)
    with pytest.raises(FloatingPointError):
        train(run, poison_step=4)
    for folder in run.folder.glob("checkpoint-*"):
        assert torch.isfinite(Linear.from_pretrained(folder / "model").layer.weight).all(), folder.name


def test_validation_is_due_regularly_but_neither_before_nor_after_the_training(start):
    run = start(max_train_steps=9, validation_steps=3)
    begin(run)
    due = [run.validation_due]
    for _ in range(9):
        run.end_step(learning_rate=0.1)
        due.append(run.validation_due)
    assert [step for step, is_due in enumerate(due) if is_due] == [3, 6]


# --- moving average ---


def test_moving_average_by_hand(start):
    run = start(use_ema=True, ema_decay=0.6)
    _, weights = train(run)
    average = weights[0]
    for step, weight in enumerate(weights[1:], start=1):
        # The decay that diffusers' EMAModel documents: it warms up with the number of steps.
        decay = 0.0 if step == 1 else min(0.6, step / (9 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(run.saved_model.layer.weight.detach(), average)
    assert not torch.allclose(average, weights[-1])


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_saved_model_stands_beside_the_trained_one(start, use_ema):
    run = start(use_ema=use_ema, ema_decay=0.9)
    model, weights = train(run)
    assert model.training and not run.saved_model.training and run.saved_model is not model
    assert torch.equal(model.layer.weight, weights[-1])
    # Without an average it takes no memory of its own.
    shares_memory = run.saved_model.layer.weight.data_ptr() == model.layer.weight.data_ptr()
    assert shares_memory == torch.equal(run.saved_model.layer.weight, weights[-1]) == (not use_ema)
    assert model.layer.weight.requires_grad


# --- checkpoints ---


def test_checkpoints_are_written_and_the_newest_kept(start):
    run = start(checkpointing_steps=1, checkpoints_total_limit=3, max_train_steps=11)
    train(run)
    assert folders(run) == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]
    run = start(checkpointing_steps=4, output_dir=str(run.folder / "unlimited"))
    train(run)
    assert folders(run) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_a_checkpoint_holds_a_usable_model(start):
    run = start(checkpointing_steps=4, max_train_steps=4, use_ema=True)
    train(run)
    saved = Linear.from_pretrained(run.folder / "checkpoint-4" / "model")
    assert torch.equal(saved.layer.weight, run.saved_model.layer.weight)


def test_a_checkpoint_stores_the_average_once_and_no_pickle_that_could_run_code(start, monkeypatch):
    run = start(checkpointing_steps=4, max_train_steps=4, use_ema=True)
    train(run)
    files = sorted(str(path.relative_to(run.folder)) for path in run.folder.glob("checkpoint-4/**/*.safetensors"))
    assert files == ["checkpoint-4/model.safetensors", "checkpoint-4/model/diffusion_pytorch_model.safetensors"]
    loaded, load = [], torch.load

    def record(file, *args, **kwargs):
        loaded.append(kwargs.get("weights_only"))
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", record)
    train(start(resume_from_checkpoint="latest", use_ema=True, max_train_steps=4))
    # The optimizer and the random states, at least.
    assert len(loaded) >= 2 and all(loaded)


@pytest.mark.parametrize("stop", [1, 5, 6, 11, 12])
@pytest.mark.parametrize("overrides", [{}, {"use_ema": True, "ema_decay": 0.5, "gradient_accumulation_steps": 2}])
def test_a_resumed_run_equals_an_uninterrupted_one(start, tmp_path, stop, overrides):
    straight = start(output_dir=str(tmp_path / "straight"), checkpointing_steps=stop, **overrides)
    _, expected = train(straight)
    broken = start(checkpointing_steps=stop, **overrides)
    train(broken, until=stop)
    resumed = start(checkpointing_steps=100, resume_from_checkpoint="latest", **overrides)
    assert resumed.global_step == stop
    torch.rand(7)  # the random state comes from the checkpoint
    _, weights = train(resumed)
    assert len(weights) == 13 - stop and all(torch.equal(*pair) for pair in zip(weights[1:], expected[stop + 1 :]))
    assert read_log(resumed) == read_log(straight)
    assert torch.equal(resumed.saved_model.layer.weight, straight.saved_model.layer.weight)


def copy_checkpoint(source, *names):
    for name in names:
        target = source.parent / name
        target.mkdir()
        (target / "training_state.json").write_text((source / "training_state.json").read_text())


@pytest.mark.parametrize("steps, newest", [((9, 10), 10), ((9, 10, 100), 100), ((2, 1), 2)])
def test_latest_is_the_highest_number(start, tmp_path, steps, newest):
    for step in steps:
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "training_state.json").write_text(json.dumps({"global_step": step, "samples_seen": 2 * step}))
    for name in ("partial-checkpoint-200", "checkpoint-old", "checkpoint-300.tmp"):
        (tmp_path / "out" / name).mkdir()
    run = start(resume_from_checkpoint="latest")
    assert (run.global_step, run.samples_seen) == (newest, 2 * newest)


def test_latest_without_checkpoints_starts_anew(start, tmp_path):
    (tmp_path / "out" / "partial-checkpoint-4").mkdir(parents=True)
    run = start(resume_from_checkpoint="latest", max_train_steps=2)
    train(run)
    assert run.global_step == 2


@pytest.mark.parametrize("by", ["name", "path"])
def test_a_named_checkpoint(start, tmp_path, by):
    train(start(checkpointing_steps=2, max_train_steps=6))
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    name = "checkpoint-4" if by == "name" else str(tmp_path / "out" / "checkpoint-4")
    run = start(resume_from_checkpoint=name)
    assert run.global_step == 4


@pytest.mark.parametrize("name", ["checkpoint-5", "elsewhere"])
def test_missing_checkpoint(start, name):
    train(start(checkpointing_steps=4, max_train_steps=4))
    with pytest.raises(ValueError, match=rf"`resume_from_checkpoint`.*'{name}'.*\['checkpoint-4'\]"):
        start(resume_from_checkpoint=name)


def test_moving_average_cannot_start_in_the_middle(start):
    train(start(checkpointing_steps=4, max_train_steps=4))
    with pytest.raises(ValueError, match="`use_ema` is True.*checkpoint-4 has no moving average"):
        train(start(resume_from_checkpoint="latest", use_ema=True))


def test_position_in_the_data_with_another_batch_size(start):
    train(start(checkpointing_steps=4, max_train_steps=4))
    run = start(resume_from_checkpoint="latest", train_batch_size=3)
    loader = run.dataloader(Numbers())
    # Eight samples were read in batches of two; the other eight steps read three each.
    assert [position for _, position in loader.sampler] == list(range(8, 8 + 8 * 3))


def test_resuming_a_finished_run_trains_no_further(start):
    train(start(checkpointing_steps=12))
    run = start(resume_from_checkpoint="latest")
    _, weights = train(run)
    assert run.global_step == 12 and len(weights) == 1


def test_two_runs_in_one_folder(start, tmp_path):
    """The second is refused while the first is there, and not by what a killed one leaves."""
    hold = f"""
import pathlib, sys
from hf_ifsq.training.output_folder import lock_folder
with lock_folder(pathlib.Path({str(tmp_path / "out")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"`output_dir` {tmp_path / 'out'} is in use by another run"):
            start()
        other.kill()
        other.wait()
        run = start(max_train_steps=1)
        train(run)
        run.finish("")
    assert {".lock", "README.md", "training_log.jsonl"} < {path.name for path in run.folder.iterdir()}


def test_what_a_killed_run_left_unfinished_is_removed(start, tmp_path):
    for name in ("partial-checkpoint-4", "partial-result/transformer"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / ".tmpXYZ").touch()
    run = start(max_train_steps=1)
    train(run)
    assert [path.name for path in run.folder.iterdir() if path.name.startswith("partial-")] == []


def test_files_have_the_rights_of_new_files(start):
    """Those of safetensors would be readable by their owner alone."""
    before = os.umask(0o022)
    try:
        run = start(checkpointing_steps=1, max_train_steps=1)
        train(run)
        run.save(run.saved_model)
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(run.folder)): path.stat().st_mode & 0o777 for path in run.folder.rglob("*.safetensors")
    }
    assert len(modes) == 3 and set(modes.values()) == {0o644}, modes


# --- what has changed since a checkpoint ---


def scheduled(run, until=None, **options):
    """Train for its learning rates and the settings of its optimizer after each step."""
    torch.manual_seed(3)
    model = Linear()
    optimizer, schedule = make_optimizer(model.parameters(), run.num_steps, **options)
    model, optimizer, schedule, loader = run.prepare(model, optimizer, schedule, run.dataloader(Numbers()))
    rates = []
    for batch in loader:
        run.accelerator.backward(model(batch).mean())
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        run.end_step(rates[-1])
        if run.global_step == until:
            break
    return rates, optimizer.param_groups[0]


def test_settings_of_the_optimizer_are_those_of_the_resumed_run(start):
    scheduled(start(checkpointing_steps=4), until=4, learning_rate=1e-2, lr_scheduler="cosine")
    new = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.3, "adam_epsilon": 1e-5}
    run = start(resume_from_checkpoint="latest")
    rates, group = scheduled(run, learning_rate=1e-3, lr_scheduler="linear", lr_warmup_steps=2, **new)
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.9), 0.3, 1e-5)
    # A line from step 2 to 0 at step 12.
    assert rates == pytest.approx([1e-3 * (12 - step) / 10 for step in range(4, 12)])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_schedule_of_a_checkpoint_of_several_processes(start, processes):
    """Accelerate counts a step of the schedule once for each process."""
    scheduled(start(checkpointing_steps=4), until=4, lr_scheduler="cosine", learning_rate=1.0)
    folder = start(resume_from_checkpoint="latest")._checkpoint
    states = {"last_epoch": 4 * processes, "_step_count": 4 * processes + 1}
    schedule = torch.load(folder / "scheduler.bin", weights_only=True)
    torch.save({**schedule, **states}, folder / "scheduler.bin")
    state = json.loads((folder / "training_state.json").read_text())
    (folder / "training_state.json").write_text(json.dumps({**state, "facts": {"num_processes": processes}}))
    run = start(resume_from_checkpoint="latest")
    rates, _ = scheduled(run, lr_scheduler="cosine", learning_rate=1.0)
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(4, 12)])


def test_changed_arguments_are_said(start, caplog):
    train(start(checkpointing_steps=4, max_train_steps=4, learning_rate=0.05))
    train(start(resume_from_checkpoint="latest", max_train_steps=6, checkpointing_steps=4, learning_rate=0.01))
    (line,) = [record.getMessage() for record in caplog.records if "Changed since" in record.getMessage()]
    assert "checkpoint-4" in line and "`learning_rate` (0.05, now 0.01)" in line
    assert "`max_train_steps` (4, now 6)" in line and "resume_from_checkpoint" not in line and "seed" not in line


def test_nothing_is_said_where_nothing_changed(start, caplog):
    train(start(checkpointing_steps=4, max_train_steps=6), until=4)
    train(start(resume_from_checkpoint="latest", checkpointing_steps=4, max_train_steps=6))
    assert not any("Changed since" in record.getMessage() for record in caplog.records)


class Scaled(Linear):
    """The weights of any `factor` fit any other."""

    @register_to_config
    def __init__(self, factor: float = 1.0, noise_prob: float = 0.0):
        super().__init__()


def prepared(run, **config):
    model = Scaled(**config)
    run.dataloader(Numbers())
    run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_model_of_other_options_is_refused_though_its_weights_fit(start):
    run = start(checkpointing_steps=1)
    prepared(run, factor=1.0, noise_prob=0.5)
    run.end_step(0.1)
    # What is about training alone may change.
    prepared(start(resume_from_checkpoint="latest"), factor=1.0, noise_prob=0.2)
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint`.*checkpoint-1 .*`factor` \(1.0, now 2.0\)"):
        prepared(start(resume_from_checkpoint="latest"), factor=2.0, noise_prob=0.5)


def test_tokens_of_another_tokenizer_are_refused_and_other_images_said(start, caplog):
    def begin(run, tokenizer_sha256, count):
        model = Linear()
        numbers = Numbers()
        run.dataloader(torch.utils.data.Subset(numbers, range(count)))
        run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), hashes={"tokenizer": tokenizer_sha256})

    run = start(checkpointing_steps=1)
    begin(run, "abc", 11)
    run.end_step(0.1)
    with pytest.raises(ValueError, match=r"another model: `tokenizer_sha256` \(abc, now def\)"):
        begin(start(resume_from_checkpoint="latest"), "def", 11)
    begin(start(resume_from_checkpoint="latest"), "abc", 9)
    assert any("`num_images` (11, now 9)" in record.getMessage() for record in caplog.records)


def test_a_moving_average_does_not_get_lost(start):
    train(start(checkpointing_steps=4, max_train_steps=4, use_ema=True))
    with pytest.raises(ValueError, match="`use_ema` is False.*checkpoint-4 has a moving average"):
        train(start(resume_from_checkpoint="latest"))


@pytest.mark.parametrize("damage", ["empty", "cut", "missing"])
@pytest.mark.parametrize("name", ["random_states_0.pkl", "optimizer.bin", "model.safetensors", "training_state.json"])
def test_a_damaged_checkpoint_is_named(start, name, damage):
    train(start(checkpointing_steps=4, max_train_steps=4))
    folder = start(resume_from_checkpoint="latest")._checkpoint
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(ValueError, match="`resume_from_checkpoint`.*checkpoint-4"):
        train(start(resume_from_checkpoint="latest" if damage != "missing" else "checkpoint-4"))


def test_accumulation_that_accelerate_is_configured_for(start, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert start().global_batch_size == 2 * 3
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` is 2.*configured for 3"):
        start(gradient_accumulation_steps=2)


# --- log ---


def test_the_log_is_cut_on_resuming_and_removed_in_a_new_run(start, tmp_path):
    run = start(checkpointing_steps=5, max_train_steps=8)
    train(run)
    file = tmp_path / "out" / "training_log.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 9, "lo')
    resumed = start(resume_from_checkpoint="latest", checkpointing_steps=5)
    # Only what comes to train takes it away.
    assert file.read_text().startswith(whole)
    begin(resumed)
    assert [entry["step"] for entry in read_log(resumed)] == [1, 2, 3, 4, 5]
    assert whole.startswith(file.read_text())
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    begin(start())
    assert file.read_text() == ""


def test_pictures_of_a_validation(start):
    run = start()
    (run.folder / "validation").mkdir()
    for name in ("samples-0000009.png", "photo-17.png", "n01440764-1.png"):
        (run.folder / "validation" / name).touch()
    begin(run)
    assert sorted(path.name for path in run.folder.glob("validation/*")) == ["n01440764-1.png", "photo-17.png"]
    run.global_step = 7
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (1, 2, 3), (4, 5, 6)]
    run.log_images("samples", [Image.new("RGB", (2, 2), color) for color in colors], columns=3)
    grid = np.asarray(Image.open(run.folder / "validation" / "samples-0000007.png"))
    assert grid.shape == (4, 6, 3) and [tuple(pixel) for pixel in grid[::2, ::2].reshape(6, 3)] == colors


def test_missing_tracker_package(start, tmp_path):
    with pytest.raises(ImportError, match="`report_to` 'wandb'.*pip install wandb"):
        start(report_to="wandb")
    assert not (tmp_path / "out").exists()


def make_card(run, args):
    return make_model_card(
        title="A title",
        description="A description.",
        usage="import this",
        facts=args.facts(256, 56789) | run.facts(),
        metrics={"psnr": 1.23456},
        arguments=asdict(args),
        pipeline_tag="some-task",
    )


def test_model_card(start, monkeypatch):
    run = start(use_ema=True, ema_decay=0.99, seed=3)
    run.global_step = 1234
    args = TrainingArguments(dataset_name="org/birds", learning_rate=3e-4)
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset_name", "org/birds", "--teacher", "my models/vit"])
    card = make_card(run, args)
    for text in ("# A title", "A description.", "```python\nimport this\n```", "`org/birds`, 256 x 256 pixels"):
        assert text in card
    for row in ("parameters | 56,789", "steps | 1,234", "images per step | 2", "averaging | EMA of 0.99", "seed | 3"):
        assert f"| {row} |" in card
    assert "| psnr | 1.2346 |" in card and "| learning rate | 0.0003, constant |" in card
    assert "accelerate launch train.py --dataset_name org/birds --teacher 'my models/vit'\n" in card
    assert card.startswith("---\n") and "pipeline_tag: some-task" in card.split("---")[1]


def test_nothing_published_says_where_it_lay(start, monkeypatch, tmp_path):
    """Paths of the machine that trained, and with them the names of its users."""
    tracked = {}
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: tracked.update(config))
    home = {
        "dataset_name": "/home/alice/birds",
        "output_dir": str(tmp_path / "alice" / "out"),
        "config": "~alice/c.yaml",
    }
    run = start(**home, report_to="tensorboard")
    monkeypatch.setattr(
        "sys.argv", ["/home/alice/train.py", "--output_dir=/home/alice/out", "--teacher", "../alice/vit"]
    )
    card = make_card(run, TrainingArguments(**home))
    assert "alice" not in card + str(tracked) + run.model_name and str(tmp_path) not in card + str(tracked)
    assert "`birds`, 256 x 256" in card and "dataset_name: birds" in card and tracked["config"] == "c.yaml"
    assert "accelerate launch train.py --output_dir=out --teacher vit\n" in card and run.model_name == "out"


@pytest.mark.parametrize("place", ["/home/alice", "~", "..", "file:///home/alice", "--config=/home/alice"])
def test_values_that_name_a_place_of_the_machine_are_shortened(place):
    assert without_local_paths(f"{place}/birds") == ("--config=birds" if place.startswith("--") else "birds")


@pytest.mark.parametrize(
    "value", ["org/birds", "outputs/tokens", "data", "facebook/dinov2-base", 3, None, 1e-4, True, [17, 17]]
)
def test_values_that_name_no_place_of_the_machine_are_published_as_they_are(value):
    assert without_local_paths(value) == value


def test_checkpoints_of_another_run_are_not_overwritten(start):
    train(start(checkpointing_steps=5))
    with pytest.raises(ValueError, match=r"`output_dir`.*beyond step 0.*\['checkpoint-5', 'checkpoint-10'\]"):
        start()
    with pytest.raises(ValueError, match=r"`output_dir`.*beyond step 5.*\['checkpoint-10'\]"):
        start(resume_from_checkpoint="checkpoint-5")
    assert start(resume_from_checkpoint="latest").global_step == 10


def test_evaluation_leaves_the_random_states_alone(start):
    loader = start().evaluation_dataloader(torch.arange(5.0))
    state = torch.get_rng_state()
    assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_is_in_the_precision_of_the_weights(start):
    run = start(mixed_precision="bf16")
    model, _ = run.prepare(Linear(), torch.optim.SGD(Linear().parameters()))
    values = torch.tensor([[1.0, 2**-9, 2**-10]])
    with torch.no_grad():
        model.layer.weight.fill_(1.0)
        assert run.saved_model(values).item() == 1 + 2**-9 + 2**-10
        # Eight bits of bfloat16 cannot hold that sum.
        assert model.eval()(values).item() == 1.0


def test_order_of_calls(start):
    with pytest.raises(RuntimeError, match="number of steps is not known before `dataloader`"):
        _ = start(max_train_steps=None).num_steps
    with pytest.raises(RuntimeError, match="`saved_model` is not there before `prepare`"):
        _ = start().saved_model


@pytest.mark.parametrize("mode, options", [(None, {}), ("reduce-overhead", {"triton.cudagraphs": True})])
def test_compilation_without_the_layouts_that_lose_gradients(start, monkeypatch, mode, options):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    if mode is not None:
        monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", mode)
    plugin = start().accelerator.state.dynamo_plugin
    assert plugin.backend.value == "INDUCTOR" and plugin.mode is None
    assert plugin.options == {**options, "layout_optimization": False}


def test_other_compilations_are_left_as_they_are(start, monkeypatch):
    assert start().accelerator.state.dynamo_plugin.backend.value == "NO"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = start().accelerator.state.dynamo_plugin
    assert plugin.backend.value == "EAGER" and plugin.options is None and plugin.mode == "default"


def test_what_is_written_after_the_last_step_does_not_lose_the_result(start, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space")

    for name in ("_save_checkpoint", "log"):
        run = start(checkpointing_steps=4, max_train_steps=4, logging_steps=4)
        with monkeypatch.context() as patch:
            patch.setattr(TrainingRun, name, fail)
            with pytest.raises(OSError, match="no space") as failure:
                train(run)
        assert f"its model is in {run.folder}" in failure.value.__notes__[0]
        Linear.from_pretrained(run.folder)
        shutil.rmtree(run.folder)


def test_epochs_are_counted_in_images_where_the_batch_changes(start):
    """11 images, 4 epochs: 44 of them, of which 12 are seen in 6 steps of 2, and the rest in 8 steps of 4."""
    options = {"max_train_steps": None, "num_train_epochs": 4, "checkpointing_steps": 6}
    train(start(**options), until=6)
    run = start(**options, train_batch_size=4, resume_from_checkpoint="latest")
    train(run)
    assert (run.global_step, run.samples_seen) == (6 + 8, 44)


def test_processes_that_would_train_each_by_itself(start, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="2 processes were launched.*`ACCELERATE_USE_CPU=true`"):
        start()


def test_accumulation_of_less_than_one_pass(start, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0")
    with pytest.raises(ValueError, match="`gradient_accumulation_steps`.*at least 1"):
        start()


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"global_step": 4}'])
def test_a_state_without_its_counters(start, content):
    train(start(checkpointing_steps=4, max_train_steps=4))
    (start(resume_from_checkpoint="latest")._checkpoint / "training_state.json").write_text(content)
    with pytest.raises(ValueError, match="`resume_from_checkpoint`.*checkpoint-4 cannot be resumed from"):
        start(resume_from_checkpoint="latest")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_a_damaged_average(start, name):
    train(start(checkpointing_steps=4, max_train_steps=4, use_ema=True))
    folder = start(resume_from_checkpoint="latest", use_ema=True)._checkpoint
    (folder / "model" / name).write_bytes((folder / "model" / name).read_bytes()[:20])
    with pytest.raises(ValueError, match="`resume_from_checkpoint`.*checkpoint-4 cannot be resumed from"):
        train(start(resume_from_checkpoint="latest", use_ema=True))


@pytest.mark.parametrize("value", ["--tokenizer=/home/alice/lr=1e-4/tok", "/home/alice/lr=1e-4/tok"])
def test_places_with_an_equals_sign(value):
    assert without_local_paths(value) in ("tok", "--tokenizer=tok")
