import numpy as np
import pytest
import torch
from torch import nn

from hf_ifsq.training.adversarial import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss


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


def test_adaptive_weight_equals_a_computation_by_hand():
    rng = np.random.default_rng(0)
    hidden, target, slope = rng.normal(size=(5, 4)), rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    weight = rng.normal(size=(3, 4))
    # Gradients of mean |y - target| and mean (slope * y) for y = hidden @ weight.T.
    error = hidden @ weight.T - target
    expected = np.linalg.norm(np.sign(error).T @ hidden / 15) / (np.linalg.norm(slope.T @ hidden / 15) + 1e-4)

    last_layer = torch.tensor(weight, requires_grad=True)
    output = torch.tensor(hidden) @ last_layer.T
    reconstruction_loss = (output - torch.tensor(target)).abs().mean()
    adversarial_loss = (torch.tensor(slope) * output).mean()
    got = adaptive_weight(reconstruction_loss, adversarial_loss, last_layer, lambda gradient: gradient)
    assert got.item() == pytest.approx(expected, rel=1e-6)
    assert not got.requires_grad
    # The graph is still there to be trained on.
    (reconstruction_loss + got * adversarial_loss).backward()


def test_adaptive_weight_is_limited():
    last_layer = torch.ones(3, requires_grad=True)
    loss = last_layer.sum()
    assert adaptive_weight(1e9 * loss, 0 * loss, last_layer, lambda gradient: gradient) == 1e4


def test_adaptive_weight_is_that_of_the_mean_gradient():
    last_layer = torch.ones(2, requires_grad=True)
    gradients = []

    def reduce(gradient):
        # As if another process had the opposite gradient in the first place.
        gradients.append(gradient)
        return (gradient + gradient * torch.tensor([-1.0, 1.0])) / 2

    loss = (last_layer * torch.tensor([4.0, 3.0])).sum()
    got = adaptive_weight(loss, 2 * loss, last_layer, reduce)
    assert got.item() == pytest.approx(3 / (6 + 1e-4))
    assert [gradient.tolist() for gradient in gradients] == [[4, 3], [8, 6]]


def test_the_discriminator_is_not_trained_by_the_generator():
    discriminator = PatchDiscriminator(3, width=4, num_layers=2)
    decoder = nn.Conv2d(3, 3, 1)
    images = decoder(torch.rand(2, 3, 16, 16))
    loss, weight = generator_loss(
        discriminator, images, images.abs().mean(), decoder.weight, lambda gradient: gradient
    )
    assert loss.item() == pytest.approx(-discriminator(images).mean().item(), rel=1e-5)
    (weight * loss).backward()
    assert decoder.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in discriminator.parameters())
