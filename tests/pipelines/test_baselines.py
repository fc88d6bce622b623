"""Pipelines over the baselines of the tokenizer: `VQModel` and `AutoencoderKL`."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, VQModel

from hf_ifsq import IFSQARPipeline, IFSQDiTPipeline


@pytest.fixture
def make_pipeline(make_baseline, make_ar, make_dit):
    """Factory of pipelines over a baseline of 3 channels and 4 x 4 cells, and 20 codes in a VQModel."""

    def make(pipeline_class, tokenizer_class, **overrides):
        options = {"shift_factor": 0.25} if tokenizer_class is AutoencoderKL else {}
        tokenizer = make_baseline(tokenizer_class, scaling_factor=1.5, **options)
        if pipeline_class is IFSQARPipeline:
            pipeline = IFSQARPipeline(make_ar(**{"vocab_sizes": [20], "grid_size": [4, 4], **overrides}), tokenizer)
        else:
            transformer = make_dit(**{"sample_size": 4, "scaling_factor": 1.5, **overrides})
            pipeline = IFSQDiTPipeline(transformer, tokenizer, FlowMatchEulerDiscreteScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def generator():
    return torch.Generator().manual_seed(0)


PAIRS = [(IFSQARPipeline, VQModel), (IFSQDiTPipeline, VQModel), (IFSQDiTPipeline, AutoencoderKL)]


@pytest.mark.parametrize("pipeline_class, tokenizer_class", PAIRS)
def test_saved_and_loaded(make_pipeline, tmp_path, pipeline_class, tokenizer_class):
    pipeline = make_pipeline(pipeline_class, tokenizer_class)
    images = pipeline([0, 3], generator=generator(), guidance_scale=1.5, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and images.std() > 0.01
    pipeline.save_pretrained(tmp_path)
    loaded = pipeline_class.from_pretrained(tmp_path)
    assert type(loaded.tokenizer) is tokenizer_class
    again = loaded([0, 3], generator=generator(), guidance_scale=1.5, output_type="np").images
    assert np.array_equal(images, again)


def test_tokens_are_decoded_by_the_codebook(make_pipeline):
    pipeline = make_pipeline(IFSQARPipeline, VQModel)
    indices = pipeline(2, generator=generator(), output_type="latent").images
    image = pipeline(2, generator=generator(), output_type="pt").images
    codes = pipeline.tokenizer.quantize.embedding.weight[indices].movedim(-1, 1)
    decoder, post_quant_conv = pipeline.tokenizer.decoder, pipeline.tokenizer.post_quant_conv
    with torch.no_grad():
        torch.testing.assert_close(image, (decoder(post_quant_conv(codes)) / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("snap", [True, False])
@pytest.mark.parametrize("tokenizer_class", [VQModel, AutoencoderKL])
def test_latents_are_decoded_in_the_scale_of_the_tokenizer(make_pipeline, tokenizer_class, snap):
    pipeline = make_pipeline(IFSQDiTPipeline, tokenizer_class)
    options = {"generator": generator(), "num_inference_steps": 3, "snap_to_codes": snap}
    latents = pipeline(1, output_type="latent", **options).images
    image = pipeline(1, output_type="pt", **{**options, "generator": generator()}).images
    codes = latents / 1.5 + (0.25 if tokenizer_class is AutoencoderKL else 0)
    if tokenizer_class is VQModel:
        distances = torch.cdist(codes.movedim(1, -1).flatten(0, 2), pipeline.tokenizer.quantize.embedding.weight)
        assert (distances.min(dim=1).values.max() < 1e-5) == snap
    with torch.no_grad():
        sample = pipeline.tokenizer.decoder(pipeline.tokenizer.post_quant_conv(codes))
    torch.testing.assert_close(image, (sample / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_tokens_need_a_codebook(make_pipeline, make_baseline):
    pipeline = make_pipeline(IFSQARPipeline, VQModel)
    with pytest.raises(ValueError, match="`tokenizer` is an AutoencoderKL, whose codes are continuous"):
        IFSQARPipeline(pipeline.transformer, make_baseline(AutoencoderKL))


def test_another_codebook_or_number_of_channels(make_pipeline, make_baseline):
    pipeline = make_pipeline(IFSQARPipeline, VQModel)
    with pytest.raises(ValueError, match="predicts 20 tokens.*`tokenizer` has a codebook of 21: use"):
        IFSQARPipeline(pipeline.transformer, make_baseline(VQModel, num_vq_embeddings=21))
    pipeline = make_pipeline(IFSQDiTPipeline, AutoencoderKL)
    with pytest.raises(ValueError, match="`transformer` has 3 `in_channels`, but the codes of `tokenizer` have 2"):
        IFSQDiTPipeline(pipeline.transformer, make_baseline(AutoencoderKL, latent_channels=2), pipeline.scheduler)


def test_codes_of_another_kind(make_pipeline, make_dit):
    pipeline = make_pipeline(IFSQDiTPipeline, VQModel)
    transformer = make_dit(sample_size=4, levels=(5, 4, 3))
    with pytest.raises(ValueError, match="with the `levels`.*5, 4, 3.*`tokenizer` has None"):
        IFSQDiTPipeline(transformer, pipeline.tokenizer, pipeline.scheduler)
