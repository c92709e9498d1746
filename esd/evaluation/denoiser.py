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
from esd.families import Family
from esd.trajectory import predict_many, rollout


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
