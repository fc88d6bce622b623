"""Parts of a pipeline that are quantized, compiled, exchanged or left out."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.utils import _pytree as pytree

from hf_ifsq import IFSQARPipeline, IFSQDiTPipeline


PIPELINES = ["ar", "dit"]


def pictures(pipeline):
    options = {} if isinstance(pipeline, IFSQARPipeline) else {"num_inference_steps": 2}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([1, 2], generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


# --- quantized ---


class ScaledIntegers(torch.Tensor):
    """A weight of integers times a scale, in one tensor as quantization libraries make them: few operations work."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return ScaledIntegers(tensors["integers"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return ScaledIntegers(args[0].integers, args[0].scale)
        if function is torch.ops.aten.t.default:
            return (args[0].integers * args[0].scale).t()
        if function not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            raise NotImplementedError(f"{function} of scaled integers")
        args = pytree.tree_map_only(cls, lambda weight: weight.integers * weight.scale, args)
        return function(*args, **(kwargs or {}))


def quantized(model):
    """A copy whose linear layers hold such weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(dim=1, keepdim=True).detach() / 127
            integers = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(ScaledIntegers(integers, scale), requires_grad=False)
    return model


@pytest.mark.parametrize("kind", PIPELINES)
def test_weights_of_a_quantization_library(make_pipeline, kind):
    pipeline = make_pipeline(kind)
    model = quantized(pipeline.transformer)
    with pytest.raises(NotImplementedError):
        torch.isfinite(next(weight for weight in model.parameters() if isinstance(weight, ScaledIntegers)))
    plain = copy.deepcopy(pipeline.transformer)
    for module, other in zip(plain.modules(), model.modules(), strict=True):
        if isinstance(module, nn.Linear):
            module.weight.data = other.weight.integers * other.weight.scale
    images, expected = (pictures(type(pipeline)(**{**pipeline.components, "transformer": m})) for m in (model, plain))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    model.get_submodule("proj_out" if kind == "dit" else "lm_heads.0").weight.scale[0] = torch.nan
    with pytest.raises(ValueError, match="`transformer` has 1 weights with NaN"):
        type(pipeline)(**{**pipeline.components, "transformer": model})


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", PIPELINES)
def test_dynamic_quantization(make_pipeline, kind):
    pipeline = make_pipeline(kind)
    model = torch.ao.quantization.quantize_dynamic(pipeline.transformer, {nn.Linear}, dtype=torch.qint8)
    assert any("quantized.dynamic" in type(module).__module__ for module in model.modules())
    images = pictures(type(pipeline)(**{**pipeline.components, "transformer": model}))
    expected = pictures(pipeline)
    assert not torch.equal(images, expected)
    if kind == "dit":  # a token that changes with the rounding changes all that follow
        assert (images - expected).abs().mean() < 0.1


# --- compiled ---


@pytest.mark.parametrize("part", ["transformer", "tokenizer"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_compiled_as_a_whole(make_pipeline, tmp_path, kind, part):
    torch._dynamo.reset()
    pipeline = make_pipeline(kind)
    expected = pictures(pipeline)
    compiled = torch.compile(getattr(pipeline, part), backend="aot_eager")
    # Handed to a pipeline or set on one.
    other = type(pipeline)(**{**pipeline.components, part: compiled})
    torch.testing.assert_close(pictures(other), expected, rtol=0, atol=1e-5)
    setattr(pipeline, part, compiled)
    torch.testing.assert_close(pictures(pipeline), expected, rtol=0, atol=1e-5)
    for saved in (pipeline, other):
        saved.save_pretrained(tmp_path)
        loaded = type(pipeline).from_pretrained(tmp_path)
        assert type(getattr(loaded, part)) is type(compiled._orig_mod)
        assert torch.equal(pictures(loaded), expected)


@pytest.mark.parametrize("kind", PIPELINES)
def test_compiled_in_place(make_pipeline, tmp_path, kind):
    torch._dynamo.reset()
    pipeline = make_pipeline(kind)
    expected = pictures(pipeline)
    pipeline.transformer.compile(backend="aot_eager")
    pipeline.tokenizer.decode = torch.compile(pipeline.tokenizer.decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(pictures(pipeline), expected, rtol=0, atol=1e-5)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(pictures(type(pipeline).from_pretrained(tmp_path)), expected)


# --- exchanged or left out ---


@pytest.mark.parametrize("kind", PIPELINES)
def test_other_parts_at_loading(make_pipeline, make_tokenizer, tmp_path, kind):
    pipeline = make_pipeline(kind)
    pipeline.save_pretrained(tmp_path)
    torch.manual_seed(1)
    other, misfit = make_tokenizer(), make_tokenizer(levels=(5, 3, 3))
    loaded = type(pipeline).from_pretrained(tmp_path, tokenizer=other)
    assert loaded.tokenizer is other
    pipeline.tokenizer = other
    assert torch.equal(pictures(loaded), pictures(pipeline))
    assert torch.equal(pictures(type(pipeline).from_pipe(loaded)), pictures(pipeline))
    with pytest.raises(ValueError, match="use the tokenizer that"):
        type(pipeline).from_pretrained(tmp_path, tokenizer=misfit)


@pytest.mark.parametrize("kind, part", [(kind, part) for kind in PIPELINES for part in ("transformer", "tokenizer")])
def test_left_out(make_pipeline, tmp_path, kind, part):
    pipeline = make_pipeline(kind)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{part}` must be .* got NoneType"):
        type(pipeline).from_pretrained(tmp_path, **{part: None})
    setattr(pipeline, part, None)
    with pytest.raises(ValueError, match=f"`{part}` must be .* got NoneType"):
        pictures(pipeline)


@pytest.mark.parametrize("kind", PIPELINES)
def test_parts_of_other_classes(make_pipeline, make_ar, make_dit, make_baseline, kind):
    pipeline = make_pipeline(kind)
    parts, other = pipeline.components, make_dit() if kind == "ar" else make_ar()
    wrong = [
        ("transformer", parts["tokenizer"]),
        ("tokenizer", parts["transformer"]),
        ("transformer", other),
        ("transformer", "folder"),
        ("tokenizer", 5),
        ("tokenizer", parts["tokenizer"].decoder),
    ]
    if kind == "ar":
        wrong.append(("tokenizer", make_baseline(AutoencoderKL)))
    else:
        wrong += [("scheduler", None), ("scheduler", "euler"), ("scheduler", FlowMatchEulerDiscreteScheduler)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"`{name}` "):
            type(pipeline)(**{**parts, name: value})


@pytest.mark.parametrize("kind", PIPELINES)
def test_on_the_meta_device(make_pipeline, kind):
    with pytest.raises(ValueError, match="on the meta device, where models have no weights"):
        pictures(make_pipeline(kind).to("meta"))


@pytest.mark.parametrize("kind", PIPELINES)
def test_models_are_found_by_diffusers(make_pipeline, tmp_path, kind):
    pipeline = make_pipeline(kind)
    models = [pipeline.tokenizer] + ([pipeline.transformer] if kind == "dit" else [])
    for model in models:
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(str(tmp_path))
        assert type(loaded) is type(model)
        for weight, other in zip(loaded.parameters(), model.parameters(), strict=True):
            assert torch.equal(weight, other)
        assert type(AutoModel.from_config(dict(model.config))) is type(model)


# --- what is not finite ---


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_decoder_that_overflows_gives_no_picture(make_pipeline, kind, output_type):
    pipeline = make_pipeline(kind)
    # In float32 the normalizations behind it make the large values small again.
    pipeline.tokenizer.decoder.conv_in.weight.data *= 2e5
    options = {} if kind == "ar" else {"num_inference_steps": 2}
    pipeline([0, 1], output_type=output_type, **options)
    pipeline.tokenizer.half()
    with pytest.raises(ValueError, match="images of the tokenizer, AutoencoderIFSQ in torch.float16, are not finite"):
        pipeline([0, 1], output_type=output_type, **options)
    assert len(pipeline([0, 1], output_type="latent", **options).images) == 2


def test_upcast_of_the_tokenizer(make_dit, make_baseline):
    tokenizer = make_baseline(AutoencoderKL, force_upcast=True)
    tokenizer.decoder.conv_in.weight.data *= 2e5
    pipeline = IFSQDiTPipeline(make_dit(sample_size=4), tokenizer, FlowMatchEulerDiscreteScheduler())
    tokenizer.half()
    images, weights = pictures(pipeline), tokenizer.state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    tokenizer.float()
    assert torch.equal(images, pictures(pipeline)) and images.std() > 0.01
    tokenizer.half().register_to_config(force_upcast=False)
    with pytest.raises(ValueError, match="images of the tokenizer, AutoencoderKL in torch.float16, are not finite"):
        pictures(pipeline)
