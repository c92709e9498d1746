"""Numbers with their 95% intervals: means, correlations, quotients; those of shares are in `esd.evaluation.metrics`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esd.evaluation.metrics import mean_interval

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A number that follows from n values.

    Attributes:
        value: the number.
        low, high: its 95% interval; None where n is too small for one.
        n: values.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def row(self, name: str) -> dict[str, float | None]:
        """{name, name_low, name_high}, as a table has it."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def told(self, digits: int = 2) -> str:
        """As a caption has it, see `told`."""
        return told(self.row(""), "", digits)


def told(row: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """A number of a table and its interval: 0.25 [0.20 to 0.30]; alone where there is none."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if low is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f} to {high:.{digits}f}]"


def mean(values: Values) -> Estimate:
    """The mean of values (n,), n at least 1, and Student's t interval; none of one value."""
    found = np.asarray(values, float)
    n, middle = len(found), float(found.mean())
    if n < 2:
        return Estimate(middle, None, None, n)
    return Estimate(middle, *mean_interval(found.tolist()), n)


def correlation(x: Values, y: Values) -> Estimate | None:
    """Pearson's r of pairs (n,) and (n,), and Fisher's interval, which takes four; None where either does not vary."""
    one, other = np.asarray(x, float), np.asarray(y, float)
    n = len(one)
    if n < 2 or not np.ptp(one) or not np.ptp(other):
        return None
    r = float(np.clip(np.corrcoef(one, other)[0, 1], -1, 1))
    if n < 4:
        return Estimate(r, None, None, n)
    if abs(r) > 1 - 1e-9:
        return Estimate(r, r, r, n)
    centre, half = math.atanh(r), 1.96 / math.sqrt(n - 3)
    return Estimate(r, math.tanh(centre - half), math.tanh(centre + half), n)


def quotient(over: Values, under: Values) -> Estimate:
    """The mean of positive values (n,) over that of others (n,) that they are paired with.

    The interval is Student's, of the quotient's logarithm to first order in the values.
    """
    one, other = np.asarray(over, float), np.asarray(under, float)
    value, n = float(one.mean() / other.mean()), len(one)
    if n < 2 or not value:
        return Estimate(value, None, None, n)
    _, half = mean_interval((one / one.mean() - other / other.mean()).tolist())  # of values whose mean is 0
    return Estimate(value, value * math.exp(-half), value * math.exp(half), n)
