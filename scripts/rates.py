"""Print the rates of one training run in one line, and where its picture is.

    python scripts/rates.py runs/demo

`make demo` ends with it. The figures are those of the run's summary.json, written by `esd.train`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

TITLES = {
    "target": "target",
    "same_domain": "others of its kind",
    "cross_domain": "the other kind",
    "target_style": "style on target prompts",
}


def percent(rate: float) -> str:
    """A rate in [0, 1] as a whole percentage."""
    return f"{100 * rate:.0f}%"


def line(summary: Mapping) -> str:
    """One line of rates before and after, or the reason why there are none.

    Args:
        summary: a run's summary.json; see "A run directory" in docs/architecture.md.
    """
    rates = {title: summary.get(key) for key, title in TITLES.items()}
    known = {title: rate for title, rate in rates.items() if rate and rate.get("after") is not None}
    if not known:
        return f"no rates: {summary.get('reason') or 'summary.json holds none'}"
    parts = [f"{title} {percent(r['before'])} -> {percent(r['after'])}" for title, r in known.items()]
    if summary.get("neither") is not None:
        parts.append(f"neither {percent(summary['neither'])}")
    if summary.get("seconds") is not None:
        parts.append(f"trained in {summary['seconds']:.0f} s")
    return "; ".join(parts)


def main() -> None:
    """Read RUN_DIR/summary.json and print."""
    parser = argparse.ArgumentParser(description="The rates of one training run in one line.")
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args().run_dir
    print(line(json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))))
    print(f"picture: {run_dir / 'preview.png'}")


if __name__ == "__main__":
    main()
