"""What an attack may spend, and the meter that counts it at the denoiser: an attack cannot forget to tell.

A *query* is one row that the denoiser evaluates (with guidance, a step of one picture is two), a *gradient* one row
that a backward pass went back through. Both add up to a *cost* in evaluations, in which attacks and their controls are
compared.

Source: ours; the field gives success without its price.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from esd.errors import UserError
from esd.families import Denoiser

GRADIENT = 2  # evaluations that going back through a row costs; with frozen weights it is less, to a control's benefit


def cost(queries: int, gradients: int) -> int:
    """What was spent, in evaluations of one row."""
    return queries + GRADIENT * gradients


@dataclass(frozen=True)
class Budget:
    """The most one run of an attack may spend; None is no limit.

    Attributes:
        gradients: rows that a backward pass goes back through.
        queries: rows that the denoiser evaluates, those with a gradient among them.
        seconds: of wall-clock time, looked at before each call of the denoiser; the call at hand is finished.

    Raises:
        UserError: a limit that is not positive.
    """

    gradients: int | None = None
    queries: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not limit > 0:
                raise UserError(f"budget.{name} is {limit}; allowed: a positive number, or none for no limit")


class OutOfBudgetError(Exception):
    """The next call of the denoiser would exceed a limit, which the message names; it ends a run, not a program."""


class Meter:
    """Counts what a run spends, at the denoisers it watches, and stops it before it exceeds its budget.

    Attributes:
        gradients, queries: spent so far, see `Budget`.
    """

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self.gradients, self.queries = 0, 0
        self._budget, self._clock, self._begun = budget, clock, clock()

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return self._clock() - self._begun

    def watch(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser, every row of it counted; raises OutOfBudgetError instead of exceeding the budget."""

        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._allow(len(x))
            output = denoiser(x, *args, **kwargs)
            self.queries += len(x)
            if output[0].requires_grad:
                output[0].register_hook(self._went_back)
            return output

        return watched

    def _allow(self, rows: int) -> None:
        """Raises OutOfBudgetError where a call of so many rows would exceed a limit."""
        asked = {
            "gradients": self.gradients + rows if torch.is_grad_enabled() else 0,
            "queries": self.queries + rows,
            "seconds": self.seconds,
        }
        for name, limit in asdict(self._budget).items():
            if limit is not None and asked[name] > limit:
                raise OutOfBudgetError(f"{name}={limit}")

    def _went_back(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)
