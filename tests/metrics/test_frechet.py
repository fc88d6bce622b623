import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch

from hf_ifsq.metrics.frechet import FeatureMoments, frechet_distance


def moments_of(*batches):
    moments = FeatureMoments()
    for batch in batches:
        moments.update(batch)
    return moments


def samples_with(mean, covariance, count=50):
    """Samples whose mean and covariance are just these."""
    values = np.random.default_rng(0).normal(size=(count, len(mean)))
    values -= values.mean(axis=0)
    values = values @ np.linalg.inv(np.linalg.cholesky(np.cov(values.T, ddof=1).reshape(len(mean), -1))).T
    root = np.linalg.cholesky(np.asarray(covariance, dtype=float))
    return values @ root.T + mean


def test_one_dimension():
    # (m_1 - m_2)**2 + (s_1 - s_2)**2
    distance = frechet_distance(
        moments_of(samples_with([1.0], [[4.0]])), moments_of(samples_with([-2.0], [[0.25]], count=9))
    )
    assert distance == pytest.approx(9 + (2 - 0.5) ** 2, rel=1e-12)


def test_commuting_covariances():
    first, second = np.array([4.0, 1.0, 0.01]), np.array([1.0, 9.0, 0.04])
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    distance = frechet_distance(
        moments_of(samples_with([0.0, 1.0, 2.0], rotation @ np.diag(first) @ rotation.T)),
        moments_of(samples_with([0.5, 1.0, 0.0], rotation @ np.diag(second) @ rotation.T)),
    )
    expected = 0.25 + 4 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert distance == pytest.approx(expected, rel=1e-10)


def test_against_sqrtm():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 24)) @ generator.normal(size=(24, 24))
    references = generator.normal(size=(300, 24)) @ generator.normal(size=(24, 24)) + 1
    covariances = np.cov(features.T), np.cov(references.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((features.mean(0) - references.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root.real)
    distance = frechet_distance(moments_of(features), moments_of(references))
    assert distance == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments_of(references), moments_of(features)) == pytest.approx(distance, rel=1e-10)


def test_fewer_samples_than_features():
    generator = np.random.default_rng(0)
    features, references = generator.normal(size=(20, 200)), 2 * generator.normal(size=(30, 200)) + 0.1
    centred = [(values - values.mean(0)) / math.sqrt(len(values) - 1) for values in (features, references)]
    # The trace of the root is the nuclear norm of the product of the centred samples.
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    difference = features.mean(0) - references.mean(0)
    expected = difference @ difference + (centred[0] ** 2).sum() + (centred[1] ** 2).sum() - 2 * root
    assert frechet_distance(moments_of(features), moments_of(references)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(moments_of(features), moments_of(features)) == pytest.approx(0, abs=1e-10)


def test_batches_and_parts_give_the_moments_of_all():
    # Far from zero, where sums of squares would lose their digits.
    features = np.random.default_rng(0).normal(size=(101, 5)) + 1e6
    whole = moments_of(features)
    np.testing.assert_allclose(whole.covariance, np.cov(features.T), atol=1e-9)
    np.testing.assert_allclose(whole.mean, features.mean(axis=0), rtol=1e-14)
    first = moments_of(features[:1], features[1:40])
    first.merge(FeatureMoments())
    second = FeatureMoments()
    second.merge(pickle.loads(pickle.dumps(moments_of(*np.split(features[40:], [3, 4, 30])))))
    first.merge(second)
    assert first.count == 101 and second.count == 61
    np.testing.assert_allclose(first.covariance, whole.covariance, atol=1e-9)
    np.testing.assert_allclose(first.mean, whole.mean, rtol=1e-14)


def test_precision_of_features():
    features = torch.randn(20, 4)
    expected = moments_of(features.double().numpy()).covariance
    np.testing.assert_array_equal(moments_of(features.requires_grad_()).covariance, expected)
    assert moments_of(features.bfloat16()).covariance.dtype == np.float64


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.zeros(3), r"`features`.*\(batch, width\).*\(3,\)"),
        (torch.zeros(0, 3), r"`features`.*\(0, 3\)"),
        (torch.tensor([[1.0, torch.nan]]), "`features` is not finite"),
        (np.array([[np.inf, 1.0]]), "`features` is not finite"),
        (torch.zeros(2, 3), "`features`.*width 2.*got 3"),
    ],
)
def test_what_are_no_features(features, message):
    moments = moments_of(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=message):
        moments.update(features)
    assert moments.count == 2


def test_too_few_samples_and_other_features():
    moments = moments_of(torch.randn(5, 3))
    for few in (FeatureMoments(), moments_of(torch.randn(1, 3))):
        with pytest.raises(ValueError, match=f"at least 2 features, got {few.count}"):
            frechet_distance(moments, few)
    with pytest.raises(ValueError, match="same width, got 3 and 2"):
        frechet_distance(moments, moments_of(torch.randn(5, 2)))
