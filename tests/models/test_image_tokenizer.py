import re

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from torch._subclasses import FakeTensorMode

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.models.image_tokenizer import as_image_tokenizer, load_image_tokenizer
from hf_ifsq.randomness import generators_at


CLASSES = [AutoencoderIFSQ, VQModel, AutoencoderKL]


@pytest.fixture
def make(make_autoencoder, make_baseline):
    """Factory of tokenizers of any class, for 16 x 16 pixels and 4 x 4 cells."""

    def make(model_class, **overrides):
        if model_class is AutoencoderIFSQ:
            return as_image_tokenizer(make_autoencoder(**overrides))
        return as_image_tokenizer(make_baseline(model_class, **overrides))

    return make


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16) * 2 - 1


@pytest.mark.parametrize("model_class", CLASSES)
def test_shapes(make, images, model_class):
    tokenizer = make(model_class)
    codes = tokenizer.encode_codes(images)
    assert codes.shape == (3, tokenizer.latent_channels, *tokenizer.grid_size) == (3, 3, 4, 4)
    assert tokenizer.decode_codes(codes).shape == images.shape
    assert tokenizer.downsampling_factor == 4
    assert tokenizer.in_channels == 3


@pytest.mark.parametrize("model_class, size", [(AutoencoderIFSQ, 60), (VQModel, 20)])
def test_tokens_and_codes_agree(make, images, model_class, size):
    tokenizer = make(model_class)
    assert tokenizer.codebook_size == size
    indices, codes = tokenizer.encode_indices(images), tokenizer.encode_codes(images)
    assert indices.shape == (3, 4, 4)
    assert indices.dtype == torch.int64
    assert indices.unique().numel() > 5
    assert torch.equal(tokenizer.indices_to_codes(indices), codes)
    assert torch.equal(tokenizer.decode_indices(indices), tokenizer.decode_codes(codes))
    # Codes are their own nearest codes, and other values go to the nearest of them all.
    assert torch.equal(tokenizer.nearest_codes(codes), codes)
    values = codes + 0.01 * torch.randn(codes.shape)
    codebook = tokenizer.indices_to_codes(torch.arange(size).view(1, -1, 1))[0, :, :, 0]
    distances = (values.movedim(1, -1).unsqueeze(-1) - codebook).square().sum(dim=-2)
    torch.testing.assert_close(tokenizer.nearest_codes(values), codebook.T[distances.argmin(dim=-1)].movedim(-1, 1))


def test_vq_takes_the_nearest_entry_of_the_codebook(make, images):
    tokenizer = make(VQModel)
    latents = tokenizer.model.encode(images).latents
    codebook = tokenizer.model.quantize.embedding.weight
    for image, row, column in [(0, 0, 0), (1, 2, 3), (2, 3, 1)]:
        distances = (codebook - latents[image, :, row, column]).norm(dim=1)
        assert tokenizer.encode_indices(images)[image, row, column] == distances.argmin()


def test_vq_in_training(make, images):
    tokenizer = make(VQModel)
    sample, loss = tokenizer(images)
    torch.testing.assert_close(sample, tokenizer.decode_indices(tokenizer.encode_indices(images)), atol=1e-5, rtol=0)
    # VQModel counts the codebook's own error a quarter.
    latents = tokenizer.model.encode(images).latents
    error = (latents - tokenizer.encode_codes(images)).square().mean()
    torch.testing.assert_close(loss, 1.25 * error)


def test_kl_in_training(make, images):
    tokenizer = make(AutoencoderKL)
    sample, loss = tokenizer(images, tokenizer.draw_noise(generators_at(3, range(len(images)))))
    codes = tokenizer.encode_codes(images, generators_at(3, range(len(images))))
    torch.testing.assert_close(sample, tokenizer.decode_codes(codes))
    # Without noise it is drawn, and the same images differ.
    assert not torch.equal(tokenizer(images)[0], tokenizer(images)[0])
    posterior = tokenizer.model.encode(images).latent_dist
    torch.testing.assert_close(tokenizer.encode_codes(images), posterior.mean)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(loss, divergence.sum() / images.numel())


def test_ifsq_in_training(make, images):
    tokenizer = make(AutoencoderIFSQ)
    sample, loss = tokenizer(images)
    assert torch.equal(sample, tokenizer.model(images).sample)
    assert loss == 0


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("training", [True, False])
def test_forward_reads_no_value(make, model_class, training):
    with FakeTensorMode():
        tokenizer = make(model_class).train(training)
        sample, loss = tokenizer(torch.rand(3, 3, 16, 16))
        (sample.mean() + loss).backward()
    assert sample.shape == (3, 3, 16, 16) and loss.shape == ()


@pytest.mark.parametrize("model_class", CLASSES)
def test_latents(make, images, model_class):
    options = {"shift_factor": 0.5} if model_class is AutoencoderKL else {}
    tokenizer = make(model_class, scaling_factor=4.0, **options)
    codes = tokenizer.encode_codes(images)
    expected = 4 * (codes - 0.5) if options else 4 * codes
    torch.testing.assert_close(tokenizer.codes_to_latents(codes), expected)
    torch.testing.assert_close(tokenizer.latents_to_codes(expected), codes)


def test_kl_has_no_tokens(make, images):
    tokenizer = make(AutoencoderKL)
    assert tokenizer.codebook_size is None
    values = torch.randn(1, 3, 4, 4)
    assert torch.equal(tokenizer.nearest_codes(values), values)
    with pytest.raises(ValueError, match="`tokenizer` is an AutoencoderKL, whose codes are continuous"):
        tokenizer.encode_indices(images)
    with pytest.raises(ValueError, match="`tokenizer` is an AutoencoderKL"):
        tokenizer.indices_to_codes(torch.zeros(1, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("model_class", CLASSES)
def test_loading(make, images, tmp_path, model_class):
    tokenizer = make(model_class)
    tokenizer.model.save_pretrained(tmp_path)
    loaded = load_image_tokenizer(tmp_path)
    assert type(loaded.model) is model_class
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.encode_codes(images), tokenizer.encode_codes(images))
    # Saved again, as a part of a pipeline, it does not tell others where it lay.
    loaded.model.save_pretrained(tmp_path / "again")
    assert str(tmp_path.parent) not in (tmp_path / "again" / "config.json").read_text()
    for size, grid in ((32, (8, 8)), ((16, 8), (4, 2))):
        assert load_image_tokenizer(str(tmp_path), sample_size=size).grid_size == grid


@pytest.mark.parametrize("model_class", CLASSES)
def test_checkpoints_with_other_weights_than_the_model(make, tmp_path, spoil_checkpoint, model_class):
    make(model_class).model.save_pretrained(tmp_path)
    name = spoil_checkpoint(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(name)):
        load_image_tokenizer(tmp_path)


def test_other_models(tmp_path):
    model = UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(ValueError, match="`tokenizer` must be one of .*'VQModel'.* got UNet2DModel"):
        as_image_tokenizer(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be one of .*'AutoencoderKL'.* got UNet2DModel"):
        load_image_tokenizer(tmp_path)


@pytest.mark.parametrize("model_class", CLASSES)
def test_bad_images(make, model_class):
    tokenizer = make(model_class)
    with pytest.raises(ValueError, match="`pixel_values`.*multiple"):
        tokenizer.encode_codes(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"`pixel_values`.*\(1, 1, 16, 16\)"):
        tokenizer.encode_codes(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="`pixel_values` is not finite"):
        tokenizer.encode_codes(torch.full((1, 3, 16, 16), torch.nan))


@pytest.mark.parametrize("model_class, size", [(AutoencoderIFSQ, 60), (VQModel, 20)])
@pytest.mark.parametrize("wrong", [-1, "size"])
def test_bad_indices(make, model_class, size, wrong):
    wrong = size if wrong == "size" else wrong
    with pytest.raises(ValueError, match=rf"`indices` must be in \[0, {size}\).*{wrong}"):
        make(model_class).indices_to_codes(torch.full((1, 4, 4), wrong))


@pytest.mark.parametrize("model_class", [VQModel, AutoencoderKL])
def test_sizes_that_do_not_divide(make, model_class):
    with pytest.raises(ValueError, match="`sample_size`.*multiple of the downsampling factor 4, got 18"):
        make(model_class, sample_size=18)


@pytest.mark.parametrize("model_class", CLASSES)
def test_offloaded_by_parts(make, images, model_class):
    tokenizer = make(model_class)
    codes = tokenizer.encode_codes(images)
    sample, nearest = tokenizer.decode_codes(codes), tokenizer.nearest_codes(codes + 0.01)
    # Weights are on the meta device but while a part runs.
    cpu_offload(tokenizer.model, execution_device=torch.device("cpu"))
    assert next(tokenizer.model.parameters()).is_meta
    assert torch.equal(tokenizer.encode_codes(images), codes)
    assert torch.equal(tokenizer.decode_codes(codes), sample)
    assert torch.equal(tokenizer.nearest_codes(codes + 0.01), nearest)


def test_nearest_codes_of_vq_in_half_precision(make):
    tokenizer = make(VQModel, num_vq_embeddings=2000)
    tokenizer.model.to(torch.bfloat16)
    indices = torch.arange(2000).view(2, 50, 20)
    codes = tokenizer.indices_to_codes(indices)
    assert codes.dtype == torch.bfloat16
    # In bfloat16 distances are so coarse that many codes would not find themselves.
    assert torch.equal(tokenizer.nearest_codes(codes), codes)


def test_vq_that_decodes_indices_alone(make_baseline):
    with pytest.raises(ValueError, match="`lookup_from_codebook=True`"):
        as_image_tokenizer(make_baseline(VQModel, lookup_from_codebook=True))


# --- what is not finite ---


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_decoder_that_overflows(make, images, model_class):
    tokenizer = make(model_class, **({"force_upcast": False} if model_class is AutoencoderKL else {}))
    # In float32 the normalizations behind it make the large values small again.
    tokenizer.model.decoder.conv_in.weight.data *= 2e5
    codes = tokenizer.encode_codes(images)
    assert torch.isfinite(tokenizer.decode_codes(codes)).all()
    tokenizer.model.half()
    one_of_several = torch.cat([torch.zeros(2, 3, 4, 4), codes[:1].detach()])
    message = f"images of the tokenizer, {model_class.__name__} in torch.float16, are not finite"
    with pytest.raises(ValueError, match=message):
        tokenizer.decode_codes(one_of_several)
    if model_class is not AutoencoderKL:
        with pytest.raises(ValueError, match="are not finite"):
            tokenizer.decode_indices(torch.ones(1, 4, 4, dtype=torch.long))


@pytest.mark.parametrize("model_class", CLASSES)
def test_an_encoder_that_is_not_finite(make, images, model_class):
    tokenizer = make(model_class, **({"force_upcast": False} if model_class is AutoencoderKL else {}))
    tokenizer.model.encoder.conv_in.weight.data *= 2e5
    assert torch.isfinite(tokenizer.encode_codes(images)).all()
    calls = [tokenizer.encode_codes] + ([tokenizer.encode_indices] if tokenizer.codebook_size else [])
    tokenizer.model.half()
    for encode in calls:
        with pytest.raises(ValueError, match="not finite"):
            encode(images.half())
    tokenizer.model.float()
    tokenizer.model.quant_conv.bias.data[0] = torch.nan
    for encode in calls:
        with pytest.raises(ValueError, match="not finite"):
            encode(images)


def test_a_codebook_that_is_not_finite(make, images):
    tokenizer = make(VQModel)
    tokenizer.model.quantize.embedding.weight.data[7, 1] = torch.nan
    for call in (tokenizer.encode_indices, tokenizer.encode_codes):
        with pytest.raises(ValueError, match="codebook of the tokenizer, VQModel in torch.float32, are not finite"):
            call(images)
    with pytest.raises(ValueError, match="codebook of the tokenizer"):
        tokenizer.nearest_codes(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("model_class", CLASSES)
def test_no_code_is_next_to_what_is_not_finite(make, model_class, bad):
    values = torch.zeros(2, 3, 4, 4)
    values[1, 2, 3, 0] = bad
    with pytest.raises(ValueError, match="`values` is not finite"):
        make(model_class).nearest_codes(values)


@pytest.mark.parametrize("drawn", [False, True])
def test_upcast(make, images, drawn):
    """As the model of Stable Diffusion XL does: in float32, and then back in its dtype."""
    tokenizer = make(AutoencoderKL, force_upcast=True)
    for part in (tokenizer.model.encoder, tokenizer.model.decoder):
        part.conv_in.weight.data *= 2e5
    tokenizer.model.half()

    def results():
        generators = generators_at(0, range(len(images))) if drawn else None
        codes = tokenizer.encode_codes(images.half().to(dtype), generators)
        return codes, tokenizer.decode_codes(codes)

    dtype = torch.float16
    codes, sample = results()
    assert tokenizer.model.dtype == codes.dtype == torch.float16
    tokenizer.model.float()
    dtype = torch.float32
    expected_codes, _ = results()
    torch.testing.assert_close(codes.float(), expected_codes, rtol=1e-3, atol=1e-3)
    assert torch.equal(sample, tokenizer.decode_codes(codes.float()))


def test_dtype_after_an_error_in_float32(make):
    tokenizer = make(AutoencoderKL, force_upcast=True)
    tokenizer.model.half()
    with pytest.raises(RuntimeError):
        tokenizer.decode_codes(torch.zeros(1, 7, 4, 4))
    assert tokenizer.model.dtype == torch.float16


def test_upcast_of_a_model_offloaded_by_parts(make, images):
    tokenizer = make(AutoencoderKL, force_upcast=True)
    tokenizer.model.half()
    codes = tokenizer.encode_codes(images.half())
    sample = tokenizer.decode_codes(codes)
    cpu_offload(tokenizer.model, execution_device=torch.device("cpu"))
    assert torch.equal(tokenizer.encode_codes(images.half()), codes)
    assert torch.equal(tokenizer.decode_codes(codes), sample)


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_model_that_was_compiled(make, images, model_class):
    tokenizer = make(model_class)
    view = as_image_tokenizer(torch.compile(tokenizer.model, backend="aot_eager"))
    assert view.model is tokenizer.model
    assert torch.equal(view.encode_codes(images), tokenizer.encode_codes(images))
