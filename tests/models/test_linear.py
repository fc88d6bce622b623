import pytest
import torch
from torch.nn import functional as F

from hf_ifsq.models.linear import HAS_ONEDNN, Linear


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def uses_onednn(layer, inputs):
    with Operators() as operators:
        layer(inputs)
    return "mkldnn._linear_pointwise.default" in operators.names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (16, 64), (2, 3, 64), (2, 3, 4, 64)], ids=str)
@torch.no_grad()
def test_equals_that_of_pytorch(shape, bias):
    layer, inputs = Linear(64, 300, bias=bias), torch.randn(shape)
    expected = F.linear(inputs.double(), layer.weight.double(), layer.bias.double() if bias else None)
    torch.testing.assert_close(layer(inputs).double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_inputs_that_are_not_contiguous():
    layer, inputs = Linear(64, 32), torch.randn(6, 128)
    for view in (inputs[:, ::2], torch.randn(64, 6).T, torch.randn(6, 5, 64)[:, -1], torch.randn(5, 6, 64).mT.mT):
        torch.testing.assert_close(layer(view), F.linear(view, layer.weight, layer.bias))


def test_gradients_are_those_of_pytorch():
    layer, inputs = Linear(8, 5), torch.randn(3, 8, requires_grad=True)
    assert not uses_onednn(layer, inputs)
    got = torch.autograd.grad(layer(inputs).square().sum(), (inputs, *layer.parameters()))
    expected = torch.autograd.grad(
        F.linear(inputs, layer.weight, layer.bias).square().sum(), (inputs, *layer.parameters())
    )
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@torch.no_grad()
def test_onednn_is_for_float32_alone():
    layer, inputs = Linear(8, 5), torch.randn(3, 8)
    assert uses_onednn(layer, inputs) == HAS_ONEDNN
    assert not uses_onednn(Linear(8, 5, dtype=torch.float64), inputs.double())
    assert not uses_onednn(Linear(8, 5, dtype=torch.bfloat16), inputs.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_onednn(layer, inputs)
        assert layer(inputs).dtype == torch.bfloat16


@torch.no_grad()
def test_derivatives_in_a_direction():
    layer, inputs, direction = Linear(8, 5), torch.randn(3, 8), torch.randn(3, 8)
    _, derivative = torch.func.jvp(layer, (inputs,), (direction,))
    torch.testing.assert_close(derivative, direction @ layer.weight.T)


@torch.no_grad()
def test_onednn_can_be_turned_off():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(Linear(8, 5), torch.randn(3, 8))
