"""How far apart pictures are, without a network: SSIM of two, FID and KID of two sets; and the scales of a CLIP score.

FID and KID are of features that are given: arrays, of the judge's last layer on the bundled model, of whatever a user
brings on another. Such a distance means nothing without the name of its features, which results carry beside it.

Source: Wang et al. 2004 (SSIM); Heusel et al. 2017 (FID); Binkowski et al. 2018 (KID, its unbiased estimate and cubic
kernel); Hessel et al. 2021 (CLIPScore, 2.5 max(cos, 0)); other tables give cos or 100 cos and call it the same, so
the scale is in the name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.ndimage import gaussian_filter

from esd.evaluation.judges import PairJudge

CLIP_SCALES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "clip_cos": lambda cosine: cosine,
    "clip_100cos": lambda cosine: 100 * cosine,
    "clip_2.5max0cos": lambda cosine: 2.5 * np.maximum(cosine, 0),
}


LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue, as in BT.601


class Ssim(PairJudge):
    """Structural similarity of luminance in [-1, 1], 1 for equal pictures: Gaussian windows, sigma 1.5 pixels."""

    name, version, hash = "ssim", "Wang2004", ""

    def __call__(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return (n,) similarities of uint8 RGB pictures (n, H, W, 3)."""
        return np.array([_ssim(one @ LUMINANCE, two @ LUMINANCE) for one, two in zip(before, after, strict=True)])


def _ssim(one: np.ndarray, two: np.ndarray) -> float:
    """Mean structural similarity of two pictures (H, W) in [0, 255]."""

    def blurred(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5)  # 11 x 11 pixels

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean1, mean2 = blurred(one), blurred(two)
    variance1, variance2 = blurred(one * one) - mean1**2, blurred(two * two) - mean2**2
    covariance = blurred(one * two) - mean1 * mean2
    alike = (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
    return float((alike / ((mean1**2 + mean2**2 + c1) * (variance1 + variance2 + c2))).mean())


def frechet(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """The squared Fréchet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Args:
        mean1, mean2: (d,).
        cov1, cov2: (d, d), symmetric, at least positive semidefinite.

    The trace of the root is that of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric, so that singular covariances,
    as few pictures give, need no fudge.
    """
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    between = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    distance = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * between
    return float(max(distance, 0.0))


def fid(features1: np.ndarray, features2: np.ndarray) -> float:
    """Fréchet distance of features (n, d) and (m, d), taken as Gaussians; biased upwards where n and m are small.

    Raises:
        ValueError: fewer than two rows, or unlike widths.
    """
    _check(features1, features2)
    (mean1, cov1), (mean2, cov2) = ((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (features1, features2))
    return frechet(mean1, cov1, mean2, cov2)


def kid(features1: np.ndarray, features2: np.ndarray, *, paired: bool = False) -> float:
    """Squared maximum mean discrepancy of features (n, d) and (m, d) under (x.y / d + 1)^3; unbiased, so may be < 0.

    Args:
        features1, features2: of independent pictures; or, where `paired`, rows of one seed and prompt at one place.
        paired: leave out how like the two of a pair are, which would be taken for a likeness of the distributions.

    Raises:
        ValueError: fewer than two rows, unlike widths, or pairs of unlike numbers.
    """
    _check(features1, features2)
    if paired and len(features1) != len(features2):
        raise ValueError(f"{len(features1)} and {len(features2)} rows are no pairs; allowed: as many of each")
    n, m, d = len(features1), len(features2), features1.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / d + 1) ** 3

    own1, own2 = kernel(features1, features1), kernel(features2, features2)
    within = (own1.sum() - np.trace(own1)) / (n * (n - 1)) + (own2.sum() - np.trace(own2)) / (m * (m - 1))
    across = kernel(features1, features2)
    between = (across.sum() - np.trace(across)) / (n * (n - 1)) if paired else across.mean()
    return float(within - 2 * between)


def _check(features1: np.ndarray, features2: np.ndarray) -> None:
    """Raises ValueError unless both have rows enough and are as wide as each other."""
    if features1.ndim != 2 or features1.shape[1:] != features2.shape[1:] or min(len(features1), len(features2)) < 2:
        raise ValueError(f"features {features1.shape} and {features2.shape}; allowed: (n, d) and (m, d), n and m > 1")
