import numpy as np
import pytest
import skimage
import torch
from skimage.metrics import peak_signal_noise_ratio as reference_psnr
from skimage.metrics import structural_similarity as reference_ssim

from hf_ifsq.metrics.images import peak_signal_noise_ratio, structural_similarity


METRICS = [peak_signal_noise_ratio, structural_similarity]


def photo(name):
    """A photo as an array of shape (height, width, channels) in [0, 1]."""
    pixels = getattr(skimage.data, name)()[40:200, 60:190] / 255
    return pixels if pixels.ndim == 3 else pixels[..., None]


def degraded(pixels, kind):
    if kind == "blurred":
        return skimage.filters.gaussian(pixels, 2, channel_axis=-1)
    noise = np.random.default_rng(0).normal(scale={"noisy": 0.1, "nearly equal": 0.001}[kind], size=pixels.shape)
    return (pixels + noise).clip(0, 1)


def to_tensor(pixels):
    return torch.from_numpy(pixels.transpose(2, 0, 1) * 2 - 1).float()[None]


@pytest.mark.parametrize("kind", ["blurred", "noisy", "nearly equal"])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "camera"])
def test_equal_to_scikit_image(name, kind):
    original = photo(name)
    image = degraded(original, kind)
    psnr = peak_signal_noise_ratio(to_tensor(image), to_tensor(original))
    assert psnr.item() == pytest.approx(reference_psnr(original, image, data_range=1), abs=1e-5, rel=1e-6)
    ssim = structural_similarity(to_tensor(image), to_tensor(original))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    assert ssim.item() == pytest.approx(reference_ssim(original, image, channel_axis=-1, **options), abs=1e-5)


def test_a_value_an_image():
    originals = torch.cat([to_tensor(photo(name)) for name in ("astronaut", "coffee")])
    images = torch.cat([to_tensor(degraded(photo(name), "noisy")) for name in ("astronaut", "coffee")])
    for metric in METRICS:
        values = metric(images, originals)
        assert values.shape == (2,) and values.dtype == torch.float32 and values[0] != values[1]
        alone = [metric(image[None], original[None]).item() for image, original in zip(images, originals)]
        assert values.tolist() == pytest.approx(alone, rel=1e-6)
        torch.testing.assert_close(metric(originals, images), values)


def test_equal_images():
    images = torch.rand(2, 3, 16, 20) * 2 - 1
    assert peak_signal_noise_ratio(images, images).tolist() == [float("inf")] * 2
    assert structural_similarity(images, images).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_half_precision_is_measured_in_float32():
    images, originals = (torch.rand(2, 1, 1, 16, 16) * 2 - 1).bfloat16()
    for metric in METRICS:
        assert torch.equal(metric(images, originals), metric(images.float(), originals.float()))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "images, references, message",
    [
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"`images`.*\(batch, 1 or 3, height, width\).*\(3, 16, 16\)"),
        (torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16), r"`images`.*\(1, 4, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), r"`images`.*\(0, 3, 16, 16\)"),
        (
            torch.zeros(2, 3, 16, 16),
            torch.zeros(1, 3, 16, 16),
            r"`references`.*\(2, 3, 16, 16\), got \(1, 3, 16, 16\)",
        ),
        (torch.zeros(1, 3, 16, 16).byte(), torch.zeros(1, 3, 16, 16), r"`images` must be floats.*torch.uint8"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 1.5), r"`references` must be in \[-1, 1\].*1.5"),
        (torch.full((1, 3, 16, 16), torch.nan), torch.zeros(1, 3, 16, 16), r"`images` must be in \[-1, 1\].*nan"),
    ],
)
def test_what_is_no_pair_of_images(metric, images, references, message):
    with pytest.raises(ValueError, match=message):
        metric(images, references)


def test_images_smaller_than_the_window():
    images = torch.zeros(1, 1, 11, 11)
    assert structural_similarity(images, images).item() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"at least 11 pixels.*\(1, 1, 12, 10\)"):
        structural_similarity(torch.zeros(1, 1, 12, 10), torch.zeros(1, 1, 12, 10))
