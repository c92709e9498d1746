"""`Bank`: whole rollouts, every point of which is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from esd import seeding
from esd.errors import UserError
from esd.families.base import Denoiser, Family
from esd.objectives import Anchor

from .points import Conditions, Points
from .source import ALL, Rolling, Sampling, dealt


class Bank(Rolling):
    """Whole rollouts, every point of which is used; rebuilt when used up, or sooner where points grow stale.

    Update s belongs to build s // updates_per_build; within a build, each pass over the points takes them in
    a new random order. Both are functions of the seed, so a resumed run rebuilds the very same bank, and so
    does every process of a parallel one.

    A build that is thrown away before all its points were taken serves the first ones of that order: a uniform
    sample of all rollouts and times. The others are never completed by the teacher.

    Args:
        family: of the model.
        teacher: frozen view; rolls out and gives the predictions.
        conditions: prompts; rollout r of build n has number n * rollouts + r of those `dealt`.
        sampling: see `Sampling`.
        rollouts: whole rollouts in a build.
        reuse: each point is used at most this often.
        per_update: samples of one update over all processes and micro-batches.
        seed: of the run.
        sampler: rolls out instead of the teacher, and then nothing is free. With the live student this is
            ESD's on-policy sampling, up to `updates_per_build` - 1 updates stale.
        staleness: most updates that a build serves; None for as many as it has points for.
        wanted: predictions of the teacher that someone will read; see `Points`.

    Raises:
        UserError: the bank cannot fill one update, or the time rule does not fit the scheduler.
    """

    def __init__(
        self,
        family: Family,
        teacher: Denoiser,
        conditions: Conditions,
        sampling: Sampling,
        *,
        rollouts: int,
        reuse: int,
        per_update: int,
        seed: int,
        sampler: Denoiser | None = None,
        staleness: int | None = None,
        wanted: Collection[Anchor] = ALL,
    ) -> None:
        super().__init__(
            family, teacher, sampler or teacher, conditions, sampling, per_update=per_update, seed=seed, wanted=wanted
        )
        self.rollouts, self.size = rollouts, rollouts * len(self.times.stops)
        self.updates_per_build = self.size * reuse // per_update
        if self.updates_per_build < 1:
            raise UserError(
                f"a bank of {rollouts} rollouts x {len(self.times.stops)} points used {reuse} times holds "
                f"less than one update of {per_update} samples; raise rollouts or reuse"
            )
        self.updates_per_build = min(self.updates_per_build, staleness or self.updates_per_build)
        self._free = self._made_anyway()
        self.missing = self.lacking(self._free)
        self._built: tuple[int, Points] | None = None

    @torch.no_grad()
    def points(self, step: int, indices: Sequence[int]) -> Points:
        """Points of update `step`, built when first needed; see `Source`."""
        build, within = divmod(step, self.updates_per_build)
        if self._built is None or self._built[0] != build:
            self._built = None  # let the old one go before the new one grows
            self._built = build, self.build(build)
        points = self._built[1]
        places = [divmod(within * self.per_update + index, self.size) for index in indices]
        orders = {turn: self._order(build, turn) for turn in {turn for turn, _ in places}}
        rows = torch.tensor([int(orders[turn][position]) for turn, position in places])
        return points[torch.searchsorted(self._serving(build), rows).to(points.x.device)]

    def in_use(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """See `Source`; every process has the whole bank, and nothing is gathered."""
        return self._built[1].tensors() if self._built else {}

    def put_back(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Source`."""
        points = Points(**{name: tensor.to(self.family.device) for name, tensor in tensors.items()})
        self._built = step // self.updates_per_build, points

    def _order(self, build: int, turn: int) -> Tensor:
        """The order in which pass `turn` over a build takes its points."""
        return torch.randperm(self.size, generator=seeding.generator(self.seed, "bank order", build, turn))

    def _serving(self, build: int) -> Tensor:
        """The points of a build that some update takes, in ascending order, rollout by rollout."""
        return self._order(build, 0)[: self.updates_per_build * self.per_update].sort().values

    def _prompts(self, build: int, numbers: Iterable[int]) -> Tensor:
        """The prompts of some rollouts of a build."""
        return dealt(self.seed, [build * self.rollouts + r for r in numbers], len(self.conditions.concept))

    def visited(self, updates: int) -> set[int]:
        """The prompts (rows of `Conditions`) that so many updates train on."""
        found: set[int] = set()
        for build in range(math.ceil(updates / self.updates_per_build)):
            within = min(updates - build * self.updates_per_build, self.updates_per_build)
            used = self._order(build, 0)[: within * self.per_update] // len(self.times.stops)
            found.update(self._prompts(build, used.unique().tolist()).tolist())
            if len(found) == len(self.conditions.concept):
                break
        return found

    @torch.no_grad()
    def build(self, build: int) -> Points:
        """The points of a build that serve, rollout by rollout, float32 on the denoiser's device."""
        serving = self._serving(build)
        numbers = (serving // len(self.times.stops)).unique()
        return Points.cat([self._part(build, part, serving) for part in numbers.split(self.at_once)])

    @property
    def at_once(self) -> int:
        """Most rollouts that run together."""
        return min(self.rollouts, self.sampling.max_batch // 2)

    def most_rows(self, samples: int) -> int:
        """See `Source`; a build does not depend on `samples`."""
        points = min(self.at_once * len(self.times.stops), self.updates_per_build * self.per_update)
        return min(self.sampling.max_batch, max(self.at_once * self.passes, points * len(self.missing)))

    def _made_anyway(self) -> tuple[Anchor, ...]:
        """The predictions that rollouts make at the very points and for the very conditionings that train."""
        c, free = self.conditions, list[Anchor]()
        if self.times.visited and self.sampler is self.teacher and self.sampling.scaled_input:
            if self.family.with_guidance(c.rolled, self.sampling.guidance_scale) is c.rolled:
                free.append("concept" if c.rolled is c.concept else "erase_from")
            if c.negative is None and self.passes == 2:
                free.append("null")
        return tuple(free)

    def _part(self, build: int, part: Tensor, serving: Tensor) -> Points:
        """The points of some rollouts of a build that are among those serving."""
        numbers, stops = part.tolist(), list(self.times.stops)
        prompt = self._prompts(build, numbers)
        noise = seeding.generators(self.seed, "bank noise", build, numbers)
        path = self.rolled(prompt, noise)
        every = (part[:, None] * len(stops) + torch.arange(len(stops))).flatten()
        rows = torch.isin(every, serving).nonzero().flatten()

        def points(values: Tensor) -> Tensor:
            """Rollout by rollout, so that the order does not depend on how many roll out together."""
            return values[stops].transpose(0, 1).flatten(0, 1)[rows.to(values.device)]

        labels = [
            low + seeding.below(source, width)
            for source in seeding.generators(self.seed, "bank time", build, numbers)
            for low, width in zip(self.times.low, self.times.width, strict=True)
        ]
        predictions = [(name, path.null if name == "null" else path.cond) for name in self._free]
        free = {name: points(values) for name, values in predictions if values is not None}
        x = points(torch.cat([self.seen(path), path.final[None]]))
        t, prompts = torch.tensor(labels)[rows], prompt.repeat_interleave(len(stops))[rows]
        return self.complete(x, t.to(x.device), prompts.to(x.device), free)
