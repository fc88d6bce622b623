import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.training.adversarial import PatchDiscriminator, adversarial_loss, forget_input, hinge_loss, remember_input


def test_layers_are_those_of_the_official_discriminator():
    shapes = [
        tuple(layer.weight.shape) for layer in PatchDiscriminator(3, width=2).modules() if hasattr(layer, "stride")
    ]
    assert shapes == [(2, 3, 4, 4), (4, 2, 4, 4), (8, 4, 4, 4), (16, 8, 4, 4), (16, 16, 4, 4), (1, 16, 4, 4)]


@pytest.mark.parametrize("num_layers, side, patches", [(4, 48, 1), (4, 256, 14), (3, 32, 2), (2, 12, 1)])
def test_patches(num_layers, side, patches):
    scores = PatchDiscriminator(3, width=4, num_layers=num_layers)(torch.rand(2, 3, side, side))
    assert scores.shape == (2, 1, patches, patches)


def test_a_score_depends_on_its_own_image_alone():
    images = torch.rand(3, 3, 48, 64) * 2 - 1
    discriminator = PatchDiscriminator(3, width=8)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), alone)


def test_images_smaller_than_a_patch():
    with pytest.raises(ValueError, match=r"at least 48 pixels.*got \(48, 47\)"):
        PatchDiscriminator(3)(torch.rand(1, 3, 48, 47))


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([[-3.0, 0.0], [-0.5, 1.0]])
    # (0 + 0.5 + 2) / 3 and (0 + 1 + 0.5 + 2) / 4
    assert hinge_loss(real, fake).item() == pytest.approx((2.5 / 3 + 3.5 / 4) / 2)


@pytest.fixture
def last_layer():
    layer = nn.Conv2d(4, 3, 1, bias=False)
    remember_input(layer)
    return layer


def equal_on_all_processes(tensor):
    return tensor


def test_adaptive_weight_equals_a_computation_by_hand(last_layer):
    rng = np.random.default_rng(0)
    hidden, target, slope = rng.normal(size=(5, 4)), rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    weight = rng.normal(size=(3, 4))
    # Gradients of mean |y - target| and minus the mean of the scores slope * y, for y = hidden @ weight.T.
    error = hidden @ weight.T - target
    expected = np.linalg.norm(np.sign(error).T @ hidden / 15) / (np.linalg.norm(slope.T @ hidden / 15) + 1e-4)

    def pixels(values):
        return torch.tensor(values, dtype=torch.float32)[..., None, None]

    last_layer.weight.data = pixels(weight)
    images = last_layer(pixels(hidden))
    reconstruction_loss = (images - pixels(target)).abs().mean()

    def discriminator(images):
        return pixels(slope) * images

    loss, got = adversarial_loss(discriminator, images, reconstruction_loss, last_layer, equal_on_all_processes)
    assert got.item() == pytest.approx(expected, rel=1e-6)
    assert loss.item() == pytest.approx(-(slope * (hidden @ weight.T)).mean(), rel=1e-5)
    assert not got.requires_grad
    # The graph is still there to be trained on.
    (reconstruction_loss + got * loss).backward()
    expected_gradient = np.sign(error).T @ hidden / 15 - expected * slope.T @ hidden / 15
    np.testing.assert_allclose(last_layer.weight.grad[..., 0, 0].numpy(), expected_gradient, atol=1e-5)


def test_adaptive_weight_is_limited(last_layer):
    images = last_layer(torch.ones(1, 4, 2, 2))
    weight = adversarial_loss(
        lambda images: 0 * images, images, 1e9 * images.sum(), last_layer, equal_on_all_processes
    )[1]
    assert weight == 1e4


def test_adaptive_weight_is_that_of_the_mean_gradient():
    last_layer = nn.Conv2d(2, 1, 1, bias=False)
    remember_input(last_layer)
    gradients = []

    def reduce(gradient):
        # As if another process had the opposite gradient in the first place.
        gradients.append(gradient.flatten())
        return (gradient + gradient * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)) / 2

    images = last_layer(torch.tensor([4.0, 3.0]).view(1, 2, 1, 1))
    got = adversarial_loss(lambda images: -2 * images, images, images.sum(), last_layer, reduce)[1]
    assert got.item() == pytest.approx(3 / (6 + 1e-4))
    assert [gradient.tolist() for gradient in gradients] == [[4, 3], [8, 6]]


def test_the_discriminator_is_not_trained_by_the_generator(last_layer):
    discriminator = PatchDiscriminator(3, width=4, num_layers=2)
    images = last_layer(torch.rand(2, 4, 16, 16))
    loss, weight = adversarial_loss(discriminator, images, images.abs().mean(), last_layer, equal_on_all_processes)
    assert loss.item() == pytest.approx(-discriminator(images).mean().item(), rel=1e-5)
    (weight * loss).backward()
    assert last_layer.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in discriminator.parameters())


def test_a_layer_forgets_its_input(last_layer):
    images = last_layer(torch.rand(1, 4, 2, 2))
    forget_input(last_layer)
    # It is a tensor the size of a whole feature map.
    assert not [value for value in vars(last_layer).values() if isinstance(value, torch.Tensor)]
    with pytest.raises(ValueError, match="must have kept its input"):
        adversarial_loss(nn.Identity(), images, images.sum(), last_layer, equal_on_all_processes)
    forget_input(last_layer)


def test_a_layer_that_does_not_remember():
    layer = nn.Conv2d(3, 3, 1)
    images = layer(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="`last_layer` must have kept its input: call `remember_input` before"):
        adversarial_loss(nn.Identity(), images, images.sum(), layer, equal_on_all_processes)


def test_no_value_is_read():
    with FakeTensorMode():
        layer, discriminator = nn.Conv2d(4, 3, 3, padding=1), PatchDiscriminator(3, width=4, num_layers=2)
        remember_input(layer)
        images = layer(torch.rand(2, 4, 16, 16))
        loss, weight = adversarial_loss(discriminator, images, images.abs().mean(), layer, equal_on_all_processes)
        (weight * loss + hinge_loss(*discriminator(images).chunk(2))).backward()
        assert layer.weight.grad.shape == layer.weight.shape


def equation_7(reconstruction_loss, adversarial_loss, weight):
    """As VQGAN writes it, by two backward passes to the weight of the last layer."""
    losses = (reconstruction_loss, adversarial_loss)
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in losses]
    return norms[0] / (norms[1] + 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        None,
        {"backend": "aot_eager"},
        # With its optimization of layouts, inductor of torch 2.13 loses gradients of diffusers' upsampling on CPUs.
        pytest.param({"backend": "inductor", "options": {"layout_optimization": False}}, marks=pytest.mark.slow),
    ],
)
def test_compiled_models(options):
    """Of a compiled model the backward pass runs once alone, and a discriminator may be compiled too."""
    model = AutoencoderIFSQ(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16)
    last_layer, discriminator = model.decoder.conv_out, PatchDiscriminator(3, width=4, num_layers=2)
    remember_input(last_layer)
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    images = model(pixel_values).sample
    reconstruction_loss = F.l1_loss(images, pixel_values)
    minus_score = -discriminator(images).mean()
    weight = equation_7(reconstruction_loss, minus_score, last_layer.weight)
    loss = reconstruction_loss + 0.5 * weight * minus_score
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)

    compiled, compiled_discriminator = model, discriminator
    if options is not None:
        torch._dynamo.reset()
        compiled = torch.compile(model, **options)
        compiled_discriminator = torch.compile(discriminator, **options)
    # The first backward passes are those of other losses, as in training.
    F.l1_loss(compiled(pixel_values).sample, pixel_values).backward()
    hinge_loss(*compiled_discriminator(pixel_values).chunk(2)).backward()
    for _ in range(2):
        model.zero_grad()
        images = compiled(pixel_values).sample
        reconstruction_loss = F.l1_loss(images, pixel_values)
        arguments = (compiled_discriminator, images, reconstruction_loss, last_layer, equal_on_all_processes)
        loss, got = adversarial_loss(*arguments)
        (reconstruction_loss + 0.5 * got * loss).backward()
        assert got.item() == pytest.approx(weight.item(), rel=1e-5)
        for parameter, expected in zip(parameters, gradients):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
