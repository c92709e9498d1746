"""The noise schedule, and samplers as solvers of one differential equation.

Sampling without fresh noise follows an ODE from x_T to x_0. Each sampler is a way of solving it, and one of more steps
comes nearer. For that all must solve the same one, which by default they do not: "leading" times begin earlier the
fewer steps there are, and from its last time each sampler leaps to no noise in one step of first order, from further
away the fewer steps there are. Here all go from the last training time to the first, and make x_0 of what is predicted
there.

Source: fast.ai's "Stable Diffusion Deep Dive" notebook; Karras et al. 2022 (arXiv:2206.00364) for sampling as an ODE;
timestep spacings from Lin et al. 2023 (arXiv:2305.08891), table 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esd.families import Conditioning, Family
from esd.trajectory import clean, conditionings_of, mixed, predict_many, rollout

REFERENCE_STEPS = 1000  # of the solution that others are held against, see `references`
FLOWS = ("euler",)  # what a flow is sampled with
TO_ZERO = ("euler", "heun", "lms")  # samplers whose last step goes from the first training time to no noise


@dataclass(frozen=True)
class Schedule:
    """A noise schedule x_t = α x_0 + σ ε, over training times and at those that sampling visits.

    Attributes:
        t: training times (n,).
        alpha: share of signal (n,).
        sigma: share of noise (n,).
        visited: times of the sampling steps (steps,).
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    visited: np.ndarray

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """α and σ at some times."""
        return np.interp(t, self.t, self.alpha), np.interp(t, self.t, self.sigma)


def schedule(family: Family, num_steps: int) -> Schedule:
    """The schedule of a model, and the times its own sampler visits in so many steps."""
    last = family.pipe.scheduler.config.num_train_timesteps - (family.prediction_type != "flow")
    t = torch.arange(0, last + 1).float()
    alpha, sigma = (scale.numpy() for scale in family.alpha_sigma(t))
    return Schedule(t.numpy(), alpha, sigma, family.scheduler(num_steps).timesteps.cpu().float().numpy())


@torch.no_grad()
def solve(
    family: Family,
    x_T: Tensor,
    cond: Conditioning,
    *,
    sampler: str,
    num_steps: int,
    guidance_scale: float,
) -> tuple[Tensor, int]:
    """Where a sampler ends (b, c, h, w), and how often it called the denoiser for each sample.

    Args:
        family: of the model.
        x_T: unit-variance noise (b, c, h, w).
        cond: b rows.
        sampler: a name of a scheduler.
        num_steps: sampling steps.
        guidance_scale: see `esd.trajectory.rollout`.
    """
    with _from_end_to_end(family, sampler):
        solver = family.scheduler(num_steps, sampler)
        # what the denoiser gets of x_T at first: Euler's kind rounds it, which would be another equation's start
        ones = family.first_latents(solver, torch.ones_like(x_T[:1]))
        scale = family.model_input(solver, ones, solver.timesteps[0]).mean()
        found = rollout(
            family, family.denoiser, x_T / scale, cond, family.null(), num_steps=num_steps,
            guidance_scale=guidance_scale, scheduler=sampler,
        )  # fmt: skip
    calls = len(found.latents)
    if family.prediction_type == "flow" or sampler in TO_ZERO:
        return found.final, calls
    first = found.t.new_zeros(())
    asked = conditionings_of(family, cond, family.null(), guidance_scale)
    prediction = mixed(predict_many(family, family.denoiser, found.final, first, asked), guidance_scale)
    return clean(family, found.final, first, prediction), calls + 1


@contextmanager
def _from_end_to_end(family: Family, sampler: str) -> Iterator[None]:
    """Has a sampler begin at the last training time and come to the first, for the length of a `with` block.

    Those of `TO_ZERO` visit the first and go on from there to no noise; others end there. Flows have no other ends.
    """
    own = family.pipe.scheduler
    if family.prediction_type != "flow":
        kind: Any = type(own)
        ends: dict[str, Any] = {"timestep_spacing": "linspace" if sampler in TO_ZERO else "trailing"}
        ends |= {"final_sigmas_type": "zero" if sampler in TO_ZERO else "sigma_min"}
        ends |= {"steps_offset": 0, "set_alpha_to_one": False}
        by_default = set(own.config.get("_use_default_values", ())) - set(ends)  # which another class replaces
        family.pipe.scheduler = kind.from_config({**own.config, **ends, "_use_default_values": [*by_default]})
    try:
        yield
    finally:
        family.pipe.scheduler = own


def references(flow: bool) -> tuple[tuple[str, int], tuple[str, int]]:
    """(sampler, steps) of what errors are held against, and of another fine solution that tells how good that is.

    The other is of another sampler; a flow's is of half the steps, from which Euler, of first order, is as far away as
    it is from the solution.
    """
    if flow:
        return ("euler", REFERENCE_STEPS), ("euler", REFERENCE_STEPS // 2)
    return ("dpm++", REFERENCE_STEPS), ("heun", REFERENCE_STEPS // 5)


def errors(ends: Tensor, reference: Tensor) -> Tensor:
    """Root mean square (b,) of how far latents (b, c, h, w) lie from the reference."""
    return (ends - reference).square().mean(dim=(1, 2, 3)).sqrt()


def order(calls: Sequence[float], found: Sequence[float]) -> float | None:
    """How fast an error falls with the calls of the denoiser: p of error ~ calls^-p, by least squares in logarithms.

    Errors of nothing, as of the reference itself, are left out; None where fewer than two numbers of calls remain.
    """
    pairs = [(np.log(count), np.log(error)) for count, error in zip(calls, found, strict=True) if error > 0]
    if len({x for x, _ in pairs}) < 2:
        return None
    x, y = np.array(pairs).T
    return float(-np.polyfit(x, y, 1)[0])
