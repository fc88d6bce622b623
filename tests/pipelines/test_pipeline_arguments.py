"""Values of arguments that make no sense: each is an error that names the argument."""

import math
import re

import numpy as np
import pytest
import torch


NOISE = torch.zeros(2, 2, 3, 4)
BAD = {
    "class_labels": [
        *[None, 1.0, True, "", b"\x01", {"ant": 1}, {0, 1}, [[0, 1]], [0, 1.0], [True], iter([0])],
        *[
            torch.tensor([[0, 1]]),
            torch.tensor([0.0]),
            torch.tensor([True]),
            torch.zeros(1, dtype=torch.long).to_sparse(),
        ],
        *[np.array([[0, 1]]), np.array([0.5]), np.array(0.5), torch.tensor([0]).to("meta")],
    ],
    "num_images_per_label": [None, 1.0, "3", True, 0, -1, 10**9, 2**63, 10**5000, math.nan, [1]],
    "guidance_scale": [None, "2", True, math.inf, math.nan, 0, 10**400, 10**5000, 1e300, [2.0], torch.tensor(2.0), 2j],
    "guidance_interval": [
        *[
            None,
            0.5,
            "01",
            b"\x00\x01",
            (0.5, 0.2),
            (0, 0.5, 1),
            (0.0, math.nan),
            ("0", "1"),
            (None, 1.0),
            (False, True),
        ],
        *[{0.0, 1.0}, {0.0: 1, 1.0: 2}, torch.tensor([0.0, 1.0])],
    ],
    "batch_size": [2.5, "3", True, 0, -1, math.inf, [1]],
    "generator": [5, "x", [0, 1], [torch.Generator()], [torch.Generator(), None], np.random.default_rng(0), {}],
    "output_type": [None, ["pil"], "PIL", 0, np.array(["pil", "np"])],
    "return_dict": [None, 0, 1, "True", []],
    "callback_on_step_end_tensor_inputs": [None, "latents", "indices", ["prompt_embeds"], [["latents"]], [None], 5],
}
BAD_AR = {
    "guidance_schedule": [None, ["linear"], "sine", 0, {}],
    "do_sample": [0, 1, "False", []],
}
BAD_DIT = {
    "num_inference_steps": [None, 2.5, "5", True, 0, -1, 10**9, 2**63, math.nan],
    "snap_to_codes": [None, 0, 1, "False"],
    "latents": [
        *[[0.0], NOISE.numpy(), 0, "noise", NOISE.long(), NOISE.bool(), NOISE.cfloat(), NOISE[:1], NOISE[0], NOISE.mT],
        *[NOISE * math.nan, NOISE + math.inf, NOISE.double() + 1e300, NOISE.to("meta"), NOISE.to_sparse()],
    ],
}


def cases(*tables):
    return [
        pytest.param(name, value, id=f"{name}-{number}")
        for table in tables
        for name in table
        for number, value in enumerate(table[name])
    ]


def check(pipeline, name, value, **options):
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: seen.append("step"))
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        pipeline(**{"class_labels": [0, 1], "guidance_scale": 2.0, **options, name: value})
    assert not seen


@pytest.mark.parametrize("name, value", cases(BAD, BAD_AR))
def test_arguments_of_the_ar_pipeline(make_pipeline, name, value):
    check(make_pipeline("ar"), name, value)


@pytest.mark.parametrize("name, value", cases(BAD, BAD_DIT))
def test_arguments_of_the_dit_pipeline(make_pipeline, name, value):
    check(make_pipeline("dit"), name, value)


def test_generator_is_checked_where_none_is_needed(make_pipeline):
    check(make_pipeline("ar"), "generator", [0, 1], do_sample=False)
    check(make_pipeline("dit"), "generator", [0, 1], latents=NOISE)


@pytest.mark.parametrize("kind", ["ar", "dit"])
def test_numbers_of_numpy(make_pipeline, kind):
    pipeline = make_pipeline(kind)

    def images(integer, number, flag):
        options = {"num_inference_steps": integer(3), "snap_to_codes": flag(True)} if kind == "dit" else {}
        return pipeline(
            [integer(1), integer(2)],
            num_images_per_label=integer(2),
            batch_size=integer(3),
            guidance_scale=number(1.5),
            guidance_interval=(number(0.25), number(0.75)),
            generator=torch.Generator().manual_seed(0),
            return_dict=flag(True),
            output_type="pt",
            **options,
        ).images

    expected = images(int, float, bool)
    for integer, number in ((np.int64, np.float64), (np.int32, np.float32), (np.uint8, np.float16)):
        assert torch.equal(images(integer, number, np.bool_), expected)


def test_latents_of_other_floats(make_pipeline):
    pipeline, noise = make_pipeline("dit"), torch.randn(2, 2, 3, 4).half()
    expected = pipeline([0, 1], latents=noise.float(), num_inference_steps=2, output_type="pt").images
    for dtype in (torch.float16, torch.float64):
        images = pipeline([0, 1], latents=noise.to(dtype), num_inference_steps=2, output_type="pt").images
        assert torch.equal(images, expected)


def test_long_values_are_not_printed_in_full(make_pipeline):
    with pytest.raises(TypeError, match="`generator`") as error:
        make_pipeline("ar")(0, generator=[0] * 10_000)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("names", [5, None, [0], {"ant"}, b"ant"])
def test_names_of_classes_that_are_none(make_pipeline, names):
    with pytest.raises(TypeError, match=f"`class_labels`.*{re.escape(repr(names))}"):
        make_pipeline("ar").get_label_ids(names)
