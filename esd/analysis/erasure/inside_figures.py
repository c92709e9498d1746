"""The figures of what is measured inside an erased model: its parts, where it looks, what a probe reads off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from esd.analysis import estimates, figures
from esd.analysis.estimates import Estimate
from esd.analysis.results import Results
from esd.evaluation.metrics import wilson

from . import locate
from .gaze import GROUPS, Gaze
from .leak import Probe
from .locate import Difference

MOST_PANELS = 4  # kinds of part that get a heat map of their own
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
    ranked = sorted(means, key=lambda label: -means[label].value)
    first, last = (
        estimates.mean(np.mean([d.each for d in found if d.step == step], axis=0)) for step in (steps[0], steps[-1])
    )
    results.figure(
        "where", figure,
        f"The largest differences are in {listed(ranked[:3], means)}; the smallest in {listed(ranked[-2:], means)}. "
        f"Over the steps the mean goes from {first.told()} (first, most noise) to {last.told()} (last). {over(first)}",
    )  # fmt: skip


def moved(results: Results, concept: str, target: Sequence[Difference], retained: Sequence[Difference]) -> None:
    """Per layer: how far weights moved, and the difference on target and on retained prompts."""
    layers = list(dict.fromkeys(d.part.layer for d in target))
    parts = {d.part.site.label: d.part for d in target}
    on, off = locate.means(target), locate.means(retained)

    def largest(values: Mapping[str, Estimate]) -> list[Estimate]:
        return [
            max((one for label, one in values.items() if parts[label].layer == layer), key=lambda one: one.value)
            for layer in layers
        ]

    weights = np.array([max(part.moved for part in parts.values() if part.layer == layer) for layer in layers])
    both = {f"prompts for “{concept}”": largest(on), "others of its kind": largest(off)}
    shown = {name: np.array([one.value for one in found]) for name, found in both.items()}
    reach = {name: np.array([one.half for one in found], float) for name, found in both.items()}
    figure, axes = figures.panels(
        1, 2, height=max(3.5, 0.3 * len(layers) + 1.4), title="How far weights moved, and what that does to the outputs"
    )
    figures.bars(axes[0], layers, {"": 100 * weights}, x_name="change of weights, % of the base's")
    figures.bars(axes[1], layers, shown, x_name="difference, share of the base's", spread=reach)
    axes[1].set_yticklabels([])
    selective = locate.selectivity(target, retained)
    ranked = sorted(selective, key=lambda label: -selective[label].value)
    agree = estimates.correlation(weights, next(iter(shown.values())))
    together = (
        f"; over n = {agree.n} layers the size of the change and of the difference correlate with {agree.told()}"
        if agree else ""
    )  # fmt: skip
    results.figure(
        "weights", figure,
        f"Of every layer its most changed part. Weights moved most in {layers[int(weights.argmax())]} "
        f"({weights.max():.1%}){together}. "
        f"Most selective, target over others: {listed(ranked[:3], selective)}; least: "
        f"{listed(ranked[-2:], selective)}. {over(next(iter(on.values())))}",
    )  # fmt: skip


def attention(
    results: Results, concept: str, tokens: Sequence[str], seen: Gaze, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Maps of the first prompt's words, before, after and their difference, and the masses of all tokens by group."""
    words = [i for i, token in enumerate(tokens) if token]
    maps = [seen.base[0, words].numpy(), seen.erased[0, words].numpy()]
    change = maps[1] - maps[0]
    high, reach = max(float(found.max()) for found in maps), float(np.abs(change).max())
    with figures.style():
        figure = Figure(figsize=(figures.WIDTH, 6.0), layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(3.6, 2.4)).flat
        axes = upper.subplots(3, len(words), squeeze=False)
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
            upper.colorbar(image, ax=axes[row], label="attention" if row < 2 else "after - before")
        figure.suptitle(f"Where the picture attends to each word, before and after “{concept}” was erased")
        bars = lower.subplots()
    by_side = {
        side: [estimates.mean([100 * row[side] for row in rows if row["tokens"] == group]) for group in GROUPS]
        for side in ("base", "erased", "moved")
    }
    figures.bars(
        bars, ["no word: start,\nend, padding" if group == GROUPS[-1] else group for group in GROUPS],
        {side: np.array([one.value for one in by_side[side]]) for side in ("base", "erased")},
        x_name="share of all attention to the text, %",
        spread={side: np.array([one.half for one in by_side[side]], float) for side in ("base", "erased")},
    )  # fmt: skip
    sentence = "; ".join(
        f"{group} {before.told(1)}% to {after.told(1)}%, changed by {change.told(1)} points"
        for group, before, after, change in zip(GROUPS, *by_side.values(), strict=True)
    )
    results.figure(
        "attention", figure,
        f"Mean over steps, layers and heads. The maps are of the words of “{seen.prompts[0]}”, without start, end and "
        f"padding, which the bars have. Over {len(seen.prompts)} prompts, of the picture's attention to its text: "
        f"{sentence}. {over(by_side['base'][0])}",
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


def listed(labels: Sequence[str], values: Mapping[str, Estimate]) -> str:
    """Labels with their values."""
    return ", ".join(f"{label} ({values[label].told()})" for label in labels)


def over(one: Estimate) -> str:
    """What intervals are over, in a sentence; nothing where there are none."""
    return "" if one.low is None else f"In brackets 95% intervals over n = {one.n} prompts."


def _band(found: Sequence[Probe]) -> tuple[np.ndarray, np.ndarray]:
    low, high = zip(*(wilson(p.k, p.n) for p in found), strict=True)
    return 100 * np.array(low), 100 * np.array(high)
