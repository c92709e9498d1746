"""One HTML file about finished runs, to look at: `python -m esd.report runs/cat runs/cat-eval`.

Takes training runs, evaluations, attacks, and folders of runs as `--multirun` leaves them, in any mixture. The file
needs nothing beside itself. In a folder of runs it also leaves `sweep.csv`, and says which setting to take.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from esd.errors import UserError
from esd.main import tell

if TYPE_CHECKING:
    from esd.evaluation.runs import Run, Sweep


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m esd.report", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("run", type=Path, nargs="+", help="run directory, or a folder of them")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        report(arguments.run, arguments.out)
    except UserError as error:
        sys.exit(tell(error))


def report(paths: list[Path], out: Path) -> None:
    """Writes the report, and `sweep.csv` in each folder of runs; prints where it is, warnings and recommendations.

    Args:
        paths: run directories and folders of them; one given twice counts once.
        out: file to write; an earlier report is replaced.

    Raises:
        UserError: a path holds no finished run, or something cannot be written; then nothing is.
    """
    from esd.evaluation import runs, sweep
    from esd.evaluation.foretold import foretold_by_kind
    from esd.evaluation.report import render
    from esd.storage import atomic

    check_out(out)
    found = [runs.read(path) for path in {path.resolve(): path for path in paths}.values()]
    single = [one for one in found if isinstance(one, runs.Run)]
    sweeps = [one for one in found if isinstance(one, runs.Sweep)]
    for one in sweeps:
        check_folder(one.path / "sweep.csv", "a folder of runs gets sweep.csv")
    html = render(single, sweeps)
    for one in sweeps:
        if tried := sweep.trials(one.runs):
            sweep.write_table(one.path / "sweep.csv", tried)
            best, why = sweep.recommend(tried)
            print(f"{one.path}: {tried[best].label or 'its only setting'} {why}")
    for kind, correlations in foretold_by_kind(runs.erased_in_turn(single)):
        for told in correlations:
            low, high = told.interval
            print(
                f"{kind}: {told.inside} with {told.score}: Spearman {told.spearman:+.2f} ({low:+.2f} to {high:+.2f}), "
                f"Pearson {told.pearson:+.2f}, n={told.n}"
            )
    with atomic(out) as staged:
        staged.write_text(html, encoding="utf-8")
    warn(single, sweeps)
    print(f"wrote {out} ({len(html.encode()) / 1e6:.1f} MB); open it in a browser")


def warn(single: list[Run], sweeps: list[Sweep]) -> None:
    """Prints on stderr what the report says at its top, so that it is not overlooked."""
    from esd.evaluation.runs import differing_bases

    everything = [*single, *(run for sweep in sweeps for run in sweep.runs)]
    notes = [f"{run.name}: {note}" for run in everything for note in run.notes]
    for line in [*differing_bases(everything), *(line for sweep in sweeps for line in sweep.left), *notes]:
        print(f"warning: {line}", file=sys.stderr)


def check_out(out: Path) -> None:
    """Raises UserError unless a report may be written there."""
    from esd.evaluation.report import is_report

    if out.exists() and not (out.is_file() and is_report(out)):
        raise UserError(f"--out {out} exists and is no report of esd; remove it, or name another file")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or name another file")
    check_folder(out, "name a file elsewhere")


def check_folder(file: Path, mend: str) -> None:
    """Raises UserError where the folder of a file cannot be written to."""
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"{file}: you may not write to the folder {file.parent}; {mend}")


if __name__ == "__main__":
    main()
