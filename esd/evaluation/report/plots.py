"""The figures that have axes: losses, the denoiser against t, what attacks bring back, the settings of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from esd.evaluation import words
from esd.evaluation.rates import Rate
from esd.evaluation.recovered import READS, RUNS, Curves, Try
from esd.evaluation.report import figures
from esd.evaluation.report.figures import Curve, Dot, Plot
from esd.evaluation.sweep import Trial, largest_drop, short

LOSSES = {"loss_erase": ("erasing", "c1"), "loss_preserve": ("preserving", "c2")}
PARTS = 6  # of a retention curve, equally many pairs in each
LINES = {  # colour, dashed
    "base": ("c2", False),
    "base_control": ("c2", True),
    "erased": ("c1", False),
    "erased_control": ("c1", True),
}


def losses(path: Path) -> Plot | None:
    """The losses of metrics.jsonl by update; None where there are none to draw."""
    steps = _lines(path)
    told = [
        Curve(name, colour, [(step["step"], step[key]) for step in steps], dots=False)
        for key, (name, colour) in LOSSES.items()
        if len(steps) > 1 and any(step[key] for step in steps)
    ]
    if not told:
        return None
    return figures.lines("Losses while training", told, x_name="update", y_name="loss", about="Losses by update.")


def _lines(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl that can be read."""
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for row in rows:
        try:
            told = json.loads(row)
            found.append({name: float(told[name]) for name in ("step", *LOSSES)})
        except (ValueError, KeyError, TypeError):
            continue
    return found


def inside(denoiser: Mapping[str, Any]) -> Plot:
    """The denoiser's reaction to the concept, and its drift on neighbours, against t."""
    told = [("concept: residual", "c1", "erased", "residual"), ("neighbours: drift", "c2", "neighbours", "drift")]
    curves = [
        Curve(name, colour, sorted((point["t"], point[key]) for point in denoiser[group]["points"]))
        for name, colour, group, key in told
        if group in denoiser
    ]
    return figures.lines(
        "Inside the denoiser",
        curves,
        x_name="t, from clean to noise",
        y_name="times the base's reaction",
        about="Residual on the concept and drift on its neighbours against t.",
    )


def retention(domain: str, erasures: Sequence[Mapping[str, Any]]) -> Plot:
    """What every other concept lost, against the likeness of its text to the erased one's.

    Args:
        domain: "thing" or "style".
        erasures: of that domain, as a canvas tells them, at least one with other concepts.
    """
    pairs = sorted(
        (other["similarity"], other["before"] - other["after"]) for one in erasures for other in one["retention"]
    )
    parts = [pairs[i * len(pairs) // PARTS : (i + 1) * len(pairs) // PARTS] for i in range(PARTS)]
    means = [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts if part]
    areas = [one["over_erasure"] for one in erasures if one["over_erasure"] is not None]
    area = f": over-erasure {fmean(areas):.3f}" if areas else ""
    return figures.lines(
        f"What other {domain}s lost{area}",
        [
            Curve(
                "mean of a sixth of them",
                "c1",
                means,
                words=[f"{words.percent(y)} at likeness {x:.2f}" for x, y in means],
            )
        ],
        cloud=pairs,
        x_name=f"likeness of a {domain}'s text to the erased one's",
        y_name="drop",
        y_text=words.percent,
        about=f"Drops of {len(pairs)} pairs of an erased and another {domain}, against the likeness of their texts.",
    )


def attack(name: str, told: Curves) -> Plot:
    """Recovery against cost: attack and control, erased and base."""
    drawn = []
    for run, (colour, dashed) in LINES.items():
        tries = told.runs.get(run, ())
        rates = [Rate(0, one.shown, told.n) for one in tries]
        if tries:
            places = [(one.cost, rate.after) for one, rate in zip(tries, rates, strict=True)]
            bounds = [rate.interval for rate in rates] if run.startswith("erased") else []
            marks = [_said(one, told.n) for one in tries]
            drawn.append(Curve(RUNS[run], colour, places, bounds, dashed, marks))
    return figures.lines(
        f"{words.named(name)}, {READS[told.reads]}",
        drawn,
        x_name="evaluations of the denoiser for each prompt",
        y_name="prompts that draw it",
        y_range=(0, 1),
        y_text=words.percent,
        about=f"Share of {told.n} prompts against cost. {words.recovery(name, told)}",
    )


def _said(one: Try, n: int) -> str:
    """A point of an attack, in words."""
    tried = ", ".join(f"{name} {short(value)}" for name, value in one.tried.items()) or "no attack"
    return f"{one.shown} of {n}, {one.cost:.0f} evaluations: {tried}"


def sweep(tried: Sequence[Trial], on_front: Sequence[int], best: int) -> Plot | None:
    """Erased against kept, a point for each setting that measured what should stay; None where none did.

    Colour and shape are of the first setting with few values, those in words before numbers; the others stand beside
    the points.

    Args:
        tried: at least one.
        on_front: numbers of those that no other beats, in order of what they erase.
        best: number of the one to take.
    """
    values = {name: list(dict.fromkeys(short(trial.settings[name]) for trial in tried)) for name in tried[0].settings}
    wordy = sorted(values, key=lambda name: not any(isinstance(trial.settings[name], str) for trial in tried))
    key = next((name for name in wordy if 2 <= len(values[name]) <= len(figures.SHAPES)), "")
    dots = {}
    for number, trial in enumerate(tried):
        if trial.kept is None:
            continue
        beside = [f"{_last(name)} {short(value)}" for name, value in trial.settings.items() if name != key]
        low, high = trial.rates["target"].interval
        dots[number] = Dot(
            trial.kept,
            trial.erased,
            _kept_bounds(trial),
            (1 - high, 1 - low),
            ", ".join(beside),
            f"{trial.label}: erased {words.percent(trial.erased)}, kept {words.percent(trial.kept)}",
            values[key].index(short(trial.settings[key])) if key else 0,
            number == best,
        )
    if not dots:
        return None
    return figures.scatter(
        "Erased against kept",
        list(dots.values()),
        [list(dots).index(number) for number in on_front],
        [f"{_last(key)} {value}" for value in values.get(key, ())],
        x_name="kept: 100% less the largest drop of anything else",
        y_name="erased: targets that no longer show it",
        text=words.percent,
        about=f"{len(dots)} settings; {tried[best].label} is recommended.",
    )


def _last(name: str) -> str:
    """The last part of a setting's dotted name."""
    return name.rpartition(".")[2]


def _kept_bounds(trial: Trial) -> tuple[float, float]:
    """The interval of what fell most, as one of what is kept; the base's rate is taken as it is."""
    rate = trial.rates[largest_drop(trial.rates)[0]]
    low, high = rate.interval
    return 1 - rate.before + low, 1 - rate.before + high
