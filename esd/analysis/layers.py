"""What each layer does for the picture: leave it out, and see how far the picture moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esd.interventions import Skip, layers

from . import figures
from .results import Results
from .subject import Subject


def analyse(subject: Subject, results: Results, *, prompts: Sequence[str], pictures: int) -> None:
    """Leaves a table and a figure of every layer's vitality, on base and erased.

    Args:
        subject: the model.
        results: gets tables and figures.
        prompts: to draw.
        pictures: of each prompt, each with its own seed.
    """
    texts = [prompt for prompt in prompts for _ in range(pictures)]
    seeds = [seed for _ in prompts for seed in subject.seeds(pictures)]
    sites = layers(subject.family)
    found = {}
    for version in subject.versions:
        with subject.wearing(version):
            plain = results.kept(f"{version}-plain", lambda: subject.draw(texts, seeds))
            without = [
                results.kept(
                    f"{version}-without-{i}", lambda site=site: subject.draw(texts, seeds, Skip(site.expression))
                )
                for i, site in enumerate(sites)
            ]
        found[version] = np.array([subject.distance(plain, images).mean() for images in without])
    results.table("vitality", [{"layer": s.label} | {v: found[v][i] for v in found} for i, s in enumerate(sites)])
    figure, (ax,) = figures.panels(title="How far the picture moves without a layer")
    figures.bars(ax, [site.label for site in sites], found, x_name=subject.distance_name)
    most = sites[int(found["base"].argmax())].label
    results.figure("vitality", figure, f"The picture moves furthest without {most}.")
