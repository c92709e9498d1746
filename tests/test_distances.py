"""FID and KID against closed forms and scipy; the scales of a CLIP score by their names."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from esd.evaluation.distances import CLIP_SCALES, fid, frechet, kid


def normal(n: int, d: int, mean: float = 0.0, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return mean + scale * np.random.default_rng(seed).standard_normal((n, d))


def covariance(d: int, seed: int, rank: int | None = None) -> np.ndarray:
    root = normal(d, rank or d, seed=seed)
    return root @ root.T


def test_the_distance_of_gaussians_with_independent_values_is_the_one_in_closed_form() -> None:
    mean1, mean2 = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    scale1, scale2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    expected = ((mean1 - mean2) ** 2).sum() + ((scale1 - scale2) ** 2).sum()
    assert frechet(mean1, np.diag(scale1**2), mean2, np.diag(scale2**2)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("rank", [None, 3])  # 3 of 8: as few pictures as leave a covariance singular
def test_the_distance_agrees_with_scipys_root(rank: int | None) -> None:
    cov1, cov2 = covariance(8, 1, rank), covariance(8, 2)
    mean1, mean2 = normal(2, 8, seed=3)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * sqrtm(cov1 @ cov2).real)
    assert frechet(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-5)
    assert frechet(mean2, cov2, mean1, cov1) == pytest.approx(frechet(mean1, cov1, mean2, cov2), rel=1e-7)


def test_fid_of_samples_goes_to_that_of_their_gaussians() -> None:
    features = normal(20_000, 4), normal(20_000, 4, mean=0.5, scale=2.0, seed=1)
    assert fid(*features) == pytest.approx(4 * (0.5**2 + 1.0**2), rel=0.03)
    assert fid(features[0], features[0]) == pytest.approx(0, abs=1e-9)


def test_kid_is_the_mean_over_pairs_written_out() -> None:
    one, two = normal(5, 3), normal(7, 3, mean=1.0, seed=1)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]) for x in (one, two)]
    expected = sum(within) - 2 * np.mean([k(a, b) for a in one for b in two])
    assert kid(one, two) == pytest.approx(expected, rel=1e-10)


def test_kid_is_unbiased_where_fid_is_not() -> None:
    pairs = [(normal(30, 6, seed=2 * i), normal(30, 6, seed=2 * i + 1)) for i in range(200)]
    kids = np.array([kid(*pair) for pair in pairs])
    assert abs(kids.mean()) < 3 * kids.std() / len(kids) ** 0.5
    assert np.mean([fid(*pair) for pair in pairs]) > 0.3


def test_pairs_of_one_seed_do_not_make_kid_negative() -> None:
    features, other = normal(30, 6), normal(29, 6)
    assert kid(features, features) < -0.1 and kid(features, features, paired=True) == pytest.approx(0, abs=1e-12)
    kids = []
    for seed in range(200):
        shared = normal(30, 6, seed=3 * seed)
        pair = [shared + 0.3 * normal(30, 6, seed=3 * seed + i) for i in (1, 2)]
        kids.append(kid(*pair, paired=True))
    assert abs(np.mean(kids)) < 3 * np.std(kids) / len(kids) ** 0.5
    with pytest.raises(ValueError, match="no pairs"):
        kid(features, other, paired=True)


@pytest.mark.parametrize("distance", [fid, kid])
def test_features_that_cannot_be_compared_are_refused(distance: object) -> None:
    for shapes in (((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5,))):
        with pytest.raises(ValueError, match="allowed"):
            distance(*(np.zeros(shape) for shape in shapes))  # type: ignore[operator]


def test_each_scale_of_a_clip_score_is_what_its_name_says() -> None:
    scaled = {name: of(np.array([0.3, -0.1])).tolist() for name, of in CLIP_SCALES.items()}
    assert scaled == {"clip_cos": [0.3, -0.1], "clip_100cos": [30, -10], "clip_2.5max0cos": [0.75, 0]}
