"""The look of figures: legible 900 pixels wide, the same to all eyes, every axis named.

Figures are made without a display and without matplotlib's global state. `panels` gives a figure and its axes; `lines`,
`bars`, `heat` and `pictures` draw into one of them. Whatever else is drawn is drawn inside `with style():`.

Source: colours of Okabe and Ito, "Color universal design" (2008).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, StrMethodFormatter

WIDTH = 9.0  # inches, 900 pixels where a page shows 100 to an inch
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MAP, SIGNED = "viridis", "PuOr"  # of values from 0 upwards, and of values of both signs
GREY, INK = "#7a7a7a", "#222222"
_STYLE: Any = {
    "font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "legend.fontsize": 10, "figure.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS), "axes.grid": True, "grid.color": "#e3e3e3",
    "axes.axisbelow": True, "image.cmap": MAP, "legend.frameon": False, "lines.linewidth": 1.8,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """The look, for the length of a `with` block."""
    with matplotlib.rc_context(_STYLE):
        yield


def panels(
    rows: int = 1, columns: int = 1, *, title: str, height: float = 4.0, width: float = WIDTH
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row.

    Args:
        rows: of panels.
        columns: of panels.
        title: above all.
        height: of a row, in inches.
        width: of the figure, in inches.
    """
    with style():
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        figure.suptitle(title)
    return figure, list(axes.flat)


def lines(
    ax: Axes,
    x: Sequence[float],
    curves: Mapping[str, np.ndarray],
    *,
    x_name: str,
    y_name: str,
    title: str = "",
    spread: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    ticks: Sequence[str] | None = None,
) -> None:
    """Draws curves over x, with a legend where there are several.

    Args:
        ax: to draw into.
        x: (n,) places.
        curves: name to (n,) values.
        x_name: label with unit.
        y_name: label with unit.
        title: of the panel.
        spread: name to the lower and upper end of a band around its curve, (n,) each.
        ticks: names of the places, in place of numbers.
    """
    with style():
        for number, (name, y) in enumerate(curves.items()):
            colour, dashes = COLOURS[number % len(COLOURS)], ("-", "--", "-.", ":")[number % 4]
            ax.plot(x, y, dashes, color=colour, marker="o", markersize=4, label=name)
            if spread and name in spread:
                ax.fill_between(x, *spread[name], color=colour, alpha=0.15, linewidth=0)
        ax.set(xlabel=x_name, ylabel=y_name, title=title)
        if ticks:
            each = -(-len(ticks) // 24)
            ax.set_xticks(x[::each], ticks[::each], rotation=90)
        if len(curves) > 1:
            ax.legend()


def from_zero(ax: Axes) -> None:
    """Has an axis of values from 0 upwards begin there, with room above the largest."""
    ax.set_ylim(0, 1.12 * max(float(ax.dataLim.y1), 1e-9))


def plain_numbers(axis: Axis) -> None:
    """0.2 and 3 along a logarithmic axis, in place of powers of ten; only those that begin with 1, 2, 3 or 5."""
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "235" else ""))


def bars(
    ax: Axes,
    names: Sequence[str],
    values: Mapping[str, np.ndarray],
    *,
    x_name: str,
    title: str = "",
    spread: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Draws bars from left to right, a group for each name, the first at the top.

    Args:
        ax: to draw into.
        names: n labels.
        values: name of a bar in each group to (n,) values.
        x_name: label with unit.
        title: of the panel.
        spread: name of a bar to half the width of its interval (n,), or to how far it reaches below and above (2, n).
    """
    with style():
        places, thick = np.arange(len(names)), 0.8 / len(values)
        for number, (name, found) in enumerate(values.items()):
            at = places + (number - (len(values) - 1) / 2) * thick
            error = spread[name] if spread else None
            ax.barh(at, found, thick, label=name, color=COLOURS[number % len(COLOURS)], xerr=error, ecolor=INK)
        ax.set_yticks(places, names)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set(xlabel=x_name, title=title)
        if len(values) > 1:
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(values))


def heat(
    ax: Axes,
    matrix: np.ndarray,
    *,
    rows: Sequence[Any],
    columns: Sequence[Any],
    y_name: str,
    x_name: str,
    unit: str,
    title: str = "",
    signed: bool = False,
    limits: tuple[float, float] | None = None,
    tell: bool = False,
) -> None:
    """Draws a matrix as colours with a scale beside it; what is nan stays white.

    Args:
        ax: to draw into.
        matrix: (rows, columns).
        rows: label of each row, from the top.
        columns: label of each column; where they would overlap, every second or third is shown.
        y_name: label.
        x_name: label.
        unit: label of the scale.
        title: of the panel.
        signed: whether values of both signs are shown, around 0.
        limits: ends of the scale; None for those of the values.
        tell: whether to write the values into their cells.
    """
    with style():
        known = matrix[np.isfinite(matrix)]
        low, high = limits or ((float(known.min()), float(known.max())) if known.size else (0.0, 1.0))
        if signed:
            reach = max(abs(low), abs(high), 1e-12)
            norm: Normalize = TwoSlopeNorm(0.0, -reach, reach)
        else:
            norm = Normalize(low, high if high > low else low + 1)
        image = ax.imshow(matrix, cmap=SIGNED if signed else MAP, norm=norm, aspect="auto", interpolation="nearest")
        ax.grid(visible=False)
        each = -(-len(columns) // 24)
        ax.set_xticks(range(0, len(columns), each), [str(name) for name in columns[::each]])
        if max((len(str(name)) for name in columns), default=0) > 4:
            ax.tick_params(axis="x", rotation=90)
        each = -(-len(rows) // 40)
        ax.set_yticks(range(0, len(rows), each), [str(name) for name in rows[::each]])
        ax.set(xlabel=x_name, ylabel=y_name, title=title)
        scale = ax.get_figure().colorbar(image, ax=ax, label=unit)  # type: ignore[union-attr]
        scale.outline.set_visible(False)
        if tell:
            for (row, column), value in np.ndenumerate(matrix):
                if np.isfinite(value):
                    red, green, blue, _ = image.cmap(norm(value))
                    ink = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
                    ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=10)


def pictures(
    images: np.ndarray,
    *,
    title: str,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    labels: Sequence[Sequence[str]] | None = None,
    row_name: str = "",
    column_name: str = "",
    width: float = WIDTH,
) -> Figure:
    """A grid of pictures.

    Args:
        images: uint8 RGB (rows, columns, H, W, 3); a picture of zeros is an empty place.
        title: above all.
        rows: label beside each row.
        columns: label above each column.
        labels: a line above each picture, in place of labels of columns.
        row_name: what the rows are.
        column_name: what the columns are.
        width: of the figure, in inches.
    """
    count, across, high, wide = images.shape[:4]
    told = ["\n".join(textwrap.fill(part, 20) for part in name.split("\n")) for name in rows or ()]
    left = (
        0.1 + 0.085 * max((len(line) for name in told for line in name.split("\n")), default=0) + 0.25 * bool(row_name)
    )
    cell = (width - left) / across
    tall, longest = cell * high / wide, max(map(len, columns), default=0) if columns else 0
    slanted = 0.085 * longest > cell
    line = 0.06 + 0.18 * max(name.count("\n") + 1 for names in labels for name in names) if labels else 0.0
    head = (0.22 + 0.05 * longest * slanted if columns else 0.0) + 0.33
    height = head + count * (tall + line) + 0.05 + 0.25 * bool(column_name)
    with style():
        figure = Figure(figsize=(width, height))
        for (row, column), _ in np.ndenumerate(np.empty((count, across))):
            corner = left + column * cell, height - head - row * (tall + line) - line - tall
            size = 0.95 * cell / width, 0.95 * tall / height
            ax = figure.add_axes((corner[0] / width, corner[1] / height, *size), xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.spines[:].set_visible(False)
            if images[row, column].any():
                ax.imshow(images[row, column], interpolation="nearest")
            if labels and labels[row][column]:
                ax.set_title(labels[row][column], fontsize=10, pad=3)
            elif columns and not row:
                turn: dict[str, Any] = {"rotation": 35, "ha": "left"} if slanted else {}
                x = 0.3 if slanted else 0.5
                ax.text(x, 1.04, columns[column], fontsize=10, transform=ax.transAxes, **{"ha": "center"} | turn)
            if rows and not column:
                ax.set_ylabel(told[row], rotation=0, ha="right", va="center", fontsize=10)
        figure.suptitle(title, y=1 - 0.05 / height, va="top")
        figure.text((left + width) / 2 / width, 0.06 / height, column_name, ha="center", fontsize=11)
        figure.text(
            0.12 / width, 0.5 * (1 - head / height), row_name, rotation=90, ha="center", va="center", fontsize=11
        )
    return figure


def wrapped(
    series: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    *,
    title: str,
    rows: Sequence[str] | None = None,
    across: int = 8,
) -> Figure:
    """Rows of labelled pictures, each broken into lines as text is.

    Args:
        series: pictures, uint8 RGB (H, W, 3) each; as many in each series as there are labels.
        labels: above each picture.
        title: above all.
        rows: what each series is, above its first line.
        across: most pictures in a line.
    """
    count = -(-len(labels) // across)  # lines, as evenly filled as can be
    across = -(-len(labels) // count)
    blank = np.zeros_like(series[0][0])
    fill = count * across - len(labels)
    grid = np.array([[*images, *[blank] * fill] for images in series])
    names = [*labels, *[""] * fill]
    lines_of = [names[i : i + across] for i in range(0, len(names), across)] * len(series)
    return pictures(
        grid.reshape(count * len(series), across, *blank.shape), title=title, labels=lines_of,
        rows=[name if not line else "" for name in rows for line in range(count)] if rows else None,
        width=min(WIDTH, 2.0 + 1.4 * across),  # few pictures are no larger than many
    )  # fmt: skip
