"""Inpainting: the erased model sees the rim of the base's picture and fills the middle.

At each step what is visible is put back, noised to the level of the step, so any text-to-image model can be asked. The
rim gives away a part of the answer, more with each try, so a try is read alone and beside its control: an unrelated
drawing by the same model, pasted into the same rim.

Source: Lu et al. 2025 (arXiv:2505.17013), inpainting probe; kevinlu4588/WhenAreConceptsErased,
src/probes/inpainting_probe.py, hides the middle half of each edge. The masking is that of RePaint (Lugmayr et al. 2022,
arXiv:2201.09865, eq. 8) without its jumps back.
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
from esd.families import Family


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
    reads: ClassVar[Reads] = "alone"
    hidden: tuple[float, ...] = (0.75, 0.5, 0.25)

    def __post_init__(self) -> None:
        if not self.hidden or not all(0 <= share <= 1 for share in self.hidden):
            raise UserError(f"inpainting.hidden is {self.hidden}; allowed: shares from 0 to 1, such as (0.75, 0.5)")

    def check(self, family: Family, rows: Sequence[PromptRow], draw: DrawSettings) -> None:
        """Fits every model."""

    def tries(self, subject: Subject) -> Tries:
        """A try for each mask, from the rows' own seeds, with one noise for what is visible: x_T."""
        known = self._shown(subject)
        noise = subject.family.initial_noise(subject.own())
        for share in self.hidden:
            mask = middle(known, share)

            def edit(solver: Any, i: int, x: Tensor, mask: Tensor = mask) -> Tensor:
                last = i == len(solver.timesteps)
                seen = known if last else subject.noised(solver, known, noise, solver.timesteps[i])
                return torch.where(mask, x, seen)

            yield Try({"hidden": share}, subject.sample(subject.attacked, subject.conditioning(), subject.own(), edit))

    def control(self, subject: Subject, found: Sequence[Tensor] | None) -> Tries:
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
