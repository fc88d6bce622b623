import numpy as np
import pytest
import torch

from hf_ifsq.metrics.alignment import cknna


def loops(features, other_features, k):
    """Centred kernel nearest-neighbour alignment, entry by entry, with the sums of the estimator written out."""
    count = len(features)

    def kernel(rows):
        unit = [row / np.linalg.norm(row) for row in rows.double().numpy()]
        return [[float(a @ b) for b in unit] for a in unit]

    def nearest(values, row):
        others = sorted((column for column in range(count) if column != row), key=lambda column: -values[row][column])
        return others[:k]

    def estimate(first, second):
        masked = [[[0.0] * count for _ in range(count)] for _ in range(2)]
        for i in range(count):
            for j in set(nearest(first, i)) & set(nearest(second, i)):
                masked[0][i][j], masked[1][i][j] = first[i][j], second[i][j]
        a, b = masked
        indices = range(count)
        pairs = sum(a[i][j] * b[j][i] for i in indices for j in indices)
        chains = sum(a[i][j] * b[j][q] for i in indices for j in indices for q in indices)
        sums = sum(map(sum, a)) * sum(map(sum, b))
        total = pairs + sums / ((count - 1) * (count - 2)) - 2 * chains / (count - 2)
        return total / (count * (count - 3))

    one, other = kernel(features), kernel(other_features)
    return estimate(one, other) / (estimate(one, one) * estimate(other, other)) ** 0.5


def related(count, width=6, other_width=9, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator)
    other = features @ torch.randn(width, other_width, generator=generator)
    return features, other + noise * torch.randn(count, other_width, generator=generator)


@pytest.mark.parametrize("count, k", [(4, 2), (11, 10), (15, 3), (30, 10)])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_against_loops(count, k, noise):
    features, other = related(count, noise=noise)
    assert cknna(features, other, k) == pytest.approx(loops(features, other, k), abs=1e-9)


def test_ten_neighbors_by_default():
    features, other = related(40)
    assert cknna(features, other) == cknna(features, other, k=10) != cknna(features, other, k=9)


def test_all_pairs_as_neighbors_give_the_unbiased_kernel_alignment():
    """Of kernels centred by U-statistics (Szekely and Rizzo, 2014): their cosine over the pairs."""
    features, other = related(20)

    def centred(rows):
        rows = torch.nn.functional.normalize(rows.double())
        values = (rows @ rows.T).fill_diagonal_(0)
        means = values.sum(0) / (len(rows) - 2)
        values = values - means - means[:, None] + values.sum() / ((len(rows) - 1) * (len(rows) - 2))
        return values.fill_diagonal_(0).flatten()

    expected = torch.nn.functional.cosine_similarity(centred(features), centred(other), dim=0).item()
    assert cknna(features, other, k=19) == pytest.approx(expected, abs=1e-12)


def test_equal_and_unrelated_representations():
    features, _ = related(200)
    assert cknna(features, features) == pytest.approx(1, abs=1e-12)
    values = [cknna(features, torch.randn(200, 9)) for _ in range(10)]
    assert max(map(abs, values)) < 0.1
    falling = [cknna(*related(200, noise=noise)) for noise in (0.0, 1.0, 3.0, 30.0)]
    assert falling == sorted(falling, reverse=True) and falling[0] > 0.5


def test_rotations_and_scales_make_no_difference():
    features, other = related(50)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    scales = torch.rand(50, 1, dtype=torch.float64) + 0.1
    expected = cknna(features, other)
    assert cknna(7 * features.double() @ rotation * scales, other) == pytest.approx(expected, abs=1e-9)
    assert cknna(features, 0.01 * other) == pytest.approx(expected, abs=1e-6)
    order = torch.randperm(50)
    assert cknna(features[order], other[order]) == pytest.approx(expected, abs=1e-12)
    assert cknna(features[order], other) < expected / 2


def test_half_precision_is_computed_in_double():
    features, other = (rows.bfloat16() for rows in related(30))
    assert cknna(features, other) == cknna(features.double(), other.double())


@pytest.mark.parametrize(
    "shape, other_shape, k, match",
    [
        ((12, 3), (13, 3), 10, r"as many images, got \(12, 3\) and \(13, 3\)"),
        ((12,), (12, 3), 10, r"\(images, width\).*\(12,\)"),
        ((10, 3), (10, 3), 10, r"`k` must be in \[1, images\).*got `k` 10 for 10"),
        ((3, 3), (3, 3), 1, "4 images or more, got `k` 1 for 3"),
        ((12, 3), (12, 3), 0, "got `k` 0 for 12"),
    ],
)
def test_shapes_that_do_not_fit(shape, other_shape, k, match):
    with pytest.raises(ValueError, match=match):
        cknna(torch.randn(shape), torch.randn(other_shape), k)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(value):
    features, other = related(20)
    other[3, 1] = value
    with pytest.raises(ValueError, match="`other_features` is not finite"):
        cknna(features, other)
