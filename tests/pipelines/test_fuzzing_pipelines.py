"""
Calls of tiny pipelines with random values for random arguments: each gives pictures if all values make sense, and
otherwise a `ValueError` or `TypeError` that names one of the senseless arguments.
"""

import math
import random

import numpy as np
import pytest
import torch


NAMES = ["ant", "bee", "cat", "dog", "eel"]
NUM_LABELS = 2
LATENTS = torch.randn(NUM_LABELS, 2, 3, 4, generator=torch.Generator().manual_seed(0))


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def give_back(pipe, step, timestep, values):
    return values


# Drawn for any argument.
VALUES = [
    *[None, True, False, np.True_, 0, 1, 2, -1, 3, 5, 10**9, -(10**9), 2**63, 10**400, np.int64(2), np.uint8(1)],
    *[0.0, 1.0, 2.5, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, 1j],
    *[np.float32(1.5), np.float64("nan"), np.random.default_rng(0), math, object()],
    *["", "x", "3", "ant", "ant" * 10_000, "linear", "constant", b"", b"\x01", bytearray(b"\x02\x01")],
    *["latent", "pil", "np", "pt", ["pil"], "PIL", "jpg", "latents", "indices"],
    *[[], (), [0], [0, 1], (0.0, 1.0), [1.0, 0.0], (0.2, math.nan), (0, 1, 2), ("0", "1"), (False, True)],
    *[(None, 1.0), [[0, 1], [2, 3]], ["ant", "bee"], ["bee", 4], ["ant", None], [None], [math.nan], [True]],
    *[{}, {"latents": 1}, set(), {0}, range(2), iter([0, 1])],
    *[["latents"], ["indices"], ("latents",), ["prompt_embeds"], [["latents"]]],
    *[torch.tensor(1), torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.empty(0)],
    *[torch.tensor([True, False]), torch.tensor([0, 1], device="meta"), torch.tensor([0, 1]).to_sparse()],
    *[np.array(1), np.array([0, 1]), np.array([[0, 1]]), np.array(["ant", "bee"]), np.array("ant")],
    *[np.array([0.5, 1]), np.array([None, 1])],
    *[LATENTS, LATENTS.double(), LATENTS.half(), LATENTS.long(), LATENTS > 0, LATENTS.cfloat(), LATENTS.numpy()],
    *[LATENTS[:1], LATENTS[0], LATENTS * math.nan, LATENTS.double() * 1e300, LATENTS.to("meta"), LATENTS.to_sparse()],
    *[LATENTS.tolist(), torch.Generator().manual_seed(0)],
    *[generators(2), tuple(generators(2)), generators(3), [*generators(1), None], [*generators(1), 5]],
    *[print, give_back, lambda: None, lambda *_: None, lambda *_: [], lambda *_: {}, lambda *_: {"x": 1}],
    *[lambda *_: {"latents": LATENTS}, lambda *_: {"latents": LATENTS.long()}, lambda *_: {"latents": [0.0]}],
    *[lambda *_: {"latents": LATENTS.cfloat()}, lambda *_: {"latents": None}, lambda *_: {"indices": 0}],
    *[lambda *_: {"latents": LATENTS * math.nan}, lambda *_: {"latents": LATENTS.to("meta")}],
    *[lambda *_: {"indices": torch.zeros(2, 12)}, lambda *_: {"indices": torch.ones(2, 12, dtype=torch.bool)}],
    *[lambda *_: {"indices": torch.ones(2, 12, dtype=torch.long)}],
]


def is_bool(value):
    return type(value) in (bool, np.bool_)


def is_integer(value, lowest, highest=math.inf):
    return type(value) in (int, np.int64, np.uint8) and lowest <= value <= highest


def is_number(value, lowest, highest):
    return type(value) in (int, float, np.int64, np.uint8, np.float32, np.float64) and lowest <= value <= highest


def is_interval(value):
    return (
        type(value) in (list, tuple)
        and len(value) == 2
        and all(is_number(end, 0, 1) for end in value)
        and value[0] <= value[1]
    )


def are_labels(value):
    if isinstance(value, torch.Tensor):
        if value.device.type == "meta" or value.is_sparse or value.dtype == torch.bool:
            return False
        value = value.tolist() if value.ndim < 2 and not value.is_floating_point() else None
    elif isinstance(value, np.ndarray):
        value = value.tolist() if value.ndim < 2 else None
    value = [*value] if isinstance(value, (list, tuple, range)) else [value]
    return len(value) > 0 and all(
        is_integer(label, 0, 4) or (isinstance(label, str) and label in NAMES) for label in value
    )


def are_generators(value):
    if isinstance(value, (list, tuple)):
        return len(value) == NUM_LABELS and all(isinstance(generator, torch.Generator) for generator in value)
    return value is None or isinstance(value, torch.Generator)


def is_noise(value):
    fits = isinstance(value, torch.Tensor) and value.shape == LATENTS.shape and value.dtype.is_floating_point
    return value is None or (
        fits and value.layout == torch.strided and value.device.type == "cpu" and bool(value.float().isfinite().all())
    )


def is_callback(name, changed):
    """Whether it takes four arguments and returns a dictionary with `name`, such as `changed`, or with nothing."""

    def check(value):
        if value is None or value is give_back:
            return True
        if not callable(value) or value is print:
            return False
        try:
            returned = value(None, 0, 0, {})
        except TypeError:
            return False
        if returned == {}:
            return True
        if not isinstance(returned, dict) or list(returned) != [name] or not isinstance(returned[name], torch.Tensor):
            return False
        tensor = returned[name]
        alike = tensor.shape == changed.shape and tensor.dtype == changed.dtype and tensor.device == changed.device
        return alike and bool(tensor.isfinite().all())

    return check


def are_names(name):
    return lambda value: isinstance(value, (list, tuple)) and all(each == name for each in value)


def are_options(check):
    """One for both factors of a token, or one each."""

    def check_options(value):
        return all(map(check, value)) and len(value) == 2 if isinstance(value, (list, tuple)) else check(value)

    return check_options


COMMON = {
    "class_labels": are_labels,
    "num_images_per_label": lambda value: is_integer(value, 1, 100_000),
    "guidance_scale": lambda value: is_number(value, 1, 10_000),
    "guidance_interval": is_interval,
    "batch_size": lambda value: value is None or is_integer(value, 1, 2**20),
    "generator": are_generators,
    "output_type": lambda value: isinstance(value, str) and value in ("pil", "np", "pt", "latent"),
    "return_dict": is_bool,
}
SENSIBLE = {
    "ar": {
        **COMMON,
        "guidance_schedule": lambda value: isinstance(value, str) and value in ("constant", "linear", "cosine"),
        "do_sample": is_bool,
        "temperature": are_options(lambda value: is_number(value, 1e-30, 1e30)),
        "top_k": are_options(lambda value: value is None or is_integer(value, 1)),
        "top_p": are_options(lambda value: value is None or is_number(value, 0, 1)),
        "callback_on_step_end": is_callback("indices", torch.zeros(NUM_LABELS, 12, dtype=torch.long)),
        "callback_on_step_end_tensor_inputs": are_names("indices"),
    },
    "dit": {
        **COMMON,
        "num_inference_steps": lambda value: is_integer(value, 1, 10_000),
        "snap_to_codes": is_bool,
        "latents": is_noise,
        "callback_on_step_end": is_callback("latents", LATENTS),
        "callback_on_step_end_tensor_inputs": are_names("latents"),
    },
}


# What fits some labels does not fit another number of them, nor does guidance fit any interval.
DEPENDENT = {
    "generator": {"class_labels", "num_images_per_label"},
    "latents": {"class_labels", "num_images_per_label"},
    "callback_on_step_end": {"class_labels", "num_images_per_label", "batch_size"},
    "guidance_interval": {"guidance_scale"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ar", "dit"])
@pytest.mark.parametrize("seed", range(4))
def test_senseless_arguments_are_named_and_sensible_ones_give_pictures(make_pipeline, kind, seed):
    pipeline, draw, counts = make_pipeline(kind), random.Random(seed), {"pictures": 0, "errors": 0}
    plain = {"class_labels": [1, 3], **({"num_inference_steps": 2} if kind == "dit" else {})}
    sensible = {name: [value for value in VALUES if check(value)] for name, check in SENSIBLE[kind].items()}
    for _ in range(750):
        names = draw.sample(list(sensible), k=draw.choice([1, 1, 2, 3]))
        changed = {name: draw.choice(draw.choice([VALUES, sensible[name]])) for name in names}
        senseless = [name for name, value in changed.items() if not SENSIBLE[kind][name](value)]
        dependent = [name for name in changed if DEPENDENT.get(name, set()) & set(changed)]
        arguments = {**plain, **changed}
        try:
            output = pipeline(**arguments)
        except (ValueError, TypeError) as error:
            assert any(f"`{name}`" in str(error) for name in senseless + dependent), changed
            counts["errors"] += 1
        else:
            assert not senseless, changed
            images = output.images if arguments.get("return_dict", True) else output[0]
            assert len(images) > 0
            counts["pictures"] += 1
    assert min(counts.values()) > 100
