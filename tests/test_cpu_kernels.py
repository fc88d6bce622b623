import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from hf_ifsq import IFSQARPipeline, IFSQDiTTransformer2DModel
from hf_ifsq.cpu_kernels import OneDNNLinear, enable_cpu_kernels


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


def make_layer(*args, **kwargs):
    layer = torch.nn.Linear(*args, **kwargs)
    enable_cpu_kernels(layer)
    return layer


def test_this_version_of_pytorch_has_the_operator():
    # It is private to PyTorch: this test tells when it is gone.
    assert hasattr(torch.ops.mkldnn, "_linear_pointwise") == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (16, 64), (2, 3, 64), (2, 3, 4, 64)], ids=str)
@torch.no_grad()
def test_equals_that_of_pytorch(shape, bias):
    layer, inputs = make_layer(64, 300, bias=bias), torch.randn(shape)
    expected = F.linear(inputs.double(), layer.weight.double(), layer.bias.double() if bias else None)
    torch.testing.assert_close(layer(inputs).double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_inputs_that_are_not_contiguous():
    layer, inputs = make_layer(64, 32), torch.randn(6, 128)
    for view in (inputs[:, ::2], torch.randn(64, 6).T, torch.randn(6, 5, 64)[:, -1], torch.randn(5, 6, 64).mT.mT):
        torch.testing.assert_close(layer(view), F.linear(view, layer.weight, layer.bias))


def test_gradients_are_those_of_pytorch():
    layer, inputs = make_layer(8, 5), torch.randn(3, 8, requires_grad=True)
    assert not uses_onednn(layer, inputs)
    got = torch.autograd.grad(layer(inputs).square().sum(), (inputs, *layer.parameters()))
    expected = torch.autograd.grad(
        F.linear(inputs, layer.weight, layer.bias).square().sum(), (inputs, *layer.parameters())
    )
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@torch.no_grad()
def test_onednn_is_for_float32_alone():
    layer, inputs = make_layer(8, 5), torch.randn(3, 8)
    assert uses_onednn(layer, inputs) and not uses_onednn(torch.nn.Linear(8, 5), inputs)
    assert not uses_onednn(make_layer(8, 5, dtype=torch.float64), inputs.double())
    assert not uses_onednn(make_layer(8, 5, dtype=torch.bfloat16), inputs.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_onednn(layer, inputs)
        assert layer(inputs).dtype == torch.bfloat16


@torch.no_grad()
def test_derivatives_in_a_direction():
    layer, inputs, direction = make_layer(8, 5), torch.randn(3, 8), torch.randn(3, 8)
    _, derivative = torch.func.jvp(layer, (inputs,), (direction,))
    torch.testing.assert_close(derivative, direction @ layer.weight.T)


@torch.no_grad()
def test_onednn_can_be_turned_off():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(make_layer(8, 5), torch.randn(3, 8))


@torch.no_grad()
def test_weights_that_are_no_plain_parameters_are_left_alone():
    class Quantized(torch.nn.Parameter):
        pass

    class QuantizedLinear(torch.nn.Linear):
        pass

    layer = make_layer(8, 5)
    layer.weight = Quantized(layer.weight.data)
    assert not uses_onednn(layer, torch.randn(3, 8))
    other = QuantizedLinear(8, 5)
    enable_cpu_kernels(other)
    assert type(other) is QuantizedLinear


def test_a_pytorch_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer = torch.nn.Linear(8, 5)
    with pytest.warns(UserWarning, match=r"`enable_cpu_kernels` changes nothing: PyTorch .*_linear_pointwise"):
        enable_cpu_kernels(layer)
    assert type(layer) is torch.nn.Linear


@torch.no_grad()
def test_compiled_and_exported():
    torch.compiler.reset()
    layer, inputs = make_layer(8, 5), torch.randn(3, 8)
    expected = layer(inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), expected)
    exported = torch.export.export(layer, (inputs,))
    assert "linear" in str(exported.graph) and "onednn" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(inputs), expected)


def test_a_model_stays_what_it_is(make_dit, tmp_path):
    model = make_dit()
    inputs = (torch.randn(2, 3, 4, 6), torch.tensor([0.2, 0.9]), torch.tensor([1, 3]))
    expected, state = model(*inputs).sample, {name: weight.clone() for name, weight in model.state_dict().items()}
    enable_cpu_kernels(model)
    assert {name for name, module in model.named_modules() if type(module) is OneDNNLinear} == {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert torch.equal(model(*inputs).sample, expected)
    model.save_pretrained(tmp_path)
    loaded = IFSQDiTTransformer2DModel.from_pretrained(tmp_path)
    assert all(type(module) is not OneDNNLinear for module in loaded.modules())
    with torch.no_grad():
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert all(torch.equal(*pair) for pair in zip(other.state_dict().values(), state.values(), strict=True))
            torch.testing.assert_close(other(*inputs).sample, expected)


def test_of_a_pipeline(make_ar, make_autoencoder):
    tokenizer = make_autoencoder(levels=(5, 3), sample_size=(12, 16))
    pipeline = IFSQARPipeline(make_ar(vocab_sizes=[5, 3]), tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline([1, 2], do_sample=False, output_type="latent").images
    pipeline.enable_cpu_kernels()
    with Operators() as operators:
        assert torch.equal(pipeline([1, 2], do_sample=False, output_type="latent").images, expected)
    assert "mkldnn._linear_pointwise.default" in operators.names
    torch.compiler.reset()
    pipeline.compile(backend="aot_eager")
    assert torch.equal(pipeline([1, 2], do_sample=False, output_type="latent").images, expected)
