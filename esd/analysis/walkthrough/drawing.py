"""Pictures of one walk through sampling: on the way, from a picture, between prompts, under guidance of both kinds.

Everything here takes a `Subject` and conditionings, and gives latents or pictures; figures are made in `study`.

Source: fast.ai's "Stable Diffusion Deep Dive" notebook, whose stations these are, for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esd.analysis.subject import Subject
from esd.evaluation.attacks.subject import Subject as Attacked
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.pixels import images_of
from esd.evaluation.prompts import PromptRow
from esd.families import Conditioning, Denoiser
from esd.interventions import Guide, sample
from esd.trajectory import Edit, Trajectory, clean, first_stages, mixed, rollout


def walk(
    subject: Subject,
    cond: Conditioning,
    seeds: Sequence[int],
    *,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    skip: int = 0,
    edit: Edit | None = None,
) -> Trajectory:
    """A rollout of conditionings, from the noise of seeds.

    Args:
        subject: the model.
        cond: n rows.
        seeds: n seeds.
        num_steps: the subject's, unless given.
        guidance_scale: the subject's, unless given.
        skip: see `rollout`.
        edit: see `rollout`.
    """
    family = subject.family
    generators = seeded(seeds)
    return rollout(
        family, family.denoiser, family.initial_noise(generators), cond, family.null(),
        num_steps=num_steps or subject.num_steps,
        guidance_scale=subject.guidance_scale if guidance_scale is None else guidance_scale,
        skip=skip, generators=generators, max_batch=2 * subject.batch_size, edit=edit,
    )  # fmt: skip


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def strips(subject: Subject, cond: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What sampling passes through, at the first evaluation of each step.

    Args:
        subject: the model.
        cond: n rows.
        seeds: n seeds.

    Returns:
        t (steps,), x_t (steps, n, c, h, w) as the denoiser gets it, and x0_hat of the guided prediction there, as many.
    """
    family, found = subject.family, walk(subject, cond, seeds)
    assert found.cond is not None
    begins = first_stages(family.scheduler(subject.num_steps))
    t, x = found.t[begins, 0], found.inputs[begins]
    predictions = [found.cond[begins]] if found.null is None else [found.null[begins], found.cond[begins]]
    guided = mixed(predictions, subject.guidance_scale)
    return t, x, torch.stack([clean(family, *one) for one in zip(x, t, guided, strict=True)])


def img2img(subject: Subject, x_0: Tensor, cond: Conditioning, seeds: Sequence[int], start: int) -> Tensor:
    """Clean latents (n, c, h, w) of pictures that are noised to step `start`, and go on from there.

    Args:
        subject: the model.
        x_0: clean latents (n, c, h, w).
        cond: what they go on under, n rows.
        seeds: of the noise, n.
        start: number of a sampling step; 0 leaves next to nothing of the pictures.
    """
    family = subject.family
    first = first_stages(family.scheduler(subject.num_steps))[start]
    noise = family.initial_noise(seeded(seeds))

    def begin(solver: Any, taken: int, x: Tensor) -> Tensor:
        return noised(subject, solver, x_0, noise, solver.timesteps[first]) if taken == 0 else x

    return walk(subject, cond, seeds, skip=first, edit=begin).final


def noised(subject: Subject, solver: Any, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t as a solver keeps it; see `esd.evaluation.attacks.subject.Subject.noised`."""
    return attacked(subject, [], subject.family.denoiser).noised(solver, x_0, noise, t)


def attacked(subject: Subject, rows: Sequence[PromptRow], base: Denoiser) -> Attacked:
    """The model as attacks see it, and a base that draws them examples."""
    draw = DrawSettings(subject.num_steps, subject.guidance_scale, subject.batch_size)
    return Attacked(subject.family, subject.family.denoiser, base, rows, draw, subject.seed)


def between(one: Conditioning, other: Conditioning, share: float) -> Conditioning:
    """The mixture share * one + (1 - share) * other of two conditionings of equal shape, pooled prompts included."""
    return Conditioning({
        name: share * tensor + (1 - share) * other.tensors[name] for name, tensor in one.tensors.items()
    })  # fmt: skip


def guided_by(
    subject: Subject, prompts: Sequence[str], seeds: Sequence[int], loss: Callable[[Tensor], Tensor], scale: float
) -> np.ndarray:
    """Pictures uint8 RGB (n, H, W, 3) that follow the gradient of a loss of the picture; see `Guide`.

    Args:
        subject: the model.
        prompts: n texts.
        seeds: n seeds.
        loss: of one picture (1, 3, H, W) in about [0, 1], a scalar.
        scale: how strongly; 0 leaves the pictures.
    """
    ops = [Guide(loss=loss, scale=scale)] if scale else []
    return images_of(subject.family, sample(
        subject.family, prompts, seeds, *ops, num_steps=subject.num_steps, guidance_scale=subject.guidance_scale
    ).latents)  # fmt: skip


def blueness(image: Tensor) -> Tensor:
    """Mean |blue - 0.9| of a picture (1, 3, H, W): the loss of the notebook."""
    return (image[:, 2] - 0.9).abs().mean()
