import pytest
import torch
import transformers
from torch.nn import functional as F

from hf_ifsq.vision.vision_model import FeatureExtractor


VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 7,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 24], "depths": [1, 1]}
MODELS = {
    "dinov2": transformers.Dinov2Config(**VIT),
    "dinov2_registers": transformers.Dinov2WithRegistersConfig(**VIT, num_register_tokens=3),
    "siglip": transformers.SiglipVisionConfig(**VIT),
    "resnet": transformers.ResNetConfig(**RESNET),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    transformers.AutoModel.from_config(MODELS[request.param]).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def expected_features(folder, images):
    """Of images of the right size in [0, 1]: the class token, or without one the mean over all places."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state
    if folder.name == "resnet":
        return hidden.mean(dim=(2, 3))
    return hidden.mean(dim=1) if folder.name == "siglip" else hidden[:, 0]


def test_features_of_images_of_the_right_size(folder):
    size = 224 if folder.name == "resnet" else 28
    pixel_values = torch.rand(2, 3, size, size) * 2 - 1
    extractor = FeatureExtractor(str(folder))
    assert extractor.image_size == size
    features = extractor(pixel_values)
    assert features.shape == (2, extractor.hidden_size) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected_features(folder, (pixel_values + 1) / 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", ["dinov2", "resnet"], indirect=True)
def test_images_are_resized(folder):
    pixel_values = torch.rand(2, 1, 60, 50) * 2 - 1
    images = F.interpolate((pixel_values + 1) / 2, size=(35, 35), mode="bicubic", antialias=True).clamp(0, 1)
    if folder.name == "resnet":
        expected = expected_features(folder, images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(
            FeatureExtractor(str(folder), image_size=35)(pixel_values), expected, rtol=1e-4, atol=1e-4
        )
    else:
        extractor = FeatureExtractor(str(folder), image_size=35)
        seen = []
        extractor.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        assert extractor(pixel_values).shape == (2, 16)
        torch.testing.assert_close(seen[0] * extractor.std + extractor.mean, images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("folder", ["dinov2"], indirect=True)
def test_frozen(folder):
    extractor = FeatureExtractor(str(folder)).train()
    assert not any(module.training for module in extractor.modules())
    assert not extractor(torch.zeros(1, 3, 28, 28, requires_grad=True)).requires_grad


@pytest.mark.parametrize("folder", ["dinov2"], indirect=True)
def test_images_smaller_than_a_patch(folder):
    with pytest.raises(ValueError, match="`image_size` must be at least 7 pixels, got 6"):
        FeatureExtractor(str(folder), image_size=6)
