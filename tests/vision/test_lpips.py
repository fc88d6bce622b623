from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from safetensors.torch import load_file, save_file

from hf_ifsq.vision.lpips import HEADS_FILE, LPIPS


# The convolutions of torchvision's VGG16: number, width, and whether their features are compared.
CONVOLUTIONS = [
    (0, 64, False),
    (2, 64, True),
    (5, 128, False),
    (7, 128, True),
    (10, 256, False),
    (12, 256, False),
    (14, 256, True),
    (17, 512, False),
    (19, 512, False),
    (21, 512, True),
    (24, 512, False),
    (26, 512, False),
    (28, 512, True),
]


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    weights, in_channels = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for number, width, _ in CONVOLUTIONS:
        weights[f"features.{number}.weight"] = torch.randn(width, in_channels, 3, 3) * (2 / (9 * in_channels)) ** 0.5
        weights[f"features.{number}.bias"] = torch.randn(width) * 0.1
        in_channels = width
    return weights


@pytest.fixture(scope="module")
def vgg(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "model.safetensors"
    save_file(weights, file)
    return str(file)


@pytest.fixture(scope="module")
def lpips(vgg):
    return LPIPS(vgg)


def convolve(features, weight, bias):
    """A 3x3 convolution of features of shape (channels, height, width) with zeros around them."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(features, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
    return np.einsum("chwyx,ocyx->ohw", windows, weight, optimize=True) + bias[:, None, None]


def numpy_lpips(weights, heads, image, reference):
    """The formula in float64, for one pair of images of shape (3, height, width)."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    pair = [(values.double().numpy() - shift[:, None, None]) / scale[:, None, None] for values in (image, reference)]
    distance, stage = 0, 0
    for number, _, compared in CONVOLUTIONS:
        weight, bias = (weights[f"features.{number}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        pair = [np.maximum(convolve(features, weight, bias), 0) for features in pair]
        if compared:
            first, second = [features / np.sqrt((features**2).sum(axis=0)) for features in pair]
            distance += np.einsum("c,chw->hw", heads[stage], (first - second) ** 2).mean()
            stage += 1
            pooled = [features.shape[1] // 2 * 2 for features in pair]
            pair = [
                features[:, :rows, :rows].reshape(len(features), rows // 2, 2, rows // 2, 2).max(axis=(2, 4))
                for features, rows in zip(pair, pooled)
            ]
    return distance


@pytest.mark.parametrize("side", [32, 35])
def test_against_the_formula(lpips, weights, side):
    images, references = torch.rand(2, 2, 3, side, side) * 2 - 1
    references[1] = images[1] + 0.05 * torch.randn(3, side, side)
    heads = [head.flatten().double().numpy() for _, head in sorted(load_file(HEADS_FILE).items())]
    expected = [numpy_lpips(weights, heads, image, reference) for image, reference in zip(images, references)]
    distances = lpips(images, references)
    assert distances.shape == (2,) and distances.dtype == torch.float32
    assert distances.tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert expected[0] > 2 * expected[1] > 0.001


def test_heads_are_those_of_torchmetrics():
    file = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
    expected = torch.load(file, map_location="cpu", weights_only=True)
    heads = load_file(HEADS_FILE)
    assert len(heads) == len(expected) == 5
    for stage in range(5):
        assert torch.equal(heads[f"{stage}.weight"], expected[f"lin{stage}.model.1.weight"])
    assert "Richard Zhang" in HEADS_FILE.with_name("lpips_vgg_LICENSE.txt").read_text()


def test_equal_images(lpips):
    images = torch.rand(3, 3, 16, 20) * 2 - 1
    assert lpips(images, images).tolist() == [0, 0, 0]


def test_grey_images(lpips):
    images, references = torch.rand(2, 1, 1, 32, 32) * 2 - 1
    expected = lpips(images.repeat(1, 3, 1, 1), references.repeat(1, 3, 1, 1))
    torch.testing.assert_close(lpips(images, references), expected)


def test_gradients_flow_to_the_images_alone(lpips):
    images, references = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    images.requires_grad_()
    before = lpips(images, references)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    assert torch.isfinite(gradient).all() and gradient.flatten(1).norm(dim=1).min() > 0
    # The distance changes along the gradient as the gradient says.
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    change = (lpips(images + step, references) - lpips(images - step, references)) / 2e-3
    assert change.tolist() == pytest.approx(gradient.flatten(1).norm(dim=1).tolist(), rel=0.05)
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    # Equal images, where differences vanish, and extreme ones.
    for other in (images.detach(), torch.ones_like(images), 1e3 * references):
        (gradient,) = torch.autograd.grad(lpips(images, other).sum(), images)
        assert torch.isfinite(gradient).all()


def test_stays_in_evaluation_mode_and_in_float32(lpips):
    wrapper = torch.nn.ModuleList([lpips]).train()
    assert wrapper.training and not any(module.training for module in lpips.modules())
    images, references = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    expected = lpips(images, references)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lpips(images, references), expected)
    distances = lpips(images.bfloat16(), references)
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances, lpips(images.bfloat16().float(), references))


def test_weights_from_a_folder(lpips, vgg):
    images, references = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    assert torch.equal(LPIPS(str(Path(vgg).parent))(images, references), lpips(images, references))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features.28.weight": None}, r"features\.28\.weight is missing"),
        (
            {"features.0.weight": torch.zeros(64, 1, 3, 3)},
            r"features\.0\.weight has shape \(64, 1, 3, 3\)",
        ),
        ({"features.5.bias": torch.full((128,), torch.nan)}, r"features\.5\.bias is not finite"),
    ],
)
def test_weights_that_do_not_fit(weights, tmp_path, change, message):
    changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
    save_file(changed, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=rf"`vgg`.*wrong\.safetensors.*{message}"):
        LPIPS(str(tmp_path / "wrong.safetensors"))


@pytest.mark.parametrize("name", ["nowhere.safetensors", "", "no/such/repository", "broken.safetensors"])
def test_weights_that_cannot_be_had(tmp_path, name):
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    place = name if name.startswith("no/") else str(tmp_path / name)
    with pytest.raises(OSError, match=r"`vgg`.*Pass the name of a repository on the Hub.*folder.*file"):
        LPIPS(place)


def test_a_hub_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"`vgg` 'some/vgg16'.*Pass the name"):
        LPIPS("some/vgg16", revision="main")


@pytest.mark.parametrize(
    "images, references, message",
    [
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), r"`images`.*\(batch, 1 or 3, height, width\).*\(3, 32, 32\)"),
        (torch.zeros(1, 2, 32, 32), torch.zeros(1, 2, 32, 32), r"`images`.*\(1, 2, 32, 32\)"),
        (torch.zeros(1, 3, 15, 32), torch.zeros(1, 3, 15, 32), r"`images`.*at least 16 pixels.*\(1, 3, 15, 32\)"),
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32), r"`references`.*\(1, 3, 32, 32\), got \(1, 1, 32, 32"),
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32).byte(), "`references` must be floats.*torch.uint8"),
    ],
)
def test_what_is_no_pair_of_images(lpips, images, references, message):
    with pytest.raises(ValueError, match=message):
        lpips(images, references)


def test_compiled_in_one_graph(lpips):
    images, references = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    compiled = torch.compile(lpips, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, references), lpips(images, references))
