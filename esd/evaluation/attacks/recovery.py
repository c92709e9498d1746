"""What an attack brought back: recovery against cost, as curves of one attack on two models, each with its control.

Every point keeps the scores of its pictures, so any curve can be read again under another threshold.

Source: a rate's interval is Wilson's; cost beside success, and controls of equal cost, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from esd.evaluation.attacks.budget import cost
from esd.evaluation.metrics import rate_of

Reads = Literal["best", "alone"]


@dataclass(frozen=True)
class Point:
    """One try of a run, and all that was spent up to it.

    Attributes:
        tried: what was set or reached, by name; empty for the plain drawing.
        gradients, queries, seconds: spent so far.
        scores: of this try's pictures (n,), one for each row.
    """

    tried: Mapping[str, float]
    gradients: int
    queries: int
    seconds: float
    scores: np.ndarray


@dataclass(frozen=True)
class Curve:
    """One run: a point per try, the plain drawing first, and a picture of each row.

    Attributes:
        points: in the order tried, at least one.
        threshold: the scorer's.
        images: uint8 (n, H, W, 3): of each row the first picture that shows the concept, or the nearest to it.
        plain: uint8 (n, H, W, 3): of each row the plain drawing.
        stopped: the limit that ended the run early, such as "queries=5000"; None where it ran through.
    """

    points: tuple[Point, ...]
    threshold: float
    images: np.ndarray
    plain: np.ndarray
    stopped: str | None

    def shown(self, reads: Reads) -> np.ndarray:
        """(points, n) bool: whether the row's picture shows the concept.

        Args:
            reads: "alone" looks at each point's own pictures, "best" at all up to it.
        """
        here = np.stack([point.scores for point in self.points]) >= self.threshold
        return np.logical_or.accumulate(here) if reads == "best" else here

    def told(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON; each point has both rates."""
        alone, best = self.shown("alone"), self.shown("best")
        return {
            "stopped": self.stopped,
            "points": [
                {
                    "tried": dict(point.tried),
                    "gradients": point.gradients,
                    "queries": point.queries,
                    "cost": cost(point.queries, point.gradients),
                    "seconds": round(point.seconds, 3),
                    "alone": rate_of(alone[i]),
                    "best": rate_of(best[i]),
                    "scores": [float(score) for score in point.scores],
                }
                for i, point in enumerate(self.points)
            ],
        }


@dataclass(frozen=True)
class Recovery:
    """What an attack brought back, and what chance and the base do at the same cost.

    Attributes:
        settings: of the attack.
        reads: which rate is the attack's, see `esd.evaluation.attacks.attack.Attack`.
        curves: of the runs "erased", "erased_control", "base" and "base_control".
    """

    settings: Mapping[str, Any]
    reads: Reads
    curves: Mapping[str, Curve]

    def told(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON."""
        return {
            "settings": dict(self.settings),
            "reads": self.reads,
            "curves": {run: curve.told() for run, curve in self.curves.items()},
        }
