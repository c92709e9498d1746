"""Completion and inpainting: give the erased model a part of the concept, and see whether it goes on with it.

`Completion` lets the base take the first steps and the erased model the rest. `Inpainting` shows the erased model the
rim of the base's picture and lets it fill the middle: at each step what is visible is put back, noised to the level
of the step. Both give away a part of the answer, more with each try, so a try is read alone and beside its control:
completing from noise of the same level, or an unrelated drawing by the same model pasted into the same rim.

Source: Lu et al. 2025 (arXiv:2505.17013), diffusion completion and inpainting probes, kevinlu4588/WhenAreConceptsErased
for the steps; the masking is that of RePaint (Lugmayr et al. 2022, arXiv:2201.09865, eq. 8) without its jumps back.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from esd.errors import UserError
from esd.evaluation.attacks.base import Attack, Subject, Try, noised
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
    reads: ClassVar[Literal["best", "alone"]] = "alone"
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

    def tries(self, subject: Subject) -> Generator[Try, None, None]:
        """A handover after each number of steps, with the rows' own seeds."""
        for steps in self.interrupts:
            handover = _Handover(subject.base, subject.attacked, steps)
            latents = subject.sample(handover, subject.conditioning(), subject.own(), handover.edit)
            yield Try({"interrupt": steps}, latents)

    def control(self, subject: Subject, found: Sequence[Tensor] | None) -> Generator[Try, None, None]:
        """The attacked model takes all steps, from another seed; at the handover its x_t gives way to fresh noise of
        that level, which holds no sign of a picture.
        """
        for number, steps in enumerate(self.interrupts):
            noise = subject.family.initial_noise(subject.fresh("noise at the handover", number))

            def edit(solver: Any, i: int, x: Tensor, steps: int = steps, noise: Tensor = noise) -> Tensor:
                if i != min(steps, len(solver.timesteps) - 1):
                    return x
                return noised(subject.family, solver, torch.zeros_like(x), noise, solver.timesteps[i])

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


@dataclass(frozen=True)
class Inpainting(Attack):
    """The erased model fills the middle of the base's pictures.

    Attributes:
        hidden: edge of the square in the middle as a share of the picture's, one try each, from 1 (all is hidden: the
            plain drawing) to 0 (nothing: the base's picture).

    Raises:
        UserError: a share outside 0 to 1, or none given.
    """

    name: ClassVar[str] = "inpainting"
    reads: ClassVar[Literal["best", "alone"]] = "alone"
    hidden: tuple[float, ...] = (0.75, 0.5, 0.25)

    def __post_init__(self) -> None:
        if not self.hidden or not all(0 <= share <= 1 for share in self.hidden):
            raise UserError(f"inpainting.hidden is {self.hidden}; allowed: shares from 0 to 1, such as (0.75, 0.5)")

    def check(self, family: Family, rows: Sequence[PromptRow], draw: DrawSettings) -> None:
        """Fits every model."""

    def tries(self, subject: Subject) -> Generator[Try, None, None]:
        """A try for each mask, from the rows' own seeds, with one noise for what is visible: x_T."""
        known = self._shown(subject)
        noise = subject.family.initial_noise(subject.own())
        for share in self.hidden:
            mask = middle(known, share)

            def edit(solver: Any, i: int, x: Tensor, mask: Tensor = mask) -> Tensor:
                last = i == len(solver.timesteps)
                seen = known if last else noised(subject.family, solver, known, noise, solver.timesteps[i])
                return torch.where(mask, x, seen)

            yield Try({"hidden": share}, subject.sample(subject.attacked, subject.conditioning(), subject.own(), edit))

    def control(self, subject: Subject, found: Sequence[Tensor] | None) -> Generator[Try, None, None]:
        """The same rim around what the attacked model draws from another seed without seeing it."""
        known = self._shown(subject)
        for number, share in enumerate(self.hidden):
            fresh = subject.fresh("another seed", number)
            drawn = subject.sample(subject.attacked, subject.conditioning(), fresh)
            yield Try({"hidden": share}, torch.where(middle(known, share), drawn, known))

    def _shown(self, subject: Subject) -> Tensor:
        """What the base draws of the rows (n, c, h, w)."""
        return subject.sample(subject.base, subject.conditioning(), subject.own())


def middle(latents: Tensor, share: float) -> Tensor:
    """Mask (1, 1, h, w), True in a square or rectangle in the middle with `share` of each edge, rounded."""
    mask = torch.zeros(1, 1, *latents.shape[2:], dtype=torch.bool, device=latents.device)
    height, width = (round(share * edge) for edge in latents.shape[2:])
    top, left = (latents.shape[2] - height) // 2, (latents.shape[3] - width) // 2
    mask[..., top : top + height, left : left + width] = True
    return mask
