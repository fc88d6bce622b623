"""Tiny pipelines, shared by the tests of both."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from hf_ifsq import IFSQARPipeline, IFSQDiTPipeline


@pytest.fixture
def make_tokenizer(make_autoencoder):
    def make(**overrides):
        return make_autoencoder(**{"levels": (5, 3), "sample_size": (12, 16), "scaling_factor": 1.5, **overrides})

    return make


@pytest.fixture
def make_pipeline(make_tokenizer, make_ar, make_dit):
    """Factory of pipelines "ar" and "dit": 3 x 4 cells of 4 x 4 pixels, 15 codes in two channels, 5 named classes."""

    def make(kind, tokenizer=None, scheduler=None, **overrides):
        tokenizer = make_tokenizer() if tokenizer is None else tokenizer
        overrides = {"id2label": dict(enumerate(["ant", "bee", "cat", "dog", "eel"])), **overrides}
        if kind == "ar":
            pipeline = IFSQARPipeline(make_ar(**{"vocab_sizes": [5, 3], **overrides}), tokenizer)
        else:
            transformer = make_dit(**{"sample_size": (3, 4), "in_channels": 2, **overrides})
            pipeline = IFSQDiTPipeline(transformer, tokenizer, scheduler or FlowMatchEulerDiscreteScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make
