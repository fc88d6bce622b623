import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from hf_ifsq.models.generation_ifsq_ar import sample_from_logits


FACTORS = {1: [12], 2: [4, 3], 4: [2, 3, 2, 4]}
every_factorization = pytest.mark.parametrize(
    "vocab_sizes", FACTORS.values(), ids=lambda sizes: f"{len(sizes)}-factor"
)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def invert(probabilities, uniform):
    """The first token at which the cumulative probability exceeds `uniform`."""
    cumulative = 0.0
    for token, probability in enumerate(probabilities):
        cumulative += probability
        if uniform < cumulative:
            return token
    raise AssertionError("on the edge of rounding: choose another seed")


def generate_by_brute_force(model, class_labels, guidance_scale=1.0, uniforms=None):
    """One full forward pass over growing prefixes for each factor of each token; greedy without uniforms."""
    config = model.config
    indices = torch.zeros(len(class_labels), config.num_tokens, dtype=torch.long)
    null_labels = torch.full_like(class_labels, config.num_classes)

    def logits_at(labels, place, factor):
        logits = model(labels, indices[:, : place + 1]).logits
        return logits.split(config.vocab_sizes, dim=-1)[factor][:, place]

    with torch.no_grad():
        for place in range(config.num_tokens):
            for factor in range(len(config.vocab_sizes)):
                logits = logits_at(class_labels, place, factor)
                if guidance_scale > 1:
                    null_logits = logits_at(null_labels, place, factor)
                    logits = null_logits + guidance_scale * (logits - null_logits)
                if uniforms is None:
                    choice = logits.argmax(-1)
                else:
                    rows = zip(logits.double().softmax(-1).tolist(), uniforms[:, place, factor].tolist(), strict=True)
                    choice = torch.tensor([invert(*row) for row in rows])
                indices[:, place] += choice * math.prod(config.vocab_sizes[:factor])
    return indices


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@every_factorization
def test_greedy_equals_brute_force(make_ar, vocab_sizes, guidance_scale):
    model, class_labels = make_ar(vocab_sizes=vocab_sizes), torch.tensor([3, 0, 5])
    generated = model.generate(class_labels, guidance_scale=guidance_scale, do_sample=False)
    assert generated.dtype == torch.int64
    assert generated.unique().numel() > 3
    assert torch.equal(generated, generate_by_brute_force(model, class_labels, guidance_scale))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@every_factorization
def test_sampling_equals_brute_force(make_ar, vocab_sizes, guidance_scale):
    model, class_labels = make_ar(vocab_sizes=vocab_sizes), torch.tensor([3, 0, 5])
    uniforms = torch.stack([torch.rand(12, len(vocab_sizes), generator=generator) for generator in seeded(1, 2, 3)])
    expected = generate_by_brute_force(model, class_labels, guidance_scale, uniforms)
    generated = model.generate(class_labels, guidance_scale=guidance_scale, generator=seeded(1, 2, 3))
    assert torch.equal(generated, expected)


def test_sample_from_logits_inverts_the_cumulative_distribution():
    logits, uniforms = torch.randn(2000, 50) * 3, torch.rand(2000)
    samples = sample_from_logits(logits, uniforms)
    assert samples.shape == (2000,) and samples.dtype == torch.int64
    probabilities = np.exp(logits.double().numpy())
    cumulative = probabilities.cumsum(1) / probabilities.sum(1, keepdims=True)
    distance = np.abs(cumulative - uniforms.double().numpy()[:, None]).min(1)
    clear = distance > 1e-6
    assert clear.mean() > 0.99
    expected = (cumulative <= uniforms.double().numpy()[:, None]).sum(1)
    assert np.array_equal(samples.numpy()[clear], expected[clear])


@pytest.mark.parametrize("uniform", [0.0, 2**-24, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("size", [5, 289, 83521])
def test_excluded_tokens_are_never_drawn(uniform, size):
    logits = torch.randn(20, size) * 5
    logits[:, 0] = logits[:, -1] = -torch.inf
    # Also excluded runs at both ends.
    logits[10:, : size // 3] = logits[10:, size - size // 3 :] = -torch.inf
    samples = sample_from_logits(logits, torch.full((20,), uniform))
    assert torch.isfinite(logits.gather(1, samples[:, None])).all()


def test_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, 0.0, -torch.inf]] * 2)
    assert sample_from_logits(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 3]


@pytest.mark.parametrize("vocab_sizes", [[12], [4, 3]], ids=["1-factor", "2-factor"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 2.0, "guidance_scale": 1.5},
        {"top_k": 2},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.8},
    ],
    ids=str,
)
def test_frequencies(make_ar, vocab_sizes, arguments):
    model = make_ar(vocab_sizes=vocab_sizes, grid_size=[1, 1])
    for head in model.lm_heads:
        head.weight.data *= 0.5

    def probabilities(token, factor):
        """Of one factor, given the lower factors of `token`."""
        labels = torch.tensor([2, 5])
        logits = model(labels, torch.full((2, 1), token)).logits
        logits = logits.split(vocab_sizes, dim=-1)[factor][:, 0].detach().double().numpy()
        scores = logits[1] + arguments.get("guidance_scale", 1.0) * (logits[0] - logits[1])
        weights = np.exp(scores / arguments.get("temperature", 1.0))
        kept = np.argsort(-weights)[: arguments.get("top_k", len(weights))]
        weights = np.where(np.isin(np.arange(len(weights)), kept), weights, 0)
        weights /= weights.sum()
        # The fewest most likely values that reach top_p together.
        mass = 0.0
        for value in np.argsort(-weights):
            weights[value], mass = weights[value] * (mass < arguments.get("top_p", 1.0)), mass + weights[value]
        return weights / weights.sum()

    expected = []
    for token in range(12):
        digits = [token % vocab_sizes[0], token // vocab_sizes[0]]
        expected.append(math.prod(probabilities(token, i)[digits[i]] for i in range(len(vocab_sizes))))
    expected = np.array(expected)
    assert expected.sum() == pytest.approx(1)
    draws = model.generate(torch.full((200_000,), 2), generator=seeded(0)[0], **arguments)
    counts = np.bincount(draws.flatten().numpy(), minlength=12)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert possible.sum() > 1
    assert chisquare(counts[possible], 200_000 * expected[possible]).pvalue > 1e-3


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 3.0, "temperature": 0.8, "top_k": 5, "top_p": 0.9}])
@every_factorization
def test_images_do_not_depend_on_their_neighbours(make_ar, vocab_sizes, arguments):
    model, class_labels = make_ar(vocab_sizes=vocab_sizes), torch.tensor([3, 0, 4, 3])
    together = model.generate(class_labels, generator=seeded(5, 6, 7, 8), **arguments)
    assert not torch.equal(together[0], together[3])
    for row in range(4):
        alone = model.generate(class_labels[row : row + 1], generator=seeded(5 + row), **arguments)
        assert torch.equal(alone[0], together[row])
        # A single generator for one image is used as it is.
        plain = model.generate(class_labels[row : row + 1], generator=seeded(5 + row)[0], **arguments)
        assert torch.equal(plain, alone)
    reversed_batch = model.generate(class_labels.flip(0), generator=seeded(8, 7, 6, 5), **arguments)
    assert torch.equal(reversed_batch.flip(0), together)


def test_one_generator_for_many_images(make_ar):
    model, class_labels = make_ar(), torch.tensor([1, 1, 1])
    images = model.generate(class_labels, generator=seeded(3)[0])
    assert torch.equal(images, model.generate(class_labels, generator=seeded(3)[0]))
    assert len({tuple(image) for image in images.tolist()}) == 3
    torch.manual_seed(11)
    unseeded = model.generate(class_labels)
    assert not torch.equal(unseeded, model.generate(class_labels))
    torch.manual_seed(11)
    assert torch.equal(unseeded, model.generate(class_labels))


def test_greedy_draws_nothing_and_ignores_the_sampling_options(make_ar):
    model, class_labels, generator = make_ar(), torch.tensor([1, 2]), seeded(3)[0]
    before, global_before = generator.get_state(), torch.get_rng_state()
    greedy = model.generate(class_labels, do_sample=False, generator=generator, temperature=5.0, top_k=1)
    assert torch.equal(generator.get_state(), before) and torch.equal(torch.get_rng_state(), global_before)
    assert torch.equal(greedy, model.generate(class_labels, top_k=1))


@pytest.mark.parametrize("guidance_scale, rows", [(1.0, 2), (1.5, 4)])
@every_factorization
def test_one_call_a_step_and_unconditional_rows_with_guidance_only(make_ar, vocab_sizes, guidance_scale, rows):
    model, shapes = make_ar(vocab_sizes=vocab_sizes), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    model.generate(torch.tensor([1, 2]), guidance_scale=guidance_scale)
    assert shapes == [(rows, 1, 32)] * 12


def test_guidance_moves_away_from_the_null_class(make_ar):
    model = make_ar(vocab_sizes=[4, 3])
    null = model.generate(torch.tensor([5]), do_sample=False)
    # The null class guided by itself stays where it is.
    assert torch.equal(null, model.generate(torch.tensor([5]), guidance_scale=4.0, do_sample=False))
    assert not torch.equal(null, model.generate(torch.tensor([1]), guidance_scale=4.0, do_sample=False))


def test_callback(make_ar):
    model, calls = make_ar(), []
    generated = model.generate(
        torch.tensor([1, 2]), do_sample=False, callback=lambda step, indices: calls.append((step, indices.clone()))
    )
    assert [step for step, _ in calls] == list(range(1, 13))
    assert all(torch.equal(indices[:, :step], generated[:, :step]) for step, indices in calls)


def test_no_gradients_and_no_cache_left_behind(make_ar):
    model, class_labels = make_ar(), torch.tensor([1, 2])
    generated = model.generate(class_labels, do_sample=False)
    assert not generated.requires_grad
    assert torch.equal(model.generate(class_labels, do_sample=False), generated)
    assert model(class_labels, generated).logits.requires_grad


@pytest.mark.parametrize("temperature", [2, 1, 1.0])
def test_temperature_may_be_an_integer(make_ar, temperature):
    model, class_labels = make_ar(), torch.tensor([1, 2])
    expected = model.generate(class_labels, temperature=float(temperature), generator=seeded(1, 2))
    assert torch.equal(model.generate(class_labels, temperature=temperature, generator=seeded(1, 2)), expected)


@pytest.mark.parametrize(
    "name, value",
    [
        ("guidance_scale", 0.5),
        ("guidance_scale", -1.0),
        ("guidance_scale", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("top_k", 0),
        ("top_p", 1.5),
        ("top_p", -0.1),
    ],
)
def test_arguments_out_of_range(make_ar, name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        make_ar().generate(torch.tensor([1]), **{name: value})


def test_guidance_needs_a_null_class(make_ar):
    model = make_ar(class_dropout_prob=0.0)
    assert model.generate(torch.tensor([4])).shape == (1, 12)
    with pytest.raises(ValueError, match="`guidance_scale` is 2.0.*no null class"):
        model.generate(torch.tensor([4]), guidance_scale=2.0)


@pytest.mark.parametrize("labels", [[6], [0, -1]])
def test_class_labels_out_of_range(make_ar, labels):
    with pytest.raises(ValueError, match=rf"`class_labels`.*\[0, 5\].*\[{', '.join(map(str, labels))}\]"):
        make_ar().generate(torch.tensor(labels))


@pytest.mark.parametrize("labels", [torch.tensor([1.0]), torch.tensor(1), torch.tensor([[1]])])
def test_class_labels_of_wrong_shape_or_dtype(make_ar, labels):
    with pytest.raises(ValueError, match=f"`class_labels`.*{labels.dtype}"):
        make_ar().generate(labels)


def test_wrong_number_of_generators(make_ar):
    with pytest.raises(ValueError, match="`generator`.*2 images.*list of 3"):
        make_ar().generate(torch.tensor([1, 2]), generator=seeded(1, 2, 3))


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("vocab_sizes", [[12], [4, 3]], ids=["1-factor", "2-factor"])
@pytest.mark.parametrize("name", ["embed_classes", "embed_tokens.0", "layers.1.mlp", "norm", "lm_heads.0"])
def test_weights_that_are_not_finite(make_ar, name, vocab_sizes, do_sample):
    model = make_ar(vocab_sizes=vocab_sizes)
    broken = [
        weight for full_name, weight in model.named_parameters() if full_name.removeprefix("model.").startswith(name)
    ]
    for weight in broken:
        weight.data.fill_(torch.nan)
    assert broken
    with pytest.raises(ValueError, match="not finite.*weights hold NaN"):
        model.generate(torch.tensor([1]), do_sample=do_sample)


def test_training_mode(make_ar):
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        make_ar().train().generate(torch.tensor([1]))


def test_no_class_labels(make_ar):
    with pytest.raises(ValueError, match=r"`class_labels`.*got torch.int64 of shape \(0,\)"):
        make_ar().generate(torch.zeros(0, dtype=torch.long))
