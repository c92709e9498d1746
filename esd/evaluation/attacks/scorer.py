"""Who says whether a picture shows the concept that an attack wants back."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from esd.evaluation.judges import Judge
from esd.evaluation.vocabulary import Target


class Scorer(Protocol):
    """Says how much of the concept each picture shows. Any callable with these attributes is one."""

    name: str
    version: str
    threshold: float
    hash: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Scores (n,) of uint8 RGB pictures (n, H, W, 3); from `threshold` upwards the concept is there."""


class ConceptScorer:
    """A judge's probability of one thing or style where it names that, 0 where it names another or none."""

    def __init__(self, judge: Judge, target: Target) -> None:
        self.judge, self.target = judge, target
        self.name, self.version, self.hash = f"{judge.name}: {target.name}", judge.version, judge.hash
        # the likeliest of the styles has at least the mean probability; half of that is below, whatever the rounding
        self.threshold = judge.threshold if target.domain == "thing" else 0.5 / len(judge.styles)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Scores (n,) in [0, 1] of uint8 RGB pictures (n, size, size, 3)."""
        readings, domain = self.judge(images), self.target.domain
        sure = readings.thing_p if domain == "thing" else readings.style_p
        return np.array([p if readings.says(i, domain, self.target.name) else 0.0 for i, p in enumerate(sure)])
