import json
import math
import re
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode
from vector_quantize_pytorch import FSP, FSQ

from hf_ifsq import FiniteScalarQuantizer
from hf_ifsq.models.quantization import BOUNDS


GOLDENS = Path(__file__).parents[1] / "fixtures" / "quantizer"
GOLDEN_CASES = json.loads((GOLDENS / "config.json").read_text())["cases"]
GOLDEN_TENSORS = load_file(GOLDENS / "goldens.safetensors")
ALPHAS = {"scale_sigmoid_16": 1.6, "scale_sigmoid_20": 2.0}

OPTIONS = [
    *({"bound": bound} for bound in BOUNDS),
    {"equal_bins": True},
    {"bound": "normal", "equal_bins": True, "noise_prob": 0.5},
]

# 7 * 7 * 73 * 127 * 337 * 92737 * 649657 == 2**63 - 1
LARGEST_CODEBOOK = [7, 7, 73, 127, 337, 92737, 649657]


def bounded_reference(z, level, alpha):
    """Bounded value before rounding, in float64."""
    half = (level - 1) / 2
    if level % 2:
        return half * (2 / (1 + math.exp(-alpha * z)) - 1)
    half *= 1 + 1e-3
    shift = 2 * math.atanh(0.5 / half) / alpha
    return half * (2 / (1 + math.exp(-alpha * (z + shift))) - 1) - 0.5


def digits_of(indices, levels):
    """Digits of each index by Python's unlimited integers, `(d, *shape)`."""
    basis = [math.prod(levels[:channel]) for channel in range(len(levels))]
    return np.array(
        [[index // step % level for index in indices] for step, level in zip(basis, levels, strict=True)], dtype=object
    )


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case["key"])
def test_goldens_of_the_official_code(case):
    golden = {name: GOLDEN_TENSORS[f"{case['key']}.{name}"] for name in ("z", "out", "global_index", "w", "grad_z")}
    quantizer = FiniteScalarQuantizer(case["levels"], alpha=ALPHAS[case["act_fun"]])
    z = golden["z"].requires_grad_()
    codes, indices = quantizer(z)
    (codes * golden["w"]).sum().backward()
    torch.testing.assert_close(codes, golden["out"], atol=1e-6, rtol=0)
    assert torch.equal(indices, golden["global_index"])
    torch.testing.assert_close(z.grad, golden["grad_z"], atol=1e-6, rtol=0)
    assert torch.equal(quantizer.codes_to_indices(golden["out"]), golden["global_index"])
    torch.testing.assert_close(quantizer.indices_to_codes(golden["global_index"]), golden["out"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [1.6, 2.0])
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_and_their_inverses(name, alpha):
    bound, z = BOUNDS[name], torch.linspace(-3, 3, 61, dtype=torch.float64)
    values = bound.function(z, alpha)
    assert values.abs().max() < 1 and (values.diff() > 0).all()
    torch.testing.assert_close(values, -values.flip(0))
    assert [bound.inverse(value, alpha) for value in values.tolist()] == pytest.approx(z.tolist(), abs=1e-9)
    assert bound.function(torch.tensor([-200.0, 200.0]), alpha).abs().max() <= 1


@pytest.mark.parametrize("alpha", [1.6, 2.0, 0.7])
@pytest.mark.parametrize("levels", [*([level] for level in range(2, 10)), [8, 5, 2], [3, 9, 7], [4, 6]])
def test_formulas_by_brute_force(levels, alpha):
    grid = [step / 50 + 0.001 for step in range(-300, 300)]
    # Channel i sees the grid turned by i * 100 places.
    z = torch.tensor([grid[100 * channel :] + grid[: 100 * channel] for channel in range(len(levels))])
    codes, indices = FiniteScalarQuantizer(levels, alpha)(z[None])
    skipped = 0
    for place in range(len(grid)):
        bounded = [bounded_reference(z[i, place].item(), level, alpha) for i, level in enumerate(levels)]
        if any(abs(value - math.floor(value) - 0.5) < 1e-4 for value in bounded):
            skipped += 1
            continue
        digits = [round(value) + level // 2 for value, level in zip(bounded, levels, strict=True)]
        assert all(0 <= digit < level for digit, level in zip(digits, levels, strict=True))
        index = sum(digit * math.prod(levels[:channel]) for channel, digit in enumerate(digits))
        assert indices[0, place].item() == index
        expected = [(digit - level // 2) / (level // 2) for digit, level in zip(digits, levels, strict=True)]
        assert codes[0, :, place].tolist() == pytest.approx(expected, abs=1e-6)
    assert skipped <= 0.02 * len(grid)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [7, 5, 5, 5, 5]])
def test_alpha_2_is_fsq(levels):
    z = torch.randn(1, len(levels), 100_000)
    codes, indices = FiniteScalarQuantizer(levels, alpha=2.0)(z)
    fsq_codes, fsq_indices = FSQ(levels, channel_first=True)(z)
    sizes = np.array(levels, dtype=np.float64)[:, None]
    half = np.where(sizes % 2, 1, 1 + 1e-3) * (sizes - 1) / 2
    offset = np.where(sizes % 2, 0.0, 0.5)
    bounded = half * np.tanh(z[0].double().numpy() + np.arctanh(offset / half)) - offset
    clear = torch.from_numpy(np.abs(bounded - np.floor(bounded) - 0.5) > 0.005)
    assert clear.double().mean() > 0.98
    torch.testing.assert_close(codes[0][clear], fsq_codes[0][clear], atol=1e-6, rtol=0)
    assert torch.equal(indices[0][clear.all(0)], fsq_indices[0][clear.all(0)].long())


@pytest.mark.parametrize("alpha", [1.6, 2.0])
@pytest.mark.parametrize("bound", ["sigmoid", "normal"])
@pytest.mark.parametrize("levels", [[2], [3], [4], [17], [8, 5, 2], [6, 6]])
def test_equal_bins_by_brute_force(levels, bound, alpha):
    alpha = alpha if bound == "sigmoid" else 1.6
    z = (torch.linspace(-4, 4, 6001) + 1e-4).repeat(len(levels), 1)
    codes, indices = FiniteScalarQuantizer(levels, alpha, bound=bound, equal_bins=True)(z[None])
    z = z[0].double()
    share = torch.sigmoid(alpha * z) if bound == "sigmoid" else torch.special.ndtr(z)
    remainder = indices[0]
    for channel, level in enumerate(levels):
        # Values within rounding of an edge may fall on either side.
        clear = (share * level - (share * level).round()).abs() > 1e-5
        digits = remainder % level
        assert clear.double().mean() > 0.98
        assert torch.equal(digits[clear], (share * level).floor().long().clamp(max=level - 1)[clear])
        torch.testing.assert_close(codes[0, channel], (2 * digits + 1 - level).float() / level)
        assert digits.unique().numel() == level
        remainder = remainder // level


@pytest.mark.parametrize("level", [2, 3, 4, 8, 9])
def test_rounding_with_the_normal_bound(level):
    z = torch.linspace(-5, 5, 4001)[1:]
    bounded = 2 * torch.special.ndtr(z.double()) - 1
    if level % 2 == 0:
        half = (level - 1) / 2 * (1 + 1e-3)
        shift = torch.special.ndtri(torch.tensor((0.5 / half + 1) / 2, dtype=torch.float64))
        bounded = (half * (2 * torch.special.ndtr(z.double() + shift) - 1) - 0.5) / (level // 2)
    else:
        half = level // 2
    scaled = bounded * (level // 2)
    clear = (scaled - scaled.floor() - 0.5).abs() > 1e-4
    codes, indices = FiniteScalarQuantizer([level], bound="normal")(z[None, None])
    assert clear.double().mean() > 0.98
    assert torch.equal(indices[0][clear], scaled.round().long()[clear] + level // 2)
    torch.testing.assert_close(codes[0, 0], (indices[0] - level // 2).float() / (level // 2))


def fsp_of(quantizer):
    """The same by another library, whose codes have the variance 1 where ours are in (-1, 1)."""
    rate = 1 - quantizer.noise_prob
    fsp = FSP(quantizer.levels, act_name="normal", quantize_rate=rate, vector_norm="none", channel_first=True)
    return fsp.train(quantizer.training)


@pytest.mark.parametrize("levels", [[5, 5, 5], [8, 5, 2], [2] * 8, [17] * 4])
def test_fsp_in_evaluation_mode(levels):
    quantizer = FiniteScalarQuantizer(levels, bound="normal", equal_bins=True, noise_prob=1.0).eval()
    z = (torch.randn(4, len(levels), 20, 20) * 1.5).requires_grad_()
    codes, indices = quantizer(z)
    fsp_codes, fsp_indices, *_ = fsp_of(quantizer)(z)
    assert torch.equal(indices, fsp_indices.long())
    scale = 2 * 0.28867513459481287
    torch.testing.assert_close(codes, fsp_codes * scale, atol=1e-6, rtol=0)
    weight = torch.randn_like(codes)
    (gradient,) = torch.autograd.grad((codes * weight).sum(), z)
    (fsp_gradient,) = torch.autograd.grad((fsp_codes * weight).sum() * scale, z)
    torch.testing.assert_close(gradient, fsp_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("noise_prob", [0.25, 1.0])
@pytest.mark.parametrize("levels", [[5, 5, 5], [8, 5, 2]])
def test_fsp_in_training_draws_the_same_noise(levels, noise_prob):
    quantizer = FiniteScalarQuantizer(levels, bound="normal", equal_bins=True, noise_prob=noise_prob)
    # Without spatial dimensions both draw in the same order.
    z = (torch.randn(5000, len(levels)) * 1.5).requires_grad_()
    results = []
    for module in (quantizer, fsp_of(quantizer)):
        torch.manual_seed(7)
        codes, indices, *_ = module(z)
        (gradient,) = torch.autograd.grad(codes.square().sum(), z)
        results.append((codes, indices.long(), gradient))
    (codes, indices, gradient), (fsp_codes, fsp_indices, fsp_gradient) = results
    scale = 2 * 0.28867513459481287
    assert torch.equal(indices, fsp_indices)
    torch.testing.assert_close(codes, fsp_codes * scale, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, fsp_gradient * scale**2, atol=1e-5, rtol=1e-5)


def test_noise_stays_within_the_bounds_and_half_a_bin():
    levels, noise_prob = [9, 4], 0.7
    quantizer = FiniteScalarQuantizer(levels, equal_bins=True, noise_prob=noise_prob)
    z = torch.cat([torch.randn(1, 2, 40_000) * 2, torch.full((1, 2, 100), 60.0)], dim=-1)
    codes, indices = quantizer(z)
    bounded = quantizer.bounded(z)
    quantizer.eval()
    evaluated, evaluated_indices = quantizer(z)
    assert torch.equal(indices, evaluated_indices) and torch.equal(quantizer.codes_to_indices(evaluated), indices)
    quantized = codes == evaluated
    # A proposal out of (-1, 1) leaves the value as it is.
    assert codes.abs().max() <= 1
    for channel, level in enumerate(levels):
        assert quantized[0, channel].float().mean() == pytest.approx(1 - noise_prob, abs=0.01)
        noise = (codes - bounded)[0, channel][~quantized[0, channel]]
        assert noise.abs().max() == pytest.approx(1 / level, rel=1e-3)
        # Uniform: refused proposals are those of the values near the ends alone.
        inner = bounded[0, channel][~quantized[0, channel]].abs() < 1 - 1 / level
        assert noise[inner].std() == pytest.approx(1 / level / math.sqrt(3), rel=0.02)
        assert noise[inner].mean() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("alpha, percent", [(2.0, 99.993), (1.6, 99.9999)])
def test_two_levels_of_a_gaussian(alpha, percent):
    # FSQ's own formula: round(half * b - 1/2) is 0, not -1, for b = 2 * sigmoid(alpha * (z + shift)) - 1 > 0.
    half = (2 - 1) / 2 * (1 + 1e-3)
    shift = 2 * math.atanh(0.5 / half) / alpha
    share = 0.5 * math.erfc(-shift / math.sqrt(2))
    assert 100 * share == pytest.approx(percent, abs=5e-4)
    z = torch.randn(1, 1, 1_000_000)
    assert FiniteScalarQuantizer([2], alpha)(z)[1].double().mean() == pytest.approx(share, abs=5e-5)
    assert FiniteScalarQuantizer([2], alpha, equal_bins=True)(z)[1].double().mean() == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("levels", [[17, 17], [8, 5, 2]])
def test_compiled_exported_and_faked(levels, options):
    quantizer, z = FiniteScalarQuantizer(levels, **options), torch.randn(2, len(levels), 4, 4)
    torch.compiler.reset()
    for training in (True, False):
        quantizer.train(training)
        with FakeTensorMode() as mode:
            codes, indices = quantizer(mode.from_tensor(z).requires_grad_())
            codes.sum().backward()
        assert codes.shape == z.shape and indices.shape == (2, 4, 4)
        torch.manual_seed(3)
        codes, indices = quantizer(z)
        compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        compiled_codes, compiled_indices = compiled(z)
        assert torch.equal(compiled_indices, indices)
        torch.testing.assert_close(compiled_codes, codes)
        gradients = []
        for module in (quantizer, compiled):
            torch.manual_seed(3)
            leaf = z.clone().requires_grad_()
            module(leaf)[0].square().sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
    exported = torch.export.export(quantizer, (z,)).module()
    assert torch.equal(exported(z)[1], indices) and torch.equal(exported(z)[0], codes)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("levels", [[2], [2, 2, 2], [17, 17], [8, 5, 5, 5], [3, 4, 5, 6], [255, 256]])
def test_round_trip_of_every_index(levels, options):
    quantizer = FiniteScalarQuantizer(levels, **options)
    assert quantizer.codebook_size == math.prod(levels)
    indices = torch.arange(quantizer.codebook_size)[None]
    codes = quantizer.indices_to_codes(indices)
    assert codes.min() >= -1 and codes.max() <= 1
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    # The first channel is the least significant digit.
    sizes = torch.tensor(levels)[:, None]
    if quantizer.equal_bins:
        digits = ((codes[0].double() * sizes + sizes - 1) / 2).round().long().numpy()
    else:
        digits = ((codes[0].double() * (sizes // 2)).round().long() + sizes // 2).numpy()
    assert np.array_equal(np.ravel_multi_index(digits, levels, order="F"), indices[0].numpy())


@pytest.mark.parametrize("levels", [[17] * 8, [2] * 62, LARGEST_CODEBOOK], ids=["17**8", "2**62", "2**63-1"])
def test_round_trip_of_extreme_indices(levels):
    quantizer, size = FiniteScalarQuantizer(levels), math.prod(levels)
    indices = [0, 1, levels[0], 2**24 + 1, 2**53 % size + 1, size // 2, size // 3, size - 2, size - 1]
    codes = quantizer.indices_to_codes(torch.tensor([indices]))
    half = np.array(levels)[:, None] // 2
    expected = (digits_of(indices, levels) - half) / half
    np.testing.assert_allclose(codes[0].numpy(), expected.astype(np.float32), atol=1e-7)
    assert quantizer.codes_to_indices(codes)[0].tolist() == indices


@pytest.mark.parametrize("level", [901, 1001, 1024, 2000])
def test_many_levels_stay_in_range(level):
    z = torch.cat([torch.linspace(-12, 12, 400_001), torch.tensor([-100.0, 100.0, -torch.inf, torch.inf])])
    codes, indices = FiniteScalarQuantizer([level])(z[None, None])
    assert torch.equal(indices.unique(), torch.arange(level))
    assert indices[0, -4:].tolist() == [0, level - 1, 0, level - 1]
    assert codes.min() == -1 and codes.max() <= 1


@pytest.mark.parametrize("level", [2**16, 2**20 - 1, 2**20])
def test_huge_levels_stay_in_range_and_go_round(level):
    quantizer = FiniteScalarQuantizer([level])
    assert quantizer(torch.tensor([[[-100.0, 100.0]]]))[1].tolist() == [[0, level - 1]]
    indices = torch.tensor([[0, 1, level // 3, level // 2, level - 2, level - 1]])
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)


@pytest.mark.parametrize("levels", [[17, 17, 17, 17], [8, 5, 1024]])
def test_low_precision_does_not_change_indices(levels):
    z = torch.randn(4, len(levels), 16, 16, dtype=torch.bfloat16) * 2
    codes, indices = FiniteScalarQuantizer(levels)(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_codes, autocast_indices = FiniteScalarQuantizer(levels)(z.float())
    cast_codes, cast_indices = FiniteScalarQuantizer(levels).to(torch.bfloat16)(z)
    assert indices.max() > 256
    assert torch.equal(autocast_indices, indices) and torch.equal(cast_indices, indices)
    assert autocast_codes.dtype == torch.float32 and torch.equal(autocast_codes, codes)
    assert cast_codes.dtype == torch.bfloat16 and torch.equal(cast_codes, codes.bfloat16())


@pytest.mark.parametrize("spatial", [(), (7,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("levels", [[5, 4, 3], [5, 7, 9]])
def test_spatial_dimensions(levels, spatial):
    quantizer = FiniteScalarQuantizer(levels)
    z = torch.randn(2, 3, *spatial)
    codes, indices = quantizer(z)
    assert codes.shape == z.shape and indices.shape == (2, *spatial) and indices.dtype == torch.int64
    # Each vector is quantized for itself.
    flat_codes, flat_indices = quantizer(z.movedim(1, -1).reshape(-1, 3))
    assert torch.equal(indices.flatten(), flat_indices)
    assert torch.equal(codes.movedim(1, -1).reshape(-1, 3), flat_codes)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    torch.testing.assert_close(quantizer.indices_to_codes(indices), codes, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [2, 3, 4, 17])
@pytest.mark.parametrize("equal_bins", [False, True])
def test_nearest_codes_by_brute_force(level, dtype, equal_bins):
    quantizer = FiniteScalarQuantizer([level], equal_bins=equal_bins)
    values = torch.linspace(-3, 3, 1002).to(dtype).view(2, 1, -1)
    nearest = quantizer.nearest_codes(values)
    assert nearest.dtype == dtype
    all_codes = quantizer.indices_to_codes(torch.arange(level)[None]).flatten()
    distances = (values.flatten()[:, None].float() - all_codes).abs()
    chosen = (nearest.flatten()[:, None] == all_codes.to(dtype)).float()
    assert torch.equal(chosen.sum(1), torch.ones(1002))
    torch.testing.assert_close((chosen * distances).sum(1), distances.amin(1), atol=1e-6, rtol=0)
    assert quantizer.codes_to_indices(nearest).unique().numel() == level


def test_input_is_left_alone_and_layout_does_not_matter():
    z = torch.randn(2, 4, 6, 5)
    quantizer, before = FiniteScalarQuantizer([17] * 4), z.clone()
    codes, indices = quantizer(z)
    assert torch.equal(z, before)
    strided_codes, strided_indices = quantizer(z.to(memory_format=torch.channels_last))
    assert torch.equal(strided_codes, codes) and torch.equal(strided_indices, indices)


def test_no_table_of_the_codebook():
    quantizer = FiniteScalarQuantizer([17] * 8)
    assert [*quantizer.parameters(), *quantizer.buffers()] == [] and quantizer.state_dict() == {}


@pytest.mark.parametrize("levels", [[], [5, 1], [0], [-3], [5.0, 5], ["5"], [True, 3], [2**20 + 1]])
def test_bad_levels(levels):
    with pytest.raises(ValueError, match=re.escape("`levels`") + ".*" + re.escape(f"got {levels}")):
        FiniteScalarQuantizer(levels)


@pytest.mark.parametrize("levels", [[2] * 63, [17] * 16])
def test_too_large_codebook(levels):
    with pytest.raises(ValueError, match=re.escape(f"`levels` {levels}") + f".*{math.prod(levels)}"):
        FiniteScalarQuantizer(levels)


@pytest.mark.parametrize("alpha", [0, -1.6, math.nan, math.inf])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=f"`alpha`.*got {alpha}"):
        FiniteScalarQuantizer([5], alpha=alpha)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bound": "tanh"}, "`bound` must be one of .*'sigmoid'.*, got 'tanh'"),
        ({"bound": "normal", "alpha": 2.0}, "`alpha`.*'sigmoid' alone, got 2.0 with 'normal'"),
        ({"equal_bins": True, "noise_prob": 1.5}, "`noise_prob`.*got 1.5"),
        ({"equal_bins": True, "noise_prob": -0.1}, "`noise_prob`.*got -0.1"),
        ({"noise_prob": 0.5}, "`noise_prob`.*`equal_bins`, got 0.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FiniteScalarQuantizer([5], **options)


@pytest.mark.parametrize("shape", [(2, 4, 8), (3,), (2, 8, 3)])
def test_wrong_channels(shape):
    quantizer, message = FiniteScalarQuantizer([5, 4, 3]), re.escape(f"got {shape}")
    with pytest.raises(ValueError, match=f"`z`.*{message}"):
        quantizer(torch.zeros(shape))
    with pytest.raises(ValueError, match=f"`codes`.*{message}"):
        quantizer.codes_to_indices(torch.zeros(shape))
    with pytest.raises(ValueError, match=f"`values`.*{message}"):
        quantizer.nearest_codes(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_indices_must_be_integers(dtype):
    with pytest.raises(ValueError, match=f"`indices`.*{dtype}"):
        FiniteScalarQuantizer([5]).indices_to_codes(torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("levels", [[5, 4, 3], LARGEST_CODEBOOK])
@pytest.mark.parametrize("too_large", [False, True])
def test_indices_outside_the_codebook(levels, too_large):
    size = math.prod(levels)
    wrong = size if too_large else -1
    span = re.escape(f"[{min(wrong, 0)}, {max(wrong, 0)}]")
    with pytest.raises(ValueError, match=rf"`indices`.*\[0, {size}\).*{span}"):
        FiniteScalarQuantizer(levels).indices_to_codes(torch.tensor([[0, wrong]]))


@pytest.mark.parametrize("levels, wrong", [([5, 5], 1.5), ([5, 5], -1.5), ([4, 4], 1.0), ([5, 5], math.nan)])
def test_codes_outside_the_codebook(levels, wrong):
    with pytest.raises(ValueError, match=f"`codes`.*{re.escape(str(levels))}.*{wrong}"):
        FiniteScalarQuantizer(levels).codes_to_indices(torch.tensor([[0.0, wrong]]))


def test_integers_are_no_latent():
    with pytest.raises(ValueError, match="`z` must be floating-point.*int64"):
        FiniteScalarQuantizer([5, 5])(torch.ones(1, 2, 3, dtype=torch.long))


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine make times meaningless."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.slow
def test_at_most_half_the_time_of_fsq(one_thread):
    z = torch.randn(64, 4, 32, 32, requires_grad=True)
    modules = {"ours": FiniteScalarQuantizer([17] * 4), "fsq": FSQ([17] * 4, channel_first=True)}
    seconds = {name: [] for name in modules}
    for _ in range(60):
        for name, module in modules.items():
            start = time.perf_counter()
            module(z)[0].sum().backward()
            seconds[name].append(time.perf_counter() - start)
    assert statistics.median(seconds["ours"]) <= 0.5 * statistics.median(seconds["fsq"])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64], ids=str
)
def test_indices_of_any_integer_type(dtype):
    quantizer, indices = FiniteScalarQuantizer([5, 4, 3]), torch.arange(60).view(2, 30)
    assert torch.equal(quantizer.indices_to_codes(indices.to(dtype)), quantizer.indices_to_codes(indices))
    with pytest.raises(ValueError, match=r"`indices` must be in \[0, 60\).*, 100\]"):
        quantizer.indices_to_codes((indices + 41).to(dtype))


@pytest.mark.parametrize(
    "name, values",
    {
        "levels": [None, 5, "55", {5: 5}, [[5]], torch.tensor([5, 5])],
        "alpha": [None, "1.6", True, 10**400, [1.6]],
        "bound": [None, 3, ["sigmoid"], torch.tensor([1, 2])],
        "equal_bins": [None, 1, "yes"],
        "noise_prob": [None, "a", math.nan, True],
    }.items(),
)
def test_options_of_wrong_types(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}`"):
            FiniteScalarQuantizer(**{"levels": [5, 5], name: value})


@pytest.mark.parametrize("value", [None, 3, [[0.0, 0.0]], "a"], ids=str)
def test_tensors_of_wrong_types(value):
    quantizer = FiniteScalarQuantizer([5, 5])
    for name, call in {
        "z": quantizer,
        "values": quantizer.nearest_codes,
        "codes": quantizer.codes_to_indices,
        "indices": quantizer.indices_to_codes,
    }.items():
        with pytest.raises(TypeError, match=f"`{name}` must be a `torch.Tensor`"):
            call(value)
    with pytest.raises(ValueError, match="`dtype`"):
        quantizer.indices_to_codes(torch.tensor([3]), dtype=torch.int64)
