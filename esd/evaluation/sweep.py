"""Which setting to take: erased against kept over the runs of a sweep, and the ones that nothing beats.

Runs that differ only in seed or in what they erase are one trial of a setting; their pictures are counted together.
*Erased* is the share of target pictures that no longer show the concept. *Kept* is what is left after the largest drop
of anything that should have stayed: a setting is as good as the worst that it does. It is known only where prompts
were drawn that name nothing erased. A picture that several runs drew counts once.

Source: UnlearnCanvas' UA for erased (Zhang et al. 2024, arXiv:2402.11846), but that a picture in which the judge is not
sure of anything counts as erased too, where there the best answer counts, as it does on our canvas; the rest is ours.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esd.errors import UserError
from esd.evaluation.rates import GOES, RETAINED, TITLES, Rate
from esd.evaluation.runs import Run
from esd.evaluation.table import read_table
from esd.storage import atomic

GONE = 0.1  # of target pictures that may still show a concept that is called gone: the interval's upper end
POOLED = ("seed", "concepts", "erase_from")  # what a trial of a setting may be repeated over
# what makes no difference to the weights, or to the pictures of an evaluation
PLACES = (
    *("run_dir", "plan_only", "device", "device_memory", "tracker", "evaluation", "base_images", "batch_size"),
    *("judges", "thresholds", "denoiser_points", "training.save_every", "training.processes"),
)
RULE = f"keeps the most of those with which at most {GONE:.0%} of target pictures still show it, at 95% confidence"
UNKEPT = "erases the most; what should stay was measured with none"
NO_RULE = f"with none it is sure that at most {GONE:.0%} of target pictures still show it; most erased plus kept"


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it.

    Attributes:
        settings: those that the sweep varies, by dotted name.
        runs: made with them.
        rates: counted over these runs, those that all of them measured.
        again: runs made with them too that drew a picture of `runs` again; they count in no rate.
    """

    settings: Mapping[str, Any]
    runs: tuple[Run, ...]
    rates: Mapping[str, Rate]
    again: tuple[Run, ...] = ()

    @property
    def erased(self) -> float:
        """UA: the share of target pictures that no longer show the concept."""
        return self.rates["target"].erased

    @property
    def kept(self) -> float | None:
        """1 less the largest drop, and no more than 1 where nothing dropped; None where the rest was not measured."""
        return 1 - max(0.0, largest_drop(self.rates)[1]) if knows_the_rest(self.rates) else None

    @property
    def gone(self) -> bool:
        """Whether the target's rate is below `GONE` with the upper end of its interval."""
        return self.rates["target"].interval[1] <= GONE

    @property
    def label(self) -> str:
        """The settings in a line, by the last part of their names."""
        return ", ".join(f"{name.rpartition('.')[2]}={short(value)}" for name, value in self.settings.items())


def largest_drop(rates: Mapping[str, Rate]) -> tuple[str, float]:
    """(name, drop) of what fell most of all that should have stayed; ("", 0.0) where nothing was measured."""
    drops = [(name, rate.drop) for name, rate in rates.items() if name not in GOES]
    return max(drops, key=lambda one: one[1], default=("", 0.0))


def knows_the_rest(rates: Mapping[str, Rate]) -> bool:
    """Whether anything was measured on prompts that name nothing erased."""
    return any(name in rates for name in RETAINED)


def pool(rates: Sequence[Mapping[str, Rate]]) -> dict[str, Rate]:
    """Counts added up, of the rates that all have."""
    shared = [name for name in TITLES if all(name in one for one in rates)]
    return {
        name: Rate(
            sum(one[name].shown_before for one in rates),
            sum(one[name].shown_after for one in rates),
            sum(one[name].n for one in rates),
        )
        for name in shared
    }


def trials(runs: Sequence[Run], *, over: Sequence[str] = POOLED) -> list[Trial]:
    """The trials of a sweep, in the order of their first runs; runs without a rate of the target are left out.

    Runs of one trial that share a picture, from the same weights, prompt and seed, would count it twice: of these the
    first counts.

    Args:
        runs: of the sweep.
        over: settings in which the runs of one trial may differ.
    """
    rated = [run for run in runs if "target" in run.rates]
    told = [leaves(run.settings) for run in rated]
    names = [name for name in swept(told) if name not in over]
    groups: dict[str, list[int]] = {}
    for i, settings in enumerate(told):
        groups.setdefault(json.dumps([settings.get(name) for name in names], default=str), []).append(i)
    tried = []
    for where in groups.values():
        counted, again = _apart([rated[i] for i in where])
        settings = {name: told[where[0]].get(name) for name in names}
        tried.append(Trial(settings, tuple(counted), pool([run.rates for run in counted]), tuple(again)))
    return tried


def _apart(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """(runs that share no picture, the others), in their order."""
    counted: list[Run] = []
    again: list[Run] = []
    seen: set[tuple[str, ...]] = set()
    for run in runs if len(runs) > 1 else ():
        if seen & (pictures := _pictures(run)):
            again.append(run)
        else:
            counted.append(run)
            seen |= pictures
    return counted or list(runs), again


def _pictures(run: Run) -> set[tuple[str, ...]]:
    """What identifies the pictures that a run's erased model drew, among runs of one trial.

    A training's follow from what its weights do. An evaluation's are weights, prompt, seed and guidance, as images.csv
    has them; where that cannot be read any more, all are taken for its own.
    """
    if run.kind == "training":
        told = leaves(run.settings)
        return {tuple(str(told.get(name)) for name in POOLED)}
    try:
        rows = read_table(run.path / "images.csv")
    except UserError:
        return set()
    decided = [
        [row.get(name, "") for name in ("prompt", "seed", "guidance")] for row in rows if row.get("model") == "erased"
    ]
    return {(str(run.results["checkpoint"].get("sha256")), *one) for one in decided}


def drawn_again(tried: Sequence[Trial]) -> list[str]:
    """A line for each run that counts in no rate of its trial, for another drew its pictures."""
    return [
        f"{run.path} drew pictures that {trial.runs[0].path} or another run of its setting has, from the same weights "
        "and seeds: it is not counted with them"
        for trial in tried
        for run in trial.again
    ]


def leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"objective.eta": 1.0, ...} of nested settings."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def swept(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that differ; one that is null is as good as one that an older run did not know."""
    names = dict.fromkeys(
        name for told in settings for name in told if name not in PLACES and name.split(".")[0] not in PLACES
    )
    return [name for name in names if len({json.dumps(told.get(name), default=str) for told in settings}) > 1]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other beats, that is, is as good in both values and better in one.

    Args:
        points: (erased, kept), more is better.

    Returns:
        In order of the first value, falling.
    """
    order = sorted(range(len(points)), key=lambda i: points[i], reverse=True)
    kept: list[int] = []
    for i in order:
        best = points[kept[-1]] if kept else None
        if best is None or points[i][1] > best[1] or points[i] == best:
            kept.append(i)
    return kept


def unbeaten(tried: Sequence[Trial]) -> list[int]:
    """Numbers of the trials on the `front` of erased and kept, of those that measured what should stay."""
    known = [(i, (trial.erased, trial.kept)) for i, trial in enumerate(tried) if trial.kept is not None]
    return [known[i][0] for i in front([(erased, kept) for _, (erased, kept) in known])]


def recommend(tried: Sequence[Trial]) -> tuple[int, str]:
    """(number, why) of the trial to take.

    Among the trials after which the concept is gone (`Trial.gone`) the one that keeps the most, and of equals the one
    that erases more; where there is none, the one with the most erased plus kept. A trial that measured nothing that
    should stay is taken only where all are such.

    Args:
        tried: at least one.
    """
    kept = {i: trial.kept for i, trial in enumerate(tried) if trial.kept is not None}
    if not kept:
        return max(range(len(tried)), key=lambda i: tried[i].erased), UNKEPT
    aside = len(tried) - len(kept)
    told = f" ({aside} that measured nothing that should stay left aside)" if aside else ""
    gone = [i for i in kept if tried[i].gone]
    if gone:
        return max(gone, key=lambda i: (kept[i], tried[i].erased)), RULE + told
    return max(kept, key=lambda i: tried[i].erased + kept[i]), NO_RULE + told


def write_table(path: Path, tried: Sequence[Trial]) -> None:
    """Writes sweep.csv: a row for each trial with its settings, erased, kept, and every rate; whole or not at all."""
    best, _ = recommend(tried)
    on_front = unbeaten(tried)
    rows = [
        {name: short(value) for name, value in trial.settings.items()}
        | {
            "runs": len(trial.runs),
            "erased": trial.erased,
            "kept": trial.kept,
            "fell_most": largest_drop(trial.rates)[0],
            "lost": "; ".join(f"{model}: {words}" for run in trial.runs for model, words in run.lost.items()),
        }
        | {"on_front": i in on_front, "recommended": i == best}
        | {f"{name}.{key}": value for name, rate in trial.rates.items() for key, value in _cells(rate).items()}
        for i, trial in enumerate(tried)
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _cells(rate: Rate) -> dict[str, Any]:
    """A rate as columns."""
    low, high = rate.interval
    return {"before": rate.before, "after": rate.after, "low": low, "high": high, "n": rate.n}


def short(value: Any) -> str:
    """A setting's value as a table shows it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(short, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)
