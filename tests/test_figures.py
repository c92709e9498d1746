"""Geometry of figures: round ticks, everything inside the canvas, labels that do not cover each other."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esd.evaluation.report.figures import (
    HEIGHT,
    MAX_TICKS,
    WIDTH,
    Curve,
    Dot,
    Plot,
    labels,
    lines,
    scatter,
    ticks,
    widened,
)  # fmt: skip

NUMBERS = st.integers(-(10**6), 10**6).map(lambda thousandths: thousandths / 1000)
SHARES = st.floats(0, 1)
DOTS = st.lists(
    st.builds(
        lambda x, y, label: Dot(x, y, (max(0, x - 0.1), x), (y, min(1, y + 0.1)), label, label),
        SHARES, SHARES, st.text("abc =1", max_size=12),
    ), min_size=1, max_size=10,
)  # fmt: skip


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_ticks_are_few_round_and_inside(values: list[float]) -> None:
    low, high = widened(values)
    assert low <= min(values) and max(values) <= high and low < high
    found = ticks(low, high)
    assert 2 <= len(found) <= MAX_TICKS + 1
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in found)
    steps = [two - one for one, two in itertools.pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9), 6) in (1, 2, 5)


def places(plot: Plot) -> list[tuple[float, float]]:
    found = [point for curve in plot.curves for point in curve.points] + [p for _, band in plot.bands for p in band]
    found += plot.front + [(dot.x, dot.y) for dot in plot.dots] + [(x, y) for x, y, *_ in plot.labels]
    return found + [(x, y) for dot in plot.dots for x in dot.x_bounds for y in dot.y_bounds]


@given(DOTS)
def test_a_scatter_stays_on_its_canvas(dots: list[Dot]) -> None:
    plot = scatter("t", dots, list(range(len(dots))), [], x_name="x", y_name="y", text=str)
    assert len(plot.dots) == len(dots) and all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(plot))


@given(st.lists(st.tuples(st.floats(0, 1e5), SHARES), min_size=1, max_size=6))
def test_curves_and_their_bands_stay_on_the_canvas(points: list[tuple[float, float]]) -> None:
    curve = Curve("a", "c1", points, [(y / 2, (1 + y) / 2) for _, y in points])
    plot = lines("t", [curve], x_name="x", y_name="y", y_range=(0, 1))
    assert len(plot.bands[0][1]) == 2 * len(points)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(plot))


def test_more_is_further_right_and_further_up() -> None:
    plot = lines("t", [Curve("a", "c1", [(0, 0.0), (5, 0.5), (10, 1.0)])], x_name="x", y_name="y")
    (x0, y0), (x1, y1), (x2, y2) = plot.curves[0].points
    assert x0 < x1 < x2 and y0 > y1 > y2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.1)


def test_labels_do_not_cover_each_other_and_the_strong_one_stays() -> None:
    dots = [Dot(230 + i, 150, (0, 1), (0, 1), f"eta {i}", "", strong=i == 5) for i in range(6)]
    found = labels(dots)
    assert 1 <= len(found) < len(dots) and found[0][3:] == ("eta 5", True)
    assert len({(x, y) for x, y, *_ in found}) == len(found)
