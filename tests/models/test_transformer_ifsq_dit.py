import logging
import math
import re

import pytest
import torch
from torch.nn import functional as F

from hf_ifsq import IFSQDiTTransformer2DModel


def random_inputs(batch=2, channels=3, height=4, width=6):
    return torch.randn(batch, channels, height, width), torch.linspace(0, 1, batch), torch.arange(batch) % 5


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("sample_size, height, width", [(4, 4, 4), ((4, 6), 4, 6), ((4, 6), 8, 2)])
def test_shapes(make_dit, patch_size, sample_size, height, width):
    model = make_dit(sample_size=sample_size, patch_size=patch_size)
    latents, timestep, class_labels = random_inputs(3, height=height, width=width)
    output = model(latents, timestep, class_labels, output_hidden_states=True)
    assert output.sample.shape == latents.shape
    patches = height * width // patch_size**2
    assert [states.shape for states in output.hidden_states] == [(3, patches, 32)] * 3
    sample, hidden_states = model(latents, timestep, class_labels, output_hidden_states=True, return_dict=False)
    assert torch.equal(sample, output.sample)
    assert all(torch.equal(a, b) for a, b in zip(hidden_states, output.hidden_states, strict=True))
    (sample,) = model(latents, timestep, class_labels, return_dict=False)
    assert torch.equal(sample, output.sample) and model(latents, timestep, class_labels).hidden_states is None


def test_output_is_zero_and_blocks_are_the_identity_at_initialization():
    model = IFSQDiTTransformer2DModel(sample_size=4, num_layers=3, num_attention_heads=2, attention_head_dim=8)
    output = model(*random_inputs(channels=4), output_hidden_states=True)
    assert torch.equal(output.sample, torch.zeros_like(output.sample))
    first, *others = output.hidden_states
    assert first.abs().max() > 0 and all(torch.equal(states, first) for states in others)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patches_keep_their_place(patch_size):
    # With zero gates the blocks pass every patch on alone: a change stays within its patch.
    model = IFSQDiTTransformer2DModel(
        sample_size=4, patch_size=patch_size, in_channels=3, num_layers=2, num_attention_heads=2, attention_head_dim=8
    )
    torch.nn.init.normal_(model.proj_out.weight)
    latents, timestep, class_labels = random_inputs(1)
    before = model(latents, timestep, class_labels).sample
    for row, column in ((0, 0), (1, 4), (3, 2), (2, 5)):
        changed = latents.clone()
        changed[0, 1, row, column] += 1.0
        moved = (model(changed, timestep, class_labels).sample - before).abs()[0] > 1e-6
        expected = torch.zeros(4, 6, dtype=torch.bool)
        top, left = row // patch_size * patch_size, column // patch_size * patch_size
        expected[top : top + patch_size, left : left + patch_size] = True
        assert torch.equal(moved, expected.expand(3, -1, -1))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_output_within_a_patch_is_row_then_column_then_channel(make_dit, patch_size):
    model = make_dit(patch_size=patch_size)
    model.proj_out.weight.data.zero_()
    model.proj_out.bias.data = torch.arange(patch_size**2 * 3, dtype=torch.float32)
    sample = model(*random_inputs()).sample
    for channel in range(3):
        for row in range(4):
            for column in range(6):
                expected = (row % patch_size * patch_size + column % patch_size) * 3 + channel
                assert sample[:, channel, row, column].tolist() == [expected] * 2


def test_label_and_time_matter_to_every_value(make_dit):
    model = make_dit()
    latents, timestep, class_labels = random_inputs()
    before = model(latents, timestep, class_labels).sample
    for other in (model(latents, timestep, class_labels + 1), model(latents, 0.9 - 0.5 * timestep, class_labels)):
        assert ((other.sample - before).abs() > 1e-6).float().mean() > 0.99
    # One image's condition does not reach another.
    other = model(latents, timestep, class_labels + torch.tensor([0, 1])).sample
    torch.testing.assert_close(other[0], before[0], atol=1e-5, rtol=0)
    assert (other[1] - before[1]).abs().max() > 1e-3


def test_attention_mixes_all_patches_and_position_matters(make_dit):
    model = make_dit()
    latents, timestep, class_labels = random_inputs(1)
    before = model(latents, timestep, class_labels).sample
    changed = latents.clone()
    changed[0, 0, 3, 5] += 1.0
    assert ((model(changed, timestep, class_labels).sample - before).abs().amax(1) > 1e-6).all()
    flipped = model(latents.flip(-1), timestep, class_labels).sample.flip(-1)
    assert (flipped - before).abs().mean() > 1e-2 * before.std()


def test_timestep_features(make_dit):
    features = make_dit().time_features(torch.tensor([0.0, 0.3, 1.0]))
    for row, t in enumerate((0.0, 0.3, 1.0)):
        angles = [t * 10000 ** (-i / 128) for i in range(128)]
        expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        assert features[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_fixed_positions(make_dit, patch_size):
    model = make_dit(patch_size=patch_size)
    model.patch_embed.bias.data.zero_()
    latents = torch.zeros(1, 3, 4 * patch_size, 6 * patch_size)
    table = model(latents, torch.zeros(1), torch.zeros(1, dtype=torch.long), output_hidden_states=True).hidden_states[
        0
    ]
    for row in range(4):
        for column in range(6):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / 8) for i in range(8)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            assert table[0, row * 6 + column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("activation_fn", ["swiglu", "gelu-approximate"])
@pytest.mark.parametrize("qk_norm", ["rms_norm", "layer_norm", None])
@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_a_block_in_plain_formulas(make_dit, norm_type, qk_norm, activation_fn):
    model = make_dit(num_layers=1, norm_type=norm_type, qk_norm=qk_norm, activation_fn=activation_fn)
    weights = {}
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.2)
        weights[name] = weight.detach().double()
    latents, timestep, class_labels = random_inputs()
    output = model(latents, timestep, class_labels, output_hidden_states=True)

    def linear(states, name):
        return states @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]

    def norm(states, name):
        """RMSNorm with weights or LayerNorm without."""
        if norm_type == "layer_norm":
            return F.layer_norm(states, (32,), eps=1e-6)
        return states / torch.sqrt(states.square().mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]

    def normed_head(states, name):
        if qk_norm is None:
            return states
        if qk_norm == "layer_norm":
            return F.layer_norm(states, (16,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)
        return states / torch.sqrt(states.square().mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]

    def rotate(states):
        """Of one head, `(24, 16)`, by complex numbers: four pairs turn with the row, four with the column."""
        frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        rows, columns = torch.arange(24) // 6, torch.arange(24) % 6
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
        pairs = torch.view_as_complex(states.reshape(24, 8, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    angles = timestep.double()[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    time = linear(torch.cat([angles.cos(), angles.sin()], dim=1), "time_embed.linear_1")
    condition = linear(F.silu(time), "time_embed.linear_2") + weights["class_embed.weight"][class_labels]
    for image in range(2):
        states = output.hidden_states[0][image].double()
        modulation = linear(F.silu(condition[image]), "blocks.0.modulation")
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6)
        qkv = linear(norm(states, "blocks.0.norm1") * (1 + scale_attn) + shift_attn, "blocks.0.attn.to_qkv")
        heads = []
        for head in range(2):
            query, key, value = (part[:, 16 * head : 16 * head + 16] for part in qkv.chunk(3, dim=1))
            query = rotate(normed_head(query, "blocks.0.attn.norm_q"))
            key = rotate(normed_head(key, "blocks.0.attn.norm_k"))
            heads.append(torch.softmax(query @ key.T / 4, dim=-1) @ value)
        states = states + gate_attn * linear(torch.cat(heads, dim=1), "blocks.0.attn.to_out")
        fed = linear(norm(states, "blocks.0.norm2") * (1 + scale_ff) + shift_ff, "blocks.0.ff.proj_in")
        if activation_fn == "swiglu":
            assert fed.shape[-1] == 2 * int(2 / 3 * 4 * 32)
            fed = F.silu(fed[:, :85]) * fed[:, 85:]
        else:
            assert fed.shape[-1] == 4 * 32
            fed = F.gelu(fed, approximate="tanh")
        states = states + gate_ff * linear(fed, "blocks.0.ff.proj_out")
        torch.testing.assert_close(output.hidden_states[1][image].double(), states, atol=1e-5, rtol=0)
        shift, scale = linear(F.silu(condition[image]), "modulation_out").chunk(2)
        velocity = linear(norm(states, "norm_out") * (1 + scale) + shift, "proj_out")
        torch.testing.assert_close(output.sample[image].double(), velocity.T.view(3, 4, 6), atol=1e-5, rtol=0)


# Parameters of DiT-S/2, -B/2, -L/2 and -XL/2 in millions, from the DiT paper, whose blocks are the plain ones.
@pytest.mark.parametrize(
    "millions, num_layers, num_attention_heads, attention_head_dim",
    [(33, 12, 6, 64), (130, 12, 12, 64), (458, 24, 16, 64), (675, 28, 16, 72)],
)
def test_sizes_of_dit(millions, num_layers, num_attention_heads, attention_head_dim):
    sizes = {
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": attention_head_dim,
    }
    counts = []
    for options in ({"norm_type": "layer_norm", "qk_norm": None, "activation_fn": "gelu-approximate"}, {}):
        with torch.device("meta"):
            model = IFSQDiTTransformer2DModel(sample_size=32, patch_size=2, **sizes, **options)
        counts.append(model.num_parameters() / 1e6)
    assert counts[0] == pytest.approx(millions, rel=0.015)
    # SwiGLU of two thirds of the width leaves the size as it is.
    assert counts[1] == pytest.approx(counts[0], rel=0.001)


def test_class_dropout_in_training_uses_the_null_class(make_dit):
    model, seen = make_dit(class_dropout_prob=0.25), []
    model.class_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    class_labels = torch.arange(4000) % 5
    inputs = (torch.zeros(4000, 3, 1, 1), torch.zeros(4000), class_labels)
    with torch.no_grad():
        model(*inputs)
        model.train()(*inputs)
    in_evaluation, in_training = seen
    assert torch.equal(in_evaluation, class_labels)
    dropped = in_training == 5
    assert torch.equal(in_training[~dropped], class_labels[~dropped])
    # Five standard deviations of the share are 0.034.
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.035)


def test_gradient_checkpointing(make_dit):
    model = make_dit(class_dropout_prob=0.0).train()
    inputs, calls, gradients = random_inputs(), [], []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    for prepare in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        prepare()
        model.zero_grad()
        output = model(*inputs, output_hidden_states=True)
        (output.sample.square().mean() + output.hidden_states[1].mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    # Once without checkpointing; with it, once forward and once again backward.
    assert len(calls) == 3 * 2
    plain, checkpointed = gradients
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-6, rtol=1e-5)
        assert plain[name].abs().max() > 0, name


def test_save_and_load(make_dit, tmp_path):
    names = {i: f"class {i}" for i in range(5)}
    model, inputs = make_dit(patch_size=2, qk_norm=None, id2label=names), random_inputs()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded, info = IFSQDiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)
    assert tuple(loaded.config.sample_size) == (4, 6) and loaded.config.qk_norm is None


def test_checkpoint_that_does_not_fit(make_dit, tmp_path, spoil_checkpoint):
    make_dit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(spoil_checkpoint(tmp_path))):
        IFSQDiTTransformer2DModel.from_pretrained(tmp_path)


def test_class_names_survive_saving(make_dit, tmp_path):
    names = {i: f"class {i}" for i in range(5)}
    make_dit(id2label=names).save_pretrained(tmp_path)
    assert IFSQDiTTransformer2DModel.from_pretrained(tmp_path).config.id2label == names


def test_bfloat16(make_dit, tmp_path):
    model, (latents, timestep, class_labels) = make_dit(), random_inputs()
    expected = model(latents, timestep, class_labels).sample
    model.save_pretrained(tmp_path)
    cast = IFSQDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    sample = cast(latents.bfloat16(), timestep, class_labels).sample
    assert sample.dtype == torch.bfloat16
    assert (sample.float() - expected).abs().mean() < 0.03 * expected.std()


@pytest.mark.parametrize(
    "name, value",
    [
        ("norm_type", "batch_norm"),
        ("qk_norm", "l2"),
        ("activation_fn", "relu"),
        ("patch_size", 3),
        ("class_dropout_prob", 1.0),
        ("attention_head_dim", 6),
    ],
)
def test_config_refuses(make_dit, name, value):
    with pytest.raises(ValueError, match=f"`?{name}`?.*{value}"):
        make_dit(**{name: value})


@pytest.mark.parametrize("sample_size", [5, (4, 5)])
def test_sample_size_must_be_divisible(make_dit, sample_size):
    with pytest.raises(ValueError, match=f"`sample_size`.*`patch_size` 2, got {re.escape(str(sample_size))}"):
        make_dit(sample_size=sample_size, patch_size=2)


def test_names_for_another_number_of_classes(make_dit):
    with pytest.raises(ValueError, match="`id2label` names 2 classes, but `num_classes` is 5"):
        make_dit(id2label={0: "cat", 1: "dog"})


@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (3, 4, 6), (2, 3, 5, 6), (2, 3, 4, 7)])
def test_wrong_shape_of_latents(make_dit, shape):
    with pytest.raises(ValueError, match=f"`hidden_states`.*got {re.escape(str(shape))}"):
        make_dit(patch_size=2)(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("name", ["timestep", "class_labels"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_wrong_shape_of_conditions(make_dit, name, shape):
    latents, timestep, class_labels = random_inputs()
    inputs = {"timestep": timestep, "class_labels": class_labels}
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=rf"`{name}`.*\(2,\).*got {re.escape(str(shape))}"):
        make_dit()(latents, **inputs)


@pytest.mark.parametrize("wrong", [-1, 6])
def test_class_labels_out_of_range(make_dit, wrong):
    model, (latents, timestep, _) = make_dit(), random_inputs()
    assert torch.isfinite(model(latents, timestep, torch.tensor([0, 5])).sample).all()
    # `forward` reads no value; the pipeline says what is wrong.
    with pytest.raises(IndexError, match="out of range"):
        model(latents, timestep, torch.tensor([0, wrong]))


def test_class_labels_must_be_integers(make_dit):
    latents, timestep, class_labels = random_inputs()
    with pytest.raises(ValueError, match="`class_labels`.*float32"):
        make_dit()(latents, timestep, class_labels.float())


def count_parameters(hidden_size, num_layers, patch_size):
    """Of the official model with RMSNorm, query and key norm, SwiGLU, 4 channels and 1,000 classes, in a formula."""
    inner_size, head_dim = int(2 / 3 * 4 * hidden_size), {1152: 72}.get(hidden_size, 64)
    attention = hidden_size * 4 * hidden_size + 4 * hidden_size + 2 * head_dim
    feed_forward = hidden_size * 3 * inner_size + 2 * inner_size + hidden_size
    block = attention + feed_forward + 6 * hidden_size * (hidden_size + 1) + 2 * hidden_size
    patch = 4 * patch_size**2
    embeddings = hidden_size * (patch + 1) + hidden_size * (256 + 1) + hidden_size * (hidden_size + 1)
    final_layer = hidden_size + 2 * hidden_size * (hidden_size + 1) + patch * (hidden_size + 1)
    return num_layers * block + embeddings + 1001 * hidden_size + final_layer


@pytest.mark.parametrize(
    "size, hidden_size, num_layers, patch_size",
    [("S/1", 384, 12, 1), ("B/2", 768, 12, 2), ("L/1", 1024, 24, 1), ("XL/2", 1152, 28, 2)],
)
def test_named_sizes_have_the_official_number_of_parameters(size, hidden_size, num_layers, patch_size):
    with torch.device("meta"):
        model = IFSQDiTTransformer2DModel.from_size(size)
    assert model.num_parameters() == count_parameters(hidden_size, num_layers, patch_size)


def test_arguments_override_a_named_size():
    with torch.device("meta"):
        model = IFSQDiTTransformer2DModel.from_size("S/2", num_layers=2)
    assert (model.config.patch_size, len(model.blocks), model.config.num_attention_heads) == (2, 2, 6)
    with pytest.raises(ValueError, match="`size` must be one of.*got 'S/4'"):
        IFSQDiTTransformer2DModel.from_size("S/4")


@pytest.mark.parametrize("options", [{"id2label": {1: "a", 2: "b"}, "num_classes": 2}, {"levels": (5, 5, 5)}], ids=str)
def test_names_and_levels_that_do_not_fit(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"`{name}` must"):
        IFSQDiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8, **options)


@pytest.mark.parametrize("sample_size", [16, (16, 16), [16, 16], (4, 6)])
def test_config_is_what_was_given_and_comes_back_equal(make_dit, tmp_path, sample_size):
    model = make_dit(sample_size=sample_size, levels=(5, 5, 3))
    assert model.config.sample_size == (16 if sample_size == 16 else list(sample_size))
    model.save_pretrained(tmp_path)
    loaded = IFSQDiTTransformer2DModel.from_pretrained(tmp_path)
    for name in ("sample_size", "levels"):
        assert loaded.config[name] == model.config[name]


def test_casting_warns_of_no_modules(make_dit):
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addHandler(handler)
    try:
        model = make_dit().to(torch.float16)
        assert model.dtype == torch.float16 and model.to("cpu", dtype=torch.float32).dtype == torch.float32
        assert not records
        # Where there are some, it does.
        model._keep_in_fp32_modules = ["norm_out"]
        model.to(torch.float16)
        assert len(records) == 1 and "norm_out" in records[0]
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint64], ids=str)
def test_class_labels_of_any_integer_type(make_dit, dtype, train):
    # The null class, 300, is more than uint8 holds.
    model, (latents, timestep, class_labels) = (
        make_dit(num_classes=300, class_dropout_prob=0.5).train(train),
        random_inputs(),
    )

    def run(labels):
        torch.manual_seed(0)
        return model(latents, timestep, labels).sample

    assert torch.equal(run(class_labels.to(dtype)), run(class_labels))
    with pytest.raises(ValueError, match="`class_labels` must be integers.*bool"):
        run(class_labels.bool())


@pytest.mark.parametrize(
    "name, values",
    {
        "sample_size": [None, "ab", 2.0, True, [4], 10**30],
        "in_channels": [0, 2.5, "3", None, True],
        "num_layers": [0, -1, "2"],
        "num_attention_heads": [0, None],
        "attention_head_dim": [0, -4, 8.0],
        "num_classes": [0, -1, "7", None, 10**30],
        "class_dropout_prob": [None, "a", math.nan],
        "mlp_ratio": [0, -1.0, math.nan, math.inf, "4"],
        "norm_type": [None, [], 3],
        "patch_size": [True, 2.0, "1"],
        "id2label": [5, ["cat"], {0: 1}],
        "levels": [5, "abc", (5, 5, 1), (5, 5, 5.0)],
        "scaling_factor": [0, -1.0, math.nan, "1"],
        "equal_bins": [1, "yes"],
    }.items(),
)
def test_config_names_what_is_wrong(make_dit, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}`"):
            make_dit(**{name: value})


@pytest.mark.parametrize("name", ["hidden_states", "timestep", "class_labels"])
def test_inputs_of_wrong_types(make_dit, name):
    inputs = dict(zip(("hidden_states", "timestep", "class_labels"), random_inputs(), strict=True))
    for value in (None, "a", 0.5, [1, 2], inputs[name].bool(), inputs[name].to(torch.complex64)):
        with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
            make_dit()(**{**inputs, name: value})


def test_latents_of_another_dtype(make_dit):
    model, (latents, timestep, class_labels) = make_dit(), random_inputs()
    with pytest.raises(ValueError, match="`hidden_states` has dtype torch.bfloat16, but the model torch.float32"):
        model(latents.bfloat16(), timestep, class_labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(latents.bfloat16(), timestep, class_labels).sample.isfinite().all()
