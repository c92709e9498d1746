"""What the figures say, in plain words: rates as people write them, what went, what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from esd.evaluation.metrics import wilson
from esd.evaluation.rates import TITLES, Rate
from esd.evaluation.recovered import Curves, curves
from esd.evaluation.runs import Run
from esd.evaluation.sweep import GONE, Trial, knows_the_rest, largest_drop

STAYED, LITTLE = 0.03, 0.1  # the largest drop of which it is said that the rest stayed, or lost a little
LONGEST = 60  # characters of a setting that a heading has room for
DOMAIN_TITLES = {
    "thing": {"same_domain": "other things", "cross_domain": "styles"},
    "style": {"same_domain": "other styles", "cross_domain": "things"},
}


def percent(rate: float) -> str:
    """A rate as a percentage, with a digit more near 0% and 100%, where it matters.

    >>> percent(0.5), percent(0.0088), percent(0.995), percent(1.0), percent(-0.02)
    ('50%', '0.88%', '99.5%', '100%', '-2%')
    """
    value = 100 * rate
    digits = 0 if 10 <= abs(value) <= 90 else 2 if 0 < abs(value) < 1 else 1
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


def span(interval: Sequence[float], n: int) -> str:
    """A rate's 95% interval and the number behind it, as programs print it.

    >>> span((0.0, 0.114), 30)
    '(95%: 0.0% to 11.4%, n=30)'
    """
    low, high = interval
    return f"(95%: {low:.1%} to {high:.1%}, n={n})"


def changes(told: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """A line for each rate before and after, as programs print it; what is no rate, or of no pictures, has none."""
    for name, rate in told:
        if isinstance(rate, dict) and rate["n"]:
            yield f"{name:<14} {rate['before']:.1%} -> {rate['after']:.1%}  {span(rate['interval'], rate['n'])}"


def points(drop: float) -> str:
    """A drop of a rate in points, a fall written as one.

    >>> points(0.0325), points(-0.01), points(0.0)
    ('−3.2', '+1', '0')
    """
    value = round(-100 * drop, 1)
    return f"{value:+g}".replace("-", "−") if value else "0"


def quoted(concepts: Sequence[str]) -> str:
    """Concepts in a sentence.

    >>> quoted(["cat", "dog", "rose"])
    '“cat”, “dog” and “rose”'
    """
    words = [f"“{concept}”" for concept in concepts]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]])) or "the concept"


def named(attack: str) -> str:
    """An attack's name, to begin a line with."""
    return attack.replace("_", " ").capitalize()


def title(measure: str, domain: str | None = None) -> str:
    """What a rate is called where a thing or a style was erased, or in general."""
    return DOMAIN_TITLES.get(domain or "", {}).get(measure, TITLES[measure])


def fate(rate: Rate) -> str:
    """What became of a concept."""
    if rate.interval[1] <= GONE:
        return "is gone"
    if rate.after <= GONE:
        return "seems gone"
    return "is weaker" if rate.interval[1] < rate.interval_before[0] else "is still there"


def headline(runs: Sequence[Run], chosen: Sequence[Trial] = ()) -> str:
    """A page's first line.

    Args:
        runs: on the page, outside of sweeps.
        chosen: the trial that is recommended of each sweep that has rates.
    """
    rated = judged(runs)
    concepts = list(dict.fromkeys(concept for run in (rated or runs) for concept in run.concepts))
    sentences = []
    if len(rated) == 1:
        sentences.append(f"{quoted(concepts)} {_outcome(rated[0].rates)}.")
    elif rated:
        gone = sum(fate(run.rates["target"]) == "is gone" for run in rated)
        who = quoted(concepts) if len(concepts) == 1 else "What was erased"
        sentences.append(f"{who} is gone in {gone} of {len(rated)} runs.")
    elif chosen:
        what = quoted(list(dict.fromkeys(name for trial in chosen for run in trial.runs for name in run.concepts)))
        label = chosen[0].label if 0 < len(chosen[0].label) <= LONGEST else "the setting to take"
        if len(chosen) == 1:
            sentences.append(f"{what} {_outcome(chosen[0].rates)}, with {label}.")
        else:
            sentences.append(f"{what}: {len(chosen)} sweeps.")
    attacks = [told for run in runs if run.kind == "attacks" for told in curves(run.results).values()]
    searches = [attack for attack in attacks if attack.reads == "best"]
    if searches:
        broken = sum(map(brought_back, searches))
        who = "An attack brings" if broken == 1 else f"{broken} attacks bring" if broken else "No attack tried brings"
        sentences.append(f"{who} {'it' if sentences else quoted(concepts)} back.")
    elif attacks and not sentences:
        sentences.append(f"{quoted(concepts)}, asked for with a hint.")
    sentences += [_canvas(run) for run in runs if run.kind == "canvas"]
    asked = any(told.get("questions") for run in runs for told in (run.results.get("judges") or {}).values())
    unread = "no judge was asked for it" if asked else "no judge has read these pictures"
    return " ".join(sentences) or f"{quoted(concepts)}: {unread}."


def _canvas(run: Run) -> str:
    """A canvas in a sentence."""
    means, method = run.results["means"], run.results["method"]["name"]
    gone, kept = (
        {domain: rate for domain, mean in means.items() if (rate := mean[name]["rate"]) is not None}
        for name in ("UA", "IRA")
    )
    if not gone:
        return f"Erased in turn, {method}: no picture of what was erased could be read."
    told = f"Erased in turn, {method} takes away " + " and ".join(f"{percent(gone[one])} of {one}s" for one in gone)
    known = kept.keys() == gone.keys()
    return told + (f", and leaves {' and '.join(map(percent, kept.values()))} of their kind." if known else ".")


def judged(runs: Sequence[Run]) -> list[Run]:
    """The runs with a rate of the target, one for each file of weights: that which read most target pictures."""
    found: dict[Path, Run] = {}
    for run in runs:
        if "target" in run.rates:
            other = found.get(run.weights)
            if other is None or other.rates["target"].n < run.rates["target"].n:
                found[run.weights] = run
    return list(found.values())


def _outcome(rates: Mapping[str, Rate]) -> str:
    """What became of a concept and of the rest."""
    went, (_, drop) = fate(rates["target"]), largest_drop(rates)
    gone = went in ("is gone", "seems gone")
    if went == "is still there" or (drop <= LITTLE and not knows_the_rest(rates)):
        return went
    if drop <= STAYED:
        return f"{went}, and the rest stayed" if gone else f"{went}; the rest stayed"
    return f"{went}, and the rest lost a little" if drop <= LITTLE else f"{went}, but not alone"


def account(run: Run) -> str:
    """The figures behind the headline, in a few sentences; why there are none, where that is so."""
    if "target" not in run.rates:
        return f"No rates: {run.reason or 'none was measured'}."
    target, (name, drop) = run.rates["target"], largest_drop(run.rates)
    low, high = map(percent, target.interval)
    told = (
        f"{target.shown_after} of {target.n} pictures that ask for {quoted(run.concepts)} still show it (95% interval "
        f"{low} to {high}); of the base's {target.shown_before} do."
    )
    neither = run.results.get("neither") or (run.results.get("erasure") or {}).get("neither")
    if neither:
        told += f" In {percent(neither)} of the erased model's pictures of it the judge sees nothing that it knows."
    if not knows_the_rest(run.rates):
        return f"{told} No prompt that names nothing erased was drawn: what became of the rest is not known."
    fell = run.rates[name]
    if drop <= 0:
        return f"{told} Nothing that should stay fell."
    return (
        f"{told} Of what should stay, {title(name, run.domain)} fell most: from {percent(fell.before)} to "
        f"{percent(fell.after)} of {fell.n} pictures."
    )


def brought_back(attack: Curves) -> bool:
    """Whether an attack ended above its control, and above what it began with, beyond the intervals of both."""
    end, chance, plain = _ends(attack)
    low = wilson(end, attack.n)[0]
    return low > max(wilson(chance, attack.n)[1], wilson(plain, attack.n)[1])


def recovery(name: str, attack: Curves) -> str:
    """An attack in a sentence; one that reads each try alone gives a hint, the last try the largest."""
    end, chance, plain = _ends(attack)
    hint = "" if attack.reads == "best" else ", with its largest hint,"
    told = f"{named(name)}{hint} draws it for {end} of {attack.n} prompts"
    luck = "" if brought_back(attack) else ", which may be luck"
    stopped = f" It was stopped at {attack.stopped}." if attack.stopped else ""
    return f"{told}{luck}; without it {plain} show it, and {chance} by chance at the same cost.{stopped}"


def _ends(attack: Curves) -> tuple[int, int, int]:
    """Prompts that showed the concept at the end of an attack, at the end of its control, and before it."""
    erased = attack.runs["erased"]
    return erased[-1].shown, attack.runs["erased_control"][-1].shown, erased[0].shown
