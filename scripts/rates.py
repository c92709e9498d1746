"""Print the rates of training runs: one run in a line, several as a table.

    python scripts/rates.py runs/demo
    python scripts/rates.py runs/things/*

`make demo` ends with the first; the tables of the docs come from the second. The figures are those of each run's
summary.json, written by `esd.train`. Runs whose config.yaml differs in the seed alone are followed by their mean.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import yaml

OF_ONE_RUN = ("seed", "run_dir", "plan_only", "device", "tracker")
TITLES = {
    "target": "target",
    "same_domain": "others of its kind",
    "cross_domain": "the other kind",
    "implied": "called otherwise",
    "target_style": "style on target prompts",
    "target_thing": "thing on target prompts",
    "elsewhere": "the concept elsewhere",
    "elsewhere_thing": "the thing elsewhere",
    "elsewhere_style": "the style elsewhere",
}


def percent(rate: float) -> str:
    """A rate in [0, 1] as a percentage; below 10% with two digits, for there they matter."""
    return f"{100 * rate:{'.2g' if rate < 0.1 else '.0f'}}%"


def known_rates(summary: Mapping) -> dict[str, Mapping]:
    """The rates of a summary.json that were measured, by title."""
    rates = {title: summary.get(key) for key, title in TITLES.items()}
    return {title: rate for title, rate in rates.items() if rate and rate.get("after") is not None}


def line(summary: Mapping) -> str:
    """One line of rates before and after, or the reason why there are none.

    Args:
        summary: a run's summary.json; see "A run directory" in docs/architecture.md.
    """
    known = known_rates(summary)
    if not known:
        return f"no rates: {summary.get('reason') or 'summary.json holds none'}"
    parts = [f"{title} {percent(r['before'])} -> {percent(r['after'])}" for title, r in known.items()]
    if summary.get("neither") is not None:
        parts.append(f"neither {percent(summary['neither'])}")
    if summary.get("seconds") is not None:
        parts.append(f"trained in {summary['seconds']:.0f} s")
    return "; ".join(parts)


def table(summaries: Mapping[str, Mapping]) -> str:
    """A Markdown table, a row for each run: every rate before and after with n, "neither", and training seconds."""
    titles = [title for title in TITLES.values() if any(title in known_rates(s) for s in summaries.values())]
    rows = [["run", *titles, "neither", "seconds"], ["---"] * (len(titles) + 3)]
    for name, summary in summaries.items():
        known = known_rates(summary)
        cells = [
            f"{percent(r['before'])} → {percent(r['after'])} (n={r['n']})" if (r := known.get(title)) else ""
            for title in titles
        ]
        neither = summary.get("neither")
        rows.append([name, *cells, "" if neither is None else percent(neither), f"{summary['seconds']:.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def settings(run: Path) -> str:
    """What a run was told besides its seed and its place, as text; its path where no config.yaml says."""
    file = run / "config.yaml"
    told = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {"run": str(run)}
    return json.dumps({name: value for name, value in told.items() if name not in OF_ONE_RUN}, sort_keys=True)


def mean(summaries: Sequence[Mapping]) -> Mapping:
    """A summary of several: the mean of each rate that all of them have, with n added up."""
    averages: dict = {name: [summary.get(name) for summary in summaries] for name in ("neither", "seconds")}
    averages = {name: None if None in values else fmean(values) for name, values in averages.items()}
    for key, title in TITLES.items():
        rates = [known_rates(summary).get(title) for summary in summaries]
        if all(rates):
            before, after, n = ([rate[name] for rate in rates if rate] for name in ("before", "after", "n"))
            averages[key] = {"before": fmean(before), "after": fmean(after), "n": sum(n)}
    return averages


def with_means(summaries: Mapping[Path, Mapping]) -> dict[str, Mapping]:
    """Every summary by the path given, and after the last run of several seeds their mean."""
    groups: dict[str, list[Path]] = {}
    for run in summaries:
        groups.setdefault(settings(run), []).append(run)
    last = {runs[-1]: runs for runs in groups.values() if len(runs) > 1}
    rows: dict[str, Mapping] = {}
    for run, summary in summaries.items():
        rows[str(run)] = summary
        if runs := last.get(run):
            rows[f"mean of {len(runs)} seeds, to {run}"] = mean([summaries[one] for one in runs])
    return rows


def main() -> None:
    """Read each RUN_DIR/summary.json and print."""
    parser = argparse.ArgumentParser(description="The rates of one training run in a line, of several as a table.")
    parser.add_argument("run_dir", type=Path, nargs="+")
    runs = parser.parse_args().run_dir
    if missing := [str(run) for run in runs if not (run / "summary.json").is_file()]:
        sys.exit(f"no summary.json in {', '.join(missing)}: give directories of finished training runs")
    summaries = {run: json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs}
    if len(runs) > 1:
        print(table(with_means(summaries)))
        return
    print(line(summaries[runs[0]]))
    print(f"picture: {runs[0] / 'preview.png'}")


if __name__ == "__main__":
    main()
