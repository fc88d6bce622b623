import importlib.util
import math
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pytest
import yaml

from hf_ifsq.training.arguments import GeneratorArguments, TrainingArguments, parse_args, values_for


EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass
class ScriptArguments(TrainingArguments):
    levels: list[int] = field(default_factory=lambda: [17, 17])
    teacher: str | None = None


@pytest.fixture
def write_recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults():
    args = parse_args(TrainingArguments, ["--dataset_name", "images"])
    assert args == TrainingArguments(dataset_name="images")
    assert args.learning_rate == 1e-4 and args.max_train_steps is None and args.use_ema is False
    assert asdict(args).keys() == {entry.name for entry in fields(TrainingArguments)}
    assert all(entry.metadata["help"] for entry in fields(TrainingArguments))


def test_recipe_and_command_line_that_overrides_it(write_recipe):
    recipe = write_recipe(
        "dataset_name: images\nlearning_rate: 1e-3\nadam_epsilon: 1.0e-6\ntrain_batch_size: 8\nlevels: [5, 3]\n"
        "use_ema: true\nseed: 3\nmax_train_steps: 70\nnum_train_epochs: 2\nteacher: null\n"
    )
    args = parse_args(ScriptArguments, ["--config", recipe, "--seed", "4", "--max_train_steps=80"])
    assert (args.learning_rate, args.adam_epsilon, args.train_batch_size) == (1e-3, 1e-6, 8)
    assert (args.levels, args.use_ema, args.seed, args.max_train_steps) == ([5, 3], True, 4, 80)
    assert args.num_train_epochs == 2 and args.teacher is None and args.config == recipe
    assert parse_args(ScriptArguments, ["--config", recipe, "--levels", "7", "9", "11"]).levels == [7, 9, 11]


def test_home_folder(write_recipe, monkeypatch, tmp_path):
    """No shell puts it for the `~` in a recipe, nor after `=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_recipe(
        "token_dataset: ~/tokens\noutput_dir: ~/result\ntokenizer: ~/tokenizer\nteacher: ~\nhub_model_id: a/b~\n"
        "resume_from_checkpoint: ~/result/checkpoint-1\n"
    )
    args = parse_args(GeneratorArguments, ["--config=~/recipe.yaml", "--teacher=~/vit"])
    assert (args.token_dataset, args.output_dir) == (f"{tmp_path}/tokens", f"{tmp_path}/result")
    assert (args.tokenizer, args.teacher, args.hub_model_id) == (f"{tmp_path}/tokenizer", f"{tmp_path}/vit", "a/b~")
    assert args.resume_from_checkpoint == f"{tmp_path}/result/checkpoint-1"
    assert TrainingArguments(train_data_dir="~/photos").train_data_dir == f"{tmp_path}/photos"


def test_arguments_of_the_process_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--train_data_dir", "photos", "--seed", "5"])
    args = parse_args(TrainingArguments)
    assert (args.train_data_dir, args.seed) == ("photos", 5)


@pytest.mark.parametrize("in_recipe", [None, True, False])
@pytest.mark.parametrize("flag, value", [([], None), (["--use_ema"], True), (["--use_ema", "false"], False)])
def test_flags_both_ways(write_recipe, in_recipe, flag, value):
    recipe = write_recipe("dataset_name: images\n" + ("" if in_recipe is None else f"use_ema: {in_recipe}\n"))
    expected = bool(in_recipe) if value is None else value
    assert parse_args(TrainingArguments, ["--config", recipe, *flag]).use_ema is expected


@pytest.mark.parametrize("name, value", [("use_ema", "maybe"), ("report_to", "clearml"), ("learning_rate", "fast")])
def test_values_that_do_not_parse(write_recipe, capsys, name, value):
    for argv in ([f"--{name}", value], ["--config", write_recipe(f"{name}: {value}\n")]):
        with pytest.raises((ValueError, SystemExit)) as error:
            parse_args(TrainingArguments, ["--dataset_name", "images", *argv])
        assert value in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    "text, match",
    [
        (
            "dataset_name: images\nlearnin_rate: 1\nzeal: 2\n",
            r"`config`.*TrainingArguments.*\['learnin_rate', 'zeal'\]",
        ),
        ("- a\n- b\n", "`config`.*must be a YAML mapping"),
        ("", "`config`.*must be a YAML mapping"),
        ("dataset_name: images\nmax_train_steps: ten\n", "max_train_steps.*ten"),
        ("dataset_name: images\ntrain_batch_size: [1, 2]\n", r"train_batch_size.*\[1, 2\]"),
        ("dataset_name: images\nuse_ema: 3\n", "use_ema.*3"),
        ("dataset_name: images\nseed: 0.5\n", r"seed.*0\.5"),
        ("dataset_name: images\nreport_to: clearml\n", "report_to.*clearml"),
    ],
)
def test_bad_recipes(write_recipe, capsys, text, match):
    with pytest.raises((ValueError, SystemExit)) as error:
        parse_args(TrainingArguments, ["--config", write_recipe(text)])
    message = capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value)
    assert re.search(match, message), message


def test_missing_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        parse_args(TrainingArguments, ["--config", str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize("argv", [["--learnin_rate", "1"], ["--learning", "1"], ["stray"]])
def test_unknown_names_on_the_command_line(argv, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        parse_args(TrainingArguments, ["--dataset_name", "images", *argv])
    assert argv[0] in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value",
    [
        ("resolution", 0),
        ("train_batch_size", -1),
        ("max_train_steps", 0),
        ("max_train_samples", 0),
        ("max_validation_samples", 0),
        ("gradient_accumulation_steps", 0),
        ("logging_steps", 0),
        ("validation_steps", 0),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("max_grad_norm", float("inf")),
        ("num_train_epochs", -1.0),
        ("min_crop_scale", 0.0),
        ("min_crop_scale", 1.5),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
    ],
)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*got {value}"):
        TrainingArguments(dataset_name="images", **{name: value})


@pytest.mark.parametrize("sources", [{}, {"dataset_name": "images", "train_data_dir": "photos"}])
def test_exactly_one_source_of_data(sources):
    with pytest.raises(ValueError, match="`dataset_name` or `train_data_dir`.*" + ".*".join(sources.values())):
        TrainingArguments(**sources)


@pytest.mark.parametrize("recipe", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_examples(recipe):
    scripts = {
        "digits_ar": "train_repa_ar",
        "llamagen_l_repa": "train_repa_ar",
        "llamagen_l_repa_2x289": "train_repa_ar",
        "digits_dit": "train_repa_dit",
        "dit_l_repa": "train_repa_dit",
    }
    script = EXAMPLES / f"{scripts.get(recipe.stem, 'train_tokenizer')}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_test_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    (arguments_class,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, TrainingArguments) and value.__module__ == spec.name
    ]
    # A recipe that is not for a certain dataset leaves it and what comes from it to the command line.
    needed = ["dataset_name"] if script.stem == "train_tokenizer" else ["dataset_name", "tokenizer"]
    missing = [name for name in needed if f"\n{name}:" not in recipe.read_text()]
    args = parse_args(arguments_class, ["--config", str(recipe), *(f"--{name}=given" for name in missing)])
    for name, value in yaml.safe_load(recipe.read_text()).items():
        got = getattr(args, name)
        assert got == (float(value) if isinstance(got, float) else value)
        assert type(got) in (type(value), float)


def test_recipes_of_the_paper():
    one_head, two_heads, dit = (
        yaml.safe_load((EXAMPLES / "recipes" / f"{name}.yaml").read_text())
        for name in ("llamagen_l_repa", "llamagen_l_repa_2x289", "dit_l_repa")
    )
    assert one_head | {"vocab_sizes": [289, 289], "num_factor_layers": 2} == two_heads
    assert one_head["vocab_sizes"] == [17**4] == [math.prod(two_heads["vocab_sizes"])]
    for recipe, batch_size in ((one_head, 256), (dit, 1024)):
        assert recipe["train_batch_size"] * recipe["gradient_accumulation_steps"] == batch_size


def test_the_tokenizer_recipe_has_the_settings_of_the_paper():
    recipe = yaml.safe_load((EXAMPLES / "recipes" / "ifsq_f16_d4_4bit.yaml").read_text())
    expected = {
        "levels": [17] * 4,
        "block_out_channels": [128, 128, 256, 512, 512],
        "perceptual_weight": 1.0,
        "discriminator_start_step": 50_000,
        "discriminator_weight": 0.5,
        "train_batch_size": 16,
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 100,
        "learning_rate": 1e-4,
        "ema_decay": 0.999,
    }
    assert expected == {name: float(recipe[name]) if name == "learning_rate" else recipe[name] for name in expected}


def test_values_for_a_function():
    def function(dataset_name, seed, *, learning_rate=1.0, other=None):
        pass

    args = TrainingArguments(dataset_name="images", seed=4, learning_rate=2.0)
    assert values_for(function, args) == {"dataset_name": "images", "seed": 4, "learning_rate": 2.0}


def test_help_names_every_argument():
    code = "from hf_ifsq.training.arguments import *; parse_args(TrainingArguments, ['--help'])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"--{entry.name}" in output for entry in fields(TrainingArguments))


@pytest.mark.parametrize(
    "options, name",
    [
        ({"guidance_scale": 2.0, "class_dropout_prob": 0.0}, "guidance_scale"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"num_images_per_label": 0}, "num_images_per_label"),
    ],
)
def test_validation_pictures_that_could_not_be_made(options, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        GeneratorArguments(dataset_name="images", tokenizer="tokenizer", **options)


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, value) for name in ("seed", "dataloader_num_workers", "lr_warmup_steps") for value in ("-1",)],
        *[(name, value) for name in ("adam_weight_decay", "adam_epsilon") for value in ("-0.1", "nan", "inf")],
        *[(name, value) for name in ("adam_beta1", "adam_beta2", "ema_decay") for value in ("1", "-0.1", "nan")],
        *[(name, value) for name in ("learning_rate", "max_grad_norm", "num_train_epochs") for value in ("0", "nan")],
        *[(name, "0") for name in ("train_batch_size", "max_train_steps", "checkpoints_total_limit", "resolution")],
    ],
)
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        parse_args(TrainingArguments, ["--dataset_name", "images", f"--{name}", value])


def test_warmup_of_a_schedule_that_has_none():
    with pytest.raises(ValueError, match="`lr_warmup_steps` must be 0.*'constant'.*'constant_with_warmup'"):
        parse_args(TrainingArguments, ["--dataset_name", "images", "--lr_warmup_steps", "10"])
    arguments = ["--dataset_name", "images", "--lr_warmup_steps", "10", "--lr_scheduler", "constant_with_warmup"]
    assert parse_args(TrainingArguments, arguments).lr_warmup_steps == 10


def test_unknown_schedules_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse_args(TrainingArguments, ["--dataset_name", "images", "--lr_scheduler", "cosinus"])
    assert "invalid choice: 'cosinus'" in capsys.readouterr().err


def test_the_result_does_not_go_among_the_images(tmp_path):
    (tmp_path / "images").mkdir()
    arguments = ["--train_data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "a" / ".." / "images")]
    with pytest.raises(ValueError, match="`output_dir` must be another folder than that of the images"):
        parse_args(TrainingArguments, arguments)
