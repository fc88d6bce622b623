import re

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from hf_ifsq.training.repa import RepresentationAlignment
from hf_ifsq.vision.vision_model import Teacher


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 7,
}
CLIP_VISION = {**VIT, "projection_dim": 16}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}

# Name, config, pixels from one feature to the next, width of a feature.
TEACHERS = {
    "dinov2": (transformers.Dinov2Config, VIT, 7, 32),
    "dinov2_registers": (transformers.Dinov2WithRegistersConfig, {**VIT, "num_register_tokens": 3}, 7, 32),
    "vit": (transformers.ViTConfig, VIT, 7, 32),
    "siglip_vision": (transformers.SiglipVisionConfig, VIT, 7, 32),
    "siglip": (transformers.SiglipConfig, {"vision_config": VIT, "text_config": TEXT}, 7, 32),
    "clip": (transformers.CLIPConfig, {"vision_config": CLIP_VISION, "text_config": TEXT}, 7, 32),
    "resnet": (transformers.ResNetConfig, {"embedding_size": 8, "hidden_sizes": [8, 24], "depths": [1, 1]}, 8, 24),
    "convnext": (transformers.ConvNextConfig, {"hidden_sizes": [8, 24], "depths": [1, 1], "num_stages": 2}, 8, 24),
    "swin": (transformers.SwinConfig, SWIN, 8, 16),
}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """Factory of folders with tiny random vision models, each saved once."""
    root = tmp_path_factory.mktemp("teachers")

    def make(name):
        folder = root / name
        if not folder.exists():
            torch.manual_seed(0)
            config_class, options, _, _ = TEACHERS[name]
            model = transformers.AutoModel.from_config(config_class(**options))
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("grid_size, channels", [((4, 4), 3), ((8, 4), 3), ((3, 5), 1)])
@pytest.mark.parametrize("name", TEACHERS)
def test_shapes(teacher_folder, name, grid_size, channels):
    if name == "swin" and grid_size == (3, 5):
        pytest.skip("transformers' Swin fails on grids smaller than its windows")
    *_, stride, width = TEACHERS[name]
    teacher = Teacher(str(teacher_folder(name)), grid_size)
    assert teacher.hidden_size == width and teacher.image_size == (grid_size[0] * stride, grid_size[1] * stride)
    features = teacher(torch.rand(2, channels, 16, 16) * 2 - 1)
    assert features.shape == (2, grid_size[0] * grid_size[1], width) and features.dtype == torch.float32


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers", "vit", "siglip", "clip", "convnext"])
def test_raster_order(teacher_folder, name):
    """A bright cell changes the feature of that cell the most."""
    teacher = Teacher(str(teacher_folder(name)), (3, 4))
    background = torch.zeros(1, 3, *teacher.image_size)
    side = teacher.image_size[0] // 3
    for cell in range(12):
        image = background.clone()
        top, left = cell // 4 * side, cell % 4 * side
        image[..., top : top + side, left : left + side] = 1
        change = (teacher(image) - teacher(background)).norm(dim=-1)[0]
        assert change.argmax() == cell


def test_features_of_a_convolutional_network_are_its_map_in_raster_order(teacher_folder):
    teacher = Teacher(str(teacher_folder("resnet")), (3, 4))
    maps = []
    teacher.model.register_forward_hook(lambda *arguments: maps.append(arguments[2].last_hidden_state))
    features = teacher(torch.rand(2, 3, 24, 32) * 2 - 1)
    for row in range(3):
        for column in range(4):
            assert torch.equal(features[:, 4 * row + column], maps[0][:, :, row, column])


@pytest.mark.parametrize("name, num_prefix_tokens", [("dinov2", 1), ("dinov2_registers", 4), ("siglip_vision", 0)])
def test_features_are_the_patch_tokens_of_normalized_images(teacher_folder, name, num_prefix_tokens):
    teacher = Teacher(str(teacher_folder(name)), (4, 4))
    pixel_values = torch.rand(2, 3, 28, 28) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    model = transformers.AutoModel.from_pretrained(teacher_folder(name)).eval()
    with torch.no_grad():
        tokens = model(((pixel_values + 1) / 2 - mean) / std).last_hidden_state
    assert tokens.shape[1] == 16 + num_prefix_tokens
    torch.testing.assert_close(teacher(pixel_values), tokens[:, num_prefix_tokens:], rtol=1e-4, atol=1e-4)


def test_images_are_resized_to_the_patch_grid_and_stay_images(teacher_folder):
    teacher = Teacher(str(teacher_folder("vit")), (2, 2))
    seen = []
    teacher.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    checkers = torch.ones(1, 1, 40, 40)
    checkers[..., 20:, :] *= -1
    checkers[..., :, 20:] *= -1
    teacher(checkers)
    assert seen[0].shape == (1, 3, 14, 14)
    images = seen[0] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    images = images + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    # Bicubic filters overshoot at edges; a picture does not leave [0, 1].
    assert images.min() > -1e-6 and images.max() < 1 + 1e-6
    torch.testing.assert_close(images[0, :, 0, 0], torch.ones(3))
    torch.testing.assert_close(images[0, :, 0, -1], torch.zeros(3), atol=1e-6, rtol=0)


def test_frozen_and_in_evaluation_mode(teacher_folder):
    teacher = Teacher(str(teacher_folder("vit")), (4, 4))
    wrapper = nn.ModuleList([teacher]).train()
    assert wrapper.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixel_values = torch.zeros(1, 3, 16, 16, requires_grad=True)
    assert not teacher(pixel_values).requires_grad


def test_a_teacher_with_too_few_features(tmp_path):
    config = transformers.ViTConfig(**{**VIT, "patch_size": 14})
    transformers.ViTModel(config).save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path), (2, 2))
    teacher.grid_size = (3, 3)  # as if the model gave fewer features for its image
    with pytest.raises(ValueError, match=r"`teacher` gives 5 features.*9 cells.*\(3, 3\)"):
        teacher(torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("width, teacher_width, projector_dim", [(8, 12, 16), (16, 8, 32)])
def test_alignment_against_numpy(width, teacher_width, projector_dim):
    alignment = RepresentationAlignment(width, teacher_width, projector_dim)
    hidden_states, features = torch.randn(2, 5, width), torch.randn(2, 5, teacher_width)
    weights = {name: value.detach().double().numpy() for name, value in alignment.named_parameters()}
    assert [value.shape for name, value in weights.items() if name.endswith("weight")] == [
        (projector_dim, width),
        (projector_dim, projector_dim),
        (teacher_width, projector_dim),
    ]
    values = hidden_states.double().numpy()
    layers = sorted({name.rsplit(".", 1)[0] for name in weights})
    for number, layer in enumerate(layers):
        values = values @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        if number < 2:
            values = values / (1 + np.exp(-values))
    target = features.double().numpy()
    cosine = (values * target).sum(-1) / np.linalg.norm(values, axis=-1) / np.linalg.norm(target, axis=-1)
    assert alignment(hidden_states, features).item() == pytest.approx(-cosine.mean(), abs=1e-6)


def test_alignment_depends_on_directions_and_can_be_learned():
    alignment = RepresentationAlignment(8, 12, 16)
    hidden_states, features = torch.randn(2, 6, 8), torch.randn(2, 6, 12)
    before = alignment(hidden_states, features)
    torch.testing.assert_close(alignment(hidden_states, 7 * features), before)
    torch.testing.assert_close(alignment(hidden_states, -features), -before)
    optimizer = torch.optim.Adam(alignment.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        alignment(hidden_states, features).backward()
        optimizer.step()
    assert -1 <= alignment(hidden_states, features) < -0.9


def test_default_width_of_the_projector():
    projector = RepresentationAlignment(4, 6).projector
    assert sum(parameter.numel() for parameter in projector.parameters()) == 5 * 2048 + 2049 * 2048 + 2049 * 6


def test_cosine_in_float32():
    alignment = RepresentationAlignment(8, 12, 16).bfloat16()
    loss = alignment(torch.randn(1, 3, 8).bfloat16(), torch.randn(1, 3, 12))
    assert loss.dtype == torch.float32
    projected = alignment.projector(torch.randn(1, 3, 8).bfloat16())
    assert F.cosine_similarity(projected.float(), projected.float(), dim=-1).min() > 0.999


@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 6, 12)])
def test_different_numbers_of_tokens(shape):
    with pytest.raises(ValueError, match=rf"`teacher_features`.*\(2, 6\).*{re.escape(str(shape[:2]))}"):
        RepresentationAlignment(8, 12, 16)(torch.randn(2, 6, 8), torch.randn(shape))


def test_no_value_is_read():
    with FakeTensorMode():
        loss = RepresentationAlignment(8, 12, 16)(torch.randn(2, 6, 8), torch.randn(2, 6, 12))
        loss.backward()
        assert loss.shape == ()
