"""The figures of an erasure, each with a caption worked out from what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
MODELS = {"base": "base", "erased": "erased"}


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
    """Restoration and rate over the depth, of each layer alone, all up to it, all but it, and its contribution."""
    labels = list(dict.fromkeys(r.where for r in found))
    rates = found[0].k is not None
    figure, axes = figures.panels(
        2 if rates else 1, 1, height=4.2, title=f"What brings “{concept}” back: the base's weights, layer by layer"
    )
    names = {
        "layer": "this layer alone", "up to layer": "all up to this layer", "all but layer": "all but this layer",
        "contribution": "this layer's output, as in the base's run",
    }  # fmt: skip
    for ax, value, y_name in zip(
        axes,
        (_restoration, _rate),
        ("restoration R of the base's picture", f"pictures of “{concept}”, %"),
        strict=False,
    ):
        curves = {
            name: np.array([next((value(r) for r in found if r.kind == kind and r.where == label), np.nan)
                            for label in labels])
            for kind, name in names.items()
        }  # fmt: skip
        figures.lines(ax, range(len(labels)), curves, x_name="", y_name=y_name)
        ax.set_xticks(range(len(labels)), labels, rotation=90)
        if ax is not axes[-1]:
            ax.set_xticklabels([])
    alone = sorted((r for r in found if r.kind == "layer"), key=lambda r: -r.restoration)
    needed = sorted((r for r in found if r.kind == "all but layer"), key=lambda r: r.restoration)
    results.figure(
        "layers", figure,
        f"{told(ends)} Alone, {alone[0].where} brings back most (R {alone[0].restoration:.2f}{_share(alone[0])}); "
        f"missed most among all others is {needed[0].where} (without it R {needed[0].restoration:.2f}"
        f"{_share(needed[0])}).",
    )  # fmt: skip


def steps(results: Results, concept: str, ends: Sequence[Restored], found: Sequence[Restored]) -> None:
    """Restoration and rate by the steps in which the base's weights are in."""
    rates = found[0].k is not None
    figure, axes = figures.panels(1, 2 if rates else 1, title="The base's weights in some of the sampling steps")
    windows = [r.where for r in found if r.kind == "steps"]
    for ax, value, x_name in zip(
        axes, (_restoration, _rate), ("restoration R", f"pictures of “{concept}”, %"), strict=False
    ):
        groups = {
            name: np.array([value(r) for r in found if r.kind == kind])
            for kind, name in (("steps", "in these"), ("first steps", "up to these"), ("last steps", "from these on"))
        }  # fmt: skip
        figures.bars(ax, windows, groups, x_name=x_name)
        ax.set_ylabel("steps" if ax is axes[0] else "")
    best = max((r for r in found if r.kind == "steps"), key=lambda r: (r.k or 0, r.restoration))
    results.figure(
        "steps", figure,
        f"{told(ends)} A single window brings back most at {best.where} of the steps (R {best.restoration:.2f}"
        f"{_share(best)}).",
    )  # fmt: skip


def parts(results: Results, concept: str, ends: Sequence[Restored], found: Sequence[Restored]) -> None:
    """Restoration by kind of part, alone and missing."""
    roles = list(dict.fromkeys(r.where for r in found))
    alone, needed = ([r for r in found if r.kind == kind] for kind in ("part", "all but part"))
    figure, (ax,) = figures.panels(
        title="The base's weights in one kind of part, over the whole depth", height=max(3.5, 0.42 * len(roles) + 1.2)
    )
    figures.bars(
        ax, roles,
        {"in this alone": np.array([r.restoration for r in alone]),
         "in all but this": np.array([r.restoration for r in needed])},
        x_name="restoration R of the base's picture",
    )  # fmt: skip
    best, missed = max(alone, key=lambda r: r.restoration), min(needed, key=lambda r: r.restoration)
    results.figure(
        "parts", figure,
        f"{told(ends)} Of one kind of part alone, {best.where} brings back most (R {best.restoration:.2f}"
        f"{_share(best)}); without {missed.where} least comes back (R {missed.restoration:.2f}{_share(missed)}).",
    )  # fmt: skip


def mechanism(results: Results, concept: str, ends: Sequence[Restored], found: Sequence[Restored]) -> None:
    """Restoration by the base's probabilities, values or both."""
    if not found:
        return
    rates = found[0].k is not None
    figure, axes = figures.panels(1, 2 if rates else 1, title="The base's attention in the erased model", height=3.8)
    names = [f"{r.kind}: {r.where}" for r in found]
    for ax, value, x_name in zip(
        axes, (_restoration, _rate), ("restoration R", f"pictures of “{concept}”, %"), strict=False
    ):
        figures.bars(ax, names, {"": np.array([value(r) for r in found])}, x_name=x_name)
        if ax is not axes[0]:
            ax.set_yticklabels([])
    sentences = []
    for kind, group in groupby(found, key=lambda r: r.kind):
        by = {r.where: r for r in group}
        told_by = ", ".join(f"{name} R {r.restoration:.2f}{_share(r)}" for name, r in by.items())
        sentences.append(f"{kind[0].upper()}{kind[1:]}: {told_by}.")
    results.figure("mechanism", figure, f"{told(ends)} {' '.join(sentences)}")


def heads(results: Results, concept: str, found: Sequence[Restored]) -> None:
    """Restoration by single heads of the attentions in the fewest layers."""
    if not found:
        return
    figure, (ax,) = figures.panels(
        title="The base's weights in one head", height=max(2.8, 0.32 * len(found) + 1.1)
    )  # fmt: skip
    figures.bars(
        ax, [r.where for r in found], {"": np.array([r.restoration for r in found])}, x_name="restoration R"
    )  # fmt: skip
    best = max(found, key=lambda r: r.restoration)
    results.figure(
        "heads", figure,
        f"Of {len(found)} heads in the layers that bring “{concept}” back together, {best.where} brings back most on "
        f"its own: R {best.restoration:.3f}{_share(best)}.",
    )  # fmt: skip


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
    sources = list(dict.fromkeys(p.source for p in found))
    labels = list(dict.fromkeys(p.layer for p in found))
    titles = {"name": "asked by name", "synonym": "asked by another word", "image": "shown a picture"}
    figure, axes = figures.panels(
        1, len(sources), height=4.6, title=f"What a linear probe reads off each layer: “{concept}” or not"
    )
    said = []
    for ax, source in zip(axes, sources, strict=True):
        here = [p for p in found if p.source == source]
        curves = {m: np.array([100 * p.k / p.n for p in here if p.model == m]) for m in MODELS}
        spread = {m: _band([p for p in here if p.model == m]) for m in MODELS}
        figures.lines(
            ax, range(len(labels)), curves, x_name="", y_name="right, %" if ax is axes[0] else "",
            title=titles[source], spread=spread,
        )  # fmt: skip
        ax.axhline(50, color=figures.GREY, linestyle=":", linewidth=1)
        ax.set_xticks(range(len(labels)), labels, rotation=90)
        ax.set_ylim(35, 102)
        best = {m: max((p for p in here if p.model == m), key=lambda p: p.k) for m in MODELS}
        said.append(
            f"{titles[source]}: at best {best['base'].k}/{best['base'].n} right in the base ({best['base'].layer}), "
            f"{best['erased'].k}/{best['erased'].n} in the erased model ({best['erased'].layer})"
        )
    results.figure("leak", figure, f"{'; '.join(said)}. Chance is half.")


def pictures(results: Results, concept: str, shown: Mapping[str, np.ndarray], fewest: Restored, selection: str) -> None:
    """The pictures of base, erased model and grafts, from the same noise."""
    images = np.stack(list(shown.values()))[:, :8]
    figure = figures.pictures(images, title=f"“{concept}”, from the same noise", rows=list(shown))
    results.figure(
        "pictures", figure,
        f"The base's weights in {fewest.where} alone bring it back in {_count(fewest)}. What was trained there: "
        f"selection='{selection}'.",
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


def _restoration(result: Restored) -> float:
    return result.restoration


def _rate(result: Restored) -> float:
    return 100 * (result.k or 0) / result.n


def _share(result: Restored) -> str:
    return "" if result.k is None else f", {result.k} of {result.n}"


def _count(result: Restored) -> str:
    return f"R {result.restoration:.2f}" if result.k is None else f"{result.k} of {result.n} pictures"


def _band(found: Sequence[Probe]) -> tuple[np.ndarray, np.ndarray]:
    low, high = zip(*(wilson(p.k, p.n) for p in found), strict=True)
    return 100 * np.array(low), 100 * np.array(high)
