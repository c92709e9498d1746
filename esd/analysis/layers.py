"""What each layer does for the picture: leave it out, have it read another prompt or another seed, weigh its text.

With z the image stream, p the text, c time and pooled prompt, and another run's tensors primed, on a block of a
transformer with two streams:

    left out         (z, p) -> (z, p)
    another prompt   (z, p) -> (z + f(z, p', c), p' + g(z, p', c)), in layers i to j
    another seed     (z, p) -> (z + f(z', p, c), p' + g(z', p, c)), the control: what is added fits another noise
    weighed text     (z, p) -> (z + f(z, p', c), p + w g(z, p', c))

A UNet's layers read the text and return none: there p' is the other prompt's encoding in every layer, and w weighs what
cross-attention adds, z + w f(z, p).

Source: antoniomari/diffusion-interpretability, which did this on FLUX.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esd.interventions import CrossSeed, InjectText, Op, Record, Scale, Source, sample
from esd.interventions.sites import STREAMS

from . import figures
from .edits import KINDS, Study, mean_of, picked, seen, selection, short, where, windows
from .results import Results
from .subject import Subject

SHOWN = 2  # prompts that figures of pictures show
ACROSS = 16  # most columns of such a figure
ENOUGH = 0.8  # of what all layers together do: what a window must do to be suggested
UNIT = "distance to the unedited picture\n(1 = as far as another prompt's)"

Rows = list[dict[str, Any]]


def analyse(
    subject: Subject,
    results: Results,
    *,
    prompts: Sequence[str],
    other_things: Sequence[str],
    other_styles: Sequence[str],
    pictures: int,
    window_pictures: int,
    lengths: Sequence[int],
    weights: Sequence[float],
) -> None:
    """Leaves what each layer does, in tables and figures; with a checkpoint of base and erased model.

    Args:
        subject: the model.
        results: gets tables and figures.
        prompts: drawn with and without edits.
        other_things: for each of `prompts` one that asks for another thing, otherwise alike.
        other_styles: for each of `prompts` one that asks for another style, otherwise alike.
        pictures: of each prompt, with single layers edited.
        window_pictures: of each prompt, with windows of layers edited; at most `pictures`.
        lengths: of windows; () is every length.
        weights: w.
    """
    others = [dict(zip(prompts, told, strict=True)) for told in (other_things, other_styles)]
    study = Study(subject, results, prompts, pictures, dict(zip(KINDS, others, strict=True)))
    few = study.first(window_pictures)
    without_layers(study)
    without_windows(study, few, lengths)
    suggest(study, with_other_prompts(study, few, lengths))
    from_a_layer_on(study, few)
    with_another_seed(study, few)
    with_weighed_text(study, few, weights)
    activations(study)


def without_layers(study: Study) -> Rows:
    """Leaves every layer out alone: vitality.csv, vitality.png, without.png."""
    names = [short(site) for site in study.layers]
    rows: Rows = []
    for version, plain in study.plain.items():
        for i in range(-1, len(study.layers)):
            images = plain.images if i < 0 else study.without(version, i, i)
            layer = {"layer": study.layers[i].label, "short": names[i]} if i >= 0 else {"layer": "", "short": "none"}
            found = mean_of(plain.moved(images)) | seen(study.subject, images, study.texts)
            rows.append({"version": version, "left_out": i} | layer | found | {"n": len(images)})
    study.results.table("vitality", rows)
    draw_vitality(study, rows)
    shown = study.first(1)[:SHOWN]
    base = [study.plain["base"].images, *(study.without("base", i, i) for i in range(len(names)))]
    figure = figures.wrapped(
        [[images[row] for images in base] for row in shown],
        ["unedited", *names],
        title="The picture with one layer left out",
        rows=[study.texts[row] for row in shown],
    )
    study.results.figure("without", figure, f"One picture of {told(study, shown)}, each time without one layer.")
    return rows


def draw_vitality(study: Study, rows: Rows) -> None:
    """Draws how far pictures move without each layer and what is still seen in them."""
    base = [row for row in rows if row["version"] == "base"]
    every = {version: [row for row in rows if row["version"] == version] for version in study.plain}
    alone = {version: found[1:] for version, found in every.items()}
    names = [row["short"] for row in base]
    judged = [kind for kind in KINDS if base[0][kind] is not None]
    figure, axes = figures.panels(
        1, 1 + bool(judged), title="What the picture loses with one layer left out", height=1.6 + 0.27 * len(names)
    )
    figures.bars(
        axes[0], names, {v: np.array([row["moved"] for row in found]) for v, found in every.items()}, x_name=UNIT,
        spread={v: np.array([row["interval"] for row in found]) for v, found in every.items()},
    )  # fmt: skip
    if judged:
        several = len(every) > 1
        shares = {
            f"{kind}, {version}" if several else kind: np.array([row[kind] for row in found])
            for version, found in every.items()
            for kind in judged
        }
        figures.bars(
            axes[1], names, shares, x_name="share of pictures in which the judge\nstill sees what was asked for"
        )
    order = sorted(alone["base"], key=lambda row: -row["moved"])
    most = ", ".join(f"{row['short']} ({row['moved']:.2f})" for row in order[:3])
    text = (
        f"Left out alone, {most} move the picture furthest and {order[-1]['short']} least ({order[-1]['moved']:.2f}). "
    )
    for kind in judged:
        lost = [f"{row['short']} ({row[kind]:.0%})" for row in alone["base"] if row[kind] < base[0][kind] / 2]
        text += (
            f"The judge sees the {kind} in {base[0][kind]:.0%} of the unedited pictures, and in less than half of that "
            f"without {', '.join(lost) or 'no single layer'}. "
        )
    study.results.figure("vitality", figure, f"{text}n = {base[0]['n']} for each layer; {told(study)}.")


def without_windows(study: Study, few: np.ndarray, lengths: Sequence[int]) -> Rows:
    """Leaves consecutive layers out: windows.csv, windows.png, windows-pictures.png."""
    names, texts = [short(site) for site in study.layers], [study.texts[i] for i in few]
    every = list(windows(len(names), lengths))
    rows: Rows = []
    for version, plain in study.plain.items():
        for first, last in every:
            images = study.without(version, first, last, few)
            span = {"first": names[first], "last": names[last], "length": last - first + 1}
            found = mean_of(plain.moved(images, few)) | seen(study.subject, images, texts)
            rows.append({"version": version} | span | found | {"n": len(few)})
    study.results.table("windows", rows)
    draw_windows(
        study, "windows", rows, "moved", names, UNIT.replace("\n", " "), "Consecutive layers left out",
        f"{furthest(rows)} n = {len(few)} for each window; {told(study)}.",
    )  # fmt: skip
    spans, starts = (picked(sorted({key(w) for w in every}), ACROSS) for key in (lambda w: w[1] - w[0], lambda w: w[0]))
    there, blank = set(every), np.zeros_like(study.plain["base"].images[0])
    grid = [[study.without("base", i, i + d, few)[0] if (i, i + d) in there else blank for i in starts] for d in spans]
    figure = figures.pictures(
        np.array(grid), title=f"Consecutive layers left out: {texts[0]!r}", rows=[f"{d + 1}" for d in spans],
        columns=[names[i] for i in starts], row_name="layers left out", column_name="the first of them",
    )  # fmt: skip
    study.results.figure("windows-pictures", figure, f"One picture of {texts[0]!r} without each window of layers.")
    return rows


def furthest(rows: Rows) -> str:
    """Which shortest window moves base pictures at least as far as another prompt would."""
    far = [row for row in rows if row["version"] == "base" and row["moved"] >= 1]
    if not far:
        return "No window moves the picture as far as another prompt does."
    best = min(far, key=lambda row: (row["length"], -row["moved"]))
    return (
        f"The shortest window without which the picture moves as far as another prompt's has {best['length']} "
        f"layer{'s' * (best['length'] > 1)}, {best['first']} to {best['last']} ({best['moved']:.2f})."
    )


def with_other_prompts(study: Study, few: np.ndarray, lengths: Sequence[int]) -> Rows:
    """Has windows of layers read another prompt: injection.csv, injection.png, injection-pictures.png.

    `towards` says where a picture lies between the two prompts' own: 0 at its own, 1 at the other's.
    """
    names = [short(site) for site in study.readers]
    every, texts = list(windows(len(names), lengths)), [study.texts[i] for i in few]
    rows: Rows = []
    for version, plain in study.plain.items():
        targets = study.of_others(version, few)
        for first, last in every:
            edited = study.injected(version, few, first, last)
            for kind, other_kind, images, target in zip(KINDS, KINDS[::-1], edited, targets, strict=True):
                own, other = plain.moved(images, few), study.subject.distance(target, images) / plain.unit
                asked = [study.others[kind][text] for text in texts]
                rows.append(
                    {
                        "version": version, "swap": kind, "first": names[first], "last": names[last],
                        "length": last - first + 1, "towards": float(np.mean(own / np.maximum(own + other, 1e-9))),
                        "other": seen(study.subject, images, asked)[kind],
                        "own": seen(study.subject, images, texts)[kind],
                        "rest": seen(study.subject, images, texts)[other_kind], "n": len(few),
                    }
                )  # fmt: skip
    study.results.table("injection", rows)
    for kind in KINDS:
        mine = [row for row in rows if row["swap"] == kind]
        by = "towards" if mine[0]["other"] is None else "other"
        unit = {
            "towards": "place between the prompts (0 own, 1 other)",
            "other": f"judge sees the other {kind} (share)",
        }
        draw_windows(
            study, f"injection-{kind}", mine, by, names, unit[by], f"Layers that read a prompt with another {kind}",
            f"{carried(mine, by, kind)} n = {len(few)} for each window; {told(study)}.",
        )  # fmt: skip
    draw_injected(study, few, every)
    return rows


def carried(rows: Rows, by: str, kind: str) -> str:
    """Which layer alone turns most base pictures into the other prompt's, and what all do."""
    base = [row for row in rows if row["version"] == "base"]
    whole, best = max(base, key=lambda row: row["length"]), max(base, key=lambda row: (row["length"] == 1, row[by]))
    what = f"sees the other {kind} in" if by == "other" else "lies between the prompts at"
    who = "the judge" if by == "other" else "the picture"
    return (
        f"Where {whole['first']} to {whole['last']} read the other prompt, {who} {what} {whole[by]:.2f}; where one "
        f"layer does, at most {best[by]:.2f} ({best['first']})."
    )


def draw_injected(study: Study, few: np.ndarray, every: Sequence[tuple[int, int]]) -> None:
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
        f"{study.texts[few[0]]!r}, whose layers read {asked}: one layer alone, all up to it, all from it on.",
    )  # fmt: skip


def suggest(study: Study, rows: Rows) -> None:
    """Suggests what to train, to erase a thing or a style: suggestion.csv, and a note for each.

    The shortest window of the base whose layers, reading another prompt, do nearly all that all of them do.
    """
    names, suggested = [short(site) for site in study.readers], []
    for kind in KINDS:
        mine = [row for row in rows if row["swap"] == kind and row["version"] == "base"]
        by = "towards" if mine[0]["other"] is None else "other"
        most = max(row[by] for row in mine)
        enough = [row for row in mine if row[by] >= ENOUGH * most]
        best = min(enough, key=lambda row: (row["length"], -row[by], -row["towards"]))
        chosen = study.readers[names.index(best["first"]) : names.index(best["last"]) + 1]
        found = study.family.select(selection(study.family, chosen))
        whole = study.family.select("esd_x")
        suggested.append(
            {"erase": kind, "selection": found.expression, "first": best["first"], "last": best["last"],
             "measure": by, "found": best[by], "most": most, "rest": best["rest"], "n": best["n"],
             "parameters": found.numel, "of_esd_x": found.numel / whole.numel}
        )  # fmt: skip
        study.results.note(
            f"To erase a {kind}, try selection='{found.expression}': these {len(chosen)} of {len(names)} layers that "
            f"read the text carry {best[by]:.2f} of the {kind}, all together {most:.2f} (n = {best['n']}); "
            f"{found.numel:,} parameters, {found.numel / whole.numel:.0%} of esd_x."
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

            def apart(one: Sequence[np.ndarray], other: Sequence[np.ndarray], unit: float = plain.unit) -> float:
                pairs = zip(one, other, strict=True)
                return float(np.mean([study.subject.distance(a, b) / unit for a, b in pairs]))

            rows.append(
                {
                    "version": version, "start": names[i],
                    "own": float(np.mean([plain.moved(images, few) for run in drawn for images in run])),
                    "prompt": apart([run[0] for run in drawn], [run[1] for run in drawn]),
                    "seed": apart(drawn[0], drawn[1]) if study.flows else None,
                    "n": len(few) * len(runs) * len(KINDS),
                }
            )  # fmt: skip
    study.results.table("start", rows)
    curves = {"from the unedited picture": "own", "with one other prompt from with another": "prompt"}
    curves |= {"with one seed of the other run from with another": "seed"} if study.flows else {}
    figure, axes = figures.panels(1, len(study.plain), title="Another prompt's text, from one layer on", height=4.4)
    for ax, version in zip(axes, study.plain, strict=True):
        mine = [row for row in rows if row["version"] == version]
        figures.lines(
            ax, range(len(names)), {name: np.array([row[key] for row in mine]) for name, key in curves.items()},
            x_name="first layer that reads it", y_name="distance (1 = as far as another prompt's)",
            title=version if len(study.plain) > 1 else "", ticks=names,
        )  # fmt: skip
    study.results.figure("start", figure, f"{depends(study, rows)} n = {rows[0]['n']} for each start; {told(study)}.")
    return rows


def depends(study: Study, rows: Rows) -> str:
    """What pictures depend on, the later the other text comes in."""
    base = [row for row in rows if row["version"] == "base"]
    text = (
        f"From {base[0]['start']} on, two other prompts leave pictures {base[0]['prompt']:.2f} apart; in "
        f"{base[-1]['start']} alone {base[-1]['prompt']:.2f}. "
    )
    if not study.flows:
        return text + "No text flows from layer to layer here, so that the other run's seed plays no part."
    holds = base[-1]["prompt"] < base[-1]["seed"]
    return text + (
        f"Two seeds of the other run leave them {base[0]['seed']:.2f} apart from the first layer on and "
        f"{base[-1]['seed']:.2f} in the last: towards the end it is {'the seed' if holds else 'the prompt'} of the "
        "other run that counts more."
    )


def with_another_seed(study: Study, few: np.ndarray) -> Rows:
    """Adds to every layer's input what another noise would get there: cross-seed.csv, cross-seed.png."""
    names, texts = [short(site) for site in study.layers], [study.texts[i] for i in few]
    rows: Rows = []
    drawn = [study.plain["base"].images[few]]
    for version, plain in study.plain.items():
        for i, site in enumerate(study.layers):

            def make(run: Source, taking: tuple[int, ...], place: str = site.expression) -> Op:
                return CrossSeed(place, source=run, rows=taking)

            images = study.taking(version, f"seed-{i}", few, [None], make)
            drawn += [images] if version == "base" else []
            found = mean_of(plain.moved(images, few)) | seen(study.subject, images, texts)
            rows.append({"version": version, "layer": site.label, "short": names[i]} | found | {"n": len(few)})
    study.results.table("cross-seed", rows)
    base = [row for row in rows if row["version"] == "base"]
    figure = figures.wrapped(
        [[images[0] for images in drawn]], ["unedited", *(f"{row['short']}: {row['moved']:.2f}" for row in base)],
        title=f"One layer adds what it adds for another noise: {texts[0]!r}",
    )  # fmt: skip
    worst = max(base, key=lambda row: row["moved"])
    study.results.figure(
        "cross-seed", figure,
        f"The number is the mean distance to the unedited picture (1 = as far as another prompt's). It is largest for "
        f"{worst['short']} ({worst['moved']:.2f}) and {np.mean([row['moved'] for row in base]):.2f} on average. "
        f"n = {len(few)} for each layer; {told(study)}.",
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


def activations(study: Study) -> Rows:
    """Measures what passes through layers and what each adds, step by step: activations.csv, activations.png."""
    subject, names = study.subject, [short(site) for site in study.layers]
    rows: Rows = []
    share: dict[tuple[str, str], np.ndarray] = {}
    for version in study.plain:
        sizes = study.drawn(version, "sizes", lambda: layer_sizes(study))
        for stream, told_of in zip(STREAMS, sizes, strict=True):
            if not np.isfinite(told_of).any():
                continue
            share[version, stream] = told_of[1] / told_of[0]
            rows += [
                {"version": version, "layer": study.layers[i].label, "stream": stream, "step": step,
                 "through": told_of[0, i, step], "added": told_of[1, i, step]}
                for i, step in np.ndindex(told_of.shape[1:])
            ]  # fmt: skip
    study.results.table("activations", rows)
    several = len(study.plain) > 1
    curves = {(f"{stream}, {v}" if several else stream): np.nanmean(found, 1) for (v, stream), found in share.items()}
    figure, (left, right) = figures.panels(1, 2, title="What layers add to what passes through them", height=4.6)
    figures.lines(
        left, range(len(names)), curves, x_name="layer", y_name="added / passed through (root mean squares)",
        title="mean over steps", ticks=names,
    )  # fmt: skip
    image = share["base", "image"]
    figures.heat(
        right, image, rows=names, columns=list(range(image.shape[1])), y_name="", x_name="sampling step",
        unit="added / passed through", title="image, base",
    )  # fmt: skip
    mean = np.nanmean(image, 1)
    study.results.figure(
        "activations", figure,
        f"{names[int(np.nanargmax(mean))]} adds most to the image stream, {np.nanmax(mean):.2f} of what passes through "
        f"it, {names[int(np.nanargmin(mean))]} least ({np.nanmin(mean):.2f}). n = "
        f"{min(len(study.texts), subject.batch_size)} pictures.",
    )  # fmt: skip
    return rows


def layer_sizes(study: Study) -> np.ndarray:
    """Root mean squares (streams, 2, layers, steps) of what leaves a layer and what it added; nan where none is."""
    subject, count = study.subject, study.subject.batch_size
    everywhere = where(study.layers)
    records = [Record(everywhere, what=what, reduce=rms, on="cond") for what in ("output", "contribution")]
    sample(
        subject.family, study.texts[:count], study.seeds[:count], *records,
        num_steps=subject.num_steps, guidance_scale=subject.guidance_scale,
    )  # fmt: skip
    number = {site.path: i for i, site in enumerate(study.layers)}
    sizes = np.full((len(STREAMS), 2, len(number), subject.num_steps), np.nan)
    for kind, record in enumerate(records):
        for key, value in record.recording.values.items():
            if key.stage == 0 and key.step is not None:
                sizes[STREAMS.index(key.stream), kind, number[key.path], key.step] = float(value.mean())
    return sizes


def rms(x: Tensor) -> Tensor:
    """Root mean squares (rows,) of a tensor (rows, ...)."""
    return torch.sqrt(x.float().flatten(1).square().mean(1))


def draw_windows(
    study: Study, name: str, rows: Rows, by: str, layers: Sequence[str], unit: str, title: str, caption: str
) -> None:
    """Draws a measure of every window as a map of its first and last layer, a panel for each version."""
    figure, axes = figures.panels(
        1, len(study.plain), title=title, height=min(8.0, 2.4 + 0.3 * len(layers)) if len(study.plain) == 1 else 4.6
    )
    values = [row[by] for row in rows]
    for ax, version in zip(axes, study.plain, strict=True):
        matrix = np.full((len(layers), len(layers)), np.nan)
        for row in rows:
            if row["version"] == version:
                matrix[layers.index(row["first"]), layers.index(row["last"])] = row[by]
        figures.heat(
            ax, matrix, rows=layers, columns=layers, y_name="first layer", x_name="last layer", unit=unit,
            title=version if len(study.plain) > 1 else "", limits=(min(0.0, *values), max(values)),
            tell=len(layers) <= ACROSS and len(study.plain) == 1,
        )  # fmt: skip
    study.results.figure(name, figure, caption)


def told(study: Study, rows: Sequence[int] | None = None) -> str:
    """Which prompts were drawn."""
    texts = list(dict.fromkeys(study.texts if rows is None else [study.texts[i] for i in rows]))
    return f"{len(texts)} prompt{'s' * (len(texts) > 1)} such as {texts[0]!r}"
