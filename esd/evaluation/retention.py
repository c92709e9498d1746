"""Who is harmed by an erasure: the drop of every other concept against how like its name is to the erased one.

An erasure that takes only its target has a drop of 0 everywhere. One that takes its neighbours along drops where texts
are alike, one that damages the model drops everywhere. The area under the curve is one number for over-erasure: with
likeness stretched so that the least alike concept is at 0 and the most alike at 1, it is a mean drop, in [-1, 1].

Likeness is the cosine between two texts' states in the model's own text encoder, each less the mean over all concepts:
without that, CLIP's states of any two short texts point the same way.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from esd.evaluation.canvas import Counts
from esd.evaluation.prompts import say
from esd.evaluation.vocabulary import Target
from esd.families import Family


@dataclass(frozen=True)
class Retained:
    """A concept that was not erased.

    Attributes:
        name: of it.
        similarity: of its text to the erased one's, in [-1, 1].
        before, after: rates at which the base and the erased model draw it, in [0, 1].
        n: pictures behind each.
    """

    name: str
    similarity: float
    before: float
    after: float
    n: int

    @property
    def drop(self) -> float:
        """What was lost of its rate."""
        return self.before - self.after


@torch.no_grad()
def similarities(family: Family, names: Sequence[str]) -> dict[tuple[str, str], float]:
    """The likeness of any two names, said as "a cat", in [-1, 1]."""
    states = family.encode([say("a {}", {"": name}) for name in names]).tensors["encoder_hidden_states"]
    flat = states.flatten(1).float().cpu()
    unit = F.normalize(flat - flat.mean(0), dim=1)
    cosines = (unit @ unit.T).tolist()
    return {(a, b): cosines[i][j] for i, a in enumerate(names) for j, b in enumerate(names)}


def curve(
    erased: str,
    before: Mapping[str, tuple[int, int]],
    after: Mapping[str, tuple[int, int]],
    likeness: Mapping[tuple[str, str], float],
) -> list[Retained]:
    """The other concepts of a domain, the least alike first.

    Args:
        erased: the name that was.
        before, after: name to (pictures taken for it, pictures asked for it), of base and erased model.
        likeness: of `similarities`.
    """
    points = [
        Retained(name, likeness[erased, name], k / n, after[name][0] / after[name][1], n)
        for name, (k, n) in before.items()
        if name != erased and n and name in after and after[name][1]
    ]
    return sorted(points, key=lambda point: point.similarity)


def told(target: Target, before: Counts, after: Counts, likeness: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """What metrics.json says of who was harmed: "retention", the points of `curve`, and their area, "over_erasure".

    Args:
        target: what was erased.
        before, after: of base and erased model, see `esd.evaluation.canvas.counted`.
        likeness: of `similarities`.
    """
    points = curve(target.name, before[target.domain], after[target.domain], likeness)
    return {"retention": [asdict(point) for point in points], "over_erasure": area(points)}


def area(points: Sequence[Retained]) -> float | None:
    """The area under drop against likeness, the latter from 0 at the least alike to 1 at the most; trapezoids.

    None for fewer than two concepts, or where all are equally alike.
    """
    if len(points) < 2 or points[-1].similarity <= points[0].similarity:
        return None
    span = points[-1].similarity - points[0].similarity
    return sum((a.drop + b.drop) / 2 * (b.similarity - a.similarity) / span for a, b in pairwise(points))
