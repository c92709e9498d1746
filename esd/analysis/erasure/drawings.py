"""The figures of an erasure, each with a caption worked out from what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from esd.analysis import figures
from esd.analysis.results import Results
from esd.evaluation.metrics import wilson

from . import locate
from .gaze import GROUPS, Gaze
from .leak import Probe
from .locate import Difference
from .restore import Restored

MOST_PANELS = 4  # kinds of part that get a heat map of their own
SEEN = 0.05  # R below which nothing came back
TAUGHT = {
    "synonym": "taught its name,\ntested by other words",
    "name": "taught other words,\ntested by its name",
    "image": "taught and tested\nby pictures",
}  # fmt: skip


def where(results: Results, concept: str, found: Sequence[Difference]) -> None:
    """A heat map over layers and steps for each kind of part, those that differ most."""
    kinds: dict[str, list[Difference]] = {}
    for one in found:
        kinds.setdefault(one.part.site.part or "other", []).append(one)
    peak = {kind: max(d.relative for d in several) for kind, several in kinds.items()}
    shown = sorted(kinds, key=lambda kind: -peak[kind])[:MOST_PANELS]
    steps = sorted({d.step for d in found})
    most = max(peak.values())
    rows = max(len({d.part.layer for d in kinds[kind]}) for kind in shown)
    figure, axes = figures.panels(
        (len(shown) + 1) // 2, min(2, len(shown)), height=max(3.0, 0.3 * rows + 1.2),
        title=f"What each part of the model without “{concept}” says otherwise, given the base's inputs",
    )  # fmt: skip
    for ax, kind in zip(axes, shown, strict=False):
        layers = list(dict.fromkeys(d.part.layer for d in kinds[kind]))
        matrix = np.full((len(layers), len(steps)), np.nan)
        for d in kinds[kind]:
            place = layers.index(d.part.layer), d.step
            matrix[place] = np.nanmax([matrix[place], d.relative])
        figures.heat(
            ax, matrix, rows=layers, columns=[step + 1 for step in steps], y_name="", x_name="sampling step",
            unit="difference, share of the base's", title=kind, limits=(0.0, most),
        )  # fmt: skip
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    means = locate.means(found)
    ranked = sorted(means, key=lambda label: -means[label])
    by_step = [np.mean([d.relative for d in found if d.step == step]) for step in steps]
    results.figure(
        "where", figure,
        f"The largest differences are in {listed(ranked[:3], means)}; the smallest in {listed(ranked[-2:], means)}. "
        f"Over the steps the mean goes from {by_step[0]:.2f} (first, most noise) to {by_step[-1]:.2f} (last).",
    )  # fmt: skip


def moved(results: Results, concept: str, target: Sequence[Difference], retained: Sequence[Difference]) -> None:
    """Per layer: how far weights moved, and the difference on target and on retained prompts."""
    layers = list(dict.fromkeys(d.part.layer for d in target))
    parts = {d.part.site.label: d.part for d in target}
    on, off = locate.means(target), locate.means(retained)

    def largest(values: Mapping[str, float], layer: str) -> float:
        return max(value for label, value in values.items() if parts[label].layer == layer)

    weights = np.array([largest({label: part.moved for label, part in parts.items()}, layer) for layer in layers])
    both = {
        f"prompts for “{concept}”": np.array([largest(on, layer) for layer in layers]),
        "others of its kind": np.array([largest(off, layer) for layer in layers]),
    }
    figure, axes = figures.panels(
        1, 2, height=max(3.5, 0.3 * len(layers) + 1.4), title="How far weights moved, and what that does to the outputs"
    )
    figures.bars(axes[0], layers, {"": 100 * weights}, x_name="change of weights, % of the base's")
    figures.bars(axes[1], layers, both, x_name="difference, share of the base's")
    axes[1].set_yticklabels([])
    selective = locate.selectivity(target, retained)
    ranked = sorted(selective, key=lambda label: -selective[label])
    agree = float(np.corrcoef(weights, both[f"prompts for “{concept}”"])[0, 1]) if len(layers) > 2 else float("nan")
    results.figure(
        "weights", figure,
        f"Of every layer its most changed part. Weights moved most in {layers[int(weights.argmax())]} "
        f"({weights.max():.1%}); over layers the size of the change and of the difference correlate with {agree:.2f}. "
        f"Most selective, target over others: {listed(ranked[:3], selective)}; least: "
        f"{listed(ranked[-2:], selective)}.",
    )  # fmt: skip


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
        spread = {} if value is _restoration else {
            name: tuple(np.array([_interval(r) for r in several]).T) for name, several in by.items()
        }  # fmt: skip
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
        reach = None if value is _restoration else {
            group: np.abs(np.array([_interval(r) for r in several]).T - values[group]) for group, several in by.items()
        }  # fmt: skip
        figures.bars(ax, labels if ax is axes[0] else [""] * len(labels), values, x_name=name, spread=reach)
        if reach:
            ax.set_xlim(0, 101)
        if legend := ax.get_legend():
            handles, texts = ax.get_legend_handles_labels()
            legend.remove()
            if ax is axes[0]:  # one for all panels, as wide as they are together
                figure.legend(handles, texts, loc="outside lower center", ncols=len(by), frameon=False)
    results.figure(file, figure, caption)


def attention(
    results: Results, concept: str, tokens: Sequence[str], seen: Gaze, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Maps of the first prompt's tokens, before, after and their difference, and what moved over all prompts."""
    words = [i for i, token in enumerate(tokens) if token]
    maps = [seen.base[0, words].numpy(), seen.erased[0, words].numpy()]
    change = maps[1] - maps[0]
    high, reach = max(float(found.max()) for found in maps), float(np.abs(change).max())
    with figures.style():
        figure = Figure(figsize=(figures.WIDTH, 3.9), layout="constrained")
        axes = figure.subplots(3, len(words), squeeze=False)
        for row, (name, found, look) in enumerate((
            ("base", maps[0], {"cmap": figures.MAP, "vmin": 0.0, "vmax": high}),
            ("erased", maps[1], {"cmap": figures.MAP, "vmin": 0.0, "vmax": high}),
            ("change", change, {"cmap": figures.SIGNED, "vmin": -reach, "vmax": reach}),
        )):  # fmt: skip
            for column, (ax, word) in enumerate(zip(axes[row], words, strict=True)):
                image = ax.imshow(found[column], interpolation="nearest", **look)
                ax.set(xticks=[], yticks=[])
                ax.grid(visible=False)
                if not row:
                    ax.set_title(tokens[word], fontsize=10)
                if not column:
                    ax.set_ylabel(name, rotation=0, ha="right", va="center")
            figure.colorbar(image, ax=axes[row], label="attention" if row < 2 else "after - before")
        figure.suptitle(f"Where the picture attends to each word, before and after “{concept}” was erased")
    by_group = {
        group: [[row[side] for row in rows if row["tokens"] == group] for side in ("base", "erased")]
        for group in GROUPS
    }  # fmt: skip
    sentence = "; ".join(
        f"{group} {100 * np.mean(before):.1f}% to {100 * np.mean(after):.1f}%"
        for group, (before, after) in by_group.items()
    )  # fmt: skip
    results.figure(
        "attention", figure,
        f"Mean over steps, layers and heads, of “{seen.prompts[0]}”. Over {len(seen.prompts)} prompts, of the "
        f"picture's attention to its text: {sentence}.",
    )  # fmt: skip


def leak(results: Results, concept: str, found: Sequence[Probe]) -> None:
    """What probes read off each layer, by what came in."""
    sources, models = (list(dict.fromkeys(getattr(p, slot) for p in found)) for slot in ("source", "model"))
    labels = list(dict.fromkeys(p.layer for p in found))
    figure, axes = figures.panels(
        1, len(sources), height=4.9, title=f"What a linear probe reads off each layer: “{concept}” or not"
    )
    said = []
    for ax, source in zip(axes, sources, strict=True):
        by = {model: [p for p in found if p.source == source and p.model == model] for model in models}
        figures.lines(
            ax, range(len(labels)), {model: np.array([100 * p.k / p.n for p in here]) for model, here in by.items()},
            x_name="", y_name="right, %" if ax is axes[0] else "", title=TAUGHT[source],
            spread={model: _band(here) for model, here in by.items()},
        )  # fmt: skip
        ax.axhline(50, color=figures.GREY, linestyle=":", linewidth=1)
        ax.set_xticks(range(len(labels)), labels, rotation=90)
        ax.set_ylim(0, 102)
        counts = {model: sorted(p.k for p in here) for model, here in by.items()}
        ranges = ", ".join(
            f"{model} {ks[0]} to {ks[-1]}, median {ks[len(ks) // 2]}" for model, ks in counts.items()
        )  # fmt: skip
        said.append(f"{TAUGHT[source].replace(chr(10), ' ')} (of {by[models[0]][0].n}): {ranges}")
    results.figure(
        "leak", figure,
        f"Right answers over the layers: {'; '.join(said)}. Chance is half; what a probe reads off the shuffled model "
        "is known to the text encoder or seen in the picture, not known to the denoiser.",
    )  # fmt: skip


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
    by_chance = f"; {count} layers drawn by chance: {', '.join(_brief(r) for r in chance)}" if chance else ""
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


def listed(labels: Sequence[str], values: Mapping[str, float]) -> str:
    """Labels with their values."""
    return ", ".join(f"{label} ({values[label]:.2f})" for label in labels)


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


def _best(begin: str, found: Sequence[Restored], none: str) -> str:
    """Which brings back most, in a sentence that says so where nothing does."""
    best = max(found, key=_height)
    if not best.k and best.restoration < SEEN:
        return f"{none} brings anything back (R {best.restoration:.2f} at most)."
    return f"{begin} {best.where} brings back most: {_said(best)}."


def _said(result: Restored) -> str:
    """R, and the rate with its interval."""
    if result.k is None:
        return f"R {result.restoration:.2f}"
    low, high = _interval(result)
    return f"R {result.restoration:.2f}, {result.k} of {result.n} (95% interval {low:.0f} to {high:.0f}%)"


def _brief(result: Restored) -> str:
    """The rate, or without a judge R."""
    return f"R {result.restoration:.2f}" if result.k is None else f"{result.k} of {result.n}"


def _band(found: Sequence[Probe]) -> tuple[np.ndarray, np.ndarray]:
    low, high = zip(*(wilson(p.k, p.n) for p in found), strict=True)
    return 100 * np.array(low), 100 * np.array(high)
