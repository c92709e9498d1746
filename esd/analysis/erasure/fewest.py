"""The fewest layers whose base's weights bring the concept back, and whether that holds on other pictures.

Layers are chosen by what they bring back in some pictures, and would look good in these by that alone. They are held
against pictures from other seeds, and against sets of as many layers drawn by chance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from esd.interventions import Site

from .restore import Restored, Restorer, ends


def minimal(restorer: Restorer, single: Sequence[Restored], share: float = 0.8) -> tuple[list[Site], list[Restored]]:
    """A small set of layers whose grafts together bring the concept back.

    Layers are added from the one that restores most on its own until the rate, or without a judge R, reaches a share
    of the base's; then each is left out again where that does not lose it.

    Args:
        restorer: of the erased model.
        single: what `by_layer` says of each layer alone.
        share: of the base's rate or restoration.

    Returns:
        The layers in the order they run, and what was tried on the way, theirs last.
    """
    sites = {site.label: site for site in restorer.touched()}
    rank = sorted((r for r in single if r.kind == "layer"), key=lambda r: (r.restoration, r.k or 0), reverse=True)
    base = restorer.score("model", "base", restorer.y_base)
    tried: dict[str, Restored] = {}

    def named(chosen: Sequence[str]) -> str:
        return " + ".join(label for label in sites if label in chosen)

    def enough(chosen: Sequence[str]) -> bool:
        where = named(chosen)
        if where not in tried:
            tried[where] = restorer.graft("set", where, restorer.inside([sites[label] for label in chosen]))
        result = tried[where]
        if result.k is None or not base.k:
            return result.restoration >= share
        return result.k >= share * base.k

    labels = [r.where for r in rank]
    low, high = 1, len(labels)  # the smallest number of layers that is enough
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(labels[:middle]) else (middle + 1, high)
    chosen = labels[:low]
    for label in reversed(chosen[:]):
        fewer = [other for other in chosen if other != label]
        if fewer and enough(fewer):
            chosen = fewer
    enough(chosen)
    last = tried.pop(named(chosen))
    return [site for label, site in sites.items() if label in chosen], [*tried.values(), last]


def elsewhere(restorer: Restorer, seeds: Sequence[int]) -> Restorer:
    """The same from other seeds, whole rounds of its prompts."""
    return replace(restorer, prompts=[*restorer.prompts] * (len(seeds) // len(restorer.prompts)), seeds=seeds)


def held_out(other: Restorer, chosen: Sequence[Site], sets: int = 3) -> list[Restored]:
    """What the chosen layers, and by-chance sets of as many, bring back in pictures that nothing was chosen by.

    Args:
        other: from other seeds than the layers were chosen by; see `elsewhere`.
        chosen: layers.
        sets: of layers drawn by chance, all unlike each other and the chosen; fewer where there are no more.

    Returns:
        Base and erased model, the chosen layers, and the sets drawn by chance.
    """
    sites = other.touched()
    taken, chance = {frozenset(site.label for site in chosen)}, random.Random(0)
    tried = [("other seeds, chosen", list(chosen))]
    for _ in range(100):  # of few layers there are few sets
        drawn = sorted(chance.sample(range(len(sites)), len(chosen)))
        labels = frozenset(sites[i].label for i in drawn)
        if labels not in taken and len(tried) <= sets:
            taken.add(labels)
            tried.append(("other seeds, by chance", [sites[i] for i in drawn]))
    return [
        *(replace(end, kind="other seeds, model") for end in ends(other)),
        *(other.graft(kind, " + ".join(site.label for site in several), other.inside(several))
          for kind, several in tried),
    ]  # fmt: skip


def shared(chosen: Restored, other: Restored) -> int:
    """How many of their layers two sets share."""
    return len(set(chosen.where.split(" + ")) & set(other.where.split(" + ")))


def suggestion(sites: Sequence[Site], selection: str) -> str:
    """A selection for another training: what was trained before, in these layers only.

    Args:
        sites: layers, at least one.
        selection: that the erasure was trained with.
    """
    where = " + ".join(site.expression for site in sites)
    return f"({selection}) & ({where})"
