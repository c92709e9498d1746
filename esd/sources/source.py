"""What a source of training points is asked, how it samples, and what all sources do alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from esd import seeding
from esd.errors import UserError
from esd.families.base import Denoiser, Family, Null
from esd.objectives import Anchor
from esd.trajectory import TimeRule, Times, Trajectory, conditionings_of, predict_many, rollout, times

from .points import Conditions, Points

ALL: tuple[Anchor, ...] = get_args(Anchor)


@dataclass(frozen=True)
class Sampling:
    """How training points are sampled.

    Attributes:
        num_steps: of a whole rollout.
        guidance_scale: of guidance while sampling x_t (upstream: 3), see `esd.trajectory.rollout`.
        time_rule: see `times`.
        scheduler: see `Family.scheduler`; None for the model's own.
        max_batch: most rows in one call of the denoiser, >= 2.
        size: edge in pixels of the square pictures rolled out; None for the model's own.
        negative: the negative prompt, see `Family.null`; None for the objective's null.
        scaled_input: training points go through `Family.model_input`, as in sampling. Upstream's esd_sdxl.py leaves
            that out, so that with Euler x is too large by sqrt(sigma^2 + 1).

    Raises:
        UserError: a value is out of range.
    """

    num_steps: int
    guidance_scale: float
    time_rule: TimeRule
    scheduler: str | None
    max_batch: int
    size: int | None
    negative: Null | None
    scaled_input: bool

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"num_steps is {self.num_steps}; it must be at least 1, such as 50")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UserError(f"guidance_scale is {self.guidance_scale}; it must be a finite number >= 0, such as 3")
        if self.time_rule not in get_args(TimeRule):
            raise UserError(f"time_rule is {self.time_rule!r}; allowed: {', '.join(get_args(TimeRule))}")
        if self.max_batch < 2:
            raise UserError(f"max_batch is {self.max_batch}; it must be at least 2")

    def training_times(self, family: Family) -> Times:
        """The training points of rollouts of this kind.

        Raises:
            UserError: the time rule does not fit the scheduler, or `scaled_input` is false where nothing is scaled.
        """
        solver = family.scheduler(self.num_steps, self.scheduler, family.latent_shape(self.size))
        if not self.scaled_input:
            ones = torch.ones(1, 1, 1, 1)
            if torch.equal(family.model_input(solver, ones, solver.timesteps[0]), ones):
                raise UserError(
                    f"trajectory.scaled_input=false: {type(solver).__name__} gives x_t to the denoiser as it is; leave "
                    "it out (Euler of Stable Diffusion and SDXL scales, trajectory.scheduler=euler)"
                )
        return times(self.time_rule, solver)


class Source(Protocol):
    """Where training points come from.

    Attributes:
        conditions: the prompts.
        updates_per_build: updates whose points are drawn before the first of them, by the sampler as it is then.
        missing: predictions that are not free: they take calls of the teacher of their own.
    """

    conditions: Conditions
    updates_per_build: int
    missing: tuple[Anchor, ...]

    def begins(self, step: int) -> bool:
        """Whether points are drawn before update `step`, by the sampler as it is then."""
        return step % self.updates_per_build == 0

    def points(self, step: int, indices: Sequence[int]) -> Points:
        """The points of update `step`, one for each sample index (over all processes and micro-batches).

        Who asks for an update asks for the same indices in every update: some sources then draw ahead.
        """

    def in_use(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The points drawn last, of all processes: what `put_back` needs.

        Args:
            gather: a tensor's rows in all processes, one process after the other; called in all of them alike.
        """

    def put_back(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `in_use` told in another sitting for the points in use at update `step`, instead of drawing."""

    def visited(self, updates: int) -> set[int]:
        """The prompts (rows of `Conditions`) that so many updates train on."""

    def most_rows(self, samples: int) -> int:
        """Most rows in one call of the denoiser while points are drawn, for `points` of so many samples."""


class Rolling(Source):
    """What both strategies do: roll out, and have the teacher say what is missing of the points on the way.

    Args:
        family: of the model.
        teacher: frozen view, gives the predictions.
        sampler: rolls out.
        conditions: prompts.
        sampling: see `Sampling`.
        per_update: samples of one update over all processes and micro-batches.
        seed: of the run.
        wanted: predictions of the teacher that someone will read; see `Points`.

    Raises:
        UserError: the time rule does not fit the scheduler, or unscaled input is asked of one that scales nothing.
    """

    def __init__(
        self,
        family: Family,
        teacher: Denoiser,
        sampler: Denoiser,
        conditions: Conditions,
        sampling: Sampling,
        *,
        per_update: int,
        seed: int,
        wanted: Collection[Anchor],
    ) -> None:
        self.family, self.teacher, self.sampler = family, teacher, sampler
        self.conditions, self.sampling, self.per_update, self.seed = conditions, sampling, per_update, seed
        self.wanted, self.times = wanted, sampling.training_times(family)

    def rolled(self, prompt: Tensor, noise: list[torch.Generator], **how: Any) -> Trajectory:
        """A rollout of some prompts (rows of `Conditions.rolled`), from and with this noise."""
        sampling, conditions = self.sampling, self.conditions
        return rollout(
            self.family,
            self.sampler,
            self.family.initial_noise(noise, sampling.size),
            conditions.rolled[prompt],
            conditions.null if conditions.negative is None else conditions.negative,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            scheduler=sampling.scheduler,
            skip=self.times.skip,
            generators=noise,
            max_batch=sampling.max_batch,
            **how,
        )

    def seen(self, path: Trajectory) -> Tensor:
        """The points of a rollout as the denoiser is shown them in training (s, b, c, h, w)."""
        return path.inputs if self.sampling.scaled_input else path.latents

    @property
    def passes(self) -> int:
        """Rows of the denoiser's batch for each rollout: two under classifier-free guidance."""
        c = self.conditions
        return len(conditionings_of(self.family, c.rolled, c.null, self.sampling.guidance_scale))

    def lacking(self, free: Collection[Anchor]) -> tuple[Anchor, ...]:
        """The predictions that are wanted and not free."""
        known: list[Anchor] = ["concept", "null"]
        if self.conditions.erase_from is not None:
            known.append("erase_from")
        return tuple(name for name in known if name in self.wanted and name not in free)

    def complete(self, x: Tensor, t: Tensor, prompt: Tensor, free: Mapping[Anchor, Tensor]) -> Points:
        """Points with the teacher's predictions that are wanted: those in `free`, the missing ones in one batch."""
        c, missing = self.conditions, self.missing
        predictions = {name: values for name, values in free.items() if name in self.wanted}
        if missing:
            conditionings = {"concept": c.concept, "null": c.null, "erase_from": c.student}
            got = predict_many(
                self.family, self.teacher, x, t, [conditionings[name] for name in missing], self.sampling.max_batch,
                which=[torch.zeros_like(prompt) if name == "null" else prompt for name in missing],
            )  # fmt: skip
            predictions |= dict(zip(missing, got, strict=True))
        return Points(x, t, prompt, **predictions)


def dealt(seed: int, numbers: Sequence[int], count: int) -> Tensor:
    """Which of `count` prompts come at these places of an endless deal, int64 (len(numbers),).

    Each pass over the prompts is in a new random order, so that a run that ends within one has seen an even
    sample of a list, and not its beginning.
    """
    passes = {number // count for number in numbers}
    orders = {n: torch.randperm(count, generator=seeding.generator(seed, "prompt order", n)) for n in passes}
    return torch.tensor([int(orders[number // count][number % count]) for number in numbers], dtype=torch.int64)
