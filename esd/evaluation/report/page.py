"""What stands on the page, section by section: runs and sweeps turned into words, figures and pictures.

`report.html.j2` lays it out. Nothing here knows HTML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from esd.errors import UserError
from esd.evaluation import words
from esd.evaluation.foretold import Foretold, foretold_by_kind
from esd.evaluation.rates import GOES, TITLES, WAYS, Rate, erasures, ways
from esd.evaluation.recovered import curves
from esd.evaluation.report import facts, pictures, plots
from esd.evaluation.report.figures import Plot
from esd.evaluation.runs import Run, Sweep, differing_bases, erased_in_turn
from esd.evaluation.sweep import Trial, drawn_again, recommend, trials, unbeaten

MOST_LOST = 8  # labels that are listed


@dataclass(frozen=True)
class Bar:
    """A rate before and after."""

    title: str
    rate: Rate
    goes: bool
    note: str = ""


@dataclass
class Section:
    """One run.

    Attributes:
        run: as read.
        title, account: its headline, and the figures behind it.
        bars: its rates.
        preview: the training run's own picture, as a data URI.
        groups: grids of pictures.
        attacks: (sentence, figure, grid) of each.
        plots: other figures.
        ways: rates of other ways to ask for what was erased.
        readings: rates of every judge.
        losses: labels whose rate fell most.
        scores: what judges measure besides rates.
        means: of a canvas, for each kind: what it is of, the scores, and UnlearnCanvas' own.
        erasures: of a canvas, each as metrics.json has it, and its rates.
        facts: (name, value) of what the run is and took.
        settings: config.yaml as text.
        notes: what is missing, in lines.
    """

    run: Run
    title: str
    account: str
    bars: list[Bar]
    preview: str | None = None
    groups: list[pictures.Group] = field(default_factory=list)
    attacks: list[tuple[str, Plot, pictures.Group]] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    ways: list[Bar] = field(default_factory=list)
    readings: list[Bar] = field(default_factory=list)
    losses: list[Bar] = field(default_factory=list)
    scores: list[tuple[str, str, str]] = field(default_factory=list)
    means: list[tuple[str, Mapping[str, Any], Mapping[str, float]]] = field(default_factory=list)
    erasures: list[tuple[Mapping[str, Any], Mapping[str, Rate]]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    settings: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SweepSection:
    """One sweep: its settings against each other, and the run of the one to take."""

    sweep: Sweep
    title: str
    tried: list[Trial]
    best: int
    why: str
    on_front: list[int]
    plot: Plot | None
    measures: list[str]
    section: Section


@dataclass(frozen=True)
class Page:
    """Everything on the page."""

    title: str
    lede: str
    warnings: list[str]
    overview: list[tuple[str, list[Bar]]]
    sections: list[Section]
    sweeps: list[SweepSection]
    foretold: list[tuple[str, list[Foretold]]]


def make(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> Page:
    """The page of some runs and sweeps; each run's pictures and each sweep's table are read here."""
    seen = [pictures.Drawn(run) for run in runs if run.kind == "evaluation"]
    sections = [section(run, seen) for run in runs]
    found = [swept for sweep in sweeps if (swept := sweep_section(sweep))]
    everything = [*runs, *(run for sweep in sweeps for run in sweep.runs)]
    unrated = [sweep for sweep in sweeps if not trials(sweep.runs)]
    warnings = [
        *differing_bases(everything),
        *(line for sweep in sweeps for line in sweep.left),
        *(line for part in found for line in drawn_again(part.tried)),
        *(
            f"{sweep.path}: no run of it has a rate of the target, so that there is nothing to choose by"
            for sweep in unrated
        ),
        *dict.fromkeys(
            f"{name}: {note}"
            for name, notes in [
                *((run.name, run.notes) for run in everything),
                *((part.run.name, part.notes) for part in [*sections, *(one.section for one in found)]),
            ]
            for note in notes
        ),
    ]
    rated, weights = [run for run in runs if "target" in run.rates], words.judged(runs)
    one = weights[0] if len(weights) == 1 else runs[0] if len(runs) == 1 else None
    lede = [words.account(one)] if one and one.kind not in ("attacks", "canvas") else []
    if len(runs) > 1:
        lede += [words.recovery(*told) for run in runs if run.kind == "attacks" for told in curves(run.results).items()]
    return Page(
        words.headline(runs, [part.tried[part.best] for part in found]),
        " ".join(lede) or "Every rate stands beside its number of pictures and its 95% interval.",
        warnings,
        overview(rated) if len(rated) > 1 else [],
        sections,
        found,
        foretold_by_kind(erased_in_turn(runs)),
    )


def overview(runs: Sequence[Run]) -> list[tuple[str, list[Bar]]]:
    """(what is asked, a bar for each run) of every rate that a run has."""
    domains = {run.domain for run in runs}
    domain = domains.pop() if len(domains) == 1 else None
    return [
        (words.title(name, domain), [Bar(run.name, run.rates[name], name in GOES) for run in runs if name in run.rates])
        for name in TITLES
        if any(name in run.rates for run in runs)
    ]


def section(run: Run, seen: Sequence[pictures.Drawn]) -> Section:
    """What the page says of one run."""
    part = Section(
        run,
        words.headline([run]),
        "" if run.kind in ("attacks", "canvas") else words.account(run),
        [Bar(words.title(name, run.domain), rate, name in GOES) for name, rate in run.rates.items()],
        facts=facts.facts(run),
        settings=yaml.safe_dump(dict(run.settings), sort_keys=False, allow_unicode=True) if run.settings else "",
        notes=list(run.notes),
    )
    {"training": _training, "evaluation": _evaluation, "canvas": _canvas, "attacks": _attacks}[run.kind](part, seen)
    return part


def _training(part: Section, seen: Sequence[pictures.Drawn]) -> None:
    """Adds the preview and the losses."""
    run = part.run
    part.preview = pictures.encoded(run.path / "preview.png", pictures.WIDE)
    if part.preview is None:
        part.notes.append(
            "preview.png is missing or corrupt; the command below draws it again once summary.json is gone"
        )
    if drawn := plots.losses(run.path / "metrics.jsonl"):
        part.plots.append(drawn)


def _evaluation(part: Section, seen: Sequence[pictures.Drawn]) -> None:
    """Adds grids, every judge's rates, and the denoiser's own figures."""
    run = part.run
    drawn = next(one for one in seen if one.run is run)
    with whole_table(run):
        part.groups = drawn.groups()
        part.readings, part.losses = _readings(drawn)
    for model, lost in drawn.lost().items():
        counts = ", ".join(f"{n} {state}" for state, n in lost.items())
        part.notes.append(f"pictures of the {model} model that cannot be read any more: {counts}")
    part.ways = [Bar(WAYS[name], rate, name in GOES) for name, rate in ways(run.results).items()]
    part.scores = facts.scores(run)
    if harm := run.results.get("harm"):
        part.plots.append(plots.retention(harm["domain"], [harm]))
    if denoiser := run.results.get("denoiser"):
        part.plots.append(plots.inside(denoiser))


@contextmanager
def whole_table(run: Run) -> Iterator[None]:
    """Raises UserError where what is read of a run's images.csv is not there, or is no number."""
    try:
        yield
    except (ValueError, KeyError) as error:
        again = f": {run.command}" if run.command else ""
        raise UserError(
            f"{run.path / 'images.csv'} is damaged ({error!r}); remove it, and evaluate again{again}"
        ) from error


def _readings(drawn: pictures.Drawn) -> tuple[list[Bar], list[Bar]]:
    """(the rates of every judge, the labels whose rates fell most, beyond the intervals of both)."""
    readings, labels, rates = [], [], drawn.rates()
    for judge, questions in rates.get("erased", {}).items():
        for question, after in questions.items():
            before = rates["base"][judge][question]
            of = "" if before["of"] == "label" else before["of"]
            readings.append(Bar(f"{judge}, {question}", _paired(before, after), False, of))
            labels += [
                Bar(f"{label} ({judge})", _paired(one, after["by_label"][label]), False)
                for label, one in before.get("by_label", {}).items()
                if not drawn.names(label)
            ]
    fell = [bar for bar in labels if bar.rate.interval[1] < bar.rate.interval_before[0]]
    return readings, sorted(fell, key=lambda bar: -bar.rate.drop)[:MOST_LOST]


def _paired(before: Mapping[str, Any], after: Mapping[str, Any]) -> Rate:
    """The rates of two models on the same prompts as one."""
    return Rate(before["k"], after["k"], before["n"])


def _canvas(part: Section, seen: Sequence[pictures.Drawn]) -> None:
    """Adds the means beside those that UnlearnCanvas publishes, every erasure, and who was harmed."""
    results = part.run.results
    for domain, mean in results["means"].items():
        told, published = [one for one in results["erasures"] if one["domain"] == domain], results["published"][domain]
        part.means.append((f"{domain}s, mean of {len(told)}", mean, published))
        part.plots += [plots.retention(domain, told)] if any(one["retention"] for one in told) else []
    part.erasures = list(zip(results["erasures"], erasures(results).values(), strict=True))
    with whole_table(part.run):
        part.groups = [pictures.canvas(part.run)]


def _attacks(part: Section, seen: Sequence[pictures.Drawn]) -> None:
    """Adds each attack's curves and pictures."""
    for name, told in curves(part.run.results).items():
        grid = pictures.attacked(part.run, name, seen)
        part.attacks.append((words.recovery(name, told), plots.attack(name, told), grid))
        lost = sum(picture.uri is None for tile in grid.tiles for picture in tile.pictures)
        if lost:
            part.notes.append(f"{lost} of the shown pictures of {name} are missing or corrupt")


def sweep_section(sweep: Sweep) -> SweepSection | None:
    """What the page says of a sweep; None where it has no rates to choose by."""
    tried = trials(sweep.runs)
    if not tried:
        return None
    best, why = recommend(tried)
    on_front = unbeaten(tried)
    plot = plots.sweep(tried, on_front, best)
    run = tried[best].runs[0]
    measures = [name for name in TITLES if any(name in trial.rates for trial in tried)]
    heading = f"Take {tried[best].label}" if len(tried[best].label) <= words.LONGEST else "The setting to take"
    return SweepSection(
        sweep,
        heading if len(tried) > 1 else "One setting, nothing to choose",
        tried,
        best,
        why,
        on_front,
        plot,
        measures,
        section(run, [pictures.Drawn(run)] if run.kind == "evaluation" else []),
    )
