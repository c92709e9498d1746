"""Finished runs side by side, and bounds to hold them to: `python -m esd.compare runs/* --min-ua 0.95 --max-drop 0.1`.

Takes training runs and evaluations whose judge knows what was erased, and folders of such runs. Ends with exit code 3
where a bound is missed, for CI.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd.errors import UserError
from esd.main import tell

if TYPE_CHECKING:
    from esd.evaluation.rates import Rate
    from esd.evaluation.runs import Run
    from esd.evaluation.sweep import Trial

EXIT_GATE = 3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m esd.compare", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("run", type=Path, nargs="+", help="run directory, or a folder of them")
    parser.add_argument(
        "--min-ua",
        type=float,
        help="least UA, the share of target pictures that no longer show the concept, such as 0.95",
    )
    parser.add_argument(
        "--max-drop", type=float, help="most that any rate of what should stay may fall; 0.1 is ten points"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    try:
        code = compare(arguments.run, arguments.min_ua, arguments.max_drop, as_json=arguments.json)
    except UserError as error:
        code = tell(error)
    sys.exit(code)


def compare(paths: Sequence[Path], min_ua: float | None, max_drop: float | None, *, as_json: bool = False) -> int:
    """Prints the runs side by side; returns 3 where one misses a bound, else 0.

    A bound that a run cannot be held to, for want of pictures or of rates, is refused: it must not pass for one met.

    Args:
        paths: run directories and folders of them; one given twice counts once.
        min_ua: least UA in [0, 1], or None.
        max_drop: most that a rate of what should stay may fall, in [0, 1], or None.
        as_json: print JSON instead of a table.

    Raises:
        UserError: a bound outside [0, 1]; a path holds no finished run, or one without rates; with a bound also one
            that is not finished, that lacks pictures, or that measured nothing of what the bound is about.
    """
    from esd.evaluation.runs import Sweep, differing_bases, read
    from esd.evaluation.sweep import drawn_again, trials

    for name, bound in (("--min-ua", min_ua), ("--max-drop", max_drop)):
        if bound is not None and not 0 <= bound <= 1:
            raise UserError(f"{name} {bound}: allowed: 0 to 1, such as 0.95 for 95% or 0.1 for ten points")
    bounds = [name for name, bound in (("--min-ua", min_ua), ("--max-drop", max_drop)) if bound is not None]
    runs: list[Run] = []
    left: list[str] = []
    for path in paths:
        found = read(path)
        runs += found.runs if isinstance(found, Sweep) else [found]
        if isinstance(found, Sweep) and found.left:
            left += found.left
            if bounds:
                number = f"{len(found.left)} of {len(found.left) + len(found.runs)} runs"
                raise UserError(
                    f"{' '.join(bounds)}: {number} in {path} cannot be held to it; {found.left[0]}; or name the runs "
                    "that are finished"
                )
    runs = list({run.path.resolve(): run for run in runs}.values())
    for run in runs:
        check(run, bounds)
    tried = trials(runs, over=("seed",))
    notes = [f"{run.path}: {note}" for run in runs for note in run.notes]
    for line in [*left, *notes, *differing_bases(runs), *drawn_again(tried)]:
        print(f"warning: {line}", file=sys.stderr)
    missed = {str(run.path): misses(run, min_ua, max_drop) for run in runs}
    if as_json:
        print(json.dumps([told(run) | {"missed": missed[str(run.path)]} for run in runs], indent=2, ensure_ascii=False))
    else:
        print(table(runs, tried))
    for name, lines in missed.items():
        for line in lines:
            print(f"missed: {name}: {line}", file=sys.stderr)
    return EXIT_GATE if any(missed.values()) else 0


def check(run: Run, bounds: Sequence[str]) -> None:
    """Raises UserError for a run that cannot be compared, or cannot be held to the bounds of these names."""
    from esd.evaluation.sweep import knows_the_rest

    if "target" not in run.rates:
        raise UserError(
            f"{run.path} has no rate of what was erased ({run.reason or 'none was measured'}), so that there is "
            "nothing to compare; leave it out, or look at it with esd.report"
        )
    if bounds and run.lost:
        lost = "; ".join(f"of the {model} model {words}" for model, words in run.lost.items())
        raise UserError(
            f"{' '.join(bounds)}: {run.path} lacks pictures ({lost}) and cannot be held to it; remove what is corrupt, "
            f"and draw what is missing: {run.command or 'evaluate again'}"
        )
    if "--max-drop" in bounds and not knows_the_rest(run.rates):
        raise UserError(
            f"--max-drop: {run.path} drew no prompt that names nothing erased, so that no rate of others of its kind "
            "or of the other kind can be held to it; evaluate the checkpoint on prompts such as 'a {thing} in the "
            "{style} style' (of esd.train: evaluation.retained_images=200), or leave --max-drop out"
        )


def misses(run: Run, min_ua: float | None, max_drop: float | None) -> list[str]:
    """The bounds that a run misses, each in a line; rates count, not the ends of their intervals."""
    from esd.evaluation.rates import GOES
    from esd.evaluation.words import percent, title

    found = []
    ua = run.rates["target"].erased
    if min_ua is not None and ua < min_ua:
        found.append(f"UA is {percent(ua)}, under {percent(min_ua)}")
    for name, rate in run.rates.items():
        if max_drop is not None and name not in GOES and rate.drop > max_drop:
            found.append(
                f"{title(name)} fell from {percent(rate.before)} to {percent(rate.after)}, by more than "
                f"{100 * max_drop:g} points"
            )
    return found


def told(run: Run) -> dict[str, Any]:
    """A run, ready for JSON."""
    from esd.evaluation.sweep import largest_drop

    low, high = run.rates["target"].interval
    name, drop = largest_drop(run.rates)
    return {
        "run": str(run.path),
        "kind": run.kind,
        "concepts": list(run.concepts),
        "ua": run.rates["target"].erased,
        "ua_interval": [1 - high, 1 - low],
        "largest_drop": {"of": name, "drop": drop} if name else None,
        "rates": {
            name: {
                "before": rate.before,
                "after": rate.after,
                "drop": rate.drop,
                "n": rate.n,
                "interval": rate.interval,
                "interval_before": rate.interval_before,
            }
            for name, rate in run.rates.items()
        },
    }


def table(runs: Sequence[Run], tried: Sequence[Trial]) -> str:
    """A row for each run, UA first, then every rate before and after with its interval and n below it.

    Runs that differ in the seed alone are followed by a row in which their pictures are counted together.

    Args:
        runs: with a rate of the target.
        tried: the same, those that differ in the seed alone as one trial.
    """
    from esd.evaluation.rates import TITLES
    from esd.evaluation.words import title

    measures = [name for name in TITLES if any(name in run.rates for run in runs)]
    rows = [["run", "UA", *map(title, measures)]]
    last = {trial.runs[-1].path: trial for trial in tried if len(trial.runs) > 1}
    for run in runs:
        rows += cells(str(run.path), run.rates, measures)
        if trial := last.get(run.path):
            rows += cells(f"{len(trial.runs)} seeds together", trial.rates, measures)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def cells(name: str, rates: Mapping[str, Rate], measures: Sequence[str]) -> list[list[str]]:
    """The two lines of a run: rates, and how far they can be trusted."""
    from esd.evaluation.words import percent

    shown = [rates.get(measure) for measure in measures]
    values = [f"{percent(rate.before)} → {percent(rate.after)}" if rate else "" for rate in shown]
    trust = [
        f"{percent(rate.interval[0])} to {percent(rate.interval[1])}, n={rate.n}" if rate else "" for rate in shown
    ]
    return [[name, percent(rates["target"].erased), *values], ["", "", *trust]]


if __name__ == "__main__":
    main()
