"""Where words are attended to, and what becomes of a picture whose attention is another's.

Maps of every word, over steps and places; a prompt and one with another word from the same noise, and how far apart
they go; attention replaced, refined and reweighted, and latents blended, as prompt-to-prompt does; and replaced in a
share of the steps, as the paper has it, or of the layers.

Source: prompt-to-prompt (arXiv:2208.01626).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from . import estimates, figures
from .begin import analysis
from .edits import band, column, rate, told_rate, whiskers
from .heads import show_heads, site_of
from .maps import Rows, show_maps
from .results import Results
from .scenes import (
    NO_CONTROL,
    OTHER_SEED,
    PLAIN,
    Drawn,
    Edit,
    Knobs,
    Scene,
    difference,
    places_of,
    sides,
    with_selves,
)
from .subject import Subject

SHOWN = 2  # pictures of each prompt in figures
MOVED = "difference to the unedited picture\n(root mean square, 0 to 1)"
SEEN = "share of pictures in which the judge\nsees what was asked for"
RATES = ("changed", "kept", "both", "was")  # columns that are shares of pictures
SIDED = ("changed", "kept", "both", "was", "moved_changed", "moved_kept")  # columns that tell of sides
FAR = ("moved_changed", "moved_kept", "moved", "distance")  # columns that are distances
APART = "difference to the unedited picture\n(root mean square, noise has 1)"


@analysis
def analyse(
    subject: Subject,
    results: Results,
    *,
    prompts: Sequence[str],
    replaced: Sequence[str],
    refined: Sequence[str],
    pictures: int,
    where: str | None,
    resolution: int | None,
    heads: str | None,
    cross_replace: float,
    self_replace: float,
    self_tokens: int,
    threshold: float,
    shares: Sequence[float],
    weights: Sequence[float],
) -> None:
    """Leaves maps of words and what edits of attention do, in tables and figures; of base and erased model.

    Args:
        subject: the model.
        results: gets tables and figures.
        prompts: what is edited; of two things each, where a judge is to read their halves.
        replaced: for each of `prompts` one of as many words, of which some differ.
        refined: for each of `prompts` one that says more.
        pictures: of each prompt.
        where: attentions that read the text; None for all.
        resolution: edge of the maps shown, in image tokens; None for the largest.
        heads: the attention whose heads are shown one by one; None for that which tells the sides of words apart best.
        cross_replace: share of the steps in which attention to the text is replaced.
        self_replace: the same for attention of the image to itself.
        self_tokens: most image tokens of an attention of which that is replaced.
        threshold: of local blend.
        shares: of steps and of layers in a sweep.
        weights: of the word that `replaced` replaces.
    """
    places = places_of(subject.family, where)
    knobs = Knobs(
        places, with_selves(places), cross_replace, self_replace, self_tokens, threshold, resolution, shares,
        sorted({1.0, *weights}),
    )  # fmt: skip
    scenes = [Scene(*texts) for texts in zip(prompts, replaced, refined, strict=True)]
    study = Drawn(subject, results, scenes, subject.seeds(pictures), knobs)
    site_of(study, heads)  # tells whether there is one
    show_heads(study, heads, show_maps(study))
    rows = edits_table(study)
    show_paths(study)
    show_edits(study, rows)
    show_weights(study, rows)
    show_sweep(study, rows)


def edits_table(study: Drawn) -> Rows:
    """Leaves what is seen under every edit: pictures.csv, a row for each picture, and edits.csv, their means."""
    every: Rows = []
    for version in study.subject.versions:
        for scene in study.scenes:
            plain = study.images(scene, PLAIN, version)
            for edit, (prompt, _) in study.knobs.edits(scene).items():
                images = study.images(scene, edit, version)
                seen = sides(study.subject, images, plain, scene, prompt)
                apart = difference(images, plain)
                far = study.subject.distance(plain, images)
                for i, seed in enumerate(study.seeds):
                    read = dict.fromkeys(SIDED)
                    if seen:
                        changed, kept = (int(answer) for answer in seen.asked[i])
                        answers = (changed, kept, changed * kept, int(seen.was[i]), *seen.moved[i])
                        read = dict(zip(SIDED, answers, strict=True))
                    own = {"version": version, "prompt": prompt, "seed": seed, "edit": edit[0], "value": edit[1]}
                    every.append(own | read | {"moved": apart[i], "distance": far[i]})
    study.results.table("pictures", every)
    rows: Rows = []
    several: dict[tuple[str, Edit], Rows] = {}
    for row in every:
        several.setdefault((row["version"], (row["edit"], row["value"])), []).append(row)
    for (version, edit), mine in several.items():
        told = {"version": version, "edit": edit[0], "value": edit[1], "n": len(mine)}
        for name in RATES:
            told |= rate(name, given(mine, name))
        for name in FAR:
            moved, before = given(mine, name), given(several[version, control_of(edit)], name)
            told |= mean(name, moved)
            told |= mean(f"{name}_over", [one - other for one, other in zip(moved, before, strict=True)])
        rows.append(told)
    study.results.table("edits", rows)
    return rows


def control_of(edit: Edit) -> Edit:
    """What is drawn of the same prompt with its attention as it is."""
    refined = ("refined, no control", 0.0)
    return {PLAIN[0]: PLAIN, OTHER_SEED[0]: PLAIN, "reweight": PLAIN, "refined, no control": refined,
            "refine": refined, "refine + self": refined}.get(edit[0], NO_CONTROL)  # fmt: skip


def show_paths(study: Drawn) -> Rows:
    """Leaves how far apart trajectories go: paths.csv, paths.png."""
    steps, knobs = study.subject.num_steps, study.knobs
    shown = [OTHER_SEED, NO_CONTROL, ("replace", knobs.cross_replace), ("replace + self", knobs.self_replace)]
    shown.append(("replace + self + blend", knobs.threshold))
    rows: Rows = []
    curves, spread = {}, {}
    for version in study.subject.versions:
        for edit in shown:
            apart = np.array(
                [pair.apart[study.edits(s).index(edit)] for s in study.scenes for pair in study.pairs(s, version)]
            )
            middle, deviation = apart.mean(0), apart.std(0)
            for step, (value, wide) in enumerate(zip(middle, deviation, strict=True)):
                own = {"version": version, "edit": edit[0], "step": step}
                rows.append(own | {"apart": float(value), "deviation": float(wide), "n": len(apart)})
            if version == "base":
                curves[edit[0]], spread[edit[0]] = middle, (middle - deviation, middle + deviation)
    study.results.table("paths", rows)
    count = len(curves["no control"])
    figure, (ax,) = figures.panels(title="How far a prompt with another word leads away, from the same noise")
    figures.lines(
        ax, range(count), curves, spread=spread, x_name="steps taken" if count == steps + 1 else "evaluations",
        y_name=APART,
    )  # fmt: skip
    free, held = curves["no control"], curves["replace + self"]
    ratio = free[-1] / max(free[1], 1e-9)
    text = (
        f"Another word moves what the denoiser gets by {free[1]:.3f} in the first step and by {free[-1]:.2f} at the "
        f"end{f', {ratio:.0f} times as far' if ratio >= 2 else ''}; another seed by {curves['another seed'][-1]:.2f}. "
        f"With attention replaced it is {curves['replace'][-1]:.2f}, with that of the image to itself {held[-1]:.2f}, "
        f"and with local blend {curves['replace + self + blend'][-1]:.2f}. Bands: one standard deviation. "
        f"{study.told}."
    )
    study.results.figure("paths", figure, text)
    return rows


def show_edits(study: Drawn, rows: Rows) -> None:
    """Draws edits beside the unedited picture, and what is seen in them: replace.png, refine.png, edits.png."""
    knobs = study.knobs
    replaced = [NO_CONTROL, ("replace", knobs.cross_replace), ("replace + self", knobs.self_replace),
                ("replace + self + blend", knobs.threshold)]  # fmt: skip
    refined = [("refined, no control", 0.0), ("refine", knobs.cross_replace), ("refine + self", knobs.self_replace)]
    for name, edits, to in (("replace", replaced, "replaced"), ("refine", refined, "refined")):
        grid, named = [], []
        for scene in study.scenes:
            columns = [study.images(scene, edit)[:SHOWN] for edit in (PLAIN, *edits)]
            grid += [list(pictures) for pictures in zip(*columns, strict=True)]
            named += [f"{scene.prompt} → {getattr(scene, to)}", *[""] * (len(columns[0]) - 1)]
        heads = ["unedited", "no control", name, "+ self-attention", "+ local blend"][: len(edits) + 1]
        title = f"A prompt {to}, without and with the other's attention"
        figure = figures.pictures(np.array(grid), title=title, rows=named, columns=heads)
        study.results.figure(name, figure, told_edits(study, rows, edits))
    shown = [PLAIN, *replaced, *refined]
    found = [row_of(rows, edit) for edit in shown]
    judged = found[0]["both"] is not None
    figure, axes = figures.panels(1, 1 + judged, title="What edits change and what they keep", height=4.6)
    names = [edit for edit, _ in shown]
    sides = sided(found)
    figures.bars(
        axes[0], names, {side: column(found, name) for side, name in sides.items()}, x_name=MOVED,
        spread={side: whiskers(found, name) for side, name in sides.items()} if found[0]["n"] > 1 else None,
    )  # fmt: skip
    if judged:
        seen = {f"{side} side": column(found, side) for side in ("changed", "kept")}
        seen |= {"both": column(found, "both")}
        reach = {name: whiskers(found, name.removesuffix(" side")) for name in seen}
        figures.bars(axes[1], names, seen, x_name=SEEN, spread=reach)
    for ax in axes:  # beside no bar
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
    study.results.figure("edits", figure, told_edits(study, rows, [*replaced, *refined]))


def show_weights(study: Drawn, rows: Rows) -> None:
    """Draws a word's attention weighed: reweight.png."""
    weights = study.knobs.weights
    grid = np.array([[study.images(scene, ("reweight", w))[0] for w in weights] for scene in study.scenes])
    figure = figures.pictures(
        grid, title="Attention to one word, times a weight", columns=[f"{w:g}" for w in weights], column_name="weight",
        rows=[f"{scene.prompt}: {scene.swapped[0]}" for scene in study.scenes],
    )  # fmt: skip
    found = [row_of(rows, ("reweight", w)) for w in weights]
    parts = [
        f"at weight {row['value']:g} the judge sees the word's thing in {told_rate(row, 'changed')} and the other one "
        f"in {told_rate(row, 'kept')}" if row["both"] is not None else
        f"at weight {row['value']:g} the picture moves by {row['moved']:.3f}"
        for row in found
    ]  # fmt: skip
    study.results.figure("reweight", figure, f"{'; '.join(parts).capitalize()}. {study.told}.")


def show_sweep(study: Drawn, rows: Rows) -> None:
    """Draws attention replaced in 0 to 100% of steps and of layers: sweep.png, sweep-curves.png."""
    shares = sorted(study.knobs.shares)
    grid, named = [], []
    for scene in study.scenes:
        for what in ("steps", "layers"):
            every = [PLAIN, NO_CONTROL, *((what, share) for share in shares)]
            grid.append([study.images(scene, edit)[0] for edit in every])
            named.append(f"{scene.replaced}: {what}")
    figure = figures.pictures(
        np.array(grid), title="Attention replaced in a share of the steps, or of the layers",
        columns=["unedited", "0%", *(f"{share:.0%}" for share in shares)], rows=named, column_name="share replaced",
    )  # fmt: skip
    found = {what: [row_of(rows, edit) for edit in (NO_CONTROL, *((what, share) for share in shares))]
             for what in ("steps", "layers")}  # fmt: skip
    study.results.figure("sweep", figure, told_sweep(study, found))
    judged = found["steps"][0]["both"] is not None
    panel, axes = figures.panels(
        1, 1 + judged, title="Attention replaced in a share of the steps, or of the layers", height=4.8
    )
    x = [0, *(100 * share for share in shares)]

    def drawn(ax: Axes, columns: Mapping[str, str], unit: str) -> None:
        curves = {
            f"{side}, over {what}": (mine, name) for what, mine in found.items() for side, name in columns.items()
        }
        figures.lines(
            ax, x, {label: column(*of) for label, of in curves.items()}, x_name="share replaced (%)", y_name=unit,
            spread={label: band(*of) for label, of in curves.items()},
        )  # fmt: skip

    drawn(axes[0], sided(found["steps"]), MOVED)
    figures.from_zero(axes[0])
    if judged:
        drawn(axes[1], {f"{side} side": side for side in ("changed", "kept")}, SEEN)
        axes[1].set_ylim(-0.03, 1.03)
    for ax in axes:  # one for both, beside no curve
        if legend := ax.get_legend():
            legend.remove()
    panel.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    study.results.figure("sweep-curves", panel, f"{told_sweep(study, found)} Bands: 95% intervals.")


def sided(rows: Rows) -> dict[str, str]:
    """Name of each side to the column of how far it moves; of the whole picture where sides are not known."""
    known = rows[0]["moved_changed"] is not None
    return {"changed side": "moved_changed", "kept side": "moved_kept"} if known else {"picture": "moved"}


def told_edits(study: Drawn, rows: Rows, edits: Sequence[Edit]) -> str:
    """What edits change and keep, in a sentence."""
    found = [row_of(rows, edit) for edit in edits]
    parts = [f"{row['edit']}: {told_row(row)}" for row in found]
    return f"{measured(found)}. {'; '.join(parts)}. {study.told}."


def measured(rows: Rows) -> str:
    """What the numbers of `told_row` are."""
    where = " on the changed and on the kept side" if rows[0]["both"] is not None else ""
    return f"Difference to the unedited picture (root mean square, 0 to 1){where}, with its 95% interval"


def told_row(row: dict[str, Any]) -> str:
    """What one edit changes and keeps, and how much further the kept side then moves than without it."""
    sides = ["moved"] if row["both"] is None else ["moved_changed", "moved_kept"]
    text = " and ".join(estimates.told(row, side, 3) for side in sides)
    edit = row["edit"], row["value"]
    if control_of(edit) not in (edit, PLAIN):
        text += f", against no control, picture by picture, {estimates.told(row, f'{sides[-1]}_over', 3)}"
        text += " on the kept side" * (len(sides) > 1)
    return text if row["both"] is None else f"{text}, what was asked for is seen on both in {told_rate(row, 'both')}"


def told_sweep(study: Drawn, found: Mapping[str, Rows]) -> str:
    """What a sweep does, in a sentence."""
    parts = [f"with none of the attention replaced {told_row(found['steps'][0])}"]
    for what, mine in found.items():
        parts += [f"in {row['value']:.0%} of the {what} {told_row(row)}" for row in (mine[len(mine) // 2], mine[-1])]
    return f"{measured(found['steps'])}: {'; '.join(parts)}. {study.told}."


def row_of(rows: Rows, edit: Edit) -> dict[str, Any]:
    """The base's row of an edit."""
    return next(row for row in rows if (row["version"], row["edit"], row["value"]) == ("base", *edit))


def given(rows: Rows, name: str) -> list[Any]:
    """A column, of the rows that have a value."""
    return [row[name] for row in rows if row[name] is not None]


def mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """{name, name_low, name_high}: a mean and its 95% interval; None of none."""
    return estimates.mean(values).row(name) if values else dict.fromkeys([name, f"{name}_low", f"{name}_high"])
