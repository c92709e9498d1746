"""Where training points come from: two strategies behind one call, `points(step, indices)`.

ESD has no data set. It trains at noisy latents that the model itself passes through on the way from pure
noise to a picture of the concept: run the sampler with guidance from x_T, stop at a random step, and that
x_t is the training point.

`OnPolicy`  a fresh partial rollout for every sample of every update, by the student as it is now (the paper)
            or by the teacher (upstream's scripts since 2024). Costs up to `num_steps` guided calls an update,
            or, where the points of `staleness` updates are drawn at once, as many larger calls for all of them.
`Bank`      with a frozen sampler, one whole rollout visits `num_steps` training points, and the two halves
            of its guided batch *are* the teacher's predictions for the concept and for the null prompt, so
            they are free. Points of one rollout are correlated; `rollouts` and `reuse` say how much. The student can
            fill a bank too: nothing is free then, but every point of a rollout can still be used, for at most
            `staleness` updates.

Free predictions need all of this: the teacher samples, and x is what it was given there; there is
classifier-free guidance (else only the concept's is free); the objective's null is the rollout's negative
prompt; a model that is told its guidance scale is told the same while sampling and for the target; t is the
visited time, not a jittered one; and the prompt is the one rolled out with (so `erase_from` and null are free,
the concept costs a call). What is wanted and missing is computed, in batched calls.

Every draw is keyed by (seed, purpose, step, index), see `esd.seeding`: a resumed run replays them. What the student
draws depends on its weights too, those of the first update that the points serve. They are gone when a run resumes amid
these updates, so the points are saved (`in_use`, `put_back`): a thousandth of what the weights would take.

Source: ESD section 4 and its algorithm (on-policy); rohitgandikota/erasing, esd_sd.py (frozen sampler); the
bank is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from . import seeding
from .errors import UserError
from .families.base import Conditioning, Denoiser, Family, Null
from .objectives import Anchor
from .trajectory import TimeRule, Times, Trajectory, conditionings_of, predict_many, rollout, times


@dataclass(frozen=True)
class Conditions:
    """What is erased, from what, and the null prompt.

    Attributes:
        concept: one row for each training prompt (P rows).
        null: one row, that of `Family.null` for the objective.
        erase_from: P rows, or None: the prompts from which the concept is removed as an attribute.
        sample_with: x_t comes from a rollout with "erase_from" (where there is one) or always with the
            "concept", as alt_esd_diffusers.py does.
        negative: one row, the negative prompt of rollouts; None for `null`.

    Raises:
        ValueError: the numbers of rows do not fit.
    """

    concept: Conditioning
    null: Conditioning
    erase_from: Conditioning | None = None
    sample_with: Literal["erase_from", "concept"] = "erase_from"
    negative: Conditioning | None = None

    def __post_init__(self) -> None:
        if len(self.null) != 1 or (self.erase_from is not None and len(self.erase_from) != len(self.concept)):
            raise ValueError("conditions need one null row and as many erase_from rows as concept rows")

    @property
    def student(self) -> Conditioning:
        """What the student is conditioned on (P rows); index it with `Points.prompt`."""
        return self.concept if self.erase_from is None else self.erase_from

    @property
    def rolled(self) -> Conditioning:
        """What rollouts are conditioned on (P rows)."""
        return self.concept if self.sample_with == "concept" else self.student


@dataclass(frozen=True)
class Points:
    """Training points with everything the teacher has to say about them; b of them, float32.

    Attributes:
        x: what the denoiser gets (b, c, h, w), already through `Family.model_input`.
        t: its time (b,).
        prompt: row of `Conditions` it belongs to (b,), int64.
        concept: teacher's prediction for the concept (b, c, h, w).
        null: for the null prompt (b, c, h, w), or None where it is not wanted.
        erase_from: for the prompt erased from (b, c, h, w), or None without one.
    """

    x: Tensor
    t: Tensor
    prompt: Tensor
    concept: Tensor
    null: Tensor | None = None
    erase_from: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Points:
        return Points(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Those that are not None, by name; `Points(**points.tensors())` is the same again."""
        return {f.name: tensor for f in fields(self) if (tensor := getattr(self, f.name)) is not None}

    @staticmethod
    def cat(parts: Sequence[Points]) -> Points:
        """One batch after the other."""
        return Points(**{name: torch.cat([getattr(p, name) for p in parts]) for name in parts[0].tensors()})

    def prediction(self, of: Anchor) -> Tensor:
        """What the teacher predicts for "null", "concept" or "erase_from" (b, c, h, w).

        Raises:
            ValueError: it was not asked that, or nothing is erased from anything.
        """
        predicted = {"null": self.null, "concept": self.concept, "erase_from": self.erase_from}[of]
        if predicted is None:
            raise ValueError(f"these points have no such prediction: {of}")
        return predicted


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


ALL: tuple[Anchor, ...] = get_args(Anchor)


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


class OnPolicy(Source):
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
        self.wanted = wanted
        self.family, self.teacher, self.sampler = family, teacher, sampler
        self.conditions, self.sampling, self.per_update, self.seed = conditions, sampling, per_update, seed
        self.times = _times(family, sampling)
        self.updates_per_build = staleness
        self.missing = _missing(self, ())
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
        path = _roll(self, prompt, noise, stop=[self.times.stops[k] for k, _ in draws], keep="last")
        t = torch.tensor([label for _, label in draws], device=path.t.device)
        return _complete(self, _seen(self, path)[0], t, prompt.to(t.device), {})

    def most_rows(self, samples: int) -> int:
        """See `Source`."""
        made = samples * self.updates_per_build
        return min(self.sampling.max_batch, made * max(_passes(self), len(self.missing)))

    def visited(self, updates: int) -> set[int]:
        """The prompts (rows of `Conditions`) that so many updates train on."""
        count = len(self.conditions.concept)
        return set(dealt(self.seed, range(min(updates * self.per_update, count)), count).tolist())


class Bank(Source):
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
        self.wanted = wanted
        self.family, self.teacher, self.sampler = family, teacher, sampler or teacher
        self.conditions, self.sampling, self.per_update, self.seed = conditions, sampling, per_update, seed
        self.times = _times(family, sampling)
        self.rollouts, self.size = rollouts, rollouts * len(self.times.stops)
        self.updates_per_build = self.size * reuse // per_update
        if self.updates_per_build < 1:
            raise UserError(
                f"a bank of {rollouts} rollouts x {len(self.times.stops)} points used {reuse} times holds "
                f"less than one update of {per_update} samples; raise rollouts or reuse"
            )
        self.updates_per_build = min(self.updates_per_build, staleness or self.updates_per_build)
        self._free = self._made_anyway()
        self.missing = _missing(self, self._free)
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
        return min(self.sampling.max_batch, max(self.at_once * _passes(self), points * len(self.missing)))

    def _made_anyway(self) -> tuple[Anchor, ...]:
        """The predictions that rollouts make at the very points and for the very conditionings that train."""
        c, free = self.conditions, list[Anchor]()
        if self.times.visited and self.sampler is self.teacher and self.sampling.scaled_input:
            if self.family.with_guidance(c.rolled, self.sampling.guidance_scale) is c.rolled:
                free.append("concept" if c.rolled is c.concept else "erase_from")
            if c.negative is None and _passes(self) == 2:
                free.append("null")
        return tuple(free)

    def _part(self, build: int, part: Tensor, serving: Tensor) -> Points:
        """The points of some rollouts of a build that are among those serving."""
        numbers, stops = part.tolist(), list(self.times.stops)
        prompt = self._prompts(build, numbers)
        noise = seeding.generators(self.seed, "bank noise", build, numbers)
        path = _roll(self, prompt, noise)
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
        x = points(torch.cat([_seen(self, path), path.final[None]]))
        t, prompts = torch.tensor(labels)[rows], prompt.repeat_interleave(len(stops))[rows]
        return _complete(self, x, t.to(x.device), prompts.to(x.device), free)


def dealt(seed: int, numbers: Sequence[int], count: int) -> Tensor:
    """Which of `count` prompts come at these places of an endless deal, int64 (len(numbers),).

    Each pass over the prompts is in a new random order, so that a run that ends within one has seen an even
    sample of a list, and not its beginning.
    """
    passes = {number // count for number in numbers}
    orders = {n: torch.randperm(count, generator=seeding.generator(seed, "prompt order", n)) for n in passes}
    return torch.tensor([int(orders[number // count][number % count]) for number in numbers], dtype=torch.int64)


def _times(family: Family, sampling: Sampling) -> Times:
    """The training points of the rollouts that `sampling` describes."""
    solver = family.scheduler(sampling.num_steps, sampling.scheduler, family.latent_shape(sampling.size))
    if not sampling.scaled_input:
        ones = torch.ones(1, 1, 1, 1)
        if torch.equal(family.model_input(solver, ones, solver.timesteps[0]), ones):
            raise UserError(
                f"trajectory.scaled_input=false: {type(solver).__name__} gives x_t to the denoiser as it is; leave it "
                "out (Euler of Stable Diffusion and SDXL scales, trajectory.scheduler=euler)"
            )
    return times(sampling.time_rule, solver)


def _seen(source: OnPolicy | Bank, path: Trajectory) -> Tensor:
    """The points of a rollout as the denoiser is shown them in training (s, b, c, h, w)."""
    return path.inputs if source.sampling.scaled_input else path.latents


def _draw(times: Times, generator: torch.Generator) -> tuple[int, float]:
    """(choice, time label) of one sample."""
    k = seeding.below(generator, len(times.stops))
    return k, times.low[k] + seeding.below(generator, times.width[k])


def _roll(source: OnPolicy | Bank, prompt: Tensor, noise: list[torch.Generator], **how: Any) -> Trajectory:
    """The source's rollout of some prompts (rows of `Conditions.rolled`), from and with this noise."""
    sampling, conditions = source.sampling, source.conditions
    return rollout(
        source.family,
        source.sampler,
        source.family.initial_noise(noise, sampling.size),
        conditions.rolled[prompt],
        conditions.null if conditions.negative is None else conditions.negative,
        num_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
        scheduler=sampling.scheduler,
        skip=source.times.skip,
        generators=noise,
        max_batch=sampling.max_batch,
        **how,
    )


def _passes(source: OnPolicy | Bank) -> int:
    """Rows of the denoiser's batch for each rollout: two under classifier-free guidance."""
    c = source.conditions
    return len(conditionings_of(source.family, c.rolled, c.null, source.sampling.guidance_scale))


def _missing(source: OnPolicy | Bank, free: Collection[Anchor]) -> tuple[Anchor, ...]:
    """The predictions that are wanted and not free."""
    known: list[Anchor] = ["concept", "null"]
    if source.conditions.erase_from is not None:
        known.append("erase_from")
    return tuple(name for name in known if name in source.wanted and name not in free)


def _complete(source: OnPolicy | Bank, x: Tensor, t: Tensor, prompt: Tensor, free: Mapping[Anchor, Tensor]) -> Points:
    """Points with the teacher's predictions that are wanted: those in `free`, and the missing ones in one batch."""
    c, missing = source.conditions, source.missing
    predictions = {name: values for name, values in free.items() if name in source.wanted}
    if missing:
        conditionings = {"concept": c.concept, "null": c.null, "erase_from": c.student}
        got = predict_many(
            source.family, source.teacher, x, t, [conditionings[name] for name in missing], source.sampling.max_batch,
            which=[torch.zeros_like(prompt) if name == "null" else prompt for name in missing],
        )  # fmt: skip
        predictions |= dict(zip(missing, got, strict=True))
    return Points(x, t, prompt, **predictions)
