import json
import logging
import math
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import send_to_device
from diffusers import AutoencoderKL
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from hf_ifsq import AutoencoderIFSQ


def images(batch=2, channels=3, height=16, width=16):
    return torch.rand(batch, channels, height, width) * 2 - 1


@pytest.mark.parametrize("height, width", [(16, 16), (8, 12), (4, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(make_autoencoder, channels, height, width):
    model = make_autoencoder(in_channels=channels, out_channels=channels)
    pixel_values = images(2, channels, height, width)
    encoded = model.encode(pixel_values)
    assert encoded.codes.shape == (2, 3, height // 4, width // 4)
    assert encoded.indices.shape == (2, height // 4, width // 4) and encoded.indices.dtype == torch.int64
    assert model.decode(encoded.codes).sample.shape == pixel_values.shape
    output = model(pixel_values)
    assert output.sample.shape == pixel_values.shape
    assert torch.equal(output.codes, encoded.codes) and torch.equal(output.indices, encoded.indices)


def test_tuples_hold_the_same_as_named_outputs(make_autoencoder):
    model, pixel_values = make_autoencoder(), images()
    for call, argument in (
        (model.encode, pixel_values),
        (model.decode, torch.rand(2, 3, 4, 4)),
        (model, pixel_values),
    ):
        named, plain = call(argument), call(argument, return_dict=False)
        assert isinstance(plain, tuple) and len(plain) == len(named)
        assert all(torch.equal(a, b) for a, b in zip(named.to_tuple(), plain, strict=True))


@pytest.mark.parametrize("sample_size, grid", [(16, (4, 4)), ((16, 16), (4, 4)), ((8, 20), (2, 5)), ([8, 20], (2, 5))])
def test_grid_size(make_autoencoder, sample_size, grid):
    assert make_autoencoder(sample_size=sample_size).grid_size == grid


def test_codes_and_indices_are_those_of_the_latent(make_autoencoder):
    model, pixel_values = make_autoencoder(), images(4)
    encoded = model.encode(pixel_values)
    assert model.codebook_size == 60
    assert encoded.indices.unique().numel() > 15
    # Levels (5, 4, 3): code times L // 2 is the centred digit, and the first digit counts least.
    half = torch.tensor([2, 2, 1]).view(3, 1, 1)
    digits = (encoded.codes * half).round().long() + half
    torch.testing.assert_close(encoded.codes, (digits - half) / half)
    assert torch.equal(encoded.indices, digits[:, 0] + 5 * digits[:, 1] + 20 * digits[:, 2])
    latent = model.quant_conv(model.encoder(pixel_values))
    assert torch.equal(encoded.unquantized, latent)
    assert torch.equal(digits[:, 0], (2 * (2 * torch.sigmoid(1.6 * latent[:, 0]) - 1)).round().long() + 2)


def test_decode_indices_is_decode_of_their_codes(make_autoencoder):
    model = make_autoencoder()
    encoded = model.encode(images())
    sample = model.decode_indices(encoded.indices).sample
    torch.testing.assert_close(sample, model.decode(encoded.codes).sample, atol=1e-5, rtol=0)
    assert not torch.allclose(sample, model.decode_indices(encoded.indices.flip(-1)).sample)


def test_encoder_and_decoder_are_those_of_autoencoder_kl(make_autoencoder):
    model = make_autoencoder()
    baseline = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=3,
        mid_block_add_attention=False,
    ).eval()
    baseline.encoder.load_state_dict(model.encoder.state_dict())
    baseline.decoder.load_state_dict(model.decoder.state_dict())
    pixel_values, codes = images(), torch.rand(2, 3, 4, 4)
    assert torch.equal(baseline.encoder(pixel_values), model.encoder(pixel_values))
    baseline.post_quant_conv = model.post_quant_conv
    assert torch.equal(baseline.decode(codes).sample, model.decode(codes).sample)


def test_defaults_are_the_paper_model():
    with torch.device("meta"):
        model = AutoencoderIFSQ()
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder)]
    assert [round(count, 1) for count in millions] == [33.9, 49.5]
    assert model.downsampling_factor == 16 and model.grid_size == (16, 16) and model.codebook_size == 17**4
    assert (model.quantizer.alpha, model.config.scaling_factor) == (1.6, 1.0)
    assert (model.quant_conv.in_channels, model.quant_conv.out_channels) == (8, 4)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-6)}
    assert not any("attention" in name for name, _ in model.named_parameters())


def test_gradients_pass_straight_through_the_quantizer(make_autoencoder):
    model = make_autoencoder().train()
    output = model(images())
    (output.sample.square().mean() + output.codes.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.encoder.conv_in.weight.grad.abs().max() > 1e-6


def test_gradient_checkpointing(make_autoencoder):
    model, pixel_values = make_autoencoder().train(), images()
    gradients, calls = [], []
    model.encoder.down_blocks[0].resnets[0].register_forward_hook(lambda *_: calls.append("encoder"))
    model.decoder.up_blocks[0].resnets[0].register_forward_hook(lambda *_: calls.append("decoder"))
    for enable in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        enable()
        model.zero_grad()
        model(pixel_values).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    # Once without checkpointing; with it, once forward and once again backward.
    assert calls.count("encoder") == calls.count("decoder") == 3
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


def test_slicing(make_autoencoder):
    model, pixel_values = make_autoencoder(), images(3)
    encoded, whole = model.encode(pixel_values), model(pixel_values).sample
    batches = []
    model.encoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    model.decoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    model.enable_slicing()
    sliced = model(pixel_values)
    assert batches == [1] * 6
    assert torch.equal(sliced.indices, encoded.indices)
    torch.testing.assert_close(sliced.sample, whole, atol=1e-5, rtol=0)
    model.disable_slicing()
    model(pixel_values)
    assert batches[6:] == [3, 3]


@pytest.mark.parametrize("height, width, exact", [(16, 16, True), (8, 16, True), (20, 16, False), (12, 36, False)])
def test_tiling(make_autoencoder, height, width, exact):
    model, pixel_values = make_autoencoder(), images(2, 3, height, width)
    whole = model(pixel_values)
    tiles = []
    model.encoder.register_forward_pre_hook(lambda _, args: tiles.append(args[0].shape[-2:]))
    model.enable_tiling()
    tiled = model(pixel_values)
    assert all(rows <= 16 and columns <= 16 for rows, columns in tiles)
    assert tiled.sample.shape == pixel_values.shape and tiled.indices.shape == whole.indices.shape
    assert torch.equal(tiled.sample, whole.sample) == exact
    assert (len(tiles) == 1) == exact


@pytest.mark.parametrize("rows, columns", [(5, 4), (4, 7), (9, 13), (3, 8), (16, 2)])
def test_tiling_is_exact_for_local_functions(make_autoencoder, rows, columns):
    model = make_autoencoder()
    model.enable_tiling()
    codes, pixel_values = torch.randn(2, 3, rows, columns), torch.randn(2, 3, 4 * rows, 4 * columns)

    def upsample(codes):
        return F.interpolate(codes, scale_factor=4, mode="nearest")

    def average(pixel_values):
        return F.avg_pool2d(pixel_values, 4)

    decoded = model._tiled(upsample, codes, scale_in=1, scale_out=4)
    torch.testing.assert_close(decoded, upsample(codes), atol=1e-6, rtol=1e-6)
    encoded = model._tiled(average, pixel_values, scale_in=4, scale_out=1)
    torch.testing.assert_close(encoded, average(pixel_values), atol=1e-6, rtol=1e-6)


def test_tiles_blend_into_each_other(make_autoencoder):
    model = make_autoencoder()
    model.enable_tiling()
    offsets = iter([0.0, 1.0])
    # Two tiles, columns 0 to 3 and 3 to 6 of the grid; the second one is brighter.
    blended = model._tiled(lambda tile: tile + next(offsets), torch.zeros(1, 1, 4, 7), scale_in=1, scale_out=1)
    assert blended[0, 0].tolist() == [pytest.approx([0, 0, 0, 0.5, 1, 1, 1])] * 4


def test_save_and_load(make_autoencoder, tmp_path):
    model, pixel_values = make_autoencoder(alpha=2.0, levels=(7, 3), sample_size=(16, 8)), images()
    model.register_to_config(scaling_factor=1.375)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded, info = AutoencoderIFSQ.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.scaling_factor == 1.375
    assert (loaded.quantizer.alpha, loaded.quantizer.levels, loaded.grid_size) == (2.0, [7, 3], (4, 2))
    expected, output = model(pixel_values), loaded(pixel_values)
    assert torch.equal(output.sample, expected.sample) and torch.equal(output.indices, expected.indices)


def test_options_of_the_quantizer_are_saved(make_autoencoder, tmp_path):
    options = {"bound": "normal", "equal_bins": True, "noise_prob": 0.5}
    model, pixel_values = make_autoencoder(**options), images()
    model.save_pretrained(tmp_path)
    loaded = AutoencoderIFSQ.from_pretrained(tmp_path)
    assert {name: getattr(loaded.quantizer, name) for name in options} == options
    encoded = loaded.encode(pixel_values)
    assert torch.equal(encoded.codes, model.encode(pixel_values).codes)
    # Centres of the bins of 5, 4 and 3 levels.
    assert encoded.codes[:, 0].unique().tolist() == pytest.approx([-0.8, -0.4, 0, 0.4, 0.8])
    assert encoded.codes[:, 1].unique().tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75])
    torch.testing.assert_close(model.decode_indices(encoded.indices).sample, model.decode(encoded.codes).sample)
    # Noise is for training alone.
    assert torch.equal(model.train().encode(pixel_values).indices, encoded.indices)
    assert not torch.equal(model.encode(pixel_values).codes, encoded.codes)


def test_config_without_the_options_of_the_quantizer(make_autoencoder, tmp_path):
    model = make_autoencoder()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("bound", "equal_bins", "noise_prob"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    pixel_values = images()
    loaded = AutoencoderIFSQ.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(pixel_values).indices, model.encode(pixel_values).indices)


def test_made_on_the_meta_device(make_autoencoder):
    model, pixel_values = make_autoencoder(), images()
    with torch.device("meta"):
        empty = make_autoencoder()
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert torch.equal(filled.encode(pixel_values).indices, model.encode(pixel_values).indices)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"bound": "normal", "equal_bins": True, "noise_prob": 1.0}])
def test_forward_reads_no_value(make_autoencoder, options, training):
    with FakeTensorMode():
        model = make_autoencoder(**options).train(training)
        output = model(images())
        (output.sample.mean() + output.codes.mean()).backward()
        assert output.sample.shape == (2, 3, 16, 16) and output.indices.shape == (2, 4, 4)
        model.enable_slicing()
        model.enable_tiling()
        assert model(images(2, 3, 20, 16)).sample.shape == (2, 3, 20, 16)


@pytest.mark.parametrize("options", [{}, {"levels": (8, 8, 8), "equal_bins": True}])
def test_compiled(make_autoencoder, options):
    torch.compiler.reset()
    model, pixel_values = make_autoencoder(**options).train(), images()
    expected = model(pixel_values)
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(pixel_values)
    torch.testing.assert_close(output.sample, expected.sample)
    assert torch.equal(output.indices, expected.indices)
    with torch.no_grad():
        encoded = torch.compile(model.encode, fullgraph=True, backend="eager")(pixel_values)
        decode_indices = torch.compile(model.decode_indices, fullgraph=True, backend="eager")
        assert torch.equal(encoded.indices, expected.indices)
        torch.testing.assert_close(decode_indices(encoded.indices).sample, expected.sample)


def test_prepared_for_mixed_precision(make_autoencoder):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    model, pixel_values = make_autoencoder().train(), images()
    expected = model(pixel_values)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    output = prepared(pixel_values)
    assert output.sample.dtype == torch.float32 and output.indices.dtype == torch.int64
    # In bfloat16 some latents fall into a neighbouring bin.
    assert (output.indices == expected.indices).float().mean() > 0.9
    output.sample.mean().backward()
    encoded = model.encode(pixel_values)
    assert torch.equal(send_to_device(encoded, "cpu").unquantized, encoded.unquantized)


def test_casting_warns_of_nothing(make_autoencoder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    model = make_autoencoder()
    model.to(torch.float16).save_pretrained(tmp_path)
    assert model.half().dtype == model.to("cpu", dtype=torch.float16).dtype == torch.float16
    assert AutoencoderIFSQ.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert caplog.messages == []
    # Where there are such modules, diffusers' warning still comes.
    model._keep_in_fp32_modules = ["quant_conv"]
    model.to(torch.float32)
    assert "kept in float32: ['quant_conv']" in caplog.text


def test_checkpoint_that_does_not_fit(make_autoencoder, tmp_path, spoil_checkpoint):
    make_autoencoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(spoil_checkpoint(tmp_path))):
        AutoencoderIFSQ.from_pretrained(tmp_path)


def test_bfloat16(make_autoencoder, tmp_path):
    make_autoencoder(levels=(17, 17, 17)).save_pretrained(tmp_path)
    model = AutoencoderIFSQ.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    encoded = model.encode(images().bfloat16())
    assert encoded.codes.dtype == torch.bfloat16 and encoded.indices.max() > 256
    assert torch.equal(model.quantizer.codes_to_indices(encoded.codes), encoded.indices)
    assert torch.equal(model.quantizer.indices_to_codes(encoded.indices, dtype=torch.bfloat16), encoded.codes)
    sample = model.decode_indices(encoded.indices).sample
    assert sample.dtype == torch.bfloat16 and torch.isfinite(sample).all()


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 3, 16, 18), (2, 3, 17, 16), (2, 3, 0, 16)])
def test_wrong_shape_of_images(make_autoencoder, shape):
    with pytest.raises(ValueError, match=f"`pixel_values`.*{re.escape(str(shape))}"):
        make_autoencoder().encode(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integer_images(make_autoencoder, dtype):
    with pytest.raises(ValueError, match=f"`pixel_values`.*{dtype}"):
        make_autoencoder().encode(images().to(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite(make_autoencoder, value):
    pixel_values = images()
    pixel_values[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match="`pixel_values` is not finite"):
        make_autoencoder().encode(pixel_values)


def test_weights_that_are_not_finite(make_autoencoder):
    model = make_autoencoder()
    model.encoder.conv_in.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="weights are not finite"):
        model.encode(images())


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (3, 4, 4), (2, 3, 4)])
def test_wrong_shape_of_codes(make_autoencoder, shape):
    with pytest.raises(ValueError, match=f"`codes`.*{re.escape(str(shape))}"):
        make_autoencoder().decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 16), (2, 1, 4, 4)])
def test_wrong_shape_of_indices(make_autoencoder, shape):
    with pytest.raises(ValueError, match=f"`indices`.*{re.escape(str(shape))}"):
        make_autoencoder().decode_indices(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("wrong", [-1, 60])
def test_indices_outside_the_codebook(make_autoencoder, wrong):
    indices = torch.zeros(1, 4, 4, dtype=torch.long)
    indices[0, 2, 1] = wrong
    with pytest.raises(ValueError, match=rf"`indices`.*\[0, 60\).*{wrong}"):
        make_autoencoder().decode_indices(indices)


@pytest.mark.parametrize("sample_size", [18, (16, 10)])
def test_sample_size_must_be_divisible(make_autoencoder, sample_size):
    with pytest.raises(ValueError, match=f"`sample_size`.*4.*got {re.escape(str(sample_size))}"):
        make_autoencoder(sample_size=sample_size)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_codes_that_are_not_finite(make_autoencoder, value):
    codes = torch.zeros(1, 3, 4, 4)
    codes[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="`codes` is not finite"):
        make_autoencoder().decode(codes)


def test_tiles_do_not_overflow_in_half_precision(make_autoencoder):
    model = make_autoencoder(sample_size=1024)
    model.enable_tiling()
    codes = torch.full((1, 3, 300, 256), 0.699, dtype=torch.float16)
    tiled = model._tiled(lambda tile: tile.repeat_interleave(4, -1).repeat_interleave(4, -2), codes, 1, 4)
    assert tiled.dtype == torch.float16 and torch.equal(tiled, torch.full_like(tiled, 0.699))


@pytest.mark.parametrize(
    "name, values",
    {
        "in_channels": [0, 2.5, "3", True],
        "out_channels": [-1, None],
        "block_out_channels": [(), None, "ab", (8, 9), (8, 0), (8.0,), 8],
        "layers_per_block": [0, 1.5],
        "norm_num_groups": [0, "4", 5],
        "z_channels": [0, "a"],
        "levels": [None, (), (5, 1), "555"],
        "alpha": [0, "1.6"],
        "sample_size": [None, 0, "16", 16.0, (16, 15)],
        "scaling_factor": [0, -1.0, math.nan, "1", None],
        "equal_bins": [3],
    }.items(),
)
def test_config_names_what_is_wrong(make_autoencoder, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}`"):
            make_autoencoder(**{name: value})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16], ids=str)
def test_indices_of_any_integer_type(make_autoencoder, dtype):
    model, indices = make_autoencoder(), torch.randint(60, (1, 4, 4))
    assert torch.equal(model.decode_indices(indices.to(dtype)).sample, model.decode_indices(indices).sample)


def test_tensors_of_another_kind(make_autoencoder):
    model = make_autoencoder()
    images, codes = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 4, 4)
    for method, name, right in ((model.encode, "pixel_values", images), (model.decode, "codes", codes)):
        for wrong in (None, right.tolist(), right.bfloat16(), right.long(), right.to("meta")):
            with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
                method(wrong)
        with torch.autocast("cpu", torch.bfloat16):
            method(right.bfloat16())
    with torch.device("meta"):
        assert make_autoencoder()(images.to("meta")).indices.shape == (1, 4, 4)


@pytest.mark.parametrize("tiling", [False, True])
def test_what_is_decoded_is_finite(make_autoencoder, tiling):
    model = make_autoencoder()
    model.decoder.conv_out.weight.data.mul_(1e5)
    if tiling:
        model.enable_tiling()
    indices = torch.zeros(1, 8, 8, dtype=torch.long)
    model.decode_indices(indices)
    model.half()
    for decode in (model.decode_indices, lambda ids: model.decode(torch.zeros(1, 3, 8, 8, dtype=torch.float16))):
        with pytest.raises(ValueError, match="decoded images of the tokenizer, AutoencoderIFSQ in torch.float16"):
            decode(indices)
