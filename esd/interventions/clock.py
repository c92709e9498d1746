"""What moment of sampling a call of the denoiser belongs to: scheduler step, pass, and rows of the batch.

Calls are never counted. Heun and PNDM call the denoiser more often than they step, SDE solvers skip calls, and a
pipeline may evaluate its prompt in one batch with the null prompt or one after the other. So the step is read off the
scheduler's own times: the first is looked for, for a pipeline may begin in the middle and tells its denoiser a rounded
time; after that it is the one that follows what was stepped from. The pass is read off the layout that the family and
its pipeline have.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch

from esd.errors import UserError
from esd.families import Family
from esd.trajectory import first_stages

Pass = Literal["cond", "uncond"]
Scope = tuple[int, int] | tuple[float, float] | None


@dataclass(frozen=True)
class Moment:
    """When a call of the denoiser is made.

    Attributes:
        step: of the scheduler, 0 the first, `num_steps` after the last; None where nothing samples.
        num_steps: of the scheduler; None where nothing samples.
        stage: which evaluation of the step it is, 0 the first; solvers of higher order make several, and guidance by
            skipped layers or by a loss makes one more.
        passes: what the batch consists of, one after the other, each of `rows` samples.
        rows: samples.
        text_tokens: of each text, as the denoiser gets them; None where it gets none.
    """

    step: int | None
    num_steps: int | None
    stage: int
    passes: tuple[Pass, ...]
    rows: int
    text_tokens: int | None

    def within(self, scope: Scope) -> bool:
        """Whether the step lies in a half-open range of steps: of numbers, or of fractions of all of them.

        Raises:
            UserError: nothing samples, so that there are no steps.
        """
        if scope is None:
            return True
        low, high = numbered("steps", scope, self.num_steps)
        return self.step is not None and low <= self.step < high

    def positions(self, on: Pass | Literal["both"], rows: Sequence[int] | None) -> list[int]:
        """Rows of the batch that are these samples in these passes."""
        samples = range(self.rows) if rows is None else rows
        starts = [i * self.rows for i, name in enumerate(self.passes) if on in ("both", name)]
        return [start + row for start in starts for row in samples]


def check_range(name: str, steps: Any) -> None:
    """Raises UserError unless `steps` is a half-open range, maybe empty, of numbers or of fractions of all steps."""
    pair = list(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else []
    two = len(pair) == 2 and all(isinstance(edge, Real) for edge in pair)
    if two and 0 <= pair[0] <= pair[1] and (pair[1] <= 1 or not _fractions(pair)):
        return
    raise UserError(f"{name}={steps!r}: allowed: numbers such as (0, 5), or fractions such as (0.0, 0.5)")


def check_schedule(name: str, steps: tuple[int, int] | tuple[float, float], num_steps: int | None) -> None:
    """Raises UserError for a range of steps of which the schedule has none, or not all."""
    low, high = numbered(name, steps, num_steps)
    if num_steps is not None and high > num_steps:
        raise UserError(
            f"{name}={steps} reaches beyond the {num_steps} steps of sampling; allowed: numbers from 0 to {num_steps}, "
            "or fractions such as (0.0, 0.5)"
        )
    if low == high:
        raise UserError(f"{name}={steps} holds none of the {num_steps} steps of sampling; widen it, or take more steps")


def numbered(name: str, steps: tuple[int, int] | tuple[float, float], num_steps: int | None) -> tuple[int, int]:
    """A half-open range of steps by their numbers.

    Raises:
        UserError: nothing samples, so that there are no steps.
    """
    if num_steps is None:
        raise UserError(f"{name}={steps}: the denoiser was called outside of sampling, where there are no steps")
    low, high = steps
    return (round(low * num_steps), round(high * num_steps)) if _fractions(steps) else (int(low), int(high))


def _fractions(steps: Sequence[float]) -> bool:
    return not all(isinstance(edge, Integral) for edge in steps)


class Clock:
    """Tells the moment of each call of a denoiser.

    Attributes:
        runs: how often the scheduler that it follows began anew.

    Args:
        family: of the model.
    """

    def __init__(self, family: Family) -> None:
        self.runs, self._family = 0, family
        self._solver: Any = None
        self._passes: tuple[Pass, ...] | None = None  # told; else what the pipeline's settings say
        self._next: int | None = None  # of the scheduler's times, the one after what was stepped from; None before that
        self._entry: int | None = None
        self._extra = 0
        self._since_step = 0  # calls since the last step: pipelines with separate passes call twice

    def tell(self, solver: Any, entry: int, passes: tuple[Pass, ...], extra: int = 0) -> None:
        """The next calls are made for entry `entry` of the solver's times, with these passes in each batch.

        Args:
            solver: the scheduler.
            entry: index into its times.
            passes: see `Moment`.
            extra: added to the stage of calls that are not the solver's own.
        """
        self._solver, self._entry, self._passes, self._extra = solver, entry, passes, extra

    @contextmanager
    def following(self, solver: Any) -> Iterator[None]:
        """Watches a pipeline's scheduler begin and step, for the length of a `with` block."""
        begin, step = solver.set_timesteps, solver.step
        outer = {name: kept for name, kept in vars(solver).items() if name in ("set_timesteps", "step")}

        @functools.wraps(begin)  # pipelines ask for its signature
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self._solver, self._entry, self._passes, self._since_step = solver, None, None, 0
            self._next = None
            self.runs += 1
            return begin(*args, **kwargs)

        @functools.wraps(step)
        def stepped(prediction: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
            self._next, self._since_step = self._entry_of(float(t)) + 1, 0
            return step(prediction, t, *args, **kwargs)

        solver.set_timesteps, solver.step = set_timesteps, stepped
        try:
            yield
        finally:
            del solver.set_timesteps, solver.step
            vars(solver).update(outer)  # those of a `with` block around this one

    def moment(
        self, batch: int, t: torch.Tensor | float, text_tokens: int | None, skips_layers: bool = False
    ) -> Moment:
        """The moment of a call.

        Args:
            batch: its rows.
            t: the time it was told, in the denoiser's own units.
            text_tokens: see `Moment`.
            skips_layers: whether it is told to leave layers out, as SD 3.5 guides itself by one more call.
        """
        self._since_step += 1
        passes: tuple[Pass, ...] = ("cond",) if skips_layers else self._passes or self._pipeline_passes()
        if self._solver is None:
            return Moment(None, None, 0, passes, batch // len(passes), text_tokens)
        entry = self._entry
        if entry is None:
            told = float(torch.as_tensor(t).flatten()[0]) * self._family.time_unit
            entry = self._entry_of(told) if self._next is None else self._next
        begins = first_stages(self._solver)
        step = bisect_right(begins, entry) - 1 if entry < len(self._solver.timesteps) else len(begins)
        stage = entry - begins[step] + skips_layers + self._extra if step < len(begins) else 0
        return Moment(step, len(begins), stage, passes, batch // len(passes), text_tokens)

    @property
    def guided(self) -> bool:
        """Whether what samples evaluates the null prompt too, in the same call or in another."""
        if self._passes:
            return "uncond" in self._passes
        guides = self._solver is not None and self._family.guidance == "cfg"
        return guides and bool(self._family.pipe.do_classifier_free_guidance)

    def _entry_of(self, t: float) -> int:
        """The first of the scheduler's times that t is nearest to, among those not stepped from yet."""
        begin = self._next or 0
        return begin + int((self._solver.timesteps[begin:].float() - t).abs().argmin())

    def _pipeline_passes(self) -> tuple[Pass, ...]:
        """As the stock pipelines have it: one batch of both halves, or the prompt first and the null prompt after."""
        if self._solver is None:
            return ("cond",)
        if not self._family.stacks_passes:
            return ("uncond",) if self._since_step == 2 else ("cond",)
        return ("uncond", "cond") if self.guided else ("cond",)
