"""Intervals of means, correlations and quotients: what they hold, and where there are none."""

import numpy as np
import pytest
from scipy import stats

from esd.analysis import estimates

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("n", [2, 8, 16])
def test_an_interval_of_a_mean_is_students(n: int) -> None:
    values = RANDOM.normal(3, 2, n)
    found = estimates.mean(values)
    expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert (found.value, found.n) == (pytest.approx(values.mean()), n)
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.half == pytest.approx((expected[1] - expected[0]) / 2)


def test_an_interval_of_a_correlation_is_fishers() -> None:
    x = RANDOM.normal(size=13)
    y = x + RANDOM.normal(size=13)
    found, expected = estimates.correlation(x, y), stats.pearsonr(x, y)
    assert found is not None and found.value == pytest.approx(expected.statistic) and found.n == 13
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=1e-4)


def test_a_quotient_holds_its_true_value_as_often_as_it_says_and_is_the_same_upside_down() -> None:
    held = 0
    for _ in range(1000):
        shared = RANDOM.normal(1, 0.2, 10)
        over, under = 2 * shared + RANDOM.normal(0, 0.1, 10), shared + RANDOM.normal(0, 0.1, 10)
        found, turned = estimates.quotient(over, under), estimates.quotient(under, over)
        assert found.low is not None and found.high is not None and turned.low is not None
        assert turned.value == pytest.approx(1 / found.value) and turned.low == pytest.approx(1 / found.high)
        held += found.low <= 2 <= found.high
    assert 930 <= held <= 970


def test_of_too_few_values_there_is_no_interval_and_of_constant_ones_no_correlation() -> None:
    for found in (estimates.mean([0.5]), estimates.quotient([1.0], [2.0])):
        assert (found.value, found.low, found.high, found.half) == (0.5, None, None, None) and found.told() == "0.50"
    nothing = estimates.quotient([0.0, 0.0], [1.0, 2.0])
    assert (nothing.value, nothing.low) == (0, None), "a share of nothing has no spread to tell"
    few = estimates.correlation([1, 2, 3], [1, 3, 2])
    assert few is not None and few.value == pytest.approx(0.5) and few.low is None
    assert estimates.correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None and estimates.correlation([1], [2]) is None
    line = estimates.correlation(range(5), range(5))
    assert line is not None and (line.value, line.low, line.high) == pytest.approx((1, 1, 1))


def test_numbers_are_told_with_their_intervals() -> None:
    found = estimates.Estimate(0.254, 0.2, 0.304, 8)
    assert found.row("R") == {"R": 0.254, "R_low": 0.2, "R_high": 0.304}
    assert found.told() == "0.25 [0.20 to 0.30]" and found.told(3) == "0.254 [0.200 to 0.304]"
    assert estimates.told({"R": 1.0, "R_low": None, "R_high": None}, "R") == "1.00"
