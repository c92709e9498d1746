"""How much of a concept a denoiser still reacts to, and how far it drifted elsewhere: without a judge or a picture.

At points x_t of the base's own rollouts under a prompt c:

    residual(t) = mean |eps'(x_t, c) - eps'(x_t, null)|  /  mean |eps(x_t, c) - eps(x_t, null)|
    drift(t)    = mean |eps'(x_t, c) - eps(x_t, c)|      /  mean |eps(x_t, c) - eps(x_t, null)|

with eps of the base and eps' of the erased model, in the model's own parametrisation: both are ratios of differences
at one t, in which the scale between eps-, v- and flow-prediction cancels. A residual of 1 is an untouched concept, of
0 one that the denoiser no longer tells from nothing, and more than 1 one that it reacts to otherwise (negative
guidance overshoots). Drift is to be read on neighbours, where it should be 0.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esd import seeding
from esd.checkpoint import Erased, erased
from esd.evaluation.prompts import say
from esd.evaluation.vocabulary import Vocabulary
from esd.families import Family
from esd.trajectory import predict_many, rollout

NEIGHBOURS = 4  # names on whose prompts the drift is measured


def look(family: Family, checkpoint: Erased, vocabulary: Vocabulary | None, **how: Any) -> dict[str, Any] | None:
    """The denoiser on what was erased and on its neighbours, against t; None for a checkpoint that names nothing.

    Prompts are "a cat" for each concept, and the nearest names of the vocabulary in the same words; without a
    vocabulary there are no neighbours.

    Args:
        family: of the base; it is the base again afterwards.
        checkpoint: the erased weights.
        vocabulary: of the model, or None.
        how: see `sensitivity`.

    Returns:
        "erased" and, where there are any, "neighbours", each {"prompts", "points"}, the latter as `sensitivity` has
        them.
    """
    concepts = list(checkpoint.provenance.get("concepts") or [])
    known = [entry for concept in concepts if vocabulary and (entry := vocabulary.find(concept))]
    near: list[str] = []
    if vocabulary and known:
        (domain, first), gone = known[0], {entry.name for _, entry in known}
        near = [name for name in vocabulary.neighbours(domain, first.name) if name not in gone][:NEIGHBOURS]
    told = {}
    for group, names in {"erased": concepts, "neighbours": near}.items():
        if prompts := [say("a {}", {"": name}) for name in names]:
            told[group] = {"prompts": prompts, "points": sensitivity(family, checkpoint, prompts, **how)}
    return told or None


@torch.no_grad()
def sensitivity(
    family: Family,
    checkpoint: Erased,
    prompts: Sequence[str],
    *,
    num_steps: int,
    guidance_scale: float,
    seed: int = 0,
    max_points: int = 10,
    max_batch: int | None = None,
) -> list[dict[str, Any]]:
    """Residual and drift against t, of some prompts.

    Args:
        family: of the base; it is the base again afterwards, its parts on the CPU.
        checkpoint: the erased weights.
        prompts: n >= 1 texts; prompt i is rolled out by the base from the noise of (seed, "denoiser", i).
        num_steps: sampling steps of the rollouts.
        guidance_scale: classifier-free guidance of the rollouts; 1 or less is none.
        seed: of the noise.
        max_points: times that are looked at, evenly spaced over the rollout, its first and last among them.
        max_batch: most rows in one call of the denoiser; None for no limit.

    Returns:
        For each time, in the order of the rollout, {"t", "residual", "drift", "n"}: "residual" and "drift" are as
        above, the means taken over the prompts and over all values of the latents; "n" the prompts.
    """
    noise = family.initial_noise(seeding.generators(seed, "denoiser", 0, range(len(prompts))))
    cond, null = family.encode(prompts), family.null()
    family.place("denoiser")
    walked = rollout(
        family,
        family.denoiser,
        noise,
        cond,
        null,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        generators=seeding.generators(seed, "denoiser steps", 0, range(len(prompts))),
        max_batch=max_batch,
    )
    visited = torch.linspace(0, len(walked.t) - 1, min(max_points, len(walked.t))).round().int().tolist()

    def predictions() -> list[list[Tensor]]:
        nulls = null[[0] * len(prompts)]
        return [
            predict_many(family, family.denoiser, walked.inputs[i], walked.t[i], [cond, nulls], max_batch)
            for i in visited
        ]

    base = predictions()
    with erased(family.pipe, checkpoint):
        after = predictions()
    family.place()
    return [
        {
            "t": float(walked.t[i, 0]),
            "residual": _distance(*new) / _distance(*old),
            "drift": _distance(new[0], old[0]) / _distance(*old),
            "n": len(prompts),
        }
        for i, old, new in zip(visited, base, after, strict=True)
    ]


def _distance(one: Tensor, two: Tensor) -> float:
    """Mean over the prompts (b, ...) of the root mean square difference."""
    return float((one - two).float().flatten(1).square().mean(1).sqrt().mean())
