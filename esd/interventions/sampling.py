"""`sample`: draw with interventions by this package's own rollout, which draws what the stock pipeline draws.

drawn = sample(family, ["a cat"], [0], InjectText("up.cross", source=Source("a dog", 0)))
drawn.images  # (1, 3, H, W) in [0, 1]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from esd.errors import UserError
from esd.families import Family
from esd.families.base import Denoiser
from esd.trajectory import Trajectory, conditionings_of, first_stages, mixed, predict_many, rollout

from .graft import Graft
from .hooks import attach, attached
from .ops import Op, Sampling, Source, source_of


@dataclass(frozen=True)
class Drawn:
    """What was sampled; rows are the prompts asked for.

    Attributes:
        latents: clean (b, c, h, w).
        trajectory: what the rollout passed through, sources included as its last rows.
        family: that drew them.
    """

    latents: Tensor
    trajectory: Trajectory
    family: Family

    @property
    def images(self) -> Tensor:
        """Decoded (b, 3, H, W), float32 in [0, 1]."""
        return self.family.decode(self.latents)


def sample(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *ops: Op,
    num_steps: int = 20,
    guidance_scale: float = 4.0,
    scheduler: str | None = None,
    null: str | None = None,
    denoiser: Denoiser | None = None,
) -> Drawn:
    """Samples prompts under ops.

    Args:
        family: of the model, with its parts on their device.
        prompts: b texts.
        seeds: b seeds, of noise as `esd.generate` draws it.
        ops: in the order they work at a site. Sources they name are drawn in the same batch, without ops.
        num_steps: sampling steps.
        guidance_scale: see `esd.trajectory.rollout`; finite.
        scheduler: see `Family.scheduler`.
        null: the negative prompt; None for the model's own.
        denoiser: callable like the family's denoiser, such as a teacher view of it; None for that itself.

    Raises:
        UserError: an op cannot work on this model, see `attach`, or in such a sampling, see `Op.fits`; or other ops
            are attached, which would not know its passes and steps.
        ValueError: not as many seeds as prompts.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds")
    if not prompts:
        raise UserError("no prompt to sample; give one")
    if not math.isfinite(guidance_scale):
        raise UserError(f"guidance_scale={guidance_scale}: allowed: a finite number; 1 or less is no guidance")
    if attached(family.denoiser):
        raise UserError("sample(...) inside of attach(...), which follows stock pipelines; give the ops to sample")
    if denoiser is not None and any(isinstance(op, Graft) for op in ops):
        raise UserError("Graft: it changes the family's own denoiser, and another is to draw; leave one of them out")
    sources = list(dict.fromkeys(s for op in ops if isinstance(s := source_of(op), Source)))
    rows = {source: len(prompts) + i for i, source in enumerate(sources)}
    every = [*prompts, *(source.prompt for source in sources)]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in [*seeds, *(source.seed for source in sources)]]
    sampling = planned(family, num_steps, guidance_scale, every, rows, scheduler)
    with torch.no_grad():
        cond = family.encode(every)
        empty = family.null() if null is None else family.encode([null])
        noise = family.initial_noise(generators)
    denoiser = denoiser or family.denoiser

    @torch.no_grad()
    def predict(solver: Any, x: Tensor, t: Tensor) -> Tensor:
        asked = conditionings_of(family, cond, empty, guidance_scale)
        return mixed(predict_many(family, denoiser, family.model_input(solver, x, t), t, asked), guidance_scale)

    with attach(family, *ops, sources=rows, prompts=every) as hooks:
        hooks.announce(sampling, predict)
        trajectory = rollout(
            family, denoiser, noise, cond, empty, num_steps=num_steps,
            guidance_scale=guidance_scale, scheduler=scheduler, generators=generators, edit=hooks.edit,
        )  # fmt: skip
    return Drawn(trajectory.final[: len(prompts)], trajectory, family)


def planned(
    family: Family,
    num_steps: int,
    guidance_scale: float,
    prompts: Sequence[str],
    sources: Mapping[Source, int] = MappingProxyType({}),
    scheduler: str | None = None,
) -> Sampling:
    """What is known of a sampling, as `sample` or the stock pipeline would do it, before it begins.

    Args:
        family: of the model.
        num_steps: sampling steps.
        guidance_scale: see `esd.trajectory.rollout`.
        prompts: of each sample, sources included.
        sources: row of each source.
        scheduler: see `Family.scheduler`.

    Raises:
        UserError: the model takes no such number of steps, or knows no such scheduler.
    """
    steps = len(first_stages(family.scheduler(num_steps, scheduler)))
    guided = family.guidance == "cfg" and guidance_scale > 1
    height, width = family.latent_shape()[1:]
    return Sampling(family, steps, guided, len(prompts), (height, width), prompts, sources)
