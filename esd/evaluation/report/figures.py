"""Figures as geometry: where lines, points and words of a plot go. `figures.html.j2` draws them as SVG.

Coordinates are those of a small canvas, so that words stay readable on a phone; colours are names that the page's
style sheet gives a value to, in the light and in the dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 28, 44  # margins around the axes
LETTER, LINE = 6.4, 13  # width of a letter and height of a line of a label
MAX_TICKS = 6
FLAT = 1e-9  # of the size of numbers, or of 1: what differs less is one number on an axis
SHAPES = ("circle", "square", "diamond", "triangle")

Place = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A line with its points.

    Attributes:
        name: for the legend.
        colour: "c1" to "c4" of the style sheet.
        points: (x, y), in order of x.
        bounds: (low, high) of each point's y; empty for none.
        dashed: as controls are.
        words: what each point says when it is pointed at; empty for none.
        dots: whether points are marked.
    """

    name: str
    colour: str
    points: Sequence[Place]
    bounds: Sequence[Place] = ()
    dashed: bool = False
    words: Sequence[str] = ()
    dots: bool = True


@dataclass(frozen=True)
class Dot:
    """A point of a scatter, with an interval along both axes.

    Attributes:
        label: beside it, where there is room.
        words: said when it is pointed at.
        group: number of the colour and the shape.
        strong: whether it is the one to look at.
    """

    x: float
    y: float
    x_bounds: Place
    y_bounds: Place
    label: str
    words: str
    group: int = 0
    strong: bool = False


@dataclass
class Plot:
    """What the template draws; all in the canvas' coordinates, y down."""

    title: str
    about: str
    x_name: str
    y_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve] = field(default_factory=list)
    bands: list[tuple[str, list[Place]]] = field(default_factory=list)
    cloud: list[Place] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    front: list[Place] = field(default_factory=list)
    labels: list[tuple[float, float, str, str, bool]] = field(default_factory=list)  # x, y, anchor, text, strong
    legend: list[tuple[str, str, bool, str]] = field(default_factory=list)  # name, colour, dashed, shape or ""
    width: int = WIDTH
    height: int = HEIGHT
    box: tuple[float, float, float, float] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high` onto the canvas, with ticks inside."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value, clipped to the axis."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, text: Callable[[float], str]) -> list[tuple[float, str]]:
        """(place, words) of the round numbers on the axis."""
        return [(self(value), text(value)) for value in ticks(self.low, self.high)]


def step_of(low: float, high: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that makes at most MAX_TICKS - 1 steps of a range."""
    rough = (high - low) / (MAX_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= rough * (1 - 1e-9))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high], at most MAX_TICKS, evenly spaced."""
    step = step_of(low, high)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def widened(values: Sequence[float], least: float = 0.0, most: float = math.inf) -> tuple[float, float]:
    """A range of whole steps that holds all values and is not empty, inside [least, most] where they are."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high), 1.0)
    if high - low <= FLAT * size:
        low, high = low - 0.05 * size, high + 0.05 * size
    step = step_of(low, high)
    low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
    return (low if min(values) < least else max(low, least)), (high if max(values) > most else min(high, most))


def lines(
    title: str,
    curves: Sequence[Curve],
    *,
    x_name: str,
    y_name: str,
    y_range: tuple[float, float] | None = None,
    y_text: Callable[[float], str] = "{:g}".format,
    about: str = "",
    cloud: Sequence[Place] = (),
) -> Plot:
    """Curves over one pair of axes, on a cloud of faint points; x begins at 0 where all x are positive and near it."""
    places = [*cloud, *(point for curve in curves for point in curve.points)]
    xs, ys = [x for x, _ in places], [y for _, y in places]
    x_low, x_high = widened([*xs, 0] if 0 <= min(xs) < max(xs) / 2 else xs)
    across = Axis(x_low, x_high, LEFT, WIDTH - RIGHT)
    up = Axis(*(y_range or widened([*ys, 0])), HEIGHT - BOTTOM, TOP)
    placed, bands = [], []
    for curve in curves:
        where = [(across(x), up(y)) for x, y in curve.points]
        placed.append(Curve(curve.name, curve.colour, where, (), curve.dashed, curve.words, curve.dots))
        if curve.bounds:
            high = [(x, up(top)) for (x, _), (_, top) in zip(where, curve.bounds, strict=True)]
            low = [(x, up(bottom)) for (x, _), (bottom, _) in zip(where, curve.bounds, strict=True)]
            bands.append((curve.colour, [*high, *reversed(low)]))
    legend = [(curve.name, curve.colour, curve.dashed, "") for curve in curves]
    return Plot(
        title, about, x_name, y_name, across.ticks("{:g}".format), up.ticks(y_text), placed, bands,
        cloud=[(across(x), up(y)) for x, y in cloud], legend=legend,
    )  # fmt: skip


def scatter(
    title: str,
    dots: Sequence[Dot],
    front: Sequence[int],
    groups: Sequence[str],
    *,
    x_name: str,
    y_name: str,
    text: Callable[[float], str],
    about: str = "",
) -> Plot:
    """Points with their intervals, and the line through those that no other beats.

    Args:
        title: of the figure.
        dots: rates, at least one.
        front: numbers of dots on that line, in order along it.
        groups: names of the colours, or none.
        x_name, y_name: of the axes.
        text: words for a rate.
        about: the figure in a sentence, for those who cannot see it.
    """
    across = Axis(*widened([dot.x for dot in dots], 0, 1), LEFT, WIDTH - RIGHT)
    up = Axis(*widened([dot.y for dot in dots], 0, 1), HEIGHT - BOTTOM, TOP)
    placed = [
        Dot(
            across(dot.x), up(dot.y),
            (across(dot.x_bounds[0]), across(dot.x_bounds[1])), (up(dot.y_bounds[0]), up(dot.y_bounds[1])),
            dot.label, dot.words, dot.group % len(SHAPES), dot.strong,
        )
        for dot in dots
    ]  # fmt: skip
    corners = []
    for one, two in pairwise(placed[i] for i in front):
        corners += [(one.x, one.y), (two.x, one.y)]
    line = [*corners, (placed[front[-1]].x, placed[front[-1]].y)] if front else []
    legend = [(name, f"c{i % len(SHAPES) + 1}", False, SHAPES[i % len(SHAPES)]) for i, name in enumerate(groups)]
    return Plot(
        title, about, x_name, y_name, across.ticks(text), up.ticks(text),
        dots=placed, front=line, labels=labels(placed), legend=legend,
    )  # fmt: skip


def labels(dots: Sequence[Dot]) -> list[tuple[float, float, str, str, bool]]:
    """(x, y, anchor, text, strong) of the labels for which there is room, the strong ones first."""
    boxes = [(dot.x - 7, dot.y - 7, dot.x + 7, dot.y + 7) for dot in dots]
    found = []
    for dot in sorted(dots, key=lambda dot: not dot.strong):
        wide = LETTER * len(dot.label)
        for x, y, anchor, left in (
            (dot.x + 11, dot.y + 4, "start", dot.x + 11),
            (dot.x - 11, dot.y + 4, "end", dot.x - 11 - wide),
            (dot.x, dot.y - 12, "middle", dot.x - wide / 2),
            (dot.x, dot.y + 21, "middle", dot.x - wide / 2),
        ):
            box = (left, y - LINE + 2, left + wide, y + 2)
            inside = box[0] > LEFT and box[2] < WIDTH and box[1] > TOP and box[3] < HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                found.append((round(x, 2), round(y, 2), anchor, dot.label, dot.strong))
                break
    return found


def _overlap(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
