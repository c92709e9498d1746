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

from esd.errors import UserError
from esd.interventions import Record, layers, sample
from esd.interventions.sites import STREAMS

from . import estimates, figures
from .begin import analysis
from .edits import (
    ACROSS,
    KINDS,
    Rows,
    Study,
    draw_windows,
    mean_of,
    picked,
    seen,
    short,
    told,
    told_rate,
    where,
    whiskers,
    windows,
)
from .injection import from_a_layer_on, suggest, with_another_seed, with_other_prompts, with_weighed_text
from .results import Results
from .subject import Subject

SHOWN = 2  # prompts that figures of pictures show
STILL = 0.005  # least distance that is told as one
SHOWS = 0.5  # least share of unedited pictures that edited ones can be held against
UNIT = "distance to the unedited picture\n(1 = as far as another prompt's)"


@analysis
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

    Raises:
        UserError: the model has fewer layers than a window is long.
    """
    count = len(layers(subject.family))
    if too_long := [length for length in lengths if length > count]:
        raise UserError(f"layers.lengths={too_long}: this model has {count} layers; allowed: 1 to {count}")
    others = [dict(zip(prompts, told, strict=True)) for told in (other_things, other_styles)]
    study = Study(subject, results, prompts, pictures, dict(zip(KINDS, others, strict=True)))
    few = study.first(window_pictures)
    alone = without_layers(study)
    without_windows(study, few, lengths)
    suggest(study, with_other_prompts(study, few, lengths))
    from_a_layer_on(study, few)
    with_another_seed(study, few)
    with_weighed_text(study, few, weights)
    activations(study, alone)


def without_layers(study: Study) -> Rows:
    """Leaves every layer out alone: vitality.csv, vitality.png, without.png."""
    names = [short(site) for site in study.layers]
    rows: Rows = []
    for version, plain in study.plain.items():
        for i in range(-1, len(study.layers)):
            images = plain.images if i < 0 else study.without(version, i, i)
            layer = {"layer": study.layers[i].label, "short": names[i]} if i >= 0 else {"layer": "", "short": "none"}
            found = mean_of(plain.moved(images)) | seen(study.subject, images, study.texts)
            rows.append({"version": version} | layer | found | {"n": len(images)})
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
    far = {
        name: float(study.plain["base"].moved(images[shown], shown).mean())
        for name, images in zip(names, base[1:], strict=True)
    }
    most, least = max(far, key=far.__getitem__), min(far, key=far.__getitem__)
    text = f"One picture of each of {told(study, shown)}, drawn without one layer."
    if far[most] - far[least] >= STILL:
        text += f" Of those shown, the ones without {most} differ most from the unedited ({far[most]:.2f}), those "
        text += f"without {least} least ({far[least]:.2f})."
    study.results.figure("without", figure, text)
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
        spread={v: np.array([row["interval"] for row in found], float) for v, found in every.items()},
    )  # fmt: skip
    if judged:
        shares, reach = dict[str, np.ndarray](), dict[str, np.ndarray]()
        for version, found in every.items():
            for kind in judged:
                label = f"{kind}, {version}" if len(every) > 1 else kind
                shares[label], reach[label] = np.array([row[kind] for row in found]), whiskers(found, kind)
        figures.bars(
            axes[1], names, shares, x_name="share of pictures in which the judge\nstill sees what was asked for",
            spread=reach,
        )  # fmt: skip
    text = furthest_alone(alone["base"])
    for kind in judged:
        text += lost(kind, base[0], alone["base"])
    study.results.figure(
        "vitality", figure, f"{text}n = {base[0]['n']} for each layer, with 95% intervals; {told(study)}."
    )


def furthest_alone(rows: Rows) -> str:
    """Without which layers pictures move furthest, and without which least, where that is not the same."""
    order = sorted(rows, key=lambda row: -row["moved"])
    if order[0]["moved"] < STILL:
        return f"No layer left out alone moves the picture by {STILL:g} or more. "
    most = ", ".join(f"{row['short']} ({row['moved']:.2f})" for row in order[: max(1, min(3, len(order) - 1))])
    text = f"Left out alone, {most} move{'s' * (', ' not in most)} the picture furthest"
    return f"{text}. " if len(order) < 2 else f"{text}, {order[-1]['short']} least ({order[-1]['moved']:.2f}). "


def lost(kind: str, plain: dict[str, Any], rows: Rows) -> str:
    """Without which layers less than half of the pictures still show what they showed."""
    if plain[kind] < SHOWS:
        return f"The judge sees the {kind} in {told_rate(plain, kind)} of the unedited pictures, too few to lose. "
    gone = [f"{row['short']} ({row[kind]:.0%})" for row in rows if row[kind] < plain[kind] / 2]
    text = f"The judge sees the {kind} in {told_rate(plain, kind)} of the unedited pictures, and "
    if gone:
        return f"{text}in less than half of that without {', '.join(gone)}. "
    least = min(rows, key=lambda row: row[kind])
    return f"{text}in {told_rate(least, kind)} at the least, without {least['short']}. "


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
    far = {
        d + 1: np.mean([row["moved"] for row in rows if (row["version"], row["length"]) == ("base", d + 1)])
        for d in spans
    }
    study.results.figure(
        "windows-pictures", figure,
        f"One picture of {texts[0]!r} without each window of layers. On average over windows the pictures of all "
        f"prompts move by {', '.join(f'{moved:.2f} (length {length})' for length, moved in far.items())}.",
    )  # fmt: skip
    return rows


def furthest(rows: Rows) -> str:
    """Which shortest window moves base pictures at least as far as another prompt would."""
    far = [row for row in rows if row["version"] == "base" and row["moved"] >= 1]
    if not far:
        most = max((row for row in rows if row["version"] == "base"), key=lambda row: row["moved"])
        return (
            f"No window tried moves the picture as far as another prompt does; {most['first']} to {most['last']} moves "
            f"it furthest ({most['moved']:.2f})."
        )
    best = min(far, key=lambda row: (row["length"], -row["moved"]))
    return (
        f"The shortest window tried without which the picture moves as far as another prompt's has {best['length']} "
        f"layer{'s' * (best['length'] > 1)}, {best['first']} to {best['last']} ({best['moved']:.2f})."
    )


def activations(study: Study, alone: Rows) -> Rows:
    """Measures what passes through layers and what each adds, step by step: activations.csv, activations.png.

    Args:
        study: the model.
        alone: what `without_layers` says, which the added shares are held against.
    """
    subject, names = study.subject, [short(site) for site in study.layers]
    rows: Rows = []
    share: dict[tuple[str, str], np.ndarray] = {}
    for version in study.plain:
        sizes = study.drawn(version, "passed-and-added", lambda: layer_sizes(study))
        for stream, told_of in zip(STREAMS, sizes, strict=True):
            if not np.isfinite(told_of).all(0).any():
                continue
            share[version, stream] = told_of[1] / told_of[0]
            rows += [
                {"version": version, "layer": study.layers[i].label, "stream": stream, "step": step,
                 "through": told_of[0, i, step], "added": told_of[1, i, step]}
                for i, step in np.argwhere(np.isfinite(told_of).all(0))
            ]  # fmt: skip
    study.results.table("activations", rows)
    several = len(study.plain) > 1
    curves = {(f"{stream}, {v}" if several else stream): found.mean(1) for (v, stream), found in share.items()}
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
    mean = image.mean(1)
    moved = [row["moved"] for row in alone if row["version"] == "base" and row["layer"]]
    study.results.figure(
        "activations", figure,
        f"{names[int(np.argmax(mean))]} adds {'most' if len(names) > 1 else 'this much'} to the image stream, "
        f"{mean.max():.2f} of what passes through it"
        + (f", {names[int(np.argmin(mean))]} least ({mean.min():.2f})" if len(names) > 1 else "")
        + f". {goes_with(mean, moved)}n = {min(len(study.texts), subject.batch_size)} pictures.",
    )  # fmt: skip
    return rows


def goes_with(share: np.ndarray, moved: Sequence[float]) -> str:
    """Whether layers that add more are those without which the picture moves further; nothing of too few layers."""
    found = estimates.correlation(share, moved)
    if found is None or found.low is None or found.high is None:
        return ""
    text = f"Over n = {found.n} layers it correlates with how far the picture moves without the layer by {found.told()}"
    if found.low <= 0 <= found.high:
        return f"{text}, which does not show that the two go together, nor that they do not. "
    return f"{text}: without layers that add more it moves {'further' if found.low > 0 else 'less far'}. "


def layer_sizes(study: Study) -> np.ndarray:
    """Root mean squares (streams, 2, layers, steps) of what comes to a layer and what it adds; nan where none is."""
    subject, count = study.subject, study.subject.batch_size
    everywhere = where(study.layers)
    records = [Record(everywhere, what=what, reduce=rms, on="cond") for what in ("input", "contribution")]
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
