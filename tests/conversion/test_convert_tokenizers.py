"""Converted tokenizers against stored outputs of the official code, and against its forward pass written out here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.conversion import convert_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"
IFSQ_FILE = FIXTURES / "ifsq_tokenizer" / "checkpoint-5000.ckpt"
VQ_FILE = FIXTURES / "llamagen_vq" / "vq_tiny.pt"

close = {"atol": 1e-4, "rtol": 0}


def goldens(folder):
    return load_file(FIXTURES / folder / "goldens.safetensors")


# The official architectures: shapes of all weights by name, and the forward pass over such weights.


def layer(name, shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def residual_shapes(name, channels, width):
    shapes = {
        **layer(f"{name}.norm1", (channels,)),
        **layer(f"{name}.conv1", (width, channels, 3, 3)),
        **layer(f"{name}.norm2", (width,)),
        **layer(f"{name}.conv2", (width, width, 3, 3)),
    }
    return shapes if channels == width else {**shapes, **layer(f"{name}.nin_shortcut", (width, channels, 1, 1))}


def attention_shapes(name, width):
    shapes = layer(f"{name}.norm", (width,))
    for projection in ("q", "k", "v", "proj_out"):
        shapes |= layer(f"{name}.{projection}", (width, width, 1, 1))
    return shapes


def ends_shapes(half, first, last, channels_in, channels_out):
    return {
        **layer(f"{half}.conv_in", (first, channels_in, 3, 3)),
        **layer(f"{half}.norm_out", (last,)),
        **layer(f"{half}.conv_out", (channels_out, last, 3, 3)),
    }


def vq_shapes(base, factors, blocks, codebook, dimension, z_channels):
    widths = [base * factor for factor in factors]
    shapes = {
        **ends_shapes("encoder", base, widths[-1], 3, z_channels),
        **ends_shapes("decoder", widths[-1], widths[0], z_channels, 3),
        **layer("quant_conv", (dimension, z_channels, 1, 1)),
        **layer("post_quant_conv", (z_channels, dimension, 1, 1)),
        "quantize.embedding.weight": (codebook, dimension),
        "quantize.codebook_used": (65536,),
    }
    for half, order, count, resample in (
        ("encoder", widths, blocks, "downsample"),
        ("decoder", widths[::-1], blocks + 1, "upsample"),
    ):
        channels = base if half == "encoder" else widths[-1]
        for index, width in enumerate(order):
            name = f"{half}.conv_blocks.{index}"
            for block in range(count):
                shapes |= residual_shapes(f"{name}.res.{block}", channels, width)
                channels = width
                if index == (len(order) - 1 if half == "encoder" else 0):
                    shapes |= attention_shapes(f"{name}.attn.{block}", width)
            if index < len(order) - 1:
                shapes |= layer(f"{name}.{resample}.conv", (width, width, 3, 3))
        shapes |= residual_shapes(f"{half}.mid.0", widths[-1], widths[-1])
        shapes |= attention_shapes(f"{half}.mid.1", widths[-1])
        shapes |= residual_shapes(f"{half}.mid.2", widths[-1], widths[-1])
    return shapes


def ifsq_shapes(base, factors, blocks, z_channels, levels):
    widths = [base * factor for factor in factors]
    shapes = {
        **ends_shapes("encoder", base, widths[-1], 3, 2 * z_channels),
        **ends_shapes("decoder", widths[-1], widths[0], z_channels, 3),
        **layer("quant_conv", (len(levels), 2 * z_channels, 1, 1)),
        **layer("post_quant_conv", (z_channels, len(levels), 1, 1)),
        "quantize.running_mean": (1, len(levels), 1, 1),
        "quantize.running_var": (1, len(levels), 1, 1),
    }
    channels = base
    for level, width in enumerate(widths):
        for block in range(blocks):
            shapes |= residual_shapes(f"encoder.down.{level}.block.{block}", channels, width)
            channels = width
        if level < len(widths) - 1:
            shapes |= layer(f"encoder.down.{level}.downsample.conv", (width, width, 3, 3))
    for level, width in reversed(list(enumerate(widths))):
        for block in range(blocks + 1):
            shapes |= residual_shapes(f"decoder.up.{level}.block.{block}", channels, width)
            channels = width
        if level:
            shapes |= layer(f"decoder.up.{level}.upsample.conv", (width, width, 3, 3))
    for half in ("encoder", "decoder"):
        for block in range(blocks):
            shapes |= residual_shapes(f"{half}.mid_block.{block}", widths[-1], widths[-1])
    return shapes


def random_weights(shapes):
    def draw(name, shape):
        if "norm" in name:
            return torch.randn(shape) * 0.2 + name.endswith("weight")
        return torch.randn(shape) * (0.1 if len(shape) == 1 else shape[1:].numel() ** -0.5)

    return {name: draw(name, torch.Size(shape)) for name, shape in shapes.items()}


class Official:
    """Forward pass of LlamaGen's `VQModel` and of iFSQ's `ImageFSQVAEModel`, by the names of their weights."""

    def __init__(self, weights):
        self.weights = weights

    def has(self, name):
        return f"{name}.weight" in self.weights

    def conv(self, x, name, **kwargs):
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **kwargs)

    def activated(self, x, name, activation=F.silu):
        return activation(F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6))

    def residual(self, x, name):
        h = self.conv(self.activated(x, f"{name}.norm1"), f"{name}.conv1", padding=1)
        h = self.conv(self.activated(h, f"{name}.norm2"), f"{name}.conv2", padding=1)
        return h + (self.conv(x, f"{name}.nin_shortcut") if self.has(f"{name}.nin_shortcut") else x)

    def attention(self, x, name):
        normed = self.activated(x, f"{name}.norm", activation=lambda values: values)
        q, k, v = (self.conv(normed, f"{name}.{part}").flatten(2) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(-1), v).view_as(x)
        return x + self.conv(mixed, f"{name}.proj_out")

    def stage(self, x, name, blocks="res"):
        index = 0
        while self.has(f"{name}.{blocks}.{index}.conv1"):
            x = self.residual(x, f"{name}.{blocks}.{index}")
            if self.has(f"{name}.attn.{index}.q"):
                x = self.attention(x, f"{name}.attn.{index}")
            index += 1
        if self.has(f"{name}.downsample.conv"):
            x = self.conv(F.pad(x, (0, 1, 0, 1)), f"{name}.downsample.conv", stride=2)
        if self.has(f"{name}.upsample.conv"):
            x = self.conv(F.interpolate(x, scale_factor=2.0), f"{name}.upsample.conv", padding=1)
        return x

    def out(self, x, half):
        return self.conv(self.activated(x, f"{half}.norm_out"), f"{half}.conv_out", padding=1)

    def stages(self, x, half):
        """All resolutions in the order in which they run."""
        if self.has(f"{half}.conv_blocks.0.res.0.conv1"):
            names = [f"{half}.conv_blocks.{level}" for level in range(9)]
            blocks = "res"
        else:
            names = [f"{half}.{'down' if half == 'encoder' else 'up'}.{level}" for level in range(9)]
            names, blocks = names if half == "encoder" else names[::-1], "block"
        for name in names:
            x = self.stage(x, name, blocks)
        return x

    def middle(self, x, half):
        if self.has(f"{half}.mid.1.q"):
            return self.residual(self.attention(self.residual(x, f"{half}.mid.0"), f"{half}.mid.1"), f"{half}.mid.2")
        for index in range(9):
            if self.has(f"{half}.mid_block.{index}.conv1"):
                x = self.residual(x, f"{half}.mid_block.{index}")
        return x

    def encode(self, images):
        x = self.stages(self.conv(images, "encoder.conv_in", padding=1), "encoder")
        return self.conv(self.out(self.middle(x, "encoder"), "encoder"), "quant_conv")

    def nearest(self, latents):
        codebook = F.normalize(self.weights["quantize.embedding.weight"], dim=-1)
        indices = torch.einsum("bchw,nc->bhwn", F.normalize(latents, dim=1), codebook).argmax(-1)
        return indices, codebook[indices].movedim(-1, 1)

    def decode(self, codes):
        x = self.middle(self.conv(self.conv(codes, "post_quant_conv"), "decoder.conv_in", padding=1), "decoder")
        return self.out(self.stages(x, "decoder"), "decoder")


def vq_indices(model, latents):
    return model.quantize(latents)[2][2].view(latents.shape[0], *latents.shape[2:])


# The iFSQ tokenizer.


@pytest.fixture
def ifsq_file(tmp_path):
    """Factory of checkpoints with given weights and config, alone in their folder."""

    def make(base, factors, blocks, z_channels, levels, act_fun):
        weights = random_weights(ifsq_shapes(base, factors, blocks, z_channels, levels))
        config = json.loads((IFSQ_FILE.parent / "run.json").read_text())
        config = {name: value for name, value in config.items() if "coder" not in name}
        config |= {"hidden_size": base, "hidden_size_mult": factors, "num_res_blocks": blocks}
        config |= {"z_channels": z_channels, "levels": levels, "embed_dim": len(levels), "act_fun": act_fun}
        (tmp_path / "run.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / "tokenizer.safetensors")
        return tmp_path / "tokenizer.safetensors", weights

    return make


@pytest.mark.parametrize("weights, prefix", [(None, ""), ("ema", ""), ("raw", "raw.")])
@torch.no_grad()
def test_ifsq_tokenizer_equals_the_official_one(tmp_path, weights, prefix):
    expected = goldens("ifsq_tokenizer")
    conversion = convert_checkpoint(IFSQ_FILE, weights=weights)
    assert conversion.entry == ("state_dict.gen_model" if weights == "raw" else "ema_state_dict")
    conversion.model.save_pretrained(tmp_path)
    reloaded = AutoencoderIFSQ.from_pretrained(tmp_path)
    for model in (conversion.model, reloaded):
        assert type(model) is AutoencoderIFSQ and not model.training and model.dtype == torch.float32
        encoded = model.encode(expected["images"])
        assert torch.equal(encoded.indices, expected[f"{prefix}indices"].squeeze(-1))
        latent = model.quant_conv(model.encoder(expected["images"]))
        torch.testing.assert_close(latent, expected[f"{prefix}h"], **close)
        recon = expected[f"{prefix}recon"]
        torch.testing.assert_close(model(expected["images"]).sample, recon, **close)
        torch.testing.assert_close(model.decode_indices(encoded.indices).sample, recon, **close)
        if not prefix:
            torch.testing.assert_close(encoded.codes, expected["z_q"], **close)
            # The official groups of two channels each are the digits of our index.
            grouped = expected["indices_grouped"]
            assert torch.equal(encoded.indices, grouped[..., 0] + 17**2 * grouped[..., 1])


@torch.no_grad()
def test_the_reference_of_this_file_equals_the_official_ifsq_tokenizer():
    weights = torch.load(IFSQ_FILE, weights_only=True)["state_dict"]["gen_model"]
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == ifsq_shapes(
        32, [1, 1, 2], 1, 4, [17] * 4
    )
    expected = goldens("ifsq_tokenizer")
    official = Official(weights)
    torch.testing.assert_close(official.encode(expected["images"]), expected["raw.h"], **close)


@pytest.mark.parametrize(
    "factors, blocks, z_channels, levels, act_fun, alpha",
    [
        ([1, 2], 2, 3, [5, 7], "scale_sigmoid_20", 2.0),
        # The first convolution is narrower than the first resolution.
        ([2, 1], 1, 2, [5, 7, 9], "scale_sigmoid_16", 1.6),
        ([3, 2], 2, 2, [5, 7], "scale_sigmoid_16", 1.6),
    ],
)
@torch.no_grad()
def test_ifsq_tokenizers_of_other_sizes(ifsq_file, factors, blocks, z_channels, levels, act_fun, alpha):
    path, weights = ifsq_file(32, factors, blocks, z_channels, levels, act_fun)
    model = convert_checkpoint(path).model
    assert model.config.levels == levels and model.config.alpha == alpha and model.config.sample_size == 256
    official, images = Official(weights), torch.rand(2, 3, 12, 8) * 2 - 1
    latent = official.encode(images)
    assert latent.std() > 0.1
    torch.testing.assert_close(model.quant_conv(model.encoder(images)), latent, **close)
    codes = torch.rand(2, len(levels), 6, 4) * 2 - 1
    torch.testing.assert_close(model.decode(codes).sample, official.decode(codes), **close)


def test_a_converted_ifsq_tokenizer_can_be_trained_further():
    model = convert_checkpoint(IFSQ_FILE).model.train()
    model(goldens("ifsq_tokenizer")["images"]).sample.square().mean().backward()
    gradients = {name: parameter.grad.abs().max() for name, parameter in model.named_parameters()}
    # The second block in the middle adds nothing: only its last layer has a gradient before the first step.
    added = {name for name in gradients if "mid_block.resnets.1." in name and "conv2" not in name}
    assert {name for name, gradient in gradients.items() if gradient == 0} <= added


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_config_of_another_name_or_place(tmp_path, name):
    config = (IFSQ_FILE.parent / "run.json").read_text()
    checkpoint = shutil.copy(IFSQ_FILE, tmp_path / "model.ckpt")
    (tmp_path / name).write_text(config)
    beside = convert_checkpoint(checkpoint).model
    (tmp_path / name).rename(tmp_path / "elsewhere.json")
    assert convert_checkpoint(checkpoint, config=tmp_path / "elsewhere.json").model.config == beside.config
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "run.json").write_text(config.replace("scale_sigmoid_16", "scale_sigmoid_20"))
    with pytest.raises(ValueError, match="`config` must be given, since .*config.json and .*run.json differ"):
        convert_checkpoint(checkpoint)
    assert convert_checkpoint(checkpoint, config=tmp_path / "run.json").model.config.alpha == 2.0


# LlamaGen's tokenizer.


@torch.no_grad()
def test_llamagen_vq_equals_the_official_one(tmp_path):
    expected = goldens("llamagen_vq")
    conversion = convert_checkpoint(VQ_FILE)
    assert conversion.entry == "model"
    conversion.model.save_pretrained(tmp_path)
    reloaded = VQModel.from_pretrained(tmp_path)
    assert reloaded.config.scaling_factor == 1.0 and reloaded.config.sample_size == 256
    for model in (conversion.model, reloaded):
        assert type(model) is VQModel and not model.training and model.dtype == torch.float32
        latents = model.encode(expected["images"]).latents
        torch.testing.assert_close(latents, expected["h"], **close)
        indices = vq_indices(model, latents)
        assert torch.equal(indices, expected["indices"])
        torch.testing.assert_close(model.quantize(latents)[0], expected["quant"], **close)
        torch.testing.assert_close(model(expected["images"]).sample, expected["recon"], **close)
        entries = model.quantize.get_codebook_entry(indices, (*indices.shape, 8))
        torch.testing.assert_close(entries, expected["codebook_entries"], **close)
        decoded = model.decode(entries, force_not_quantize=True).sample
        torch.testing.assert_close(decoded, expected["decoded_from_indices"], **close)


@torch.no_grad()
def test_the_reference_of_this_file_equals_the_official_llamagen_vq():
    weights = torch.load(VQ_FILE, weights_only=True)["model"]
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == vq_shapes(32, [2, 1], 2, 128, 8, 32)
    expected = goldens("llamagen_vq")
    official = Official(weights)
    latents = official.encode(expected["images"])
    torch.testing.assert_close(latents, expected["h"], **close)
    indices, codes = official.nearest(latents)
    assert torch.equal(indices, expected["indices"])
    torch.testing.assert_close(official.decode(codes), expected["decoded_from_indices"], **close)


@pytest.mark.parametrize("factors, blocks, dimension", [([1, 2], 2, 8), ([1, 1, 2], 1, 4), ([3, 1], 1, 8)])
@torch.no_grad()
def test_llamagen_vqs_of_other_sizes(tmp_path, factors, blocks, dimension):
    weights = random_weights(vq_shapes(32, factors, blocks, 60, dimension, 5))
    torch.save({"model": weights}, tmp_path / "vq.pt")
    model = convert_checkpoint(tmp_path / "vq.pt").model
    if factors[0] == 1:
        assert model.config.block_out_channels == [32 * factor for factor in factors]
    official, images = Official(weights), torch.rand(2, 3, 16, 24) * 2 - 1
    latents = model.encode(images).latents
    torch.testing.assert_close(latents, official.encode(images), **close)
    indices, codes = official.nearest(latents)
    assert indices.unique().numel() > 10
    assert torch.equal(vq_indices(model, latents), indices)
    torch.testing.assert_close(model.decode(latents).sample, official.decode(codes), **close)


@pytest.mark.parametrize("factors, millions", [([1, 1, 2, 2, 4], 72), ([1, 2, 2, 4], 70)])
def test_published_llamagen_vqs_fit(tmp_path, factors, millions):
    shapes = vq_shapes(128, factors, 2, 16384, 8, 256)
    # All elements of a weight share one number: files of some kilobytes.
    torch.save(
        {"model": {name: torch.tensor(0.5).expand(shape) for name, shape in shapes.items()}}, tmp_path / "vq.pt"
    )
    model = convert_checkpoint(tmp_path / "vq.pt").model
    assert model.config.block_out_channels == [128 * factor for factor in factors]
    assert model.config.num_vq_embeddings == 16384 and model.config.vq_embed_dim == 8
    assert model.config.latent_channels == 256 and model.config.layers_per_block == 2
    # As LlamaGen states them.
    assert round(model.num_parameters() / 1e6) == millions
