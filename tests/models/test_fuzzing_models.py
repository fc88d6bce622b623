"""
Arguments of wrong types, shapes, dtypes and sizes for models, quantizer and configs: each call works, or ends in a
`ValueError` or `TypeError` that names the argument.
"""

import inspect
import math
import random

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin
from transformers import GenerationConfig

from hf_ifsq import (
    AutoencoderIFSQ,
    FiniteScalarQuantizer,
    IFSQARConfig,
    IFSQDiTTransformer2DModel,
)


# Right for some arguments, wrong for most.
VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    4,
    10**30,
    -(10**400),
    -0.5,
    0.0,
    0.5,
    1.0,
    1e-300,
    math.nan,
    math.inf,
    "",
    "hot",
    "3",
    b"4",
    [],
    [1],
    [1, 2],
    (2, 3),
    [2, 3.0],
    [2, None],
    ["a", "b"],
    [[1, 2], [3, 4]],
    {},
    {0: "cat"},
    {"0": "cat", "1": "dog"},
    {1, 2},
    range(3),
    np.array([1, 2]),
    np.float32(0.5),
    1 + 2j,
    object(),
    print,
    torch.float32,
    torch.int64,
    "cpu",
    torch.tensor(1.0),
    torch.nn.Linear(2, 2),
]

TENSORS = [
    torch.zeros(shape, dtype=dtype)
    for shape in [(), (0,), (1,), (2,), (3,), (2, 3), (2, 12), (2, 13), (2, 4, 4), (2, 3, 4, 4), (2, 3, 0, 4)]
    for dtype in (torch.float32, torch.int64, torch.uint8, torch.uint16, torch.bool, torch.complex64)
]
# For `forward`, which reads no values, PyTorch says what is wrong.
TENSORS_AT_DOORS = [
    torch.zeros(2, 3, 4, 4, device="meta"),
    torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16),
    torch.zeros(2, device="meta", dtype=torch.long),
    torch.full((2,), -5),
    torch.full((2, 4, 4), 60),
    torch.full((2, 3, 4, 4), math.nan),
]

SMALL = {
    FiniteScalarQuantizer: {"levels": [5, 4]},
    AutoencoderIFSQ: {"block_out_channels": (4, 4), "norm_num_groups": 2, "levels": (3, 3, 3), "sample_size": 8},
    IFSQARConfig: {"vocab_sizes": [4, 3], "num_classes": 2, "hidden_size": 8, "num_attention_heads": 1},
    IFSQDiTTransformer2DModel: {"sample_size": 4, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8},
}


def assert_named(call, arguments):
    """Gives whether the call works."""
    try:
        call()
    except (ValueError, TypeError) as error:
        if not any(f"`{name}`" in str(error) for name in arguments):
            raise AssertionError(f"{arguments} are not named: {type(error).__name__}: {error}") from error
        return False
    except Exception as error:
        raise AssertionError(f"{arguments} end in {type(error).__name__}: {error}") from error
    return True


@pytest.mark.slow
@pytest.mark.parametrize("make", SMALL, ids=lambda make: make.__name__)
def test_constructors(make):
    names = [name for name in inspect.signature(make).parameters if name not in ("self", "args", "kwargs")]
    if make is IFSQARConfig:
        # What is its own, and `num_labels`.
        names = [name for name in IFSQARConfig.__annotations__ if name != "model_type"] + ["id2label", "num_labels"]
    if issubclass(make, ConfigMixin):
        assert len(names) > 10
    results = []
    for name in names:
        for value in VALUES:
            arguments = {**SMALL[make], name: value}
            results.append(assert_named(lambda arguments=arguments: make(**arguments), [name]))
    assert 0.02 < sum(results) / len(results) < 0.5


def right_calls(make_autoencoder, make_ar, make_dit):
    """Methods, and arguments of each that are right."""
    tokenizer, ar, dit = make_autoencoder(levels=(5, 4, 3)), make_ar(vocab_sizes=[4, 3]), make_dit(sample_size=4)
    ids, labels = torch.zeros(2, 12, dtype=torch.long), torch.tensor([1, 3])
    images, codes = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 4, 4)
    options = {
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "do_sample": True,
        "callback": None,
        "generation_config": GenerationConfig(),
    }
    return [
        (tokenizer.encode, {"pixel_values": images}),
        (tokenizer.forward, {"pixel_values": images}),
        (tokenizer.decode, {"codes": codes}),
        (tokenizer.decode_indices, {"indices": torch.zeros(2, 4, 4, dtype=torch.long)}),
        (tokenizer.quantizer.forward, {"z": codes}),
        (tokenizer.quantizer.bounded, {"z": codes}),
        (tokenizer.quantizer.nearest_codes, {"values": codes}),
        (tokenizer.quantizer.codes_to_indices, {"codes": codes}),
        (tokenizer.quantizer.indices_to_codes, {"indices": ids, "dtype": torch.float32}),
        (ar.forward, {"class_labels": labels, "input_ids": ids, "labels": ids, "past_key_values": None}),
        (ar.model.forward, {"class_labels": labels, "input_ids": ids[:, :5], "past_key_values": None}),
        (ar.generate, {"class_labels": labels, **options}),
        (ar.setup_cache, {"max_rows": 2}),
        (dit.forward, {"hidden_states": codes, "timestep": torch.zeros(2), "class_labels": labels}),
    ]


@pytest.mark.slow
@torch.no_grad()
def test_calls(make_autoencoder, make_ar, make_dit):
    results, draw = [], random.Random(0)
    for call, arguments in right_calls(make_autoencoder, make_ar, make_dit):
        tensors = draw.sample(TENSORS, 40) + (TENSORS_AT_DOORS if call.__name__ != "forward" else [])
        call(**arguments)
        for name in arguments:
            for value in VALUES + tensors:
                if callable(value) and name == "callback":
                    continue
                changed = {**arguments, name: value}
                # What does not fit together may be said of either.
                results.append(assert_named(lambda call=call, changed=changed: call(**changed), changed))
    assert len(results) > 2000 and 0.01 < sum(results) / len(results) < 0.3
