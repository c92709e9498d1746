"""What layers do with the text: they read another prompt, or another run's seed, or weigh their own.

`esd.analysis.layers` says what the formulas are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esd.interventions import CrossSeed, InjectText, Op, Scale, Source

from . import estimates, figures
from .edits import (
    ACROSS,
    KINDS,
    Rows,
    Study,
    band,
    column,
    draw_windows,
    mean_of,
    picked,
    seen,
    selection,
    short,
    told,
    told_rate,
    where,
    windows,
)

ENOUGH = 0.8  # of what all layers together do: what a window must do to be suggested
LITTLE = 0.2  # what all layers together must do at least for anything to be suggested


def with_other_prompts(study: Study, few: np.ndarray, lengths: Sequence[int]) -> Rows:
    """Has windows of layers read another prompt: injection.csv, injection.png, injection-pictures.png.

    All layers together are among them, whatever the lengths: what a window does is held against that. `towards` says
    where a picture lies between the two prompts' own: 0 at its own, 1 at the other's.
    """
    names = [short(site) for site in study.readers]
    every = list(dict.fromkeys([*windows(len(names), lengths), (0, len(names) - 1)]))
    texts = [study.texts[i] for i in few]
    rows: Rows = []
    for version, plain in study.plain.items():
        targets = study.of_others(version, few)
        for first, last in every:
            edited = study.injected(version, few, first, last)
            for kind, other_kind, images, target in zip(KINDS, KINDS[::-1], edited, targets, strict=True):
                own, other = plain.moved(images, few), study.subject.distance(target, images) / plain.unit
                asked = [study.others[kind][text] for text in texts]
                own_read, other_read = (seen(study.subject, images, prompts) for prompts in (texts, asked))
                rows.append(
                    {
                        "version": version, "swap": kind, "first": names[first], "last": names[last],
                        "length": last - first + 1, "towards": float(np.mean(own / np.maximum(own + other, 1e-9))),
                        **renamed(other_read, kind, "other"), **renamed(own_read, kind, "own"),
                        **renamed(own_read, other_kind, "rest"), "n": len(few),
                    }
                )  # fmt: skip
    study.results.table("injection", rows)
    for kind in KINDS:
        mine = [row for row in rows if row["swap"] == kind]
        by = measure(mine)
        unit = {
            "towards": "place between the prompts (0 own, 1 other)",
            "other": f"judge sees the other {kind} (share)",
        }
        draw_windows(
            study, f"injection-{kind}", mine, by, names, unit[by], f"Layers that read a prompt with another {kind}",
            f"{carried(mine, by, kind)} n = {len(few)} for each window; {told(study)}.",
        )  # fmt: skip
    draw_injected(study, few, every, rows)
    return rows


def renamed(read: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    """The `rate` of a kind under another name."""
    return {f"{name}{end}": read[f"{kind}{end}"] for end in ("", "_low", "_high", "_n")}


def measure(rows: Rows) -> str:
    """The column that says what layers carry: shares where somebody reads pictures, else places between prompts."""
    return "towards" if rows[0]["other"] is None else "other"


def carried(rows: Rows, by: str, kind: str) -> str:
    """What all layers do to base pictures when they read the other prompt, and which of them it takes."""
    base = [row for row in rows if row["version"] == "base"]
    whole, few = together(base), shortest(base, by)
    alone = max((row for row in base if row["length"] == 1 < whole["length"]), key=lambda row: row[by], default=None)
    what = f"the judge sees the other {kind} in" if by == "other" else "the picture lies between the prompts at"
    text = f"Where {whole['first']} to {whole['last']} read the other prompt, {what} {told_measure(whole, by)}"
    if alone:
        text += f"; one layer alone does {alone[by]:.2f} at most ({alone['first']})"
    if few is None:
        return f"{text}. That is too little to say which layers it takes."
    if few is whole:
        return f"{text}. No shorter window that was tried does {ENOUGH:.0%} of that."
    span = few["first"] if few["length"] == 1 else f"{few['first']} to {few['last']}"
    return f"{text}. The shortest window tried that does {ENOUGH:.0%} of that is {span} ({told_measure(few, by)})."


def told_measure(row: dict[str, Any], by: str) -> str:
    """What a window does, with its interval where it is a share."""
    return told_rate(row, by) if by == "other" else f"{row[by]:.2f}"


def together(base: Rows) -> dict[str, Any]:
    """The row of all layers."""
    return max(base, key=lambda row: row["length"])


def shortest(base: Rows, by: str) -> dict[str, Any] | None:
    """The shortest window that does nearly what all layers do; None where that is next to nothing."""
    most = together(base)[by]
    enough = [row for row in base if row[by] >= ENOUGH * most]
    return min(enough, key=lambda row: (row["length"], -row[by], -row["towards"])) if most >= LITTLE else None


def draw_injected(study: Study, few: np.ndarray, every: Sequence[tuple[int, int]], rows: Rows) -> None:
    """Draws a picture for every single layer, every window from the first and every window to the last."""
    names = [short(site) for site in study.readers]
    places, last, there = picked(range(len(names)), ACROSS - 2), len(names) - 1, set(every)
    own, targets = study.plain["base"].images[few[0]], study.of_others("base", few)
    rules = {"this layer": lambda i: (i, i), "up to it": lambda i: (0, i), "from it on": lambda i: (i, last)}
    grid, labels = [], []
    for number, kind in enumerate(KINDS):
        for name, rule in rules.items():
            cells = [
                study.injected("base", few, *rule(i))[number][0] if rule(i) in there else np.zeros_like(own)
                for i in places
            ]
            grid.append([own, *cells, targets[number][0]])
            labels.append(f"other {kind},\n{name}")
    figure = figures.pictures(
        np.array(grid), rows=labels, columns=["unedited", *(names[i] for i in places), "other"],
        title=f"Layers that read another prompt: {study.texts[few[0]]!r}",
    )  # fmt: skip
    asked = " and ".join(repr(study.others[kind][study.texts[few[0]]]) for kind in KINDS)
    study.results.figure(
        "injection-pictures", figure,
        f"{study.texts[few[0]]!r}, whose layers read {asked}: one layer alone, all up to it, all from it on. "
        f"{' '.join(half_way(rows, kind, names) for kind in KINDS)} n = {len(few)} for each; {told(study)}.",
    )  # fmt: skip


def half_way(rows: Rows, kind: str, names: Sequence[str]) -> str:
    """From which layer on, and up to which, base pictures have to read the other prompt to show it half of the time."""
    mine = [row for row in rows if (row["version"], row["swap"]) == ("base", kind)]
    by = measure(mine)
    enough = [row for row in mine if row[by] >= 0.5]
    up_to = [names.index(row["last"]) for row in enough if row["first"] == names[0]]
    from_on = [names.index(row["first"]) for row in enough if row["last"] == names[-1]]
    what = (
        f"The other {kind} is seen in half of the pictures"
        if by == "other"
        else f"Pictures are half way to the other {kind}"
    )
    if not up_to or not from_on:
        return f"{what} in no window from the first layer or to the last."
    if min(up_to) == len(names) - 1 and not max(from_on):
        return f"{what} where all layers read it, and in no shorter window tried from the first or to the last."
    return f"{what} once all layers up to {names[min(up_to)]} read it, or all from {names[max(from_on)]} on."


def suggest(study: Study, rows: Rows) -> None:
    """Suggests what to train, to erase a thing or a style: suggestion.csv, and a note for each.

    The shortest window of the base whose layers, reading another prompt, do nearly all that all of them do; none where
    that is next to nothing.
    """
    names, suggested = [short(site) for site in study.readers], []
    for kind in KINDS:
        mine = [row for row in rows if row["swap"] == kind and row["version"] == "base"]
        by, whole, best = measure(mine), together(mine), shortest(mine, measure(mine))
        told: dict[str, Any] = {"erase": kind, "measure": by, "all": whole[by], "n": whole["n"]}
        told |= dict.fromkeys(("selection", "first", "last", "found", "rest", "parameters", "of_esd_x"))
        suggested.append(told)
        if best is None:
            study.results.note(
                f"No selection is suggested to erase a {kind}: with all {len(names)} layers that read the text reading "
                f"another prompt, {told_measure(whole, by)} of the {kind} comes with it (n = {whole['n']})."
            )
            continue
        chosen = study.readers[names.index(best["first"]) : names.index(best["last"]) + 1]
        found, every = study.family.select(selection(study.family, chosen)), study.family.select("esd_x")
        told |= {"selection": found.expression, "first": best["first"], "last": best["last"], "found": best[by],
                 "rest": best["rest"], "parameters": found.numel, "of_esd_x": found.numel / every.numel}  # fmt: skip
        study.results.note(
            f"To erase a {kind}, try 'selection=\"{found.expression}\"': {len(chosen)} of the {len(names)} layers that "
            f"read the text carry {told_measure(best, by)} of the {kind}, all together {told_measure(whole, by)} "
            f"(n = {best['n']}); {found.numel:,} parameters, {found.numel / every.numel:.0%} of esd_x."
        )
    study.results.table("suggestion", suggested)


def from_a_layer_on(study: Study, few: np.ndarray) -> Rows:
    """Has all layers from one on read two other prompts, from two other seeds: start.csv, start.png.

    What the picture then depends on: how far it moves with the other prompt, and with the other run's seed. A UNet's
    text has passed through nothing, so that there is no seed in it.
    """
    last = len(study.readers) - 1
    names, runs = [short(site) for site in study.readers], range(2 if study.flows else 1)
    rows: Rows = []
    for version, plain in study.plain.items():
        for i in range(last + 1):
            drawn = np.array([study.injected(version, few, i, last, run) for run in runs])  # (seed, kind, n, ...)

            def apart(one: np.ndarray, other: np.ndarray, unit: float = plain.unit) -> np.ndarray:
                return study.subject.distance(one, other) / unit

            far = {
                "own": [plain.moved(images, few) for run in drawn for images in run],
                "prompt": [apart(*run) for run in drawn],
                "seed": [apart(*kind) for kind in drawn.swapaxes(0, 1)] if study.flows else [],
            }
            told_of = [of_each_picture(name, several) for name, several in far.items()]
            rows.append({"version": version, "start": names[i]} | told_of[0] | told_of[1] | told_of[2])
    study.results.table("start", rows)
    curves = {"from the unedited picture": "own", "between two other prompts": "prompt"}
    curves |= {"between two seeds of the other run": "seed"} if study.flows else {}
    figure, axes = figures.panels(1, len(study.plain), title="Another prompt's text, from one layer on", height=4.4)
    for ax, version in zip(axes, study.plain, strict=True):
        mine = [row for row in rows if row["version"] == version]
        figures.lines(
            ax, range(len(names)), {name: column(mine, key) for name, key in curves.items()},
            x_name="first layer that reads it", y_name="distance (1 = as far as another prompt's)",
            title=version if len(study.plain) > 1 else "", ticks=names,
            spread={name: band(mine, key) for name, key in curves.items()},
        )  # fmt: skip
        figures.from_zero(ax)
    counts = ", ".join(f"{rows[0][f'{key}_of']} {name}" for name, key in curves.items())
    study.results.figure(
        "start", figure,
        f"{depends(rows)} Bands: 95% intervals, of n = {len(few)} pictures for each start and curve; of each picture "
        f"the mean of so many distances: {counts}. {told(study)}.",
    )  # fmt: skip
    return rows


def of_each_picture(name: str, several: Sequence[np.ndarray]) -> dict[str, float | None]:
    """{name, name_low, name_high, name_n, name_of}: the mean of distances over n pictures, each with as many of them.

    Args:
        name: of the distances.
        several: distances (n,), of the same pictures each; none where there are none.
    """
    if not several:
        return dict.fromkeys([f"{name}{end}" for end in ("", "_low", "_high", "_n", "_of")])
    found = estimates.mean(np.mean(several, axis=0))
    return found.row(name) | {f"{name}_n": found.n, f"{name}_of": len(several)}


def depends(rows: Rows) -> str:
    """What base pictures depend on, the later the other text comes in; what of it counts more, where that is shown."""
    base = [row for row in rows if row["version"] == "base"]
    first, last = base[0], base[-1]
    text = (
        f"From {first['start']} on, two other prompts leave pictures {estimates.told(first, 'prompt')} apart; in "
        f"{last['start']} alone {estimates.told(last, 'prompt')}. "
    )
    if last["seed"] is None:
        return text + "No text flows from layer to layer here, so that the other run's seed plays no part."
    text += f"Two seeds of the other run leave them {estimates.told(first, 'seed')} apart from the first layer on and "
    text += f"{estimates.told(last, 'seed')} in the last: "
    for more, less in (("seed", "prompt"), ("prompt", "seed")):
        if last[f"{less}_high"] is not None and last[f"{less}_high"] < last[f"{more}_low"]:
            return f"{text}towards the end it is the {more} of the other run that counts more."
    return f"{text}which of the two counts more towards the end is not shown."


def with_another_seed(study: Study, few: np.ndarray) -> Rows:
    """Adds to every layer's input what another noise would get there: cross-seed.csv, cross-seed.png."""
    places = {short(site): site.expression for site in study.layers} | {"all": where(study.layers)}
    texts = [study.texts[i] for i in few]
    rows: Rows = []
    drawn = [study.plain["base"].images[few]]
    for version, plain in study.plain.items():
        for i, (name, place) in enumerate(places.items()):

            def make(run: Source, taking: tuple[int, ...], place: str = place) -> Op:
                return CrossSeed(place, source=run, rows=taking)

            images = study.taking(version, f"seed-{i}", few, [None], make)
            drawn += [images] if version == "base" else []
            found = mean_of(plain.moved(images, few)) | seen(study.subject, images, texts)
            rows.append({"version": version, "layer": name} | found | {"n": len(few)})
    study.results.table("cross-seed", rows)
    base = [row for row in rows if row["version"] == "base"]
    figure = figures.wrapped(
        [[images[0] for images in drawn]], ["unedited", *(f"{row['layer']}\n{row['moved']:.2f}" for row in base)],
        title=f"Layers that add what they add for another noise: {texts[0]!r}",
    )  # fmt: skip
    *alone, every = base
    worst = max(alone, key=lambda row: row["moved"])
    study.results.figure(
        "cross-seed", figure,
        "The number is the mean distance to the unedited picture (1 = as far as another prompt's). One layer alone "
        f"moves it by {np.mean([row['moved'] for row in alone]):.2f} on average"
        + (f", {worst['layer']} most ({worst['moved']:.2f})" if len(alone) > 1 else "")
        + f"; all together by {every['moved']:.2f}. n = {len(few)} each; {told(study)}.",
    )  # fmt: skip
    return rows


def with_weighed_text(study: Study, few: np.ndarray, weights: Sequence[float]) -> Rows:
    """Weighs what layers make of the text, one and all of them: weights.csv, weights.png."""
    places = {short(site): site.expression for site in study.readers} | {"all": where(study.readers)}
    rows: Rows = []
    grid: list[list[np.ndarray]] = []
    for version, plain in study.plain.items():
        for weight in weights:
            cells = []
            for name, place in places.items():

                def make(run: Source, taking: tuple[int, ...], place: str = place, w: float = weight) -> Op:
                    if study.flows:
                        return InjectText(place, source=run, weight=w, flow=False, rows=taking)
                    return Scale(place, activation=w, rows=taking)

                same = not study.flows and weight == 1
                images = plain.images[few] if same else study.taking(
                    version, f"weight-{weight:g}-{name}", few, KINDS[:1], make
                )  # fmt: skip
                cells.append(images[0])
                rows.append(
                    {"version": version, "weight": weight, "layer": name} | mean_of(plain.moved(images, few))
                    | seen(study.subject, images, [study.texts[i] for i in few]) | {"n": len(few)}
                )  # fmt: skip
            grid += [cells] if version == "base" else []
    study.results.table("weights", rows)
    shown = picked(range(len(places)), ACROSS)
    figure = figures.pictures(
        np.array([[cells[i] for i in shown] for cells in grid]), rows=[f"w = {weight:g}" for weight in weights],
        columns=[list(places)[i] for i in shown],
        title=f"{'Another prompt’s text' if study.flows else 'Cross-attention'}, weighed: {study.texts[few[0]]!r}",
    )  # fmt: skip
    means = {w: np.mean([r["moved"] for r in rows if (r["version"], r["weight"]) == ("base", w)]) for w in weights}
    moved = ", ".join(f"{mean:.2f} at w = {weight:g}" for weight, mean in means.items())
    what = "w weighs what the layer adds to the text" if study.flows else "w weighs what cross-attention adds"
    study.results.figure(
        "weights",
        figure,
        f"{what}; pictures move by {moved}, on average over layers. n = {len(few)} each; {told(study)}.",
    )
    return rows
