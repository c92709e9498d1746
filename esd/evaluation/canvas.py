"""UnlearnCanvas in miniature: every thing and style of a grid erased in turn, and the whole grid read each time.

With acc(name) the share of the grid's pictures asked for a name that the judge takes for it (its best answer, whatever
its probability), for an erased name e in its domain D (things or styles) and the other domain D':

    UA  = 1 - acc(e)                           unlearning accuracy
    IRA = mean of acc over D without e         in-domain retain accuracy
    CRA = mean of acc over D'                  cross-domain retain accuracy

over the whole grid, pictures that ask for e among those of CRA. A judge and a base that are not perfect bound all
three; beside each stands the same of the base, and its share of it: 1 - acc(e) / acc_base(e) for UA, the ratio for the
others.

The mean of many erasures has an interval over erasures, by Student's t: they differ by more than their pictures do. It
is never narrower than what all their pictures give together, which matters where few erasures, or one, come out alike.

Source: Zhang et al. 2024, "UnlearnCanvas" (arXiv:2402.11846); machine_unlearning/evaluation/quantitative/accuracy.py of
OPTML-Group/UnlearnCanvas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from esd.evaluation.metrics import mean_interval, ratio_interval, wilson
from esd.evaluation.prompts import PromptRow, fill
from esd.evaluation.vocabulary import DOMAINS, OTHER, Target

SCORES = ("UA", "IRA", "CRA")
GOLDEN = (5**0.5 - 1) / 2  # numbers in the order of their multiples' fractions: neighbours end up far apart
PUBLISHED = {"style": {"UA": 0.986, "IRA": 0.810, "CRA": 0.940}, "thing": {"UA": 0.922, "IRA": 0.558, "CRA": 0.442}}

Score = Mapping[str, Any]  # see `scores`
Interval = tuple[float, float]
Counts = dict[str, dict[str, tuple[int, int]]]  # domain to name to (pictures taken for it, pictures asked for it)


def order(things: Sequence[str], styles: Sequence[str]) -> list[Target]:
    """What is erased, in turn: the first n, whatever n is, are a fair part of the whole.

    Both domains have their share, and of each domain names from everywhere in its list, where like stands by like.
    """
    every = [
        ((i + 0.5) / len(names), Target(domain, names[number]))
        for domain, names in zip(DOMAINS, (things, styles), strict=True)
        for i, number in enumerate(sorted(range(len(names)), key=lambda number: number * GOLDEN % 1))
    ]
    return [target for _, target in sorted(every, key=lambda placed: placed[0])]


def grid(template: str, things: Sequence[str], styles: Sequence[str], *, seed: int, samples: int) -> list[PromptRow]:
    """A row for every thing in every style; every picture of the grid has a seed of its own.

    Args:
        template: holds {thing} and {style}.
        things, styles: of the grid.
        seed: of the first picture.
        samples: pictures of each row, whose seeds follow one another.
    """
    return [
        PromptRow(i, prompt, seed + i * samples, labels=dict(labels))
        for i, (prompt, labels) in enumerate(fill(template, things, styles))
    ]


def counted(rows: Sequence[Mapping[str, str]], judge: str) -> Counts:
    """How many pictures of each name are taken for it.

    Args:
        rows: of images.csv, of one model; those without a picture, or without a label of a domain, are left out.
        judge: whose best answers "thing" and "style" count.
    """
    counts: Counts = {domain: {} for domain in DOMAINS}
    for row in rows:
        for domain in DOMAINS if row["state"] == "ok" else ():
            if name := row.get(f"label.{domain}"):
                k, n = counts[domain].get(name, (0, 0))
                counts[domain][name] = (k + (row.get(f"{judge}.{domain}", "") == name), n + 1)
    return counts


def scores(target: Target, base: Counts, erased: Counts) -> dict[str, dict[str, Any]]:
    """UA, IRA and CRA of one erasure.

    Args:
        target: what was erased, one of the grid's names.
        base, erased: of the two models, on the same grid.

    Returns:
        Each {"rate", "n", "interval", "base", "n_base", "of_base", "of_base_interval"}; rates in [0, 1], intervals at
        95%, that of the rate Wilson's. A mean over names of which all have as many pictures is the share of all their
        pictures, which is what is counted. Null where the grid has no such pictures, "of_base" also where the base
        draws none of them.
    """
    domain, other = target.domain, OTHER[target.domain]
    return {
        "UA": _score(base[domain], erased[domain], [target.name], gone=True),
        "IRA": _score(base[domain], erased[domain], [name for name in erased[domain] if name != target.name]),
        "CRA": _score(base[other], erased[other], list(erased[other])),
    }


def mean(every: Sequence[Mapping[str, Score]]) -> dict[str, dict[str, Any]]:
    """The mean of some erasures' scores, all of the same weight.

    Args:
        every: of each erasure, what `scores` says.

    Returns:
        Each {"rate", "erasures", "interval", "base", "of_base", "of_base_erasures", "of_base_interval"}: how many
        erasures have such a rate, and such a share of the base's, and intervals at 95% over these; nulls of none.
    """
    return {name: _mean([scores[name] for scores in every], gone=name == "UA") for name in SCORES}


def _mean(told: Sequence[Score], *, gone: bool) -> dict[str, Any]:
    """The mean of one score."""
    rated = [one for one in told if one["rate"] is not None]
    shared = [one for one in rated if one["of_base"] is not None]
    rates, shares = [one["rate"] for one in rated], [one["of_base"] for one in shared]
    found: dict[str, Any] = {"rate": None, "erasures": len(rated), "interval": None, "base": None}
    found |= {"of_base": None, "of_base_erasures": len(shared), "of_base_interval": None}
    if rated:
        low, high = _widest(mean_interval(rates), _together(rated, gone=gone)[0])
        found |= {"rate": fmean(rates), "interval": [max(0.0, low), min(1.0, high)]}
        found["base"] = fmean(one["base"] for one in rated)
    if shared and (pictures := _together(shared, gone=gone)[1]):
        low, high = _widest(mean_interval(shares), pictures)
        found |= {
            "of_base": fmean(shares),
            "of_base_interval": [low, min(1.0, high)] if gone else [max(0.0, low), high],
        }
    return found


def _together(told: Sequence[Score], *, gone: bool) -> tuple[Interval, Interval | None]:
    """The intervals of some erasures' pictures counted together; the base's, which erasures share, count once."""
    n, n_base = sum(one["n"] for one in told), fmean(one["n_base"] for one in told)
    hits = sum(round(one["rate"] * one["n"]) for one in told)
    hits_base = fmean(one["base"] for one in told) * n_base
    return _intervals(hits, n, hits_base, n_base, gone=gone)


def _intervals(
    hits: float, n: float, hits_base: float, n_base: float, *, gone: bool
) -> tuple[Interval, Interval | None]:
    """(of a score, of its share of the base's; None where the base draws nothing of it).

    Args:
        hits, hits_base: pictures that the score counts, of n and n_base.
        gone: whether it counts those that are not taken for what was asked.
    """
    if not gone:
        return wilson(hits, n), ratio_interval(hits, n, hits_base, n_base) if hits_base else None
    if hits_base >= n_base:
        return wilson(hits, n), None
    low, high = ratio_interval(n - hits, n, n_base - hits_base, n_base)
    return wilson(hits, n), (1 - high, 1 - low)


def _widest(one: Interval, other: Interval) -> Interval:
    """What holds both."""
    return min(one[0], other[0]), max(one[1], other[1])


def _score(
    base: Mapping[str, tuple[int, int]],
    erased: Mapping[str, tuple[int, int]],
    names: Sequence[str],
    *,
    gone: bool = False,
) -> dict[str, Any]:
    """The accuracy on some names, or for `gone` what is missing of it."""
    (k, n), (k_base, n_base) = ([sum(column) for column in _columns(side, names)] for side in (erased, base))
    if not n or not n_base:
        told: dict[str, Any] = {"rate": None, "n": n, "interval": None, "base": None, "n_base": n_base}
        return told | {"of_base": None, "of_base_interval": None}
    hits, hits_base = (n - k, n_base - k_base) if gone else (k, k_base)
    ratio = (k / n) / (k_base / n_base) if k_base else None
    own, share = _intervals(hits, n, hits_base, n_base, gone=gone)
    return {
        "rate": hits / n,
        "n": n,
        "interval": list(own),
        "base": hits_base / n_base,
        "n_base": n_base,
        "of_base": None if ratio is None else 1 - ratio if gone else ratio,
        "of_base_interval": None if share is None else list(share),
    }


def _columns(counts: Mapping[str, tuple[int, int]], names: Sequence[str]) -> tuple[list[int], list[int]]:
    """(pictures taken for a name, pictures asked for it) of some names."""
    chosen = [counts.get(name, (0, 0)) for name in names]
    return [k for k, _ in chosen], [n for _, n in chosen]
