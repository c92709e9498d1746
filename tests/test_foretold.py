"""Correlation of the denoiser's own figures with what a judge sees, over erasures that are made up."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esd.evaluation.foretold import foretold, foretold_by_kind, inside, interval


def erasure(residual: float, ua: float | None, domain: str = "thing") -> dict[str, Any]:
    """What a canvas tells of an erasure without neighbours."""
    points = [{"t": t, "residual": residual + d, "drift": 9.0, "n": 1} for t, d in ((900.0, 0.1), (100.0, -0.1))]
    scores = {name: {"of_base": ua if name == "UA" else 1.0} for name in ("UA", "IRA", "CRA")}
    return {"domain": domain, "denoiser": {"erased": {"prompts": ["a cat"], "points": points}}, **scores}


def test_a_figure_is_the_mean_over_t_on_the_prompts_that_it_is_to_be_read_on() -> None:
    told = erasure(0.5, 1.0)["denoiser"] | {"neighbours": {"points": [{"residual": 7.0, "drift": 0.2}]}}
    assert inside(told) == pytest.approx({"residual": 0.5, "drift": 0.2})
    assert inside(None) == {}


def test_ranks_and_values_are_correlated_on_their_own_and_equal_values_share_a_rank() -> None:
    pairs = [(0.1, 1.0), (0.2, 0.9), (0.3, 0.9), (5.0, 0.1)]
    (found,) = foretold([erasure(*pair) for pair in pairs])  # the others are constant, or were not measured
    assert (found.inside, found.score, found.n) == ("residual", "UA", 4)
    assert found.spearman == pytest.approx(-0.9486833)  # of the ranks 1 2 3 4 and 4 2.5 2.5 1
    assert found.pearson == pytest.approx(-3.01 / math.sqrt(17.3 * 0.5275))
    assert found.interval[0] < found.spearman < found.interval[1] < 1


def test_erasures_that_lack_a_figure_do_not_count_and_too_few_tell_nothing() -> None:
    three = [erasure(0.1, 0.5), erasure(0.2, 0.6), erasure(0.3, 0.9)]
    assert foretold(three) == []
    assert foretold([*three, erasure(0.4, None), erasure(1.0, 1.0) | {"denoiser": None}]) == []


def test_things_and_styles_are_told_alone_and_together() -> None:
    every = [erasure(i, i / 9, domain) for domain in ("thing", "style") for i in range(4)]
    assert [(kind, one.n) for kind, (one,) in foretold_by_kind(every)] == [
        ("things erased", 4),
        ("styles erased", 4),
        ("things and styles erased", 8),
    ]
    assert [kind for kind, _ in foretold_by_kind(every[:4])] == ["things erased"]


@given(st.floats(-0.999, 0.999), st.integers(4, 200))
def test_an_interval_holds_its_correlation_and_narrows_with_n(rho: float, n: int) -> None:
    low, high = interval(rho, n)
    assert -1 <= low <= rho <= high <= 1
    assert high - low >= interval(rho, 2 * n)[1] - interval(rho, 2 * n)[0]
    assert interval(-rho, n) == pytest.approx((-high, -low))
