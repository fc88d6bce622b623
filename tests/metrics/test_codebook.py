import collections
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch

from hf_ifsq import FiniteScalarQuantizer
from hf_ifsq.metrics.codebook import CodebookUsage, bounded_values


def brute_force_entropy(values):
    shares = [count / len(values) for count in collections.Counter(values).values()]
    return -sum(share * math.log2(share) for share in shares)


@pytest.mark.parametrize("levels", [[5, 4, 3], [2], [17, 17, 17, 17]])
def test_against_brute_force(levels):
    size = math.prod(levels)
    tokens = np.random.default_rng(0).binomial(size - 1, 0.3, size=(7, 4, 5))
    usage = CodebookUsage(levels=levels)
    usage.update(torch.from_numpy(tokens[:3]))
    usage.update(tokens[3:].astype(np.int32))
    result = usage.compute()
    flat = tokens.flatten().tolist()
    assert result["num_tokens"] == 140 and result["num_codes_used"] == len(set(flat))
    assert result["usage"] == pytest.approx(len(set(flat)) / size)
    assert result["entropy_bits"] == pytest.approx(brute_force_entropy(flat), abs=1e-12)
    assert result["perplexity"] == pytest.approx(2 ** brute_force_entropy(flat))
    assert usage.counts.tolist() == sorted(collections.Counter(flat).values(), reverse=True)
    codes = FiniteScalarQuantizer(levels).indices_to_codes(torch.from_numpy(tokens))
    for dimension, level in enumerate(levels):
        digits = (codes[:, dimension] * (level // 2)).round().long().flatten() + level // 2
        histogram = [digits.tolist().count(digit) for digit in range(level)]
        assert result["dimension_histograms"][dimension] == histogram
        entropy = brute_force_entropy(digits.tolist())
        assert result["dimension_entropies_bits"][dimension] == pytest.approx(entropy, abs=1e-12)
    assert "dimension_ks_distances" not in result


def test_extremes():
    usage = CodebookUsage(8)
    usage.update(torch.zeros(10, dtype=torch.long))
    assert usage.compute() == {
        "num_tokens": 10,
        "num_codes_used": 1,
        "usage": 1 / 8,
        "entropy_bits": 0.0,
        "perplexity": 1.0,
    }
    usage.update(torch.arange(1, 8).repeat(10))
    assert usage.compute()["usage"] == 1
    assert usage.compute()["entropy_bits"] == pytest.approx(3) and usage.compute()["perplexity"] == pytest.approx(8)


def test_a_codebook_that_fits_no_memory():
    levels = [2**20, 2**20, 2**20, 7]
    usage = CodebookUsage(levels=levels)
    last = math.prod(levels) - 1
    usage.update(torch.tensor([last, 0, last - 1, last]))
    result = usage.compute()
    assert result["num_codes_used"] == 3 and result["entropy_bits"] == pytest.approx(1.5)
    assert result["usage"] == pytest.approx(3 / (last + 1))
    assert [np.flatnonzero(histogram).tolist() for histogram in result["dimension_histograms"]] == [
        [0, 2**20 - 2, 2**20 - 1],
        [0, 2**20 - 1],
        [0, 2**20 - 1],
        [0, 6],
    ]


@pytest.mark.parametrize("alpha", [1.6, 2.0])
def test_distance_to_uniform_against_scipy(alpha):
    quantizer = FiniteScalarQuantizer([5, 3], alpha=alpha)
    latent = torch.randn(20, 2, 8, 8) * torch.tensor([1.0, 3.0]).view(2, 1, 1)
    bounded = bounded_values(quantizer, latent)
    usage = CodebookUsage(levels=[5, 3])
    for part, part_bounded in zip(quantizer(latent)[1].split(6), bounded.split(6)):
        usage.update(part, part_bounded)
    distances = usage.compute()["dimension_ks_distances"]
    for dimension in range(2):
        values = bounded[:, dimension].flatten().double().numpy()
        expected = scipy.stats.kstest(values, scipy.stats.uniform(-1, 2).cdf).statistic
        assert distances[dimension] == pytest.approx(expected, abs=2**-16)
    # A normal latent becomes nearly uniform, a wide one saturates.
    assert distances[0] < 0.1 < distances[1]


def test_distance_to_uniform_of_constants():
    for value, expected in ((-1.0, 1.0), (0.0, 0.5), (1.0, 1.0)):
        usage = CodebookUsage(levels=[3])
        usage.update(torch.ones(4, 5, dtype=torch.long), torch.full((4, 1, 5), value))
        assert usage.compute()["dimension_ks_distances"] == pytest.approx([expected], abs=2**-15)


def test_merged_parts_equal_the_whole():
    quantizer = FiniteScalarQuantizer([5, 4])
    latent = torch.randn(10, 2, 4, 4)
    indices, bounded = quantizer(latent)[1], bounded_values(quantizer, latent)
    whole, first, second = (CodebookUsage(levels=[5, 4]) for _ in range(3))
    whole.update(indices, bounded)
    first.update(indices[:3], bounded[:3])
    second.update(indices[3:], bounded[3:])
    # As between processes, of which one had no images.
    second = pickle.loads(pickle.dumps(second))
    first.merge(CodebookUsage(levels=[5, 4]))
    first.merge(second)
    assert first.compute() == whole.compute()
    none = CodebookUsage(levels=[5, 4])
    none.merge(whole)
    assert none.compute() == whole.compute()


@pytest.mark.parametrize("levels", [[5, 3], [4, 2, 17], [2]])
@pytest.mark.parametrize("alpha", [1.6, 2.0])
def test_bounded_values_are_what_is_rounded(levels, alpha):
    quantizer = FiniteScalarQuantizer(levels, alpha)
    latent = torch.randn(4, len(levels), 6) * 2
    bounded, codes = bounded_values(quantizer, latent), quantizer(latent)[0]
    assert bounded.dtype == torch.float32
    for dimension, level in enumerate(levels):
        values = bounded[:, dimension]
        if level % 2:
            torch.testing.assert_close(values, 2 * torch.sigmoid(alpha * latent[:, dimension]) - 1)
        # Rounding the scaled values gives the codes; an even number of levels is shifted by half a level.
        digits = (values * (level - 1) / 2 - (0 if level % 2 else 0.5)).round()
        torch.testing.assert_close(digits / (level // 2), codes[:, dimension])
    extremes = bounded_values(quantizer, torch.tensor([-60.0, 60.0]).expand(1, len(levels), 2))
    torch.testing.assert_close(extremes, torch.tensor([-1.0, 1.0]).expand(1, len(levels), 2))


@pytest.mark.parametrize("levels", [[5, 3], [4, 2, 17]])
@pytest.mark.parametrize("bound", ["sigmoid", "normal"])
def test_bounded_values_of_equal_bins(levels, bound):
    quantizer = FiniteScalarQuantizer(levels, bound=bound, equal_bins=True)
    latent = torch.randn(4, len(levels), 600)
    bounded, codes = bounded_values(quantizer, latent), quantizer(latent)[0]
    expected = 2 * torch.sigmoid(1.6 * latent) - 1 if bound == "sigmoid" else 2 * torch.special.ndtr(latent) - 1
    torch.testing.assert_close(bounded, expected, atol=1e-6, rtol=0)
    for dimension, level in enumerate(levels):
        digits = ((bounded[:, dimension] + 1) / 2 * level).floor()
        torch.testing.assert_close(codes[:, dimension], (2 * digits + 1 - level) / level)


def test_the_normal_bound_makes_a_gaussian_uniform():
    quantizer, latent = FiniteScalarQuantizer([5], bound="normal", equal_bins=True), torch.randn(10, 1, 5000)
    usage = CodebookUsage(levels=[5])
    usage.update(quantizer(latent)[1], bounded_values(quantizer, latent))
    result = usage.compute()
    assert result["dimension_ks_distances"][0] < 0.01
    assert result["entropy_bits"] == pytest.approx(math.log2(5), abs=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "`codebook_size` or `levels`"),
        ({"levels": []}, "`levels`"),
        ({"levels": [5, 1]}, r"`levels`.*\[5, 1\]"),
        ({"levels": [5, 3], "codebook_size": 16}, r"`codebook_size`, got \[5, 3\] and 16"),
        ({"codebook_size": 0}, "`codebook_size`.*got 0"),
        ({"levels": [2**32, 2**32]}, "`codebook_size`"),
    ],
)
def test_what_is_no_codebook(arguments, message):
    with pytest.raises(ValueError, match=message):
        CodebookUsage(**arguments)


@pytest.mark.parametrize(
    "indices, bounded, message",
    [
        (torch.tensor([0, 15]), None, r"`indices`.*\[0, 15\).*\[0, 15\]"),
        (torch.tensor([-1, 3]), None, r"`indices`.*\[-1, 3\]"),
        (torch.tensor([0.0, 1.0]), None, "`indices` must be integers.*torch.float32"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3, 3), r"`bounded`.*\(batch, 2, \*spatial\).*\(2, 3, 3\)"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 2, 4), r"`bounded`.*6 places.*\(2, 2, 4\)"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 2, 3).long(), "`bounded` must be floats.*torch.int64"),
        (torch.zeros(1, 1).long(), torch.tensor([[[0.0], [1.5]]]), r"`bounded` must be in \[-1, 1\].*1.5"),
        (torch.zeros(1, 1).long(), torch.tensor([[[0.0], [torch.nan]]]), r"`bounded` must be in \[-1, 1\].*nan"),
    ],
)
def test_what_cannot_be_counted(indices, bounded, message):
    usage = CodebookUsage(levels=[5, 3])
    with pytest.raises(ValueError, match=message):
        usage.update(indices, bounded)
    with pytest.raises(ValueError, match="no tokens"):
        usage.compute()


def test_counts_that_do_not_belong_together():
    usage = CodebookUsage(levels=[5, 3])
    usage.update(torch.zeros(1, 1).long(), torch.zeros(1, 2, 1))
    with pytest.raises(ValueError, match="`bounded`.*all tokens or with none"):
        usage.update(torch.zeros(1, 1).long())
    with pytest.raises(ValueError, match=r"same codebook.*\[5, 3\].*\[3, 5\]"):
        usage.merge(CodebookUsage(levels=[3, 5]))
    with pytest.raises(ValueError, match="`bounded`.*`levels`"):
        CodebookUsage(15).update(torch.zeros(1, 1).long(), torch.zeros(1, 2, 1))


@pytest.mark.parametrize("size, count", [(1, 5), (7, 3), (50, 200)])
def test_different_codes_of_even_tokens(size, count):
    """By the chain of the number of different codes: with j of them, the next token is new with 1 - j / size."""
    usage = CodebookUsage(size)
    usage.update(torch.zeros(count, dtype=torch.long))
    chances = np.zeros(size + 1)
    chances[0] = 1
    for _ in range(count):
        new = 1 - np.arange(size + 1) / size
        chances = chances * (1 - new) + np.concatenate([[0], (chances * new)[:-1]])
    assert usage.num_codes_if_even == pytest.approx(chances @ np.arange(size + 1))


def test_different_codes_of_even_tokens_in_the_largest_codebook():
    usage = CodebookUsage(2**63 - 1)
    usage.update(torch.zeros(1000, dtype=torch.long))
    assert usage.num_codes_if_even == pytest.approx(1000)
