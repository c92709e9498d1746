"""How far the denoiser alone foretells what a judge sees: correlation of the two over many erasures.

The residual on what was erased and the drift on its neighbours (`esd.evaluation.denoiser`, means over t) cost seconds
and no picture. Whether they stand for UA, IRA and CRA can only be seen over erasures that differ; a canvas has them.
Scores are taken as shares of the base's, so that things and styles, which the base draws unequally well, compare.

Source: Spearman's interval is that of Bonett and Wright 2000 (Psychometrika 65), on Fisher's scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from esd.evaluation.canvas import SCORES
from esd.evaluation.vocabulary import DOMAINS

INSIDE = {"residual": "erased", "drift": "neighbours"}  # what the denoiser tells, and on whose prompts
LEAST = 4  # erasures, below which a correlation has no interval


@dataclass(frozen=True)
class Foretold:
    """How one figure of the denoiser goes with one score.

    Attributes:
        inside: "residual" or "drift".
        score: "UA", "IRA" or "CRA".
        n: erasures.
        spearman, pearson: in [-1, 1].
        interval: of Spearman's, 95%.
    """

    inside: str
    score: str
    n: int
    spearman: float
    pearson: float
    interval: tuple[float, float]


def inside(denoiser: Mapping[str, Any] | None) -> dict[str, float]:
    """Residual and drift of an erasure, each the mean over t; those that were measured.

    Args:
        denoiser: as `esd.evaluation.denoiser.look` tells it.
    """
    told = denoiser or {}
    return {
        name: fmean(point[name] for point in told[group]["points"]) for name, group in INSIDE.items() if group in told
    }


def foretold_by_kind(erasures: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Foretold]]]:
    """(what was erased, the correlations) over the things, the styles, and both; what has none is left out.

    Args:
        erasures: of canvases, as metrics.json tells them.
    """
    kinds = {f"{domain}s": [one for one in erasures if one["domain"] == domain] for domain in DOMAINS}
    kinds |= {"things and styles": list(erasures)} if all(kinds.values()) else {}
    return [(f"{kind} erased", found) for kind, own in kinds.items() if (found := foretold(own))]


def foretold(erasures: Sequence[Mapping[str, Any]]) -> list[Foretold]:
    """Every figure of the denoiser against every score, where enough erasures have both and they differ.

    Args:
        erasures: of canvases, as metrics.json tells them.
    """
    from scipy import stats  # takes a second

    found = []
    for name in INSIDE:
        for score in SCORES:
            pairs = [
                (value, one[score]["of_base"])
                for one in erasures
                if (value := inside(one.get("denoiser")).get(name)) is not None and one[score]["of_base"] is not None
            ]
            x, y = np.array(pairs, float).reshape(-1, 2).T
            if len(pairs) >= LEAST and np.ptp(x) > 0 and np.ptp(y) > 0:
                rho, r = (float(of(x, y).statistic) for of in (stats.spearmanr, stats.pearsonr))
                found.append(Foretold(name, score, len(x), rho, r, interval(rho, len(x))))
    return found


def interval(rho: float, n: int) -> tuple[float, float]:
    """The 95% interval (low, high) of a Spearman correlation of n > 3 pairs."""
    if abs(rho) > 1 - 1e-9:
        return rho, rho
    centre, half = math.atanh(rho), 1.96 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(centre - half), math.tanh(centre + half)
