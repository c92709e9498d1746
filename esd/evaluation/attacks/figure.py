"""Recovery against cost as a picture: a panel for each attack, erased beside base, attack beside control.

Drawn with Pillow and its built-in font, as previews are. Colours are two of Okabe and Ito's, which colour-blind eyes
tell apart; controls are dashed besides, so that the picture can be read in grey.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from esd.evaluation.recovered import READS, RUNS
from esd.storage import atomic

FINE = 4  # times finer than the layout that all is drawn, before it is reduced to half of that: smooth lines
WIDTH, HEIGHT, COLUMNS = 330, 210, 3  # of a panel's axes
LEFT, TOP, RIGHT, BOTTOM = 52, 46, 18, 52  # around them
HEAD, MARGIN = 92, 16
INK, FAINT, GRID, PAPER = (25, 25, 25), (105, 105, 105), (226, 226, 226), (255, 255, 255)
ERASED, BASE = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermilion and blue
LINES = {  # colour, dashed; the later ones are drawn over the others
    "base": (BASE, False),
    "base_control": (BASE, True),
    "erased": (ERASED, False),
    "erased_control": (ERASED, True),
}
HINTS = {"interrupt": "numbers: steps that the base takes", "hidden": "numbers: share of each edge that is hidden"}

Place = tuple[float, float]


def draw_recovery(path: Path, attacks: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Writes a PNG of the curves, atomically.

    Args:
        path: of the picture.
        attacks: by name, as `Recovery.told` and metrics.json have them; at least one.
        title: one line above everything.
    """
    columns = min(COLUMNS, len(attacks))
    rows = -(-len(attacks) // columns)
    across, down = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    size = (max(columns * across, 2 * across) + 2 * MARGIN, HEAD + rows * down + MARGIN)
    page = Image.new("RGB", (FINE * size[0], FINE * size[1]), PAPER)
    pen = _Pen(page)
    pen.text((MARGIN, MARGIN), title, 17)
    for i, (run, words) in enumerate(RUNS.items()):
        colour, dashed = LINES[run]
        x, y = MARGIN + 165 * i, MARGIN + 42
        pen.line([(x, y), (x + 34, y)], colour, dashed=dashed)
        pen.dot((x + 17, y), colour, hollow=dashed)
        pen.text((x + 42, y - 8), words, 13)
    pen.text((MARGIN, MARGIN + 56), "shaded: 95% intervals of the erased model's rates", 12, FAINT)
    for number, (name, told) in enumerate(attacks.items()):
        corner = (MARGIN + number % columns * across + LEFT, HEAD + number // columns * down + TOP)
        _panel(pen, corner, name, told)
    with atomic(path) as staged:
        page.resize((2 * size[0], 2 * size[1]), Image.Resampling.LANCZOS).save(staged, format="PNG", optimize=True)


class _Pen:
    """Draws in units of the layout on a page that is finer."""

    def __init__(self, page: Image.Image) -> None:
        self._pen = ImageDraw.Draw(page, "RGBA")

    def text(
        self, at: Place, text: str, size: int, colour: tuple[int, ...] = INK, *, anchor: str | None = None
    ) -> None:
        """Text from its upper left corner, or as Pillow's `anchor` says."""
        font = ImageFont.load_default(FINE * size)
        self._pen.text((FINE * at[0], FINE * at[1]), text, fill=colour, font=font, anchor=anchor)

    def line(self, places: Sequence[Place], colour: tuple[int, ...], *, width: float = 2, dashed: bool = False) -> None:
        """Straight lines from place to place."""
        for one, two in _dashes(places) if dashed else pairwise(places):
            ends = [FINE * value for value in (*one, *two)]
            self._pen.line(ends, fill=colour, width=round(FINE * width))

    def dot(self, at: Place, colour: tuple[int, ...], *, hollow: bool) -> None:
        """A disc, or a ring."""
        x, y, radius = FINE * at[0], FINE * at[1], FINE * 3.5
        box = (x - radius, y - radius, x + radius, y + radius)
        self._pen.ellipse(box, fill=PAPER if hollow else colour, outline=colour, width=round(1.6 * FINE))

    def band(self, low: Sequence[Place], high: Sequence[Place], colour: tuple[int, ...]) -> None:
        """A light surface between two lines."""
        around = [(FINE * x, FINE * y) for x, y in (*low, *reversed(high))]
        self._pen.polygon(around, fill=(*colour, 34))


def _panel(pen: _Pen, corner: Place, name: str, told: Mapping[str, Any]) -> None:
    """One attack's axes and curves; `corner` is where 100% and no cost meet."""
    left, top = corner
    reads = told["reads"]
    points = {run: told["curves"][run]["points"] for run in LINES}
    n = points["erased"][0]["alone"]["n"]
    ticks = _ticks(max(point["cost"] / n for run in LINES for point in points[run]))

    def place(point: Mapping[str, Any], rate: float) -> Place:
        return left + WIDTH * point["cost"] / n / ticks[-1], top + HEIGHT * (1 - rate)

    pen.text((left, top - 38), f"{name}: {READS[reads]}, {n} prompts", 15)
    hints = [HINTS[key] for key in points["erased"][-1]["tried"] if key in HINTS]
    for hint in hints:
        pen.text((left, top - 20), hint, 12, FAINT)
    for percent in range(0, 101, 25):
        y = top + HEIGHT * (1 - percent / 100)
        pen.line([(left, y), (left + WIDTH, y)], GRID, width=1)
        pen.text((left - 8, y), f"{percent}%", 12, FAINT, anchor="rm")
    for tick in ticks:
        pen.text((left + WIDTH * tick / ticks[-1], top + HEIGHT + 8), f"{tick:g}", 12, FAINT, anchor="mt")
    pen.text((left + WIDTH / 2, top + HEIGHT + 26), "evaluations per prompt", 12, FAINT, anchor="mt")
    for run in ("erased", "erased_control"):
        low, high = ([place(point, point[reads]["interval"][side]) for point in points[run]] for side in (0, 1))
        pen.band(low, high, LINES[run][0])
    for run, (colour, dashed) in LINES.items():
        places = [place(point, point[reads]["rate"]) for point in points[run]]
        pen.line(places, colour, dashed=dashed)
        for at in places:
            pen.dot(at, colour, hollow=dashed)
    for point in points["erased"] if hints else []:
        x, y = place(point, point[reads]["rate"])
        for value in point["tried"].values():
            pen.text((x, y + (18 if point[reads]["rate"] > 0.8 else -14)), f"{value:g}", 12, ERASED, anchor="mm")


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 up to at least `most`, 3 to 6 of them."""
    step = 1.0
    for step in (base * 10**power for power in range(9) for base in (1, 2, 5)):
        if most / step <= 5:
            break
    return [step * i for i in range(max(2, int(-(-most // step))) + 1)]


def _dashes(places: Sequence[Place], on: float = 6, off: float = 4) -> Iterator[tuple[Place, Place]]:
    """Pieces of a line with gaps between them, which run on around its corners."""
    walked = 0.0
    for (x0, y0), (x1, y1) in pairwise(places):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        at = -(walked % (on + off))  # where the dash at hand began, before this piece of line
        while at < length:
            begin, end = max(at, 0.0) / length, min(at + on, length) / length
            if begin < end:
                one, two = ((x0 + (x1 - x0) * share, y0 + (y1 - y0) * share) for share in (begin, end))
                yield one, two
            at += on + off
        walked += length
