"""Rates of what a judge saw, each with its interval: did the concept go, and did everything else stay?

Rows are *target* when their labels name an erased concept and the prompt does so too, *implied* when the prompt
calls it otherwise, else *retained*. On target rows the rate of the concept itself should fall, and the rate of the
other label (the style of an erased thing) should not. On retained rows, the same domain (other things) and the cross
domain (styles) should both hold. Where a concept was erased from one thing or style only, target rows name both, and
rows that name one of the two are *elsewhere*: the concept should be there as before, and so should what it was erased
from.

Source: the split is UnlearnCanvas' UA, IRA and CRA (Zhang et al. 2024, arXiv:2402.11846); the interval of a rate is
Wilson 1927, that of the ratio of two rates Donner and Zou 2012 (MOVER-R, of Wilson's intervals), that of a mean
Student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from esd.evaluation.judges import Readings
from esd.evaluation.prompts import PromptRow
from esd.evaluation.vocabulary import DOMAINS, Target

NO_RATE: dict[str, Any] = {"before": None, "after": None, "n": 0, "interval": None, "interval_before": None}


def wilson(k: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval (low, high) of a rate k of n; z = 1.96 covers 95%.

    Raises:
        ValueError: not 0 <= k <= n, or n is 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"{k} of {n} is no rate")
    p, zz = k / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def ratio_interval(k: float, n: float, k_base: float, n_base: float) -> tuple[float, float]:
    """The 95% interval (low, high) of the rate k of n over the rate k_base of n_base, taken as independent.

    Raises:
        ValueError: see `wilson`; or k_base is 0, and there is no ratio.
    """
    rate, (low, high) = k / n if n else 0.0, wilson(k, n)
    base, (low_base, high_base) = k_base / n_base if n_base else 0.0, wilson(k_base, n_base)
    if not base:
        raise ValueError(f"{k_base} of {n_base} is no base of a ratio")
    product = rate * base
    below = low * (2 * rate - low) * high_base * (2 * base - high_base)
    above = high * (2 * rate - high) * low_base * (2 * base - low_base)
    lowest = low * (2 * rate - low) / (product + math.sqrt(max(0.0, product**2 - below))) if rate else 0.0
    highest = (product + math.sqrt(max(0.0, product**2 - above))) / (low_base * (2 * base - low_base))
    return min(lowest, rate / base), max(highest, rate / base)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval (low, high) of the mean of values, by Student's t; of fewer than two the mean itself.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values have no mean")
    half = stdtrit(len(values) - 1, 0.975) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return fmean(values) - float(half), fmean(values) + float(half)


def rate_of(hits: Iterable[bool]) -> dict[str, Any]:
    """{"rate", "k", "n", "interval"}: k of n hits, as JSON holds them; no rate and no interval of none."""
    found = [bool(hit) for hit in hits]
    k, n = sum(found), len(found)
    return {"rate": k / n if n else None, "k": k, "n": n, "interval": list(wilson(k, n)) if n else None}


def paired_rate(before: int, after: int, n: int) -> dict[str, Any]:
    """{"before", "after", "n", "interval" of after, "interval_before"} of n pictures by each model; nulls of none.

    Args:
        before, after: pictures by the base and by the erased model that show what is asked about.
        n: pictures by each.
    """
    if not n:
        return dict(NO_RATE)
    return {
        "before": before / n,
        "after": after / n,
        "n": n,
        "interval": list(wilson(after, n)),
        "interval_before": list(wilson(before, n)),
    }


def erasure_rates(
    rows: Sequence[PromptRow], before: Readings, after: Readings, targets: Sequence[Target]
) -> dict[str, Any]:
    """The rates of summary.json.

    Args:
        rows: the prompts drawn, n of them, with labels "thing" and/or "style"; "called" is the other word by which
            an implied concept is called.
        before: what the judge reads in the base's n images.
        after: what it reads in the erased model's, of the same prompts and seeds.
        targets: what was erased, for example [Target("thing", "cat")].

    Returns:
        "target", "same_domain", "cross_domain", "implied" and, on target rows, "target_<other domain>"; where a
        concept was erased from something, "elsewhere", the concept with anything else, and "elsewhere_<other
        domain>", what it was erased from, without the concept. Each as `paired_rate` has it. And "neither", the share
        of the erased model's target images in which the judge saw nothing it knows.
    """
    domains = {target.domain for target in targets}
    others = [domain for domain in DOMAINS if domain not in domains]

    def where(holds: Callable[[Target, Mapping[str, str]], bool]) -> list[int]:
        return [i for i, row in enumerate(rows) if any(holds(target, row.labels) for target in targets)]

    meant, named, touched = where(Target.meant), where(Target.named), where(Target.touched)
    target = [i for i in meant if "called" not in rows[i].labels]
    implied = [i for i in meant if "called" in rows[i].labels]
    elsewhere = sorted(set(named) - set(meant))
    without = sorted(set(touched) - set(named))
    retained = sorted(set(range(len(rows))) - {*named, *touched})

    def rate(indices: Collection[int], among: Collection[str], *, erased_only: bool = False) -> dict[str, Any]:
        asked = [
            (i, domain, name)
            for i in indices
            for domain, name in rows[i].labels.items()
            if domain in among and (not erased_only or any(t.named({domain: name}) for t in targets))
        ]
        hits, hits_after = (sum(read.says(*one) for one in asked) for read in (before, after))
        return paired_rate(hits, hits_after, len(asked))

    rates: dict[str, Any] = {
        "target": rate(target, domains, erased_only=True),
        "same_domain": rate(retained, domains),
        "cross_domain": rate(retained, others),
        "implied": rate(implied, domains, erased_only=True),
    }
    rates |= {f"target_{domain}": rate(target, [domain]) for domain in others}
    if any(target.within for target in targets):
        rates["elsewhere"] = rate(elsewhere, domains, erased_only=True)
        rates |= {f"elsewhere_{domain}": rate(without, [domain]) for domain in others}
    rates["neither"] = sum(bool(after.neither[i]) for i in target) / len(target) if target else None
    return rates
