"""The generation config of a checkpoint is what `generate` and the pipeline do where the caller says nothing."""

import json

import pytest
import torch
from transformers import GenerationConfig

from hf_ifsq import IFSQARForImageGeneration, IFSQARPipeline
from hf_ifsq.models.sampling_ifsq_ar import DEFAULTS


LABELS = torch.tensor([1, 3])
# Each but the schedule and interval of guidance, without which there is none to speak of.
SETTINGS = [
    {"do_sample": False},
    {"temperature": 0.3},
    {"temperature": [0.3, 2.0]},
    {"top_k": 2},
    {"top_k": [1, 3]},
    {"top_p": 0.4},
    {"guidance_scale": 4.0},
    {"guidance_scale": 4.0, "guidance_schedule": "linear"},
    {"guidance_scale": 4.0, "guidance_interval": [0.5, 1.0]},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def sample(model, **options):
    return model.generate(LABELS, generator=torch.Generator().manual_seed(2), **options)


@every_setting
def test_generation_config_is_followed(make_ar, tmp_path, settings):
    model = make_ar(vocab_sizes=[4, 3])
    plain, expected = sample(model), sample(model, **settings)
    assert not torch.equal(plain, expected)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in DEFAULTS if name in saved} == settings
    loaded = IFSQARForImageGeneration.from_pretrained(tmp_path)
    assert torch.equal(sample(model), expected) and torch.equal(sample(loaded), expected)
    # An argument wins, and `None` is one.
    assert torch.equal(sample(loaded, **{name: DEFAULTS[name] for name in settings}), plain)
    # So does the config of a call or of the loading.
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, guidance_scale=1.0)
    assert torch.equal(sample(loaded, generation_config=config), plain)
    loaded = IFSQARForImageGeneration.from_pretrained(tmp_path, generation_config=GenerationConfig())
    assert torch.equal(sample(loaded), plain)


@every_setting
def test_config_of_a_call(make_ar, settings):
    model = make_ar(vocab_sizes=[4, 3])
    config = GenerationConfig(**{"do_sample": True, **settings})
    assert torch.equal(sample(model, generation_config=config), sample(model, **settings))
    assert torch.equal(sample(model), sample(model, do_sample=True))
    # What it does not set is as in the model's.
    model.generation_config.top_k = 1
    assert torch.equal(
        sample(model, generation_config=GenerationConfig(temperature=0.7)), sample(model, do_sample=False)
    )


def test_nothing_is_said_where_nothing_is_set(make_ar, tmp_path):
    model = make_ar()
    assert model.can_generate()
    model.generation_config.top_k = 3
    model.save_pretrained(tmp_path)
    assert (tmp_path / "generation_config.json").exists()
    model.generation_config.top_k = None
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    # As transformers has written it for a model without any.
    (tmp_path / "generation_config.json").write_text('{"_from_model_config": true, "use_cache": false}')
    loaded = IFSQARForImageGeneration.from_pretrained(tmp_path)
    assert torch.equal(sample(loaded), sample(model, top_k=None, do_sample=True, temperature=1.0))


@pytest.mark.parametrize(
    "name, value",
    [("temperature", "hot"), ("temperature", 0), ("top_k", -1), ("top_p", 1.5), ("do_sample", "yes"), ("num_beams", 4)]
    + [("max_new_tokens", 3), ("repetition_penalty", 1.2), ("min_p", 0.1)],
)
def test_wrong_values(make_ar, tmp_path, name, value):
    model = make_ar()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"`{name}`"):
        IFSQARForImageGeneration.from_pretrained(tmp_path)
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.generate(LABELS)
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.save_pretrained(tmp_path)


def test_a_file_that_cannot_be_read_is_not_passed_over(make_ar, tmp_path):
    make_ar().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_k": ')
    with pytest.raises(OSError, match="not a valid JSON file"):
        IFSQARForImageGeneration.from_pretrained(tmp_path)


def test_loading_with_other_classes_leaves_it_alone(make_ar, tmp_path):
    model = make_ar()
    model.generation_config.top_k = 3
    model.save_pretrained(tmp_path)
    loaded = IFSQARForImageGeneration.from_pretrained(tmp_path, num_classes=7, ignore_mismatched_sizes=True)
    assert loaded.generation_config == model.generation_config


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"top_k": 2, "guidance_scale": 2.0}], ids=str)
def test_the_pipeline_follows_it(make_ar, make_autoencoder, tmp_path, settings):
    model = make_ar(vocab_sizes=[60], grid_size=[4, 4])
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    IFSQARPipeline(model, make_autoencoder()).save_pretrained(tmp_path)
    pipe = IFSQARPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)

    def ids(**options):
        generator = torch.Generator().manual_seed(5)
        return pipe([1, 3], batch_size=1, generator=generator, output_type="latent", **options).images.flatten(1)

    plain = {name: DEFAULTS[name] for name in settings}
    assert torch.equal(ids(), ids(**settings)) and not torch.equal(ids(), ids(**plain))


@pytest.mark.parametrize(
    "name, values",
    {
        "temperature": ["hot", [1, 2, 3], None, 0, float("nan"), float("inf"), True, [1.0, None], torch.tensor(1.0)],
        "top_k": ["a", 0, 2.5, True, [1, 2, 3], [1, "b"]],
        "top_p": ["a", -1, True, [0.5], [0.5, 2]],
        "do_sample": [None, 1, "no"],
        "callback": [5],
        "generation_config": [{"top_k": 3}],
        "class_labels": [[1, 2], 1, None, "1", torch.tensor([True]), torch.zeros(2, dtype=torch.long, device="meta")],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_of_generate(make_ar, name, values):
    model = make_ar(vocab_sizes=[4, 3])
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
            model.generate(**{"class_labels": LABELS, name: value})
