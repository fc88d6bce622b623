import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from hf_ifsq import (
    AutoencoderIFSQ,
    IFSQARForImageGeneration,
    IFSQARPipeline,
    IFSQDiTPipeline,
    IFSQDiTTransformer2DModel,
)


NAMES = ["ant", "bee", "cat", "dog", "eel"]
PIPELINES = ["ar", "dit"]
STEPS = {"ar": 12, "dit": 5}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def run(make_pipeline):
    """Images of a pipeline of the given kind, with few steps."""
    pipelines = {}

    def call(kind, class_labels=0, **arguments):
        pipeline = pipelines.setdefault(kind, make_pipeline(kind))
        if kind == "dit":
            arguments.setdefault("num_inference_steps", STEPS["dit"])
        return pipeline(class_labels, **arguments).images

    call.pipelines = pipelines
    return call


def count_rows(pipeline):
    """List that fills with the number of rows of each step of the transformer."""
    rows = []
    is_dit = isinstance(pipeline.transformer, IFSQDiTTransformer2DModel)
    layer = (pipeline.transformer.blocks if is_dit else pipeline.transformer.model.layers)[0]
    layer.register_forward_pre_hook(
        lambda _, inputs, options: rows.append(len([*inputs, *options.values()][0])), with_kwargs=True
    )
    return rows


# --- classes ---


@pytest.mark.parametrize("kind", PIPELINES)
def test_labels_in_all_forms(run, kind):
    expected = run(kind, [1, 3], generator=generators(0, 1), output_type="latent")
    for labels in (["bee", "dog"], ("bee", 3), torch.tensor([1, 3]), np.array([1, 3]), range(1, 4, 2)):
        assert torch.equal(run(kind, labels, generator=generators(0, 1), output_type="latent"), expected)
    for label in (1, "bee", np.int64(1), torch.tensor(1)):
        assert torch.equal(run(kind, label, generator=generators(0), output_type="latent"), expected[:1])
    other = run(kind, [2, 3], generator=generators(0, 1), output_type="latent")
    assert torch.equal(other[1], expected[1]) and not torch.equal(other[0], expected[0])


@pytest.mark.parametrize("kind", PIPELINES)
def test_names_of_classes(run, make_pipeline, kind):
    pipeline = make_pipeline(kind)
    assert list(pipeline.labels.items()) == [(name, number) for number, name in enumerate(NAMES)]
    assert pipeline.get_label_ids("dog") == [3] and pipeline.get_label_ids(["eel", "ant"]) == [4, 0]


@pytest.mark.parametrize("kind", PIPELINES)
def test_images_of_a_class_are_next_to_each_other(run, kind):
    several = run(kind, ["cat", 4], num_images_per_label=2, generator=generators(0, 1, 2, 3), output_type="latent")
    expected = run(kind, [2, 2, 4, 4], generator=generators(0, 1, 2, 3), output_type="latent")
    assert torch.equal(several, expected)


# --- outputs ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", PIPELINES)
def test_output_types(make_pipeline, make_tokenizer, kind, channels):
    tokenizer = make_tokenizer(in_channels=channels, out_channels=channels)
    tokenizer.decoder.conv_out.weight.data *= 3  # some pixels beyond [-1, 1]
    pipeline = make_pipeline(kind, tokenizer=tokenizer)

    def images(output_type):
        return pipeline([0, 3], generator=generators(0, 1), output_type=output_type).images

    latent = images("latent")
    if kind == "ar":
        assert latent.shape == (2, 3, 4) and latent.dtype == torch.int64 and latent.min() >= 0 and latent.max() < 15
        sample = tokenizer.decode_indices(latent).sample
    else:
        assert latent.shape == (2, 2, 3, 4)
        digits = latent / 1.5 * torch.tensor([2.0, 1.0])[:, None, None]  # levels 5 and 3 are multiples of 1/2 and 1
        torch.testing.assert_close(digits, digits.round(), rtol=0, atol=1e-5)
        assert digits.round().abs().amax(dim=(0, 2, 3)).tolist() <= [2, 1]
        sample = tokenizer.decode(latent / 1.5).sample
    assert len(latent.unique()) > 2 and sample.abs().max() > 1
    pixels = images("pt")
    assert pixels.shape == (2, channels, 12, 16) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, ((sample + 1) / 2).clamp(0, 1), rtol=0, atol=1e-5)
    array = images("np")
    assert array.shape == (2, 12, 16, channels) and array.min() >= 0 and array.max() <= 1
    np.testing.assert_allclose(array, pixels.numpy().transpose(0, 2, 3, 1), atol=1e-6)
    pictures = images("pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [("L" if channels == 1 else "RGB", (16, 12))] * 2
    for picture, expected in zip(pictures, array):
        values = np.asarray(picture).reshape(12, 16, channels)
        np.testing.assert_allclose(values, expected * 255, atol=0.51)


@pytest.mark.parametrize("kind", PIPELINES)
def test_plain_tuple(make_pipeline, kind):
    pipeline = make_pipeline(kind)
    (images,) = pipeline(0, generator=generators(0), output_type="pt", return_dict=False)
    assert torch.equal(images, pipeline(0, generator=generators(0), output_type="pt").images)


# --- randomness ---


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 2.5}])
@pytest.mark.parametrize("kind", PIPELINES)
def test_an_image_depends_on_its_own_generator_and_label_alone(run, kind, arguments):
    labels, seeds = [4, 0, 2, 0], [11, 12, 13, 14]

    def images(order, output_type):
        chosen = [labels[index] for index in order]
        seeded = generators(*[seeds[index] for index in order])
        return run(kind, chosen, generator=seeded, output_type=output_type, **arguments)

    latents, pixels = images(range(4), "latent"), images(range(4), "pt")
    assert len({tuple(row.flatten().tolist()) for row in latents}) == 4
    for order in ([0], [1], [2], [3], [3, 1], [2, 0, 3, 1]):
        assert torch.equal(images(order, "latent"), latents[list(order)])
        torch.testing.assert_close(images(order, "pt"), pixels[list(order)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", PIPELINES)
def test_one_generator_for_many_images(run, kind):
    def images(count, generator):
        return run(kind, [0] * count, generator=generator, output_type="latent")

    first = images(3, torch.Generator().manual_seed(5))
    assert torch.equal(images(3, torch.Generator().manual_seed(5)), first)
    assert not torch.equal(images(3, torch.Generator().manual_seed(6)), first)
    assert len({tuple(row.flatten().tolist()) for row in first}) == 3
    torch.manual_seed(7)
    without = images(2, None)
    torch.manual_seed(7)
    assert torch.equal(images(2, None), without)


@pytest.mark.parametrize("kind", PIPELINES)
def test_batches_give_the_same_images(run, kind):
    def images(batch_size, generator):
        return run(kind, [4, 0, 2, 0, 1], generator=generator, batch_size=batch_size, output_type="latent")

    expected = images(None, torch.Generator().manual_seed(5))
    for batch_size in (1, 2, 5, 7):
        assert torch.equal(images(batch_size, torch.Generator().manual_seed(5)), expected)
        seeds = torch.randint(2**63 - 1, (5,), generator=torch.Generator().manual_seed(5)).tolist()
        assert torch.equal(images(batch_size, generators(*seeds)), expected)


# --- steps ---


@pytest.mark.parametrize("kind", PIPELINES)
def test_callback_sees_every_step(make_pipeline, kind):
    pipeline, calls = make_pipeline(kind), []

    def callback(*arguments):
        calls.append((*arguments[:3], {name: value.clone() for name, value in arguments[3].items()}))
        return arguments[3]

    options = {} if kind == "ar" else {"num_inference_steps": STEPS[kind], "snap_to_codes": False}
    arguments = {**options, "output_type": "latent"}
    images = pipeline([1, 2], generator=generators(0, 1), callback_on_step_end=callback, **arguments).images
    assert all(pipe is pipeline for pipe, *_ in calls)
    assert [step for _, step, _, _ in calls] == list(range(STEPS[kind]))
    assert [list(values) for *_, values in calls] == [["indices" if kind == "ar" else "latents"]] * STEPS[kind]
    if kind == "ar":
        for done, (_, step, same_step, values) in enumerate(calls, start=1):
            assert same_step == step
            expected = images.flatten(1).clone()
            expected[:, done:] = 0
            assert torch.equal(values["indices"], expected)
    else:
        assert [float(timestep) for _, _, timestep, _ in calls] == pytest.approx([1000, 800, 600, 400, 200])
        torch.testing.assert_close(calls[-1][3]["latents"], images)
    assert torch.equal(pipeline([1, 2], generator=generators(0, 1), **arguments).images, images)


def test_ids_changed_by_the_callback_are_gone_on_from(make_pipeline):
    pipeline = make_pipeline("ar")
    plain = pipeline([1, 2], do_sample=False, output_type="latent").images.flatten(1)
    forced = (plain[:, 3] + 7) % 15

    calls = []

    def callback(pipe, step, timestep, values):
        calls.append(step)
        indices = values["indices"].clone()
        if len(calls) == 4:
            indices[:, 3] = forced
        return {"indices": indices}

    images = pipeline([1, 2], do_sample=False, output_type="latent", callback_on_step_end=callback).images.flatten(1)
    assert torch.equal(images[:, :3], plain[:, :3]) and torch.equal(images[:, 3], forced)
    # What follows is the most likely continuation of the changed ids by a plain forward pass.
    with torch.no_grad():
        low = pipeline.transformer(torch.tensor([1, 2]), images).logits[..., :5]
    assert torch.equal(images[:, 4:] % 5, low.argmax(-1)[:, 4:]) and not torch.equal(images[:, 4:], plain[:, 4:])


@pytest.mark.parametrize("guidance_scale, factor", [(1.0, 1), (2.0, 2)])
@pytest.mark.parametrize("kind", PIPELINES)
def test_unconditional_rows_with_guidance_only(run, make_pipeline, kind, guidance_scale, factor):
    pipeline = make_pipeline(kind)
    run.pipelines[kind] = pipeline
    rows = count_rows(pipeline)
    run(kind, [0, 1, 2], guidance_scale=guidance_scale, output_type="latent")
    assert rows == [3 * factor] * STEPS[kind]


@pytest.mark.parametrize("arguments", [{"top_k": 2}, {"top_p": 0.4}, {"temperature": 0.2}, {"do_sample": False}])
def test_sampling_options_reach_the_generator(make_pipeline, arguments):
    pipeline = make_pipeline("ar")
    images = pipeline([1, 2], generator=generators(0, 1), output_type="latent", **arguments).images
    expected = pipeline.transformer.generate(torch.tensor([1, 2]), generator=generators(0, 1), **arguments)
    assert torch.equal(images, expected.view(2, 3, 4))
    plain = pipeline([1, 2], generator=generators(0, 1), output_type="latent").images
    assert not torch.equal(images, plain)


# --- flow matching ---


def test_noise_is_drawn_from_the_generators(make_pipeline):
    pipeline = make_pipeline("dit")
    noise = torch.stack([torch.randn(2, 3, 4, generator=generator) for generator in generators(3, 4)])
    arguments = {"num_inference_steps": 5, "snap_to_codes": False, "output_type": "latent"}
    images = pipeline([0, 1], generator=generators(3, 4), **arguments).images
    assert torch.equal(images, pipeline([0, 1], latents=noise, **arguments).images)


# --- saving and loading ---


LOAD = """
import sys
import numpy as np, torch
from hf_ifsq import IFSQARPipeline, IFSQDiTPipeline
for kind, pipeline_class in (("ar", IFSQARPipeline), ("dit", IFSQDiTPipeline)):
    pipeline = pipeline_class.from_pretrained(f"{sys.argv[1]}/{kind}")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = pipeline(["dog", "ant"], guidance_scale=2.0, generator=generators, output_type="np").images
    np.save(f"{sys.argv[1]}/{kind}.npy", images)
    assert pipeline.labels == {"ant": 0, "bee": 1, "cat": 2, "dog": 3, "eel": 4}, pipeline.labels
"""


def test_a_new_process_generates_the_same(make_pipeline, tmp_path):
    expected = {}
    for kind in PIPELINES:
        pipeline = make_pipeline(kind)
        pipeline.save_pretrained(tmp_path / kind)
        arguments = {"guidance_scale": 2.0, "generator": generators(3, 4), "output_type": "np"}
        expected[kind] = pipeline(["dog", "ant"], **arguments).images
        assert not list((tmp_path / kind).rglob("*.bin")) and len(list((tmp_path / kind).rglob("*.safetensors"))) == 2
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", LOAD, tmp_path], check=True, env=environment)
    for kind in PIPELINES:
        assert np.array_equal(np.load(tmp_path / f"{kind}.npy"), expected[kind])


@pytest.mark.parametrize("kind, pipeline_class", [("ar", IFSQARPipeline), ("dit", IFSQDiTPipeline)])
def test_diffusion_pipeline_resolves_the_class(make_pipeline, tmp_path, kind, pipeline_class):
    pipeline = make_pipeline(kind)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is pipeline_class and loaded.labels == pipeline.labels
    images = [pipe(0, generator=generators(0), output_type="pt").images for pipe in (pipeline, loaded)]
    assert torch.equal(*images)


@pytest.mark.parametrize("kind", PIPELINES)
def test_bfloat16(make_pipeline, tmp_path, kind):
    pipeline = make_pipeline(kind)
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.transformer.dtype == loaded.tokenizer.dtype == torch.bfloat16
    images = loaded([0, 1], guidance_scale=2.0, generator=generators(0, 1), output_type="np").images
    assert images.dtype == np.float32 and images.shape == (2, 12, 16, 3) and images.std() > 0.01


class CountingHook(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("kind", PIPELINES)
def test_offloading_hooks_are_triggered(make_pipeline, kind):
    pipeline = make_pipeline(kind)
    hooks = {"transformer": CountingHook(), "tokenizer": CountingHook()}
    for name, hook in hooks.items():
        add_hook_to_module(getattr(pipeline, name), hook)
    indices = torch.zeros(1, 3, 4, dtype=torch.long)
    for call in (
        lambda: pipeline.tokenizer.encode(torch.zeros(1, 3, 12, 16)),
        lambda: pipeline.tokenizer.decode(torch.zeros(1, 2, 3, 4)),
        lambda: pipeline.tokenizer.decode_indices(indices),
        lambda: pipeline(0, output_type="pt"),
    ):
        before = hooks["tokenizer"].calls
        call()
        assert hooks["tokenizer"].calls > before
    assert hooks["transformer"].calls >= (1 if kind == "ar" else 50)


# --- bad input ---


@pytest.mark.parametrize(
    "labels, got",
    [
        (5, "5"),
        (-1, "-1"),
        ([0, 7], "7"),
        (["dgo"], "'dgo'.*'dog'"),
        (1.0, "1.0"),
        ([True], "True"),
        (torch.tensor([0.5]), "0.5"),
        ([], "empty"),
        ([None], "None"),
        (None, "None"),
    ],
)
@pytest.mark.parametrize("kind", PIPELINES)
def test_bad_labels(make_pipeline, kind, labels, got):
    with pytest.raises(ValueError, match=f"`class_labels`.*{got}"):
        make_pipeline(kind)(labels)


def test_names_without_id2label(make_pipeline):
    pipeline = make_pipeline("dit", id2label=None)
    assert pipeline.labels == {}
    with pytest.raises(ValueError, match="`class_labels`.*'dog'.*no `id2label`"):
        pipeline("dog")


COMMON = [
    ("num_images_per_label", 0, "0"),
    ("guidance_scale", 0.5, "0.5"),
    ("guidance_scale", float("nan"), "nan"),
    ("batch_size", 0, "0"),
    ("output_type", "jpg", "'jpg'"),
    ("generator", generators(0, 1, 2), "3"),
]
AR_ONLY = [("temperature", 0.0, "0.0"), ("top_k", 0, "0"), ("top_p", 1.5, "1.5")]
DIT_ONLY = [
    ("num_inference_steps", 0, "0"),
    ("guidance_interval", (0.5, 0.2), "(0.5, 0.2)"),
    ("guidance_interval", (-0.1, 0.2), "(-0.1, 0.2)"),
    ("guidance_interval", (0.5, 1.1), "(0.5, 1.1)"),
    ("guidance_interval", (0.5,), "(0.5,)"),
    ("latents", torch.zeros(2, 2, 4, 3), "(2, 2, 4, 3)"),
    ("latents", torch.zeros(1, 2, 3, 4), "(1, 2, 3, 4)"),
    ("latents", torch.full((2, 2, 3, 4), torch.nan), "NaN"),
]


@pytest.mark.parametrize(
    "kind, name, value, got",
    [
        *[(kind, *case) for kind in PIPELINES for case in COMMON],
        *[("ar", *case) for case in AR_ONLY],
        *[("dit", *case) for case in DIT_ONLY],
    ],
)
def test_arguments_out_of_range(make_pipeline, kind, name, value, got):
    with pytest.raises(ValueError, match=f"(?s)`{name}`.*{re.escape(got)}") as error:
        make_pipeline(kind)([0, 1], **{name: value})
    assert name in str(error.value)


@pytest.mark.parametrize("kind", PIPELINES)
def test_guidance_without_class_dropout(make_pipeline, kind):
    with pytest.raises(ValueError, match="`guidance_scale` is 2.0.*`class_dropout_prob=0`"):
        make_pipeline(kind, class_dropout_prob=0.0)(0, guidance_scale=2.0)


def test_pairing_of_another_codebook(make_pipeline, make_tokenizer):
    with pytest.raises(ValueError, match=r"`transformer`.*15.*\[5, 3\].*`tokenizer`.*21.*\[7, 3\]"):
        make_pipeline("ar", tokenizer=make_tokenizer(levels=(7, 3)))
    with pytest.raises(ValueError, match="`transformer` has 2 `in_channels`.*`tokenizer`.*3"):
        make_pipeline("dit", tokenizer=make_tokenizer(levels=(5, 3, 3)))


@pytest.mark.parametrize("kind", PIPELINES)
def test_pairing_of_another_grid(make_pipeline, make_tokenizer, kind):
    with pytest.raises(
        ValueError, match=r"`transformer`.*\[3, 4\].*`tokenizer`.*\[4, 3\].*`sample_size` is \(16, 12\)"
    ):
        make_pipeline(kind, tokenizer=make_tokenizer(sample_size=(16, 12)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("component", ["transformer", "tokenizer"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_weights_that_are_not_finite(make_pipeline, tmp_path, kind, component, value):
    pipeline = make_pipeline(kind)
    *_, (name, weight) = getattr(pipeline, component).named_parameters()
    weight.data.view(-1)[-1] = value
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"`{component}` has 1 weights with NaN or infinite.*{re.escape(name)}"):
        type(pipeline).from_pretrained(tmp_path)


MODELS = {
    "tokenizer": (AutoencoderIFSQ, "make_tokenizer"),
    "ar": (IFSQARForImageGeneration, "make_ar"),
    "dit": (IFSQDiTTransformer2DModel, "make_dit"),
}


@pytest.mark.parametrize("change", ["missing", "unexpected", "renamed", "misshapen"])
@pytest.mark.parametrize("model", MODELS)
def test_checkpoints_with_other_weights_than_the_model(request, tmp_path, model, change):
    model_class, factory = MODELS[model]
    request.getfixturevalue(factory)().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[len(weights) // 2]
    if change == "unexpected":
        weights["extra.weight"] = torch.zeros(2)
    else:
        weight = weights.pop(name)
        if change == "renamed":
            weights[f"{name}_old"] = weight
        elif change == "misshapen":
            weights[name] = torch.cat([weight, weight])
    save_file(weights, file, metadata={"format": "pt"})
    keys = {"missing": [name], "unexpected": ["extra.weight"], "renamed": [name, f"{name}_old"]}
    with pytest.raises((ValueError, RuntimeError)) as error:
        model_class.from_pretrained(tmp_path)
    assert all(key in str(error.value) for key in keys.get(change, []))  # transformers logs misshapen ones


@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_refuse_such_checkpoints(make_pipeline, tmp_path, kind):
    pipeline = make_pipeline(kind)
    pipeline.save_pretrained(tmp_path)
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    weights = load_file(file)
    name = max(weights)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        type(pipeline).from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_tokenizer_exchanged_later(make_pipeline, make_tokenizer, kind):
    pipeline = make_pipeline(kind)
    pipeline.tokenizer = make_tokenizer(levels=(5, 3, 3))
    with pytest.raises(ValueError, match="use the tokenizer that"):
        pipeline(0)


@pytest.mark.parametrize("name, wrong", [("levels", [3, 5]), ("equal_bins", True), ("scaling_factor", 1.25)])
def test_codes_of_another_tokenizer(make_pipeline, make_tokenizer, tmp_path, name, wrong):
    pipeline = make_pipeline("dit", levels=(5, 3), equal_bins=False, scaling_factor=1.5)
    pipeline.save_pretrained(tmp_path)
    loaded = IFSQDiTPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{name}`.*`tokenizer` has {re.escape(str(wrong))}"):
        IFSQDiTPipeline(loaded.transformer, make_tokenizer(**{name: wrong}), loaded.scheduler)


def test_a_name_of_two_classes(make_pipeline):
    pipeline = make_pipeline("ar", id2label=dict(enumerate(["crane", "bee", "crane", "dog", "eel"])))
    with pytest.raises(ValueError, match=r"'crane'.*several classes.*\[0, 2\]"):
        pipeline("crane")
    assert pipeline.get_label_ids("dog") == [3]


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("name", ["transformer", "tokenizer"])
def test_training_mode(make_pipeline, kind, name):
    pipeline = make_pipeline(kind)
    getattr(pipeline, name).train()
    with pytest.raises(ValueError, match=f"`{name}` is in training mode"):
        pipeline(0)


def test_ids_of_a_callback_are_checked(make_pipeline):
    with pytest.raises(ValueError, match=r"`callback_on_step_end`.*\[0, 15\).*15"):
        make_pipeline("ar")(0, callback_on_step_end=lambda *_: {"indices": torch.full((1, 12), 15)})


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_callback_that_changes_nothing(run, kind):
    expected = run(kind, generator=generators(0), output_type="latent")
    changed = run(kind, generator=generators(0), output_type="latent", callback_on_step_end=lambda *_: {})
    assert torch.equal(changed, expected)


def test_unknown_class_names_that_are_part_of_others(make_pipeline):
    names = ["house finch", "goldfinch", "fence", "inch", "bee"]
    pipeline = make_pipeline("ar", id2label=dict(enumerate(names)))
    with pytest.raises(ValueError, match=r"'Finch', which is none.*one of \['house finch', 'goldfinch'\]\?"):
        pipeline("Finch")
