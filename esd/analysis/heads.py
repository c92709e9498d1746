"""Maps of words head by head: what the heads of one attention, averaged elsewhere, do each for itself.

Source: prompt-to-prompt (arXiv:2208.01626) shows means over heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esd.errors import UserError
from esd.interventions import AttentionMaps, Site, sample

from . import figures
from .edits import Rows, picked, short
from .maps import FAINT, heat_picture, label, left_share, of, quoted, thing_tokens
from .scenes import Drawn, Scene, places_of
from .subject import Subject

MOST = 22  # heads in a figure, three lines with picture and mean


def show_heads(study: Drawn, expression: str | None, maps: Rows) -> Rows:
    """Leaves maps of the things of the first scene in every head of an attention: heads.csv, heads.png.

    Args:
        study: the pictures.
        expression: see `site_of`.
        maps: rows of `show_maps`.
    """
    scene = study.scenes[0]
    words = thing_tokens(study, scene)
    site = site_of(study, expression) or one_sided(study.knobs.places, of(maps, scene), [token for token, _ in words])
    rows: Rows = []
    found: dict[str, np.ndarray] = {}

    def looked() -> np.ndarray:
        return head_maps(study.subject, scene, study.seeds, site, [token for token, _ in words])

    for version in study.subject.versions:
        with study.subject.wearing(version):
            found[version] = study.results.kept(f"{version}-heads", looked)
        for number, (token, text) in enumerate(words):
            for head, seen in enumerate(found[version][:, :, number].mean(0)):
                own = {"version": version, "place": short(site), "head": head, "token": token, "text": text}
                mass, left = float(seen.mean()), left_share(seen)
                rows.append(own | {"mass": mass, "left": left, "n": len(study.seeds)})
    study.results.table("heads", rows)
    image, first = study.pairs(scene)[0].images[0], found["base"][0]  # (heads, words, h, w) of the first picture
    chosen = picked(range(len(first)), MOST)
    series = [
        [image, *(heat_picture(seen, image) for seen in (first[:, i].mean(0), *first[chosen, i]))]
        for i in range(len(words))
    ]
    figure = figures.wrapped(
        series, ["picture", "mean", *(f"head {head}" for head in chosen)],
        rows=[label(study, scene, *word) for word in words],
        title=f"Where each head of {short(site)} attends to words: {scene.prompt!r}",
    )  # fmt: skip
    study.results.figure("heads", figure, told_heads(study, scene, site, rows))
    return rows


def site_of(study: Drawn, expression: str | None) -> Site | None:
    """The one attention that an expression names; None for none.

    Raises:
        UserError: it names several, or one that reads no text.
    """
    if expression is None:
        return None
    sites = places_of(study.subject.family, expression)
    if len(sites) > 1:
        some = ", ".join(site.expression for site in sites[:3])
        raise UserError(f"attention.heads={expression} names {len(sites)} attentions; name one, such as one of {some}")
    AttentionMaps(sites).sites(study.subject.family)
    return sites[0]


def one_sided(places: Sequence[Site], rows: Rows, tokens: Sequence[int]) -> Site:
    """The attention in which words are furthest from being attended to on both sides alike; the first where none is."""

    def sides(site: Site) -> float:
        mine = [row for row in rows if row["place"] == short(site) and row["token"] in tokens and row["mass"] >= FAINT]
        return float(np.mean([abs(row["left"] - 0.5) for row in mine])) if mine else 0.0

    return max(places, key=sides)


def head_maps(subject: Subject, scene: Scene, seeds: Sequence[int], site: Site, tokens: Sequence[int]) -> np.ndarray:
    """Maps (seeds, heads, tokens, h, w) of a scene's prompt, mean over steps.

    Args:
        subject: the model.
        scene: whose prompt is drawn.
        seeds: of pictures, each drawn by itself: maps of all tokens and heads are large.
        site: the attention.
        tokens: numbers of those that are kept.
    """
    found = []
    for seed in seeds:
        seen = AttentionMaps([site], by_head=True, by_step=False)
        sample(
            subject.family, [scene.prompt], [seed], seen,
            num_steps=subject.num_steps, guidance_scale=subject.guidance_scale,
        )  # fmt: skip
        found.append([seen.maps.mean(head=head)[0, list(tokens)].numpy() for head in seen.maps.heads])
    return np.array(found)


def told_heads(study: Drawn, scene: Scene, site: Site, rows: Rows) -> str:
    """How far apart heads are in where they attend to words, and how much."""
    parts = []
    for token in dict.fromkeys(row["token"] for row in rows):
        mine = [row for row in rows if (row["version"], row["token"]) == ("base", token)]
        named = quoted(study, scene, token, mine[0]["text"])
        shares, masses = ([row[name] for row in mine] for name in ("left", "mass"))
        if len(mine) == 1:
            parts.append(f"{named} has {shares[0]:.0%} of its attention in the left half")
            continue
        parts.append(
            f"{named} has between {min(shares):.0%} (head {int(np.argmin(shares))}) and {max(shares):.0%} (head "
            f"{int(np.argmax(shares))}) of its attention in the left half, and gets {min(masses):.1%} to "
            f"{max(masses):.1%} of what heads give to all tokens"
        )
    return (
        f"{short(site)} of {len({row['head'] for row in rows})} heads: {'; '.join(parts)} (mean of n = "
        f"{rows[0]['n']} pictures). Each map is of the first picture and scaled to its own largest value."
    )
