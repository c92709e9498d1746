"""The report: one HTML file that needs nothing beside itself, for people who would rather look than read.

    page.py             what stands on it
    facts.py            where it comes from
    plots.py            which figures; figures.py turns them into geometry
    pictures.py         which pictures, as data URIs
    report.html.j2      the page; figures.html.j2 draws figures as SVG, report.css is its style

No script, no address: the page forbids the browser to load or run anything (its Content-Security-Policy).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2

from esd.evaluation import words
from esd.evaluation.report import figures, page
from esd.evaluation.runs import Run, Sweep
from esd.evaluation.sweep import short

MARK = '<meta name="generator" content="esd.report">'  # by which a report is known as one


def render(runs: Sequence[Run], sweeps: Sequence[Sweep] = ()) -> str:
    """The report of some runs and sweeps, as HTML; their pictures are read here.

    Raises:
        UserError: the images.csv of an evaluation cannot be read.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"percent": words.percent, "points": words.points, "title": words.title, "mark": MARK}
    environment.globals |= {"short": short, "shapes": figures.SHAPES, "most_lost": page.MOST_LOST}
    html = environment.get_template("report.html.j2").render(page=page.make(runs, sweeps))
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", html)  # of arguments that are no UTF-8


def is_report(path: Path) -> bool:
    """Whether a file is a report, which another may replace."""
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(2000)
    except OSError:
        return False
