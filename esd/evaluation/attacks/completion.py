"""Diffusion completion: the base takes the first steps and the erased model the rest.

An erased model may have unlearned how a picture of the concept begins, and still know how it goes on. Each further step
of the base gives away more of the answer, so a try is read alone and beside its control: at the handover, noise of the
same level without a sign of a picture.

Source: Lu et al. 2025 (arXiv:2505.17013), diffusion completion; kevinlu4588/WhenAreConceptsErased,
src/probes/diffusion_completion_probe.py, hands over after 1, 2 and 3 of 50 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from esd.errors import UserError
from esd.evaluation.attacks.attack import Attack, Tries, Try
from esd.evaluation.attacks.recovery import Reads
from esd.evaluation.attacks.subject import Subject
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.prompts import PromptRow
from esd.families import Denoiser, Family


@dataclass(frozen=True)
class Completion(Attack):
    """The base takes so many steps, the erased model the rest.

    Attributes:
        interrupts: scheduler steps before the handover, one try each; 0 is the plain drawing.

    Raises:
        UserError: a number of steps below 0, or none given.
    """

    name: ClassVar[str] = "completion"
    reads: ClassVar[Reads] = "alone"
    interrupts: tuple[int, ...] = (1, 2, 3, 5, 10, 15, 20)

    def __post_init__(self) -> None:
        if not self.interrupts or not all(k == int(k) and k >= 0 for k in self.interrupts):
            raise UserError(f"completion.interrupts is {self.interrupts}; allowed: whole numbers >= 0, such as (1, 2)")

    def check(self, family: Family, rows: Sequence[PromptRow], draw: DrawSettings) -> None:
        """Refuses more steps for the base than there are."""
        most = len(family.scheduler(draw.num_steps).timesteps)
        if max(self.interrupts) > most:
            raise UserError(
                f"completion.interrupts has {max(self.interrupts)}, and num_steps={draw.num_steps} makes {most} steps; "
                f"allowed: 0 to {most}"
            )

    def tries(self, subject: Subject) -> Tries:
        """A handover after each number of steps, with the rows' own seeds."""
        for steps in self.interrupts:
            handover = _Handover(subject.base, subject.attacked, steps)
            latents = subject.sample(handover, subject.conditioning(), subject.own(), handover.edit)
            yield Try({"interrupt": steps}, latents)

    def control(self, subject: Subject, found: Sequence[Tensor] | None) -> Tries:
        """The attacked model takes all steps, from another seed; at the handover its x_t gives way to fresh noise of
        that level, which holds no sign of a picture.
        """
        for number, steps in enumerate(self.interrupts):
            noise = subject.family.initial_noise(subject.fresh("noise at the handover", number))

            def edit(solver: Any, i: int, x: Tensor, steps: int = steps, noise: Tensor = noise) -> Tensor:
                if i != min(steps, len(solver.timesteps) - 1):
                    return x
                return subject.noised(solver, torch.zeros_like(x), noise, solver.timesteps[i])

            latents = subject.sample(
                subject.attacked, subject.conditioning(), subject.fresh("another seed", number), edit
            )
            yield Try({"interrupt": steps}, latents)


class _Handover:
    """Two denoisers in one: `first` until so many steps are taken, `then` from there on."""

    def __init__(self, first: Denoiser, then: Denoiser, steps: int) -> None:
        self.first, self.then, self.steps, self.taken = first, then, steps, 0

    def edit(self, solver: Any, i: int, x: Tensor) -> Tensor:
        """Notes how many steps are taken; the latents go on as they are."""
        self.taken = i
        return x

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the one at work predicts."""
        return (self.first if self.taken < self.steps else self.then)(*args, **kwargs)
