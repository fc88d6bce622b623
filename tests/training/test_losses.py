from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode

from hf_ifsq.training.losses import velocity_loss


# Velocity and target at `plan.xt` of the reference DiT's goldens, and the losses of its own training code.
GOLDENS = Path(__file__).parents[1] / "fixtures" / "dit" / "velocity_loss.safetensors"


def test_goldens_of_the_official_code():
    goldens = load_file(GOLDENS)
    squared, direction = velocity_loss(goldens["velocity"], goldens["target"])
    torch.testing.assert_close(squared, goldens["loss"])
    torch.testing.assert_close(direction, goldens["cos_loss"])


@pytest.mark.parametrize("factor, squared, direction", [(1, 0, 0), (2, 25 / 2, 0), (-1, 50, 2)])
def test_closed_forms(factor, squared, direction):
    # Vectors (3, 4) over two channels: 25 / 2 is their mean square.
    target = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(2, 2, 3, 5)
    losses = velocity_loss(factor * target, target)
    assert torch.stack(losses).tolist() == [pytest.approx([squared] * 2), pytest.approx([direction] * 2)]


def test_direction_is_that_over_the_channels():
    velocity, target = torch.zeros(2, 1, 2, 2, 2)
    velocity[0, 0], target[0, 1] = 1, 1
    losses = velocity_loss(velocity, target)
    assert torch.stack(losses).tolist() == [pytest.approx([1]), pytest.approx([1])]


def test_low_precision_is_lifted_to_float32():
    velocity, target = torch.randn(2, 2, 4, 3, 3).bfloat16()
    losses = velocity_loss(velocity, target)
    for loss, expected in zip(losses, velocity_loss(velocity.double(), target.double())):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)


def test_no_value_is_read():
    with FakeTensorMode():
        losses = velocity_loss(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))
        assert [loss.shape for loss in losses] == [(2,), (2,)]
