"""The figures of what brings a concept back, each with a caption worked out from what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from esd.analysis import figures
from esd.analysis.estimates import told as told_mean
from esd.analysis.results import Results
from esd.evaluation.metrics import wilson

from .fewest import shared
from .restore import Restored

SEEN = 0.05  # R below which nothing came back


def layers(results: Results, concept: str, ends: Sequence[Restored], found: Sequence[Restored]) -> None:
    """Restoration and rate over the depth: the base's weights in each layer alone, and in all but it."""
    names = {"layer": "in this layer alone", "all but layer": "in all but this layer"}
    labels = list(dict.fromkeys(r.where for r in found))
    measures = _measures(found)
    figure, axes = figures.panels(
        len(measures), 1, height=4.2, title=f"What brings “{concept}” back: the base's weights, layer by layer"
    )
    for ax, (value, y_name) in zip(axes, measures, strict=True):
        by = {name: [r for r in found if r.kind == kind] for kind, name in names.items()}
        spread = {name: _ends(several, value) for name, several in by.items()}
        curves = {name: np.array([value(r) for r in several]) for name, several in by.items()}
        figures.lines(ax, range(len(labels)), curves, x_name="", y_name=y_name, spread=spread)
        ax.set_xticks(range(len(labels)), labels, rotation=90)
        if ax is not axes[-1]:
            ax.set_xticklabels([])
    alone = max((r for r in found if r.kind == "layer"), key=_height)
    needed = min((r for r in found if r.kind == "all but layer"), key=_height)
    results.figure(
        "layers", figure,
        f"{told(ends)} {_best('Of layers alone,', [alone], 'No layer alone')} Missed most among all others is "
        f"{needed.where}: without it {_said(needed)}.",
    )  # fmt: skip


def windows(
    results: Results, concept: str, ends: Sequence[Restored], found: Sequence[Restored], what: str, file: str
) -> None:
    """Restoration and rate by the first and the last layer that has `what` of the base."""
    firsts, lasts = (list(dict.fromkeys(r.where.split(" to ")[side] for r in found)) for side in (0, 1))
    measures = _measures(found)
    figure, axes = figures.panels(
        1, len(measures), height=4.6, title=f"What brings “{concept}” back: the base's {what} in a run of layers"
    )
    for ax, (value, name) in zip(axes, measures, strict=True):
        matrix = np.full((len(firsts), len(lasts)), np.nan)
        for r in found:
            first, last = r.where.split(" to ")
            matrix[firsts.index(first), lasts.index(last)] = value(r) / (1 if value is _restoration else 100)
        figures.heat(
            ax, matrix.round(2) + 0.0, rows=firsts if ax is axes[0] else [""] * len(firsts), columns=lasts,
            y_name="first layer" if ax is axes[0] else "", x_name="last layer", unit="",
            title=name if value is _restoration else "share of the pictures that show it",
            limits=(min(0.0, float(np.nanmin(matrix))), 1.0), tell=True,
        )  # fmt: skip
    upper = [r for r in found if r.where.startswith(f"{firsts[0]} to ")]
    lower = [r for r in found if r.where.endswith(f" to {lasts[-1]}")]
    rows = [
        f"from {name}: " + ", ".join(f"{r.where.split(' to ')[side]} {_brief(r)}" for r in several)
        for name, several, side in (("the first to this", upper, 1), ("this to the last", lower, 0))
    ]
    results.figure(file, figure, f"{told(ends)} The base's {what} in layers, {'; '.join(rows)}.")


def contributions(results: Results, concept: str, ends: Sequence[Restored], found: Sequence[Restored]) -> None:
    """Restoration and rate by what is patched: contributions of one layer, of a run of layers, of all in some steps."""
    by_layer, by_window, by_steps = (
        [r for r in found if r.kind == kind]
        for kind in ("contribution", "contributions of layers", "contributions in steps")
    )
    _bars(
        results, "contributions", f"Contributions of the base's own run in the model without “{concept}”",
        {"": [*by_layer, *(replace(r, where=f"all, steps {r.where}") for r in by_steps)]},
        f"{told(ends)} {_best('Of one layer,', by_layer, 'No one layer')} What is patched in was made in a run that "
        "draws the concept, and holds its picture: it tells where the picture goes through, and not only what was "
        "erased.",
    )  # fmt: skip
    windows(results, concept, ends, by_window, "contributions", "contributions-windows")


def steps(results: Results, concept: str, ends: Sequence[Restored], found: Sequence[Restored]) -> None:
    """Restoration and rate by the steps in which the base's weights are in."""
    names = {"steps": "in these", "first steps": "from the first to these", "last steps": "from these to the last"}
    by = {name: [r for r in found if r.kind == kind] for kind, name in names.items()}
    rows = [f"{name}, {', '.join(f'{r.where} {_brief(r)}' for r in several)}" for name, several in by.items()]
    windows = [r.where for r in by["in these"]]
    _bars(
        results, "steps", "The base's weights in some of the sampling steps", by,
        f"{told(ends)} Steps: {'; '.join(rows)}.", labels=[f"steps {where}" for where in windows],
    )  # fmt: skip


def parts(results: Results, concept: str, ends: Sequence[Restored], found: Sequence[Restored]) -> None:
    """Restoration and rate by kind of part, alone and missing."""
    by = {
        name: [r for r in found if r.kind == kind]
        for kind, name in (("part", "in this alone"), ("all but part", "in all but this"))
    }
    missed = min(by["in all but this"], key=_height)
    _bars(
        results, "parts", "The base's weights in one kind of part, over the whole depth", by,
        f"{told(ends)} {_best('Of one kind of part alone,', by['in this alone'], 'No kind of part alone')} Least comes "
        f"back without {missed.where}: {_said(missed)}.",
    )  # fmt: skip


def mechanism(results: Results, ends: Sequence[Restored], found: Sequence[Restored]) -> None:
    """Restoration and rate by the base's weights for where to look, for what is read there, and outside of both."""
    sentences = []
    for kind, group in groupby(found, key=lambda r: r.kind):
        sentences.append(f"{kind[0].upper()}{kind[1:]}: {'; '.join(f'{r.where} {_said(r)}' for r in group)}.")
    _bars(
        results, "mechanism", "The base's weights for where to look, and for what is read there",
        {"": [replace(r, where=f"{r.kind}: {r.where}") for r in found]}, f"{told(ends)} {' '.join(sentences)}",
    )  # fmt: skip


def heads(results: Results, concept: str, found: Sequence[Restored]) -> None:
    """Restoration and rate by single heads of the attentions in the fewest layers: their weights, what they add."""
    kinds = {"its weights": "head", "what it adds in the base's own run": "contribution of a head"}
    by = {name: [r for r in found if r.kind == kind] for name, kind in kinds.items()}
    weights, added = by.values()
    if found:
        _bars(
            results, "heads", f"What brings “{concept}” back: one head of the base", by,
            f"{len(weights)} heads that were trained, in the fewest layers. "
            f"{_best('By the weights of one head alone,', weights, 'No head alone, by its weights,')} "
            f"{_best('By what one head adds in a run of the base,', added, 'No head alone, by what it adds there,')}",
        )  # fmt: skip


def _bars(
    results: Results, file: str, title: str, by: Mapping[str, Sequence[Restored]], caption: str,
    labels: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """A panel for R and one for the rate, with a bar for each result of each group."""
    first = next(iter(by.values()))
    labels, measures = labels or [r.where for r in first], _measures(first)
    figure, axes = figures.panels(
        1, len(measures), title=title, height=max(3.0, (0.2 + 0.16 * len(by)) * len(labels) + 1.4)
    )
    for ax, (value, name) in zip(axes, measures, strict=True):
        values = {group: np.array([value(r) for r in several]) for group, several in by.items()}
        reach = {group: np.abs(np.array(_ends(several, value)) - values[group]) for group, several in by.items()}
        figures.bars(ax, labels if ax is axes[0] else [""] * len(labels), values, x_name=name, spread=reach)
        if value is _rate:
            ax.set_xlim(0, 101)
        if legend := ax.get_legend():
            handles, texts = ax.get_legend_handles_labels()
            legend.remove()
            if ax is axes[0]:  # one for all panels, as wide as they are together
                figure.legend(handles, texts, loc="outside lower center", ncols=len(by), frameon=False)
    results.figure(file, figure, caption)


def pictures(
    results: Results, concept: str, shown: Mapping[str, np.ndarray], fewest: Sequence[Restored], layers: int,
    selection: str,
) -> None:  # fmt: skip
    """The pictures of base, erased model and grafts, from the same noise.

    Args:
        results: gets the figure.
        concept: what was erased.
        shown: label of a row to its uint8 RGB pictures (n, H, W, 3).
        fewest: what the fewest layers bring back in these pictures, then what `fewest.held_out` says.
        layers: that were trained.
        selection: that names the fewest.
    """
    chosen, base, _, other, *chance = fewest
    images = np.stack(list(shown.values()))[:, :8]
    figure = figures.pictures(images, title=f"“{concept}”, from the same noise", rows=list(shown))
    count = len(chosen.where.split(" + "))
    sets = ", ".join(f"{r.where} ({shared(chosen, r)} of them shared) {_brief(r)}" for r in chance)
    by_chance = f"; {count} layers drawn by chance: {sets}" if chance else ""
    results.figure(
        "pictures", figure,
        f"The base's weights in {chosen.where} ({count} of {layers} layers): {_said(chosen)} of the pictures that they "
        f"were chosen by. From other seeds: {_said(other)}{by_chance}; the base: {_brief(base)}. What was trained in "
        f"them: 'selection=\"{selection}\"'.",
    )  # fmt: skip


def told(ends: Sequence[Restored]) -> str:
    """The two ends of the scale in a sentence."""
    base, erased = ends
    if base.k is None or erased.k is None:
        return f"n={base.n} pictures; no judge reads them."
    return f"Of {base.n} pictures the base shows it in {base.k}, the erased model in {erased.k}."


Measure = Callable[[Restored], float]


def _measures(found: Sequence[Restored]) -> list[tuple[Measure, str]]:
    """What is drawn of results, and its name: the rate only where a judge read them."""
    rates: list[tuple[Measure, str]] = [(_rate, "pictures that show it, %")] if found[0].k is not None else []
    return [(_restoration, "restoration R"), *rates]


def _restoration(result: Restored) -> float:
    return result.restoration


def _rate(result: Restored) -> float:
    return 100 * (result.k or 0) / result.n


def _height(result: Restored) -> tuple[int, float]:
    """By which results are ranked: what is seen before what is only nearer."""
    return result.k or 0, result.restoration


def _interval(result: Restored) -> tuple[float, float]:
    low, high = wilson(result.k or 0, result.n)
    return 100 * low, 100 * high


def _ends(found: Sequence[Restored], value: Measure) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper ends of intervals (found,), nan where there is none."""
    low, high = zip(
        *(_interval(r) if value is _rate else (r.restoration_low, r.restoration_high) for r in found), strict=True
    )
    return np.array(low, float), np.array(high, float)


def _best(begin: str, found: Sequence[Restored], none: str) -> str:
    """Which brings back most, in a sentence that says so where nothing does."""
    best = max(found, key=_height)
    if not best.k and best.restoration < SEEN:
        return f"{none} brings anything back (R {best.restoration:.2f} at most)."
    return f"{begin} {best.where} brings back most: {_said(best)}."


def _said(result: Restored) -> str:
    """R, and the rate, with their intervals."""
    r = f"R {told_mean(result.row(), 'restoration')}"
    if result.k is None:
        return r
    low, high = _interval(result)
    return f"{r}, {result.k} of {result.n} (95% interval {low:.0f} to {high:.0f}%)"


def _brief(result: Restored) -> str:
    """The rate, or without a judge R."""
    return f"R {result.restoration:.2f}" if result.k is None else f"{result.k} of {result.n}"
