"""Rates as results tell them: what is asked, how often base and erased model show it, and whether it should go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from esd.evaluation.metrics import wilson

TITLES = {
    "target": "target",
    "implied": "called otherwise",
    "same_domain": "others of its kind",
    "cross_domain": "the other kind",
    "target_style": "style on target prompts",
    "target_thing": "thing on target prompts",
    "elsewhere": "the concept elsewhere",
    "elsewhere_thing": "the thing elsewhere",
    "elsewhere_style": "the style elsewhere",
}
WAYS = {
    "named": "by its name",
    "paraphrases": "in another phrasing",
    "synonyms": "by a synonym",
    "hypernyms": "by its kind: it",
    "hypernyms_kind": "by its kind: any of it",
    "scenes": "beside another thing: it",
    "scenes_other": "beside another thing: the other",
}
GOES = ("target", "implied", "named", "paraphrases", "synonyms", "hypernyms", "scenes")  # all others should stay
RETAINED = ("same_domain", "cross_domain")  # of prompts that name nothing erased: only these tell of the rest


@dataclass(frozen=True)
class Rate:
    """Of n pictures by the base and n by the erased model, those that show what is asked about."""

    shown_before: int
    shown_after: int
    n: int

    @property
    def before(self) -> float:
        """The base's rate."""
        return self.shown_before / self.n

    @property
    def after(self) -> float:
        """The erased model's rate."""
        return self.shown_after / self.n

    @property
    def drop(self) -> float:
        """How far the rate fell: 0.1 is ten points; negative where it rose."""
        return (self.shown_before - self.shown_after) / self.n

    @property
    def erased(self) -> float:
        """The share of the erased model's pictures that do not show it; of the target this is UA."""
        return (self.n - self.shown_after) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Of `after`, 95%."""
        return wilson(self.shown_after, self.n)

    @property
    def interval_before(self) -> tuple[float, float]:
        """Of `before`, 95%."""
        return wilson(self.shown_before, self.n)


def ways(results: Mapping[str, Any]) -> dict[str, Rate]:
    """The rates of other ways to ask for what was erased, by the names of `WAYS`, those that were measured."""
    return read_rates(results.get("ways") or {}, WAYS)


def read_rates(told: Mapping[str, Any], names: Iterable[str] = TITLES) -> dict[str, Rate]:
    """The rates of a summary that were measured."""
    rates = {}
    for name in names:
        if (rate := told.get(name)) and rate["n"]:
            n, before, after = int(rate["n"]), rate["before"], rate["after"]
            if not (0 <= before <= 1 and 0 <= after <= 1):
                raise ValueError(f"{name}: {before} and {after} are no rates")
            rates[name] = Rate(round(before * n), round(after * n), n)
    return rates


def erasures(results: Mapping[str, Any]) -> dict[str, dict[str, Rate]]:
    """The rates of each erasure of a canvas, by name: of the target, of its kind and of the other kind."""
    scores = {"target": "UA", "same_domain": "IRA", "cross_domain": "CRA"}
    return {
        told["name"]: {
            name: _scored(told[score], gone=score == "UA")
            for name, score in scores.items()
            if told[score]["rate"] is not None
        }
        for told in results["erasures"]
    }


def _scored(score: Mapping[str, Any], *, gone: bool) -> Rate:
    """A score as counts of pictures that show something; UA, which is `gone`, is the share of those that do not."""
    rates = [float(score[side]) for side in ("base", "rate")]
    if not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"{rates} are no rates")
    before, after = (round((1 - rate if gone else rate) * score["n"]) for rate in rates)
    return Rate(before, after, score["n"])
