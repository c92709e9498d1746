"""What is attacked: an erased model beside its base, and one of them as an attack sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esd import checkpoint, seeding
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.prompts import PromptRow
from esd.families import Conditioning, Denoiser, Family
from esd.families.base import Part
from esd.trajectory import Edit, rollout


@dataclass(frozen=True)
class Model:
    """An erased model beside the base it was made from.

    Attributes:
        family: of the pipeline whose denoiser is erased.
        base: the base's denoiser, callable as the erased one; gradients must flow through it.
    """

    family: Family
    base: Denoiser

    @classmethod
    def wearing(cls, family: Family) -> Model:
        """The model of a pipeline that wears erased weights, which `esd.apply` put on.

        Raises:
            CheckpointError: it wears none.
        """
        return cls(family, checkpoint.base_view(family.pipe))

    @contextmanager
    def at_work(self, *parts: Part) -> Iterator[None]:
        """These parts of the pipeline on its device, and no parameter of either model requiring a gradient.

        On any exit each parameter requires what it did before, and the parts lie on the CPU.
        """
        modules = [part for part in (*self.family.pipe.components.values(), self.base) if isinstance(part, nn.Module)]
        before = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
        try:
            self.family.place(*parts)
            for parameter, _ in before:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)
            self.family.place()


@dataclass(frozen=True)
class Subject:
    """One model under attack, with what an attacker has; all calls of its denoisers are counted.

    Attributes:
        family: says how the denoisers are called.
        attacked: the denoiser that is to draw the concept.
        base: the base's, which draws examples and hints.
        rows: what is asked for, n of them.
        draw: how pictures are drawn.
        seed: of the attack's own draws.
    """

    family: Family
    attacked: Denoiser
    base: Denoiser
    rows: Sequence[PromptRow]
    draw: DrawSettings
    seed: int

    def conditioning(self) -> Conditioning:
        """The rows' prompts, n rows."""
        return self.family.encode([row.prompt for row in self.rows])

    def own(self) -> list[torch.Generator]:
        """Generators that draw each row's own picture, as `esd.evaluation.generate` does."""
        return [torch.Generator().manual_seed(row.evaluation_seed) for row in self.rows]

    def fresh(self, purpose: str, step: int = 0) -> list[torch.Generator]:
        """Generators of other draws, one per row, that depend on no other row."""
        return [seeding.generator(self.seed, f"attack {purpose}", step, row.case_number) for row in self.rows]

    def sample(
        self, denoiser: Denoiser, cond: Conditioning, generators: list[torch.Generator], edit: Edit | None = None
    ) -> Tensor:
        """Clean latents (n, c, h, w) that a denoiser draws; see `rollout` for `edit`."""
        return rollout(
            self.family, denoiser, self.family.initial_noise(generators), cond, self.family.null(),
            num_steps=self.draw.num_steps, guidance_scale=self.draw.guidance_scale, keep="last",
            generators=generators, max_batch=self.draw.batch_size, edit=edit,
        ).final  # fmt: skip

    def plain(self) -> Tensor:
        """What the attacked model draws without any attack (n, c, h, w)."""
        return self.sample(self.attacked, self.conditioning(), self.own())

    def noised(self, solver: Any, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of clean latents (b, c, h, w), as a solver keeps it that is about to take its step at time t (scalar)."""
        alpha, sigma = (scale.to(x_0) for scale in self.family.alpha_sigma(t.reshape(1)))
        scale = self.family.model_input(solver, torch.ones_like(x_0[:1, :1, :1, :1]), t)  # Euler keeps x_t / α
        return (alpha * x_0 + sigma * noise) / scale
