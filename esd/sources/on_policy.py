"""`OnPolicy`: fresh partial rollouts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from esd import seeding
from esd.families.base import Denoiser, Family
from esd.objectives import Anchor
from esd.trajectory import Times

from .points import Conditions, Points
from .source import ALL, Rolling, Sampling, dealt


class OnPolicy(Rolling):
    """Fresh partial rollouts for every update or every few, each sample to its own random stop.

    Args:
        family: of the model.
        teacher: frozen view, gives the predictions.
        sampler: who rolls out: the live student (pass the unwrapped module) for the paper's ESD, or the
            teacher for upstream's later scripts.
        conditions: prompts; sample i of an update takes number step * per_update + i of those `dealt`.
        sampling: see `Sampling`.
        per_update: samples of one update over all processes and micro-batches.
        seed: of the run.
        staleness: updates whose points are drawn at once: as many rows for the denoiser, in fewer and larger calls.
            A student has moved on by up to staleness - 1 updates when they train it; 1 is the paper's.
        wanted: predictions of the teacher that someone will read; see `Points`.

    Raises:
        UserError: the time rule does not fit the scheduler.
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
        staleness: int = 1,
        wanted: Collection[Anchor] = ALL,
    ) -> None:
        super().__init__(
            family, teacher, sampler, conditions, sampling, per_update=per_update, seed=seed, wanted=wanted
        )
        self.updates_per_build = staleness
        self.missing = self.lacking(())
        self._build = -1
        self._built: dict[int, Points] = {}  # by sample index: one point for each update of the build

    def points(self, step: int, indices: Sequence[int]) -> Points:
        """Points of update `step`, float32 on the denoiser's device; see `Source`."""
        build, within = divmod(step, self.updates_per_build)
        if self._build != build:
            self._build, self._built = build, {}
        if missing := [i for i in indices if i not in self._built]:
            first = build * self.updates_per_build
            fresh = self._fresh(range(first, first + self.updates_per_build), missing)
            self._built |= {i: fresh[k :: len(missing)] for k, i in enumerate(missing)}
        return Points.cat([self._built[i][within : within + 1] for i in indices])

    def in_use(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """See `Source`; "index" is the sample index of each `updates_per_build` rows."""
        points = Points.cat(list(self._built.values()))
        tensors = points.tensors() | {"index": torch.tensor(list(self._built), device=points.x.device)}
        return {name: gather(tensor) for name, tensor in tensors.items()}

    def put_back(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Source`."""
        columns = {name: tensor.to(self.family.device) for name, tensor in tensors.items()}
        indices, n = columns.pop("index").tolist(), self.updates_per_build
        points = Points(**columns)
        self._build, self._built = step // n, {i: points[k * n : (k + 1) * n] for k, i in enumerate(indices)}

    @torch.no_grad()
    def _fresh(self, steps: Sequence[int], indices: Sequence[int]) -> Points:
        """The points of some updates, one update after the other."""
        numbers = [step * self.per_update + i for step in steps for i in indices]
        prompt = dealt(self.seed, numbers, len(self.conditions.concept))
        time = [gen for step in steps for gen in seeding.generators(self.seed, "time", step, indices)]
        noise = [gen for step in steps for gen in seeding.generators(self.seed, "noise", step, indices)]
        draws = [_draw(self.times, gen) for gen in time]
        path = self.rolled(prompt, noise, stop=[self.times.stops[k] for k, _ in draws], keep="last")
        t = torch.tensor([label for _, label in draws], device=path.t.device)
        return self.complete(self.seen(path)[0], t, prompt.to(t.device), {})

    def most_rows(self, samples: int) -> int:
        """See `Source`."""
        made = samples * self.updates_per_build
        return min(self.sampling.max_batch, made * max(self.passes, len(self.missing)))

    def visited(self, updates: int) -> set[int]:
        """The prompts (rows of `Conditions`) that so many updates train on."""
        count = len(self.conditions.concept)
        return set(dealt(self.seed, range(min(updates * self.per_update, count)), count).tolist())


def _draw(times: Times, generator: torch.Generator) -> tuple[int, float]:
    """(choice, time label) of one sample."""
    k = seeding.below(generator, len(times.stops))
    return k, times.low[k] + seeding.below(generator, times.width[k])
