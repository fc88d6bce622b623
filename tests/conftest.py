"""Tiny models with random weights, shared by all tests."""

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file

from hf_ifsq import AutoencoderIFSQ, IFSQARConfig, IFSQARForImageGeneration, IFSQDiTTransformer2DModel


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def make_autoencoder():
    """Factory of tokenizers: 60 codes, 4 pixels a cell, 4 x 4 cells; keyword arguments override the config."""

    def make(**overrides):
        config = {
            "block_out_channels": (8, 8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "levels": (5, 4, 3),
            "sample_size": 16,
        }
        model = AutoencoderIFSQ(**{**config, **overrides}).eval()
        # Spreads the codes over all levels.
        torch.nn.init.normal_(model.quant_conv.weight, std=2.0)
        return model

    return make


@pytest.fixture
def make_baseline():
    """Factory of VQModel and AutoencoderKL with the size of `make_autoencoder`: 3 channels, 20 codes."""

    def make(model_class, **overrides):
        config = {
            "block_out_channels": (8, 8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 4,
            "latent_channels": 3,
            "mid_block_add_attention": False,
            "sample_size": 16,
        }
        if model_class is VQModel:
            config["num_vq_embeddings"] = 20
        model = model_class(**{**config, **overrides}).eval()
        if model_class is VQModel:
            # Spreads the latents and the codebook so that many codes are used.
            torch.nn.init.normal_(model.quant_conv.weight, std=2.0)
            torch.nn.init.normal_(model.quantize.embedding.weight)
        return model

    return make


@pytest.fixture
def make_ar():
    """Factory of AR generators: 3 x 4 cells, 5 classes, no dropout of tokens; heads and norms are random."""

    def make(**overrides):
        config = {
            "vocab_sizes": [9],
            "num_classes": 5,
            "grid_size": [3, 4],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "dropout": 0.0,
            "initializer_range": 0.2,
        }
        model = IFSQARForImageGeneration(IFSQARConfig(**{**config, **overrides})).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
            elif "lm_heads" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture
def make_dit():
    """Factory of DiT generators: 4 x 6 latents of 3 channels, 5 classes; no layer is left at zero."""

    def make(**overrides):
        config = {
            "sample_size": (4, 6),
            "in_channels": 3,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_classes": 5,
        }
        model = IFSQDiTTransformer2DModel(**{**config, **overrides}).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        return model

    return make


@pytest.fixture(params=["missing", "unexpected", "misshapen"])
def spoil_checkpoint(request):
    """Function that makes the weights in a folder misfit their config, and returns the name of the culprit."""

    def spoil(folder):
        (path,) = folder.glob("*.safetensors")
        weights = load_file(path)
        name = max(weights)
        if request.param == "missing":
            del weights[name]
        elif request.param == "unexpected":
            name = "extra.weight"
            weights[name] = torch.zeros(2)
        else:
            weights[name] = torch.zeros(7, 7)
        save_file(weights, path, metadata={"format": "pt"})
        return name

    return spoil
