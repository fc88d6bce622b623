import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import ClassLabel, Dataset, Features, Value
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from token_dataset_writer import TokenDatasetWriter
from transformers import ViTConfig, ViTModel

from hf_ifsq import AutoencoderIFSQ, IFSQARPipeline, IFSQDiTPipeline
from hf_ifsq.metrics.alignment import cknna
from hf_ifsq.models.image_tokenizer import as_image_tokenizer
from hf_ifsq.randomness import generators_at
from hf_ifsq.training.arguments import parse_args
from hf_ifsq.training.tokens import TokenDatasetInfo, fingerprint


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ["train_tokenizer", "train_repa_ar", "train_repa_dit"]
NAMES = ["ant", "bee", "cat"]

# All that carries state is on: accumulation, average, warmup, random crops and flips; dropouts by default.
PLAIN = (
    "--resolution 16 --train_batch_size 3 --gradient_accumulation_steps 2 --max_train_steps 12 --learning_rate 1e-3 "
    "--lr_scheduler cosine --lr_warmup_steps 4 --use_ema --ema_decay 0.9 --adam_weight_decay 0.1 --logging_steps 1 "
    "--validation_steps 5 --checkpointing_steps 5"
)
COMMON = f"{PLAIN} --random_flip --min_crop_scale 0.7"
REPA = "--num_attention_heads 2 --repa_depth 1 --projector_dim 16 --num_images_per_label 1 --class_dropout_prob 0.3"
OPTIONS = {
    "train_tokenizer": "--block_out_channels 32 32 32 --layers_per_block 1 --levels 5 3 --num_validation_images 2 "
    "--perceptual_weight 0 --discriminator_start_step 3 --discriminator_layers 2",
    "train_repa_ar": f"{REPA} --vocab_sizes 3 5 --hidden_size 16 --num_hidden_layers 2 --num_factor_layers 1 "
    "--dropout 0.2",
    "train_repa_dit": f"{REPA} --attention_head_dim 8 --num_layers 2 --num_inference_steps 2 --cknna_depth 2",
}

# First on the module path of every script: any attempt to reach the network ends it.
NO_NETWORK = """
import os, socket, sys
def refuse(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        sys.stderr.write(f"NETWORK {event} {arguments}\\n")
        sys.stderr.flush()
        os._exit(97)
sys.addaudithook(refuse)
"""

# `accelerate launch --cpu` starts one process whatever `--num_processes` says.
TWO_PROCESSES = {
    "launcher": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "environment": {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": ""},
}

# Runs a script and kills it right after a step.
KILLED = """
import os, runpy, signal, sys
from hf_ifsq.training.run import TrainingRun
end_step = TrainingRun.end_step
def end_step_and_die(self, *args, **kwargs):
    end_step(self, *args, **kwargs)
    if self.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingRun.end_step = end_step_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Runs a script and kills it in its first validation, when its metrics are about to be logged.
KILLED_IN_VALIDATION = """
import os, runpy, signal, sys
from hf_ifsq.training.run import TrainingRun
log = TrainingRun.log
def die_at_metrics_of_validation(self, metrics):
    if any(name.startswith("validation") for name in metrics):
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, metrics)
TrainingRun.log = die_at_metrics_of_validation
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_images(count, seed, height=20, width=24):
    """Each class has its own color; noise on top."""
    generator = np.random.default_rng(seed)
    labels = [index % 3 for index in range(count)]
    colors = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])[labels][:, None, None]
    arrays = (colors + generator.integers(-40, 55, (count, height, width, 3))).astype(np.uint8)
    return [Image.fromarray(array) for array in arrays], labels


def write_parquet(path, count, seed, labels=None, label_feature=None):
    images, own_labels = make_images(count, seed)
    features = Features({"image": datasets.Image(), "label": label_feature or ClassLabel(names=NAMES)})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"image": images, "label": labels or own_labels}, features=features).to_parquet(path)


class Workspace:
    """A folder with data, a teacher and what the scripts make of them; each run is done once a session."""

    def __init__(self, root):
        self.root = root
        self.failed = set()
        self.data = root / "data"
        write_parquet(self.data / "train.parquet", 40, seed=0)
        write_parquet(self.data / "test.parquet", 14, seed=1)
        self.teacher = root / "teacher"
        sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
        torch.manual_seed(0)
        ViTModel(ViTConfig(image_size=28, patch_size=7, **sizes)).save_pretrained(self.teacher)
        self.guard = root / "guard"
        self.guard.mkdir()
        (self.guard / "sitecustomize.py").write_text(NO_NETWORK)

    def arguments(self, script, output, *extra):
        arguments = [*COMMON.split(), *OPTIONS[script].split()]
        arguments += ["--dataset_name", str(self.data), "--output_dir", str(output)]
        if script != "train_tokenizer":
            arguments += ["--tokenizer", str(self.trained("train_tokenizer")), "--teacher", str(self.teacher)]
        return [*arguments, *extra]

    def environment(self):
        environment = {**os.environ, "HF_HOME": str(self.root / "hf"), "OMP_NUM_THREADS": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        return {**environment, "PYTHONPATH": str(self.guard)}

    def run(self, script, output, *extra, launcher=(), environment=None, returncode=0, timeout=300):
        """Run a script in a process of its own."""
        environment = {**self.environment(), **(environment or {})}
        command = [sys.executable, *launcher, str(EXAMPLES / f"{script}.py"), *self.arguments(script, output, *extra)]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=self.root, timeout=timeout
        )
        assert result.returncode == returncode, result.stderr[-4000:]
        return result

    def once(self, name, make):
        """Output folder of that name, filled by `make` on first use; if that failed, it is not tried again."""
        output = self.root / name
        if name not in self.failed and not output.exists():
            self.failed.add(name)
            make(output)
            self.failed.remove(name)
        assert name not in self.failed, f"the run of {name} failed in an earlier test"
        return output

    def trained(self, script):
        """Output folder of an uninterrupted run."""
        return self.once(script, lambda output: self.run(script, output))

    def interrupted(self, script):
        """Output folder of a run that was killed after step 8, and then resumed."""

        def make(output):
            self.run(script, output, launcher=("-c", KILLED), returncode=-signal.SIGKILL)
            assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-5"]
            assert read_log(output)[-1]["step"] == 8
            self.run(script, output, "--resume_from_checkpoint", "latest")

        return self.once(f"{script}_interrupted", make)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("training"))


def read_log(folder):
    """Entries of the log without the throughput, in which no two runs agree."""
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if "_per_second" not in name} for entry in entries]


def validation_batch(workspace):
    """The validation images, 20 x 24 pixels, as their square middles of 16 x 16, and their labels."""
    dataset = Dataset.from_parquet(str(workspace.data / "test.parquet"), cache_dir=str(workspace.root / "cache"))
    return to_pixel_values(dataset["image"]), torch.tensor(dataset["label"])


def to_pixel_values(images):
    squares = [image.resize((16, 16), Image.Resampling.BICUBIC, box=(2, 0, 22, 20)) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(square, dtype=np.float32) for square in squares]))
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1


# --- a whole run ---


@pytest.mark.parametrize("script", SCRIPTS)
def test_log(workspace, script):
    folder = workspace.trained(script)
    log = read_log(folder)
    entries = [entry for entry in log if "loss" in entry]
    # From step 3 on, counted from 0, every other step is the discriminator's.
    steps = [1, 2, 3, 5, 7, 9, 11] if script == "train_tokenizer" else list(range(1, 13))
    assert [entry["step"] for entry in entries] == steps
    assert [entry["step"] for entry in log if any("validation" in name for name in entry)] == [5, 10, 12]
    # The adversarial loss of the tokenizer need not fall.
    losses = [entry["reconstruction_loss" if script == "train_tokenizer" else "loss"] for entry in entries]
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])
    # Warmup over four steps, then half a cosine over the others; the first step has a rate of zero.
    num_steps = len(steps)
    cosine = [(1 + np.cos(np.pi * (step - 4) / (num_steps - 4))) / 2 for step in range(4, num_steps)]
    expected = [1e-3 * factor for factor in (0, 0.25, 0.5, 0.75, *cosine)]
    assert [entry["learning_rate"] for entry in entries] == pytest.approx(expected, abs=1e-9)
    unit = "tokens" if script == "train_repa_ar" else "images"
    for line in (folder / "training_log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert entry.get(f"{unit}_per_second", 0) > 0 or any("validation" in name for name in entry)
        assert not any(f"{other}_per_second" in entry for other in ("images", "tokens") if other != unit)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_log_of_generators(workspace, script):
    entries = read_log(workspace.trained(script))
    training = [entry for entry in entries if "loss" in entry]
    assert all(np.isfinite(entry["gradient_norm"]) and entry["gradient_norm"] > 0 for entry in training)
    for entry in training if script == "train_repa_ar" else ():
        assert entry["cross_entropy_0"] + entry["cross_entropy_1"] == pytest.approx(entry["cross_entropy"], abs=1e-5)
    # The first step changes nothing and starts from uniform predictions.
    if script == "train_repa_ar":
        first = [training[0][f"cross_entropy_{factor}"] for factor in (0, 1)]
        assert first == pytest.approx([math.log(3), math.log(5)], abs=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_model_card(workspace, script):
    folder = workspace.trained(script)
    card = (folder / "README.md").read_text()
    metric = {
        "train_tokenizer": "validation_psnr_db",
        "train_repa_ar": "validation_cross_entropy",
        "train_repa_dit": "validation_loss",
    }[script]
    (value,) = [entry[metric] for entry in read_log(folder) if entry["step"] == 12 and metric in entry]
    for row in (
        "| data | `data`, 16 x 16 pixels |",
        "| steps | 12 |",
        "| images per step | 6 |",
        "| averaging | EMA of 0.9 |",
        f"| {metric} | {value:.4f} |",
    ):
        assert row in card
    part = {"train_repa_ar": "layer 1", "train_repa_dit": "block 1"}.get(script)
    assert (f"its {part} was aligned with `teacher`" in card) == (part is not None)
    assert ("| validation_cknna | " in card) == (part is not None)
    command = card.split("```bash\n")[1].split("\n```")[0]
    assert command.startswith("accelerate launch ") and f"{script}.py" in command and "--max_train_steps 12" in command
    assert "library_name: hf-ifsq" in card.split("---")[1]
    assert "{" not in card.replace("{args", "{")
    assert str(workspace.root) not in card


@pytest.mark.parametrize("script", SCRIPTS)
def test_files_of_the_result(workspace, script):
    folder = workspace.trained(script)
    pictures = sorted(path.name for path in (folder / "validation").iterdir())
    name = "reconstructions" if script == "train_tokenizer" else "samples"
    assert pictures == [f"{name}-{step:07d}.png" for step in (5, 10, 12)]
    width, height = Image.open(folder / "validation" / pictures[-1]).size
    assert (width, height) == ((32, 32) if script == "train_tokenizer" else (16, 48))
    assert not list(folder.glob("partial-*"))
    results = [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path)]
    assert len(results) == (1 if script == "train_tokenizer" else 2)


@pytest.mark.parametrize("script, pipeline_class", [(SCRIPTS[1], IFSQARPipeline), (SCRIPTS[2], IFSQDiTPipeline)])
def test_results_hold_a_generator_and_nothing_of_the_alignment(workspace, script, pipeline_class):
    folder = workspace.trained(script)
    model = pipeline_class.from_pretrained(folder).transformer
    blank = type(model)(model.config) if script == "train_repa_ar" else type(model).from_config(model.config)
    expected = {name: weight.shape for name, weight in blank.state_dict().items()}
    for place in ("transformer", "checkpoint-5/model", "checkpoint-10/model"):
        (file,) = (folder / place).glob("*.safetensors")
        assert {name: weight.shape for name, weight in load_file(file).items()} == expected


def test_tokenizer_loads_and_its_numbers_are_true(workspace):
    folder = workspace.trained("train_tokenizer")
    tokenizer = AutoencoderIFSQ.from_pretrained(folder).eval()
    assert tokenizer.codebook_size == 15 and tokenizer.grid_size == (4, 4)
    pixel_values, _ = validation_batch(workspace)
    with torch.no_grad():
        squared_error = (tokenizer(pixel_values).sample.clamp(-1, 1) - pixel_values).square().mean(dim=(1, 2, 3))
    psnr = (20 * np.log10(2) - 10 * squared_error.log10()).mean().item()
    assert read_log(folder)[-1]["validation_psnr_db"] == pytest.approx(psnr, abs=1e-3)


def test_generator_and_discriminator_take_turns(workspace):
    log = [entry for entry in read_log(workspace.trained("train_tokenizer")) if "validation_psnr_db" not in entry]
    turns = ["discriminator" if "discriminator_loss" in entry else "tokenizer" for entry in log]
    assert turns == ["tokenizer"] * 3 + ["discriminator", "tokenizer"] * 4 + ["discriminator"]
    for entry in log:
        assert ("discriminator_loss" in entry) != ("loss" in entry)
        assert ("adaptive_weight" in entry) == (entry["step"] in (5, 7, 9, 11))


def test_generator_and_discriminator_never_step_together(workspace, tmp_path):
    options = ["--checkpointing_steps", "1", "--max_train_steps", "7", "--lr_warmup_steps", "0", "--lr_scheduler"]
    options += ["constant", "--gradient_accumulation_steps", "1"]
    workspace.run("train_tokenizer", tmp_path / "run", *options)
    files = {"generator": "model.safetensors", "discriminator": "model_1.safetensors"}
    files["average"] = "model/diffusion_pytorch_model.safetensors"
    changed = []
    for step in range(1, 7):
        before, after = (tmp_path / "run" / f"checkpoint-{number}" for number in (step, step + 1))
        weights = {player: (load_file(before / file), load_file(after / file)) for player, file in files.items()}
        changed.append(
            {
                player
                for player, (old, new) in weights.items()
                if any(not torch.equal(old[key], new[key]) for key in old)
            }
        )
    generator, discriminator = {"generator", "average"}, {"discriminator"}
    assert changed == [generator, generator, discriminator, generator, discriminator, generator]
    judged = [entry for entry in read_log(tmp_path / "run") if "adaptive_weight" in entry]
    assert [entry["step"] for entry in judged] == [5, 7]
    for entry in judged:
        adversarial_loss = 0.5 * entry["adaptive_weight"] * entry["adversarial_loss"]
        assert entry["loss"] == pytest.approx(entry["reconstruction_loss"] + adversarial_loss, abs=1e-5)


def test_scaling_factor_makes_the_codes_of_the_training_images_unit_normal(workspace):
    tokenizer = AutoencoderIFSQ.from_pretrained(workspace.trained("train_tokenizer")).eval()
    pixel_values = to_pixel_values(make_images(40, seed=0)[0])
    with torch.no_grad():
        latents = tokenizer.encode(pixel_values).codes * tokenizer.config.scaling_factor
    assert latents.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("script, pipeline_class", [(SCRIPTS[1], IFSQARPipeline), (SCRIPTS[2], IFSQDiTPipeline)])
def test_generators_load_as_pipelines(workspace, script, pipeline_class):
    pipeline = pipeline_class.from_pretrained(workspace.trained(script))
    assert pipeline.labels == {"ant": 0, "bee": 1, "cat": 2}
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["bee", "ant"], guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    tokenizer = load_file(workspace.trained("train_tokenizer") / "diffusion_pytorch_model.safetensors")
    copy = load_file(workspace.trained(script) / "tokenizer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(copy[name], weight) for name, weight in tokenizer.items())


def test_validation_cross_entropy_is_true(workspace):
    folder = workspace.trained("train_repa_ar")
    pipeline = IFSQARPipeline.from_pretrained(folder)
    pixel_values, labels = validation_batch(workspace)
    with torch.no_grad():
        indices = pipeline.tokenizer.encode(pixel_values).indices.flatten(1)
        low, high = pipeline.transformer(labels, indices).logits.split([3, 5], dim=-1)
    loss = 0
    for logits, digits in ((low, indices % 3), (high, indices // 3)):
        loss = loss - logits.double().log_softmax(-1).gather(-1, digits[..., None]).mean()
    assert read_log(folder)[-1]["validation_cross_entropy"] == pytest.approx(loss.item(), abs=1e-4)


def cknna_of_means(workspace, hidden_states, pixel_values):
    """Of hidden states of validation images and the patches of a plain ViT at twice the patches' 14 pixels."""
    images = torch.nn.functional.interpolate(pixel_values / 2 + 0.5, size=(28, 28), mode="bicubic", antialias=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        patches = ViTModel.from_pretrained(workspace.teacher)((images.clamp(0, 1) - mean) / std).last_hidden_state
    assert patches.shape[1] == 17 and hidden_states.shape[1] == 16
    return cknna(hidden_states.mean(dim=1), patches[:, 1:].mean(dim=1), k=10)


def test_validation_cknna_of_the_ar_model_is_true(workspace):
    folder = workspace.trained("train_repa_ar")
    pipeline = IFSQARPipeline.from_pretrained(folder)
    pixel_values, labels = validation_batch(workspace)
    with torch.no_grad():
        indices = pipeline.tokenizer.encode(pixel_values).indices.flatten(1)
        layers = pipeline.transformer(labels, indices, output_hidden_states=True).hidden_states
    expected = cknna_of_means(workspace, layers[1], pixel_values)
    assert read_log(folder)[-1]["validation_cknna"] == pytest.approx(expected, abs=1e-4)
    assert cknna_of_means(workspace, layers[2], pixel_values) != pytest.approx(expected, abs=1e-3)


def test_validation_of_the_dit_is_true(workspace):
    """On noise and a time drawn by a generator of each image; the second block is compared with the teacher."""
    folder = workspace.trained("train_repa_dit")
    pipeline = IFSQDiTPipeline.from_pretrained(folder)
    pixel_values, labels = validation_batch(workspace)
    generators = generators_at(0, range(14))
    noise = torch.stack([torch.randn(2, 4, 4, generator=generator) for generator in generators])
    t = torch.stack([torch.randn((), generator=generator) for generator in generators]).sigmoid()
    with torch.no_grad():
        latents = pipeline.tokenizer.encode(pixel_values).codes * pipeline.tokenizer.config.scaling_factor
        path = t[:, None, None, None] * latents + (1 - t[:, None, None, None]) * noise
        output = pipeline.transformer(path, t, labels, output_hidden_states=True)
    target = latents - noise
    cosine = (output.sample * target).sum(1) / output.sample.norm(dim=1) / target.norm(dim=1)
    loss = (output.sample - target).square().mean() + 1 - cosine.mean()
    entry = read_log(folder)[-1]
    assert entry["validation_loss"] == pytest.approx(loss.item(), abs=1e-4)
    expected = cknna_of_means(workspace, output.hidden_states[2], pixel_values)
    assert entry["validation_cknna"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_alignment_with_a_teacher(workspace, script):
    entries = [entry for entry in read_log(workspace.trained(script)) if "loss" in entry]
    alignment = [entry["alignment_loss"] for entry in entries]
    assert len(set(alignment)) == 12 and all(-1 <= loss <= 1 for loss in alignment)
    for entry in entries:
        if script == "train_repa_ar":
            total = entry["cross_entropy"] + 2.0 * entry["alignment_loss"]
        else:
            total = entry["squared_error"] + entry["direction_error"] + 0.5 * entry["alignment_loss"]
        assert entry["loss"] == pytest.approx(total, abs=1e-4)


# --- resuming and several processes ---


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_equals_uninterrupted(workspace, script):
    straight, resumed = workspace.trained(script), workspace.interrupted(script)
    assert read_log(resumed) == read_log(straight)
    files = [path.relative_to(straight) for path in straight.rglob("*.safetensors") if "checkpoint-5" not in str(path)]
    assert len(files) >= 3  # the result, and the trained and the averaged model of checkpoint 10
    for file in files:
        expected, weights = load_file(straight / file), load_file(resumed / file)
        assert expected.keys() == weights.keys()
        assert all(torch.equal(expected[name], weights[name]) for name in expected), file
    raw = load_file(straight / "checkpoint-10" / "model.safetensors")
    averaged = load_file(next((straight / "checkpoint-10" / "model").glob("*.safetensors")))
    assert not all(torch.equal(raw.get(name, raw.get(f"model.{name}")), averaged[name]) for name in averaged)


@pytest.mark.parametrize("script", ["train_tokenizer", "train_repa_dit"])
def test_a_run_that_is_killed_in_a_validation_repeats_it(workspace, script, tmp_path):
    """After the checkpoint of that step: the resumed run would not come to this validation."""
    workspace.run(script, tmp_path / "out", launcher=("-c", KILLED_IN_VALIDATION), returncode=-signal.SIGKILL)
    assert not any(
        "validation_cknna" in entry or "validation_psnr_db" in entry for entry in read_log(tmp_path / "out")
    )
    workspace.run(script, tmp_path / "out", "--resume_from_checkpoint", "latest")
    assert read_log(tmp_path / "out") == read_log(workspace.trained(script))


def test_a_finished_run_that_is_resumed_logs_nothing_twice(workspace, tmp_path):
    straight = workspace.trained("train_tokenizer")
    shutil.copytree(straight, tmp_path / "out")
    same = ["--checkpointing_steps", "12", "--resume_from_checkpoint", "checkpoint-10"]
    workspace.run("train_tokenizer", tmp_path / "out", *same)
    workspace.run("train_tokenizer", tmp_path / "out", *same[:-1], "latest")
    assert read_log(tmp_path / "out") == read_log(straight)


@pytest.fixture(scope="session", params=SCRIPTS[1:])
def one_and_two_processes(request, workspace):
    """Output folders of a run with six images a pass, and of one with three images in each of two processes."""
    same = ["--max_train_steps", "5", "--checkpointing_steps", "3", "--validation_steps", "3"]
    # All that is random but the masks of dropout is that of an image: crops, noise, times, dropped classes.
    same += ["--dropout", "0"] if request.param == "train_repa_ar" else []

    def two(output):
        workspace.run(request.param, output, *same, "--train_batch_size", "3", **TWO_PROCESSES)

    def one(output):
        workspace.run(request.param, output, *same, "--train_batch_size", "6")

    return workspace.once(f"{request.param}_one", one), workspace.once(f"{request.param}_two", two)


def test_two_processes_train_as_one(one_and_two_processes):
    logs = [[entry for entry in read_log(folder) if "loss" in entry] for folder in one_and_two_processes]
    assert len(logs[0]) == len(logs[1]) == 5
    for expected, entry in zip(*logs):
        assert entry == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert entry["gradient_norm"] > 0 and "alignment_loss" in entry
    files = [next(folder.glob("transformer/*.safetensors")) for folder in one_and_two_processes]
    expected, weights = map(load_file, files)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-4)
    cards = [(folder / "README.md").read_text() for folder in one_and_two_processes]
    assert all("| images per step | 12 |" in card for card in cards)


def test_a_discriminator_that_begins_after_the_end_of_a_run(workspace, tmp_path):
    options = ["--discriminator_start_step", "4", "--checkpointing_steps", "3", "--lr_scheduler", "constant"]
    options += ["--lr_warmup_steps", "0"]
    workspace.run("train_tokenizer", tmp_path / "run", *options, "--max_train_steps", "3")
    resume = ["--max_train_steps", "6", "--resume_from_checkpoint", "latest"]
    workspace.run("train_tokenizer", tmp_path / "run", *options, *resume)
    workspace.run("train_tokenizer", tmp_path / "straight", *options, "--max_train_steps", "6")
    logs = [
        [entry for entry in read_log(tmp_path / name) if "validation_psnr_db" not in entry]
        for name in ("run", "straight")
    ]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0] if "discriminator_loss" in entry] == [5]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--bottleneck vq --gradient_checkpointing", "`gradient_checkpointing` must be off with the bottleneck `vq`"),
        ("--perceptual_weight -1", "`perceptual_weight` must be at least 0, got -1.0"),
        ("--discriminator_start_step -1", "`discriminator_start_step` must be at least 0, got -1"),
    ],
)
def test_arguments_of_tokenizers_out_of_range(monkeypatch, options, message):
    spec = importlib.util.spec_from_file_location("train_tokenizer_arguments", EXAMPLES / "train_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=message):
        parse_args(module.TokenizerTrainingArguments, ["--dataset_name", "images", *options.split()])


@pytest.mark.parametrize(
    "bottleneck",
    [
        "--levels 100001 100001",
        "--levels 101 101 --bound normal --equal_bins --noise_prob 1",
        "--bottleneck kl --latent_channels 2",
    ],
)
def test_two_processes_train_a_tokenizer_as_one(workspace, tmp_path, bottleneck):
    # Smooth where training is not: a squared error instead of L1, levels so fine that rounding hardly matters or none,
    # and steps of AdamW that are proportional to small gradients.
    same = (
        "--resolution 16 --block_out_channels 32 32 32 --layers_per_block 1 --perceptual_weight 0 --logging_steps 1 "
    )
    same += "--discriminator_layers 2 --discriminator_start_step 2 --max_train_steps 4 --reconstruction_loss l2 "
    same += f"--adam_epsilon 0.1 --use_ema --ema_decay 0.5 --num_validation_images 2 {bottleneck}"

    def train(name, batch_size, launcher=(), environment=None):
        command = [sys.executable, *launcher, str(EXAMPLES / "train_tokenizer.py"), *same.split()]
        command += ["--dataset_name", str(workspace.data), "--output_dir", str(tmp_path / name)]
        result = subprocess.run(
            [*command, "--train_batch_size", batch_size],
            env={**workspace.environment(), **(environment or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-4000:]

    train("one", "6")
    train("two", "3", **TWO_PROCESSES)
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [sorted(entry) for entry in logs[0]] == [sorted(entry) for entry in logs[1]]
    assert any("adaptive_weight" in entry for entry in logs[0])
    for expected, entry in zip(*logs):
        assert entry == pytest.approx(expected, abs=2e-4)
    factors = [json.loads((tmp_path / name / "config.json").read_text())["scaling_factor"] for name in ("one", "two")]
    assert factors[0] == pytest.approx(factors[1], rel=1e-3)


def test_another_number_of_processes_goes_on_alike(one_and_two_processes, workspace, tmp_path):
    """One process is stopped after three steps of five, and two go on from there: data, noise, schedule, average."""
    straight, resumed = one_and_two_processes[0], tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    script = "train_repa_dit" if (straight / "scheduler").is_dir() else "train_repa_ar"
    shutil.rmtree(resumed / "transformer")
    same = ["--max_train_steps", "5", "--checkpointing_steps", "3", "--validation_steps", "3"]
    same += ["--dropout", "0"] if script == "train_repa_ar" else []
    same += ["--resume_from_checkpoint", "latest", "--train_batch_size", "3"]
    result = workspace.run(script, resumed, *same, **TWO_PROCESSES)
    assert "Changed since checkpoint-3" in result.stderr and "`num_processes` (1, now 2)" in result.stderr
    for entry, expected in zip(read_log(resumed), read_log(straight), strict=True):
        assert entry == pytest.approx(expected, rel=1e-5, abs=1e-5)
    files = [next(folder.glob("transformer/*.safetensors")) for folder in (straight, resumed)]
    expected, weights = map(load_file, files)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-4)


def test_two_processes_validate_as_one(one_and_two_processes):
    """14 images: in the last pass the first process gets two of them, which accelerate fills up to three."""
    expected, entries = (
        [entry for entry in read_log(folder) if "validation_cknna" in entry] for folder in one_and_two_processes
    )
    assert [entry["step"] for entry in entries] == [3, 5]
    for entry, expected_entry in zip(entries, expected, strict=True):
        assert len(entry) == 3 and entry == pytest.approx(expected_entry, abs=1e-5)


# --- compiled by accelerate ---

# All that is random but for the order of the data is off: a compiled dropout draws other numbers.
WITHOUT_DROPOUT = {
    "train_tokenizer": (),
    "train_repa_ar": ("--dropout", "0", "--class_dropout_prob", "0"),
    "train_repa_dit": ("--class_dropout_prob", "0"),
}


def accelerate_launch(backend):
    return ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--dynamo_backend", backend)


def greatest_difference(folder, other):
    """Of the weights of two results."""
    files = [path.relative_to(folder) for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path)]
    pairs = [(load_file(folder / file), load_file(other / file)) for file in files]
    assert pairs and all(one.keys() == two.keys() for one, two in pairs)
    return max((one[name] - two[name]).abs().max().item() for one, two in pairs for name in one)


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_training_equals_plain_training(workspace, tmp_path, script):
    """Trained, validated in the midst of it and saved; the backend traces like `inductor`, without its code."""
    options = ["--max_train_steps", "6", "--validation_steps", "4", *WITHOUT_DROPOUT[script]]
    for backend in ("no", "aot_eager"):
        workspace.run(script, tmp_path / backend, *options, launcher=accelerate_launch(backend))
    assert greatest_difference(tmp_path / "no", tmp_path / "aot_eager") < 1e-4
    logs = [read_log(tmp_path / backend) for backend in ("no", "aot_eager")]
    for expected, entry in zip(*logs, strict=True):
        assert entry == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_training_compiled_by_inductor_is_killed_and_resumed(workspace, tmp_path, script):
    options = ["--max_train_steps", "20", "--validation_steps", "10", *WITHOUT_DROPOUT[script]]
    if script == "train_tokenizer":
        # With one channel per normalization group the biases before it have no gradient but rounding, which AdamW
        # turns into steps of full size.
        options += ["--block_out_channels", "64", "64", "64"]
    workspace.run(script, tmp_path / "plain", *options)
    killed = tmp_path / "killed.py"
    killed.write_text(KILLED.replace("del sys.argv[0]\n", f"sys.argv[0] = {str(EXAMPLES / f'{script}.py')!r}\n"))
    launcher = accelerate_launch("inductor")
    arguments = workspace.arguments(script, tmp_path / "compiled", *options)
    command = [sys.executable, *launcher, str(killed), *arguments]
    subprocess.run(command, env=workspace.environment(), capture_output=True, cwd=workspace.root, timeout=600)
    assert sorted(path.name for path in (tmp_path / "compiled").glob("checkpoint-*")) == ["checkpoint-5"]
    resume = ["--resume_from_checkpoint", "latest"]
    workspace.run(script, tmp_path / "compiled", *options, *resume, launcher=launcher, timeout=600)
    assert greatest_difference(tmp_path / "plain", tmp_path / "compiled") < 1e-4


def test_no_script_reaches_for_the_network(workspace):
    """All runs above ended well under this guard, and thus reached for none: none was asked to push to the Hub."""
    code = "import socket; socket.create_connection(('huggingface.co', 443), timeout=1)"
    result = subprocess.run([sys.executable, "-c", code], env=workspace.environment(), capture_output=True, text=True)
    assert result.returncode == 97 and "NETWORK" in result.stderr
    for script in SCRIPTS:
        assert workspace.trained(script).is_dir()


# --- in this process: the tracker, and bad input ---


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """Runs a script in this process, with these arguments."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def reset():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    def run(script, arguments):
        reset()
        spec = importlib.util.spec_from_file_location(script, EXAMPLES / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, script, module)
        spec.loader.exec_module(module)
        (arguments_class,) = [
            value for name, value in vars(module).items() if name.endswith("Arguments") and value.__module__ == script
        ]
        return module.main(parse_args(arguments_class, arguments))

    yield run
    reset()


@pytest.fixture
def run_here(workspace, tmp_path, run_main):
    """Runs a training script in this process; returns its output folder."""

    def run(script, *extra):
        run_main(script, workspace.arguments(script, tmp_path / "out", *extra))
        return tmp_path / "out"

    return run


@pytest.fixture
def fails(run_here, tmp_path):
    """Checks that a script ends with a `ValueError` before it trains or writes a model."""

    def check(script, match, *extra):
        with pytest.raises(ValueError, match=match):
            run_here(script, *extra)
        assert not (tmp_path / "out" / "training_log.jsonl").exists()
        assert not list((tmp_path / "out").rglob("*.safetensors"))

    return check


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard(run_here, script):
    folder = run_here(script, "--report_to", "tensorboard", "--max_train_steps", "3")
    tracked = EventAccumulator(str(folder / "logs" / "hf-ifsq")).Reload()
    losses = [(entry["step"], entry["loss"]) for entry in read_log(folder) if "loss" in entry]
    assert [(event.step, event.value) for event in tracked.Scalars("loss")] == [
        (step, pytest.approx(loss, rel=1e-5)) for step, loss in losses
    ]
    (name,) = tracked.Tags()["images"]
    (picture,) = tracked.Images(name)
    saved = Image.open(next((folder / "validation").iterdir()))
    assert (picture.width, picture.height, picture.step) == (*saved.size, 3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resolution_that_does_not_divide(fails, script):
    fails(script, "`sample_size` must be a multiple of the downsampling factor 4.*got 18", "--resolution", "18")


def test_factors_of_another_codebook(fails):
    fails("train_repa_ar", r"25.*\[5, 5\].*15", "--vocab_sizes", "5", "5")


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_broken_tokenizer(fails, workspace, tmp_path, script):
    tokenizer = AutoencoderIFSQ.from_pretrained(workspace.trained("train_tokenizer"))
    tokenizer.save_pretrained(tmp_path / "broken")
    (file,) = (tmp_path / "broken").glob("*.safetensors")
    weights = load_file(file)
    weights["encoder.conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    match = "`tokenizer` has 1 weights with NaN.*encoder.conv_in.weight"
    fails(script, match, "--tokenizer", str(tmp_path / "broken"))


@pytest.mark.parametrize("script", SCRIPTS[1:])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("wrong, feature", [(-1, None), (3, Value("int64"))])
def test_label_out_of_range(fails, tmp_path, script, split, wrong, feature):
    if split == "train" and feature is not None:
        pytest.skip("without names, the training labels define the classes")
    for name, count in (("train", 9), ("test", 3)):
        labels = [0, 1, 2] * (count // 3)
        if name == split:
            labels[-1] = wrong
        write_parquet(tmp_path / "data" / f"{name}.parquet", count, 0, labels=labels, label_feature=feature)
    fails(script, f"label.*{wrong}", "--dataset_name", str(tmp_path / "data"))


@pytest.mark.parametrize("name, depth", [("repa_depth", 0), ("repa_depth", 3), ("cknna_depth", 0), ("cknna_depth", 3)])
@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_depth_of_the_alignment(fails, script, name, depth):
    fails(script, rf"`{name}` must be in \[1, 2\], got {depth}", f"--{name}", str(depth))


@pytest.mark.parametrize(
    "script, options, expected",
    [
        ("train_repa_ar", "--size S --num_hidden_layers 1", {"hidden_size": 384, "num_attention_heads": 12}),
        ("train_repa_ar", "--num_hidden_layers 1", {"hidden_size": 768, "num_attention_heads": 12}),
        (
            "train_repa_ar",
            "--size L --num_hidden_layers 1 --hidden_size 16 --num_attention_heads 2",
            {"hidden_size": 16, "num_attention_heads": 2},
        ),
        ("train_repa_dit", "--size S/2 --num_layers 1", {"num_attention_heads": 6, "patch_size": 2}),
        ("train_repa_dit", "--size S/2 --num_layers 1 --patch_size 1", {"num_attention_heads": 6, "patch_size": 1}),
        (
            "train_repa_dit",
            "--num_layers 1 --num_attention_heads 1 --attention_head_dim 12",
            {"num_attention_heads": 1, "attention_head_dim": 12, "patch_size": 1},
        ),
    ],
)
def test_sizes(workspace, tmp_path, run_main, script, options, expected):
    """Arguments override what belongs to the size, and only that."""
    arguments = [*PLAIN.split(), *options.split(), "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1"]
    arguments += ["--dataset_name", str(workspace.data), "--tokenizer", str(workspace.trained("train_tokenizer"))]
    run_main(script, [*arguments, "--teacher", str(workspace.teacher), "--projector_dim", "16"])
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert expected.items() <= config.items()
    assert 1 == config["num_hidden_layers" if script == "train_repa_ar" else "num_layers"]


@pytest.mark.parametrize("script, size", [("train_repa_ar", "L/1"), ("train_repa_dit", "L")])
def test_size_of_the_other_generator(run_here, capsys, script, size):
    with pytest.raises(SystemExit):
        run_here(script, "--size", size)
    assert f"--size: invalid choice: '{size}'" in capsys.readouterr().err


# --- after the last step, and before the first ---


@pytest.mark.parametrize("backend", ["EAGER", "INDUCTOR"])
def test_regional_compilation_of_a_tokenizer(fails, monkeypatch, backend):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    fails("train_tokenizer", "`ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION` must be off")


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_fails_after_the_training_leaves_the_model_on_disk(run_here, tmp_path, monkeypatch, script):
    def fail(**values):
        raise RuntimeError("no card")

    monkeypatch.setattr("hf_ifsq.training.model_card.make_model_card", fail)
    with pytest.raises(RuntimeError, match="no card") as failure:
        run_here(script, "--max_train_steps", "1")
    assert f"its model is in {tmp_path / 'out'}" in failure.value.__notes__[0]
    if script == "train_tokenizer":
        AutoencoderIFSQ.from_pretrained(tmp_path / "out")
    else:
        (IFSQARPipeline if script == "train_repa_ar" else IFSQDiTPipeline).from_pretrained(tmp_path / "out")


def test_a_tokenizer_whose_codes_are_all_equal_is_saved_all_the_same(run_here, tmp_path):
    with pytest.raises(ValueError, match="All codes of the training images are equal.*`learning_rate`") as failure:
        run_here("train_tokenizer", "--max_train_steps", "1", "--alpha", "1e-6")
    assert f"its model is in {tmp_path / 'out'}" in failure.value.__notes__[0]
    AutoencoderIFSQ.from_pretrained(tmp_path / "out")


# One step that changes nothing: what comes out is what the training began with.
STILL = ["--max_train_steps", "1", "--learning_rate", "1e-60", "--adam_weight_decay", "0", "--lr_warmup_steps", "0"]


@pytest.mark.parametrize("subfolder", [False, True])
@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_generators_begin_with_weights_and_other_classes(workspace, run_main, tmp_path, script, subfolder):
    """Of a pipeline folder: the class table is new, and with it the names of the data; all else is as it was."""
    trained = workspace.trained(script)
    write_parquet(tmp_path / "data" / "train.parquet", 8, 0, [0, 1] * 4, ClassLabel(names=["dog", "eel"]))
    dropout = ["--dropout", "0.2"] if script == "train_repa_ar" else []
    arguments = [*PLAIN.split(), *STILL, *dropout, "--class_dropout_prob", "0.3", "--num_images_per_label", "1"]
    arguments += ["--pretrained_model_name_or_path", str(trained), "--tokenizer", str(trained / "tokenizer")]
    arguments += ["--subfolder", "transformer"] if subfolder else []
    run_main(script, [*arguments, "--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")])
    before, after = (
        load_file(next(folder.glob("transformer/*.safetensors"))) for folder in (trained, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    (table,) = changed
    assert "class" in table and after[table].shape == (3, before[table].shape[1])
    assert 0.01 < after[table].std() < 0.03
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["id2label"] == {"0": "dog", "1": "eel"} and config["num_classes"] == 2
    for file in (tmp_path / "out").rglob("*.json"):
        assert str(trained.parent) not in file.read_text(), file


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_generators_begin_with_weights_and_the_same_classes(workspace, run_main, tmp_path, script):
    """Nothing is new then: dropouts are those of the weights, whatever the default of the arguments."""
    trained = workspace.trained(script)
    arguments = [*PLAIN.split(), *STILL, "--num_images_per_label", "1", "--dataset_name", str(workspace.data)]
    arguments += ["--pretrained_model_name_or_path", str(trained / "transformer"), "--tokenizer"]
    run_main(script, [*arguments, str(trained / "tokenizer"), "--output_dir", str(tmp_path / "out")])
    before, after = (
        load_file(next(folder.glob("transformer/*.safetensors"))) for folder in (trained, tmp_path / "out")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    before, after = (
        json.loads((folder / "transformer/config.json").read_text()) for folder in (trained, tmp_path / "out")
    )
    assert {**before, "_name_or_path": ""} == {**after, "_name_or_path": ""}


@pytest.mark.parametrize("script, of", [("train_repa_ar", "train_repa_dit"), ("train_repa_dit", "train_tokenizer")])
def test_weights_of_another_kind(workspace, run_main, tmp_path, script, of):
    (tmp_path / "empty").mkdir()
    places = {workspace.trained(of): " must be a model of the class IFSQ", tmp_path / "empty": " there is no config"}
    for place, message in places.items():
        arguments = [
            "--dataset_name",
            str(workspace.data),
            "--output_dir",
            str(tmp_path / "out"),
            "--resolution",
            "16",
        ]
        arguments += ["--tokenizer", str(workspace.trained("train_tokenizer")), "--output_dir", str(tmp_path / "out")]
        with pytest.raises(ValueError, match=f"`pretrained_model_name_or_path` '{place}'.*{message}"):
            run_main(script, [*arguments, "--pretrained_model_name_or_path", str(place)])


def test_a_tokenizer_begins_with_weights(workspace, run_main, tmp_path):
    trained = workspace.trained("train_tokenizer")
    arguments = [*PLAIN.split(), *STILL, "--dataset_name", str(workspace.data), "--output_dir", str(tmp_path / "out")]
    arguments += ["--pretrained_model_name_or_path", str(trained), "--perceptual_weight", "0"]
    run_main("train_tokenizer", arguments)
    before, after = (load_file(next(folder.glob("*.safetensors"))) for folder in (trained, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (trained, tmp_path / "out"))
    assert before["scaling_factor"] == pytest.approx(after["scaling_factor"], rel=1e-5)
    assert {**before, "scaling_factor": 0, "_name_or_path": ""} == {**after, "scaling_factor": 0, "_name_or_path": ""}


@pytest.mark.parametrize(
    "script, name, value",
    [("train_tokenizer", "levels", "3"), ("train_repa_ar", "size", "B"), ("train_repa_dit", "num_layers", "2")],
)
def test_a_model_that_is_begun_with_has_its_own_sizes(workspace, run_main, tmp_path, script, name, value):
    arguments = ["--dataset_name", str(workspace.data), "--output_dir", str(tmp_path / "out"), f"--{name}", value]
    arguments += [] if script == "train_tokenizer" else ["--tokenizer", str(workspace.trained("train_tokenizer"))]
    with pytest.raises(ValueError, match=f"`{name}` must be left out with `pretrained_model_name_or_path`.*{value}"):
        run_main(script, [*arguments, "--pretrained_model_name_or_path", str(workspace.trained(script))])


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stay_short(script):
    assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) <= 300


# --- tokens in place of images, and tokenizers of other classes ---


@pytest.fixture
def train_from(tmp_path, run_main):
    """Trains a generator on what the arguments name, without random crops; returns its output folder."""

    def train(script, name, *sources):
        arguments = [*PLAIN.split(), *OPTIONS[script].split(), *sources, "--output_dir", str(tmp_path / name)]
        run_main(script, arguments)
        return tmp_path / name

    return train


@pytest.fixture
def tokenize(workspace, tmp_path, run_main):
    """Tokenizes the images of the workspace plainly; returns the folder."""

    def run(tokenizer, *extra):
        arguments = ["--dataset_name", str(workspace.data), "--tokenizer", str(tokenizer), "--resolution", "16"]
        run_main("tokenize_dataset", [*arguments, "--output_dir", str(tmp_path / "tokens"), *extra])
        return str(tmp_path / "tokens")

    return run


@pytest.mark.parametrize("script", SCRIPTS[1:])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_tokens_train_as_their_images(workspace, train_from, tokenize, tmp_path, monkeypatch, script, with_teacher):
    """Images that lie there no more cannot be read, and a tokenizer without `encode` cannot be run."""
    tokenizer = workspace.trained("train_tokenizer")
    teacher = ["--teacher", str(workspace.teacher)] if with_teacher else []
    images = ["--dataset_name", str(workspace.data), "--tokenizer", str(tokenizer), "--center_crop"]
    expected = train_from(script, "images", *images, *teacher)
    tokens = tokenize(tokenizer, *teacher)
    workspace.data.rename(tmp_path / "elsewhere")
    if with_teacher:
        workspace.teacher.rename(tmp_path / "no teacher")
    monkeypatch.delattr(AutoencoderIFSQ, "encode")
    try:
        folder = train_from(script, "generator", "--token_dataset", tokens, *teacher)
    finally:
        (tmp_path / "elsewhere").rename(workspace.data)
        if with_teacher:
            (tmp_path / "no teacher").rename(workspace.teacher)
    monkeypatch.undo()
    log, expected_log = read_log(folder), read_log(expected)
    assert len(log) == len(expected_log) == 15
    # Stored features are rounded to float16.
    tolerance = 2e-3 if with_teacher else 1e-6
    for entry, expected_entry in zip(log, expected_log):
        assert entry == pytest.approx(expected_entry, abs=tolerance)
        assert ("alignment_loss" in entry) == (with_teacher and "loss" in entry)
    # The pipeline has the tokenizer with it.
    pipeline = (IFSQARPipeline if script == "train_repa_ar" else IFSQDiTPipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("bee", output_type="np").images.shape == (1, 16, 16, 3)
    weights = load_file(tokenizer / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in pipeline.tokenizer.state_dict().items())


@pytest.mark.parametrize("shift, learnable", [(1, True), (0, False)])
def test_the_state_that_predicts_a_token_is_aligned_with_the_patch_of_that_token(
    workspace, tmp_path, run_main, shift, learnable
):
    """
    Tokens are random, and the feature of patch i is the token `shift` places before i. Aligned with patch i is the
    state that has seen the tokens before i and not token i. If it were that of the next position, it would know both
    features; if it were that of the position before, none.
    """
    tokenizer = as_image_tokenizer(AutoencoderIFSQ.from_pretrained(workspace.trained("train_tokenizer")))
    indices = torch.randint(15, (600, 16))
    info = TokenDatasetInfo(
        tokenizer={
            "name_or_path": str(workspace.root / "train_tokenizer"),
            "revision": None,
            **fingerprint(tokenizer),
        },
        scaling_factor=tokenizer.scaling_factor,
        resolution=16,
        teacher={"name_or_path": "oracle", "hidden_size": 15},
        num_rows={"train": 600},
        images={},
        shards={"batch_size": 600, "images_per_shard": 600},
        hf_ifsq_version="0",
    )
    writer = TokenDatasetWriter(str(tmp_path / "tokens"), info, ClassLabel(names=NAMES))
    writer.begin()
    with writer.open(writer.shards("train")[0]) as add_rows:
        features = torch.nn.functional.one_hot(indices.roll(shift, dims=1), 15).float()
        add_rows(indices=indices, label=torch.arange(600) % 3, teacher_features=features)
    writer.finish("Random tokens")
    model = "--vocab_sizes 15 --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --dropout 0"
    training = "--train_batch_size 32 --max_train_steps 60 --learning_rate 5e-3 --projector_dim 64 --logging_steps 5"
    run_main(
        "train_repa_ar",
        [*model.split(), *training.split(), "--token_dataset", str(tmp_path / "tokens"), "--teacher", "oracle"]
        + ["--num_images_per_label", "1", "--output_dir", str(tmp_path / "out")],
    )
    losses = [entry["alignment_loss"] for entry in read_log(tmp_path / "out") if "alignment_loss" in entry]
    # The best that is to be had without knowledge is the mean of all features, and patch 0 has nothing before it.
    assert losses[0] > -0.3
    assert losses[-1] < -0.85 if learnable else losses[-1] > -(15**-0.5) - 0.05


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_alignment_is_learned(workspace, train_from, tokenize, script):
    teacher = ["--teacher", str(workspace.teacher)]
    tokens = tokenize(workspace.trained("train_tokenizer"), *teacher)
    longer = ["--max_train_steps", "80", "--learning_rate", "1e-2", "--validation_steps", "100", "--repa_weight", "5"]
    log = read_log(train_from(script, "out", "--token_dataset", tokens, *teacher, *longer))
    losses = [entry["alignment_loss"] for entry in log if "alignment_loss" in entry]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


def test_training_on_tokens_resumes(workspace, train_from, tokenize):
    tokens = tokenize(workspace.trained("train_tokenizer"), "--num_augmentations", "2", "--random_flip")
    source = ["--token_dataset", tokens]
    straight = train_from("train_repa_ar", "straight", *source)
    resumed = train_from(
        "train_repa_ar", "resumed", *source, "--resume_from_checkpoint", str(straight / "checkpoint-5")
    )
    expected, weights = (load_file(folder / "transformer" / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    losses = {entry["step"]: entry["loss"] for entry in read_log(straight) if "loss" in entry}
    assert {entry["step"]: entry["loss"] for entry in read_log(resumed) if "loss" in entry} == {
        step: losses[step] for step in range(6, 13)
    }


@pytest.mark.parametrize("script", SCRIPTS[1:])
@pytest.mark.parametrize("model_class", [VQModel, AutoencoderKL])
def test_tokenizers_of_other_classes(workspace, train_from, tokenize, make_baseline, tmp_path, script, model_class):
    model = make_baseline(model_class, scaling_factor=0.7)
    model.save_pretrained(tmp_path / "tokenizer")
    images = ["--dataset_name", str(workspace.data), "--tokenizer", str(tmp_path / "tokenizer"), "--center_crop"]
    short = ["--max_train_steps", "3"] + (["--vocab_sizes", "4", "5"] if script == "train_repa_ar" else [])
    if model_class is AutoencoderKL and script == "train_repa_ar":
        with pytest.raises(ValueError, match="`tokenizer` is an AutoencoderKL.*continuous"):
            train_from(script, "images", *images, *short)
        return
    folder = train_from(script, "images", *images, *short)
    pipeline = (IFSQARPipeline if script == "train_repa_ar" else IFSQDiTPipeline).from_pretrained(folder)
    assert type(pipeline.tokenizer) is model_class
    log = read_log(folder)
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    if model_class is VQModel:
        tokens = train_from(script, "generator", "--token_dataset", tokenize(tmp_path / "tokenizer"), *short)
        for entry, expected in zip(read_log(tokens), log, strict=True):
            assert entry == pytest.approx(expected, abs=1e-6)


def test_without_vocab_sizes_an_autoencoder_kl_is_refused_too(workspace, run_main, make_baseline, tmp_path):
    make_baseline(AutoencoderKL).save_pretrained(tmp_path / "tokenizer")
    arguments = ["--dataset_name", str(workspace.data), "--tokenizer", str(tmp_path / "tokenizer")]
    with pytest.raises(ValueError, match="`tokenizer` is an AutoencoderKL.*continuous"):
        run_main("train_repa_ar", [*arguments, "--resolution", "16", "--output_dir", str(tmp_path / "out")])
