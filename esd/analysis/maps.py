"""Maps of where words are attended to: over steps, over places, and on which side of the picture.

Source: the figures of prompt-to-prompt (arXiv:2208.01626).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from esd.interventions import positions_of, token_texts
from esd.interventions.words import words_of

from . import figures
from .edits import picked, short
from .scenes import Drawn, Scene, things

Rows = list[dict[str, Any]]
ACROSS = 8  # most columns of steps
FAINT = 1e-3  # share of attention below which a map shows nothing


def show_maps(study: Drawn) -> Rows:
    """Leaves maps of every word: maps.csv, maps.png, maps-steps.png, maps-places.png."""
    rows: Rows = []
    for version in study.subject.versions:
        for scene in study.scenes:
            pairs = study.pairs(scene, version)
            steps, places = (np.mean([getattr(pair, kind) for pair in pairs], axis=0) for kind in ("maps", "by_place"))
            named = [short(site) for site in study.knobs.places]
            for token, text in shown_tokens(study, scene):
                found = [("", "", steps.mean(0)), *((i, "", maps) for i, maps in enumerate(steps))]
                found += [("", name, maps) for name, maps in zip(named, places, strict=True)]
                for step, place, maps in found:
                    own = {"version": version, "prompt": scene.prompt, "token": token, "text": text}
                    own["encoder"] = encoder(study, scene, token)
                    seen = {"mass": float(maps[token].mean()), "left": left_share(maps[token]), "n": len(pairs)}
                    rows.append(own | {"step": step, "place": place} | seen)
    study.results.table("maps", rows)
    panels, labels, named_rows = list[list[np.ndarray]](), list[list[str]](), list[str]()
    for version in study.subject.versions:
        for scene in study.scenes:
            pair, tokens = study.pairs(scene, version)[0], shown_tokens(study, scene)
            row = [pair.images[0], *(heat_picture(pair.maps.mean(0)[i], pair.images[0]) for i, _ in tokens)]
            above = ["picture", *(label(study, scene, i, text) for i, text in tokens)]
            lines = -(-len(row) // (ACROSS + 1))
            size = -(-len(row) // lines)
            panels += [row[begin : begin + size] for begin in range(0, len(row), size)]
            labels += [above[begin : begin + size] for begin in range(0, len(row), size)]
            beside = scene.prompt + (f", {version}" if len(study.subject.versions) > 1 else "")
            named_rows += [beside, *[""] * (lines - 1)]
    figure = figures.pictures(
        padded(panels), title="Where each word is attended to, mean over steps and places", labels=filled(labels),
        rows=named_rows,
    )  # fmt: skip
    study.results.figure("maps", figure, f"{told_sides(study, rows)} Each map is scaled to its own largest value.")
    scene = study.scenes[0]
    pair, words = study.pairs(scene)[0], thing_tokens(study, scene)
    chosen, named = picked(range(len(pair.maps)), ACROSS), [label(study, scene, i, text) for i, text in words]
    by_step = [[heat_picture(pair.maps[step][i], pair.images[0]) for step in chosen] for i, _ in words]
    figure = figures.pictures(
        np.array(by_step), title=f"Where words are attended to, step by step: {scene.prompt!r}", rows=named,
        columns=[str(step) for step in chosen], column_name="step",
    )  # fmt: skip
    study.results.figure("maps-steps", figure, told_steps(study, rows, scene, words))
    by_place = [[heat_picture(maps[i], pair.images[0]) for maps in pair.by_place] for i, _ in words]
    figure = figures.pictures(
        np.array(by_place), title=f"Where words are attended to, attention by attention: {scene.prompt!r}", rows=named,
        columns=[short(site) for site in study.knobs.places], column_name="attention, in the order they run",
    )  # fmt: skip
    study.results.figure("maps-places", figure, told_places(study, rows, scene, words))
    return rows


def shown_tokens(study: Drawn, scene: Scene) -> list[tuple[int, str]]:
    """Number and text of the start token and of those that stand for words of the prompt."""
    texts = token_texts(study.subject.family, scene.prompt)
    words = [(i, text) for i, text in enumerate(texts) if text]
    start = [(0, "(start)")] if words and words[0][0] else []
    return start + words


def thing_tokens(study: Drawn, scene: Scene) -> list[tuple[int, str]]:
    """Those of the things that a prompt names; of the word that is replaced and of the last one where nobody knows."""
    family, tokens = study.subject.family, [found for found in shown_tokens(study, scene) if found[1] != "(start)"]
    named = " ".join(things(study.subject, scene.prompt) or []).split()
    if found := [(i, text) for i, text in tokens if text.lower() in named]:
        return found
    words = (scene.swapped[0], words_of(scene.prompt)[-1])
    places = [place for word in words for place in positions_of(family, scene.prompt, word)]
    return [(i, text) for i, text in tokens if i in places]


def encoder(study: Drawn, scene: Scene, token: int) -> str:
    """Which of several encoders a text token comes from; "" where there is one."""
    family = study.subject.family
    ends = np.cumsum([len(part) for part in family.token_spans(scene.prompt)])
    return family.segments[int(np.searchsorted(ends, token, side="right"))]


def label(study: Drawn, scene: Scene, token: int, text: str) -> str:
    """What stands above a token's map."""
    return "\n".join(filter(None, (text, encoder(study, scene, token))))


def quoted(study: Drawn, scene: Scene, token: int, text: str) -> str:
    """What captions call a token."""
    read_by = encoder(study, scene, token)
    return repr(text) + (f" ({read_by})" if read_by else "")


def heat_picture(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A map (h, w) as a picture uint8 RGB (H, W, 3), as large as another, from 0 to its largest value.

    Where that is less than `FAINT` the map stays dark.
    """
    high, wide = like.shape[:2]
    rows, columns = (np.arange(size) * n // size for size, n in zip((high, wide), values.shape, strict=True))
    scaled = values / max(float(values.max()), FAINT)
    coloured: np.ndarray = matplotlib.colormaps[figures.MAP](scaled[rows][:, columns])[..., :3]
    return (255 * coloured).round().astype(np.uint8)


def left_share(values: np.ndarray) -> float:
    """The share of a map (h, w) that lies in the left half of the picture; a column in the middle counts half."""
    width = values.shape[1]
    middle = values[:, width // 2].sum() / 2 if width % 2 else 0.0
    return float((values[:, : width // 2].sum() + middle) / values.sum())


def padded(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of pictures of unequal length as one array, filled with empty places."""
    most = max(map(len, rows))
    return np.array([[*row, *[np.zeros_like(row[0])] * (most - len(row))] for row in rows])


def filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows of labels of unequal length, filled with empty ones."""
    most = max(map(len, rows))
    return [[*row, *[""] * (most - len(row))] for row in rows]


def told_sides(study: Drawn, rows: Rows) -> str:
    """On which side each thing's word is attended to."""
    parts = []
    for scene in study.scenes:
        for token, text in thing_tokens(study, scene):
            (row,) = [r for r in of(rows, scene) if r["token"] == token and r["step"] == r["place"] == ""]
            named = quoted(study, scene, token, text)
            parts.append(f"{named} of {scene.prompt!r} has {row['left']:.0%} of its attention in the left half")
    return f"{'; '.join(parts)} (mean of n = {len(study.seeds)} pictures)."


def told_steps(study: Drawn, rows: Rows, scene: Scene, words: Sequence[tuple[int, str]]) -> str:
    """How early words have found their side."""
    parts = []
    for token, text in words:
        mine = [row for row in of(rows, scene) if row["token"] == token and row["step"] != ""]
        parts.append(
            f"{quoted(study, scene, token, text)}: {mine[0]['left']:.0%} in step 0, {mine[-1]['left']:.0%} in the last"
        )
    return f"Share of attention in the left half, mean of n = {rows[0]['n']} pictures. {'; '.join(parts)}."


def told_places(study: Drawn, rows: Rows, scene: Scene, words: Sequence[tuple[int, str]]) -> str:
    """Which attentions tell the sides of words apart best."""
    parts = []
    for token, text in words:
        mine = [row for row in of(rows, scene) if row["token"] == token and row["place"] and row["mass"] >= FAINT]
        best = max(mine, key=lambda row: abs(row["left"] - 0.5), default=None)
        told = f"most one-sided in {best['place']} ({best['left']:.0%} left)" if best else "hardly attended to"
        parts.append(f"{quoted(study, scene, token, text)} is {told}")
    return (
        f"{'; '.join(parts)}; mean of n = {rows[0]['n']} pictures. Each map is scaled to its own largest value; dark "
        f"ones have less than {FAINT:g} of the attention everywhere."
    )


def of(rows: Rows, scene: Scene) -> Rows:
    """The base's rows of a scene."""
    return [row for row in rows if (row["version"], row["prompt"]) == ("base", scene.prompt)]
