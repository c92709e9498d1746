"""Which setting to take: the front is what nothing beats, seeds are counted together, the rule is kept."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esd.evaluation.rates import Rate
from esd.evaluation.runs import Run, Sweep, read
from esd.evaluation.sweep import (
    GONE,
    UNKEPT,
    Trial,
    front,
    largest_drop,
    pool,
    recommend,
    swept,
    trials,
    unbeaten,
    write_table,
)
from tests import finished
from tests.programs import table

SHARES = st.integers(0, 10).map(lambda tenths: tenths / 10)  # coarse, so that there are ties
POINTS = st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=12)
COUNTS = st.tuples(st.integers(0, 100), st.integers(0, 100))


def beats(one: tuple[float, float], two: tuple[float, float]) -> bool:
    """As good in both, better in one."""
    return one[0] >= two[0] and one[1] >= two[1] and one != two


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    unbeaten = {i for i, one in enumerate(points) if not any(beats(two, one) for two in points)}
    found = front(points)
    assert set(found) == unbeaten and len(found) == len(unbeaten)
    assert [points[i] for i in found] == sorted((points[i] for i in found), reverse=True)


@given(POINTS, st.randoms())
def test_the_front_does_not_depend_on_the_order(points: list[tuple[float, float]], random: object) -> None:
    shuffled = points.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sorted(points[i] for i in front(points)) == sorted(shuffled[i] for i in front(shuffled))


def trial(target: tuple[int, int], same: tuple[int, int] | None) -> Trial:
    """One of 100 pictures each; without `same` nothing else was measured but the style on target prompts."""
    rest = {"same_domain": Rate(*same, 100)} if same else {"target_style": Rate(100, 100, 100)}
    return Trial({}, (), {"target": Rate(*target, 100), **rest})


@given(st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=8))
def test_the_recommended_is_unbeaten_and_keeps_the_most_of_those_that_are_gone(counts: list) -> None:
    tried = [trial(*one) for one in counts]
    best, why = recommend(tried)
    assert best in front([(one.erased, one.kept) for one in tried]) == unbeaten(tried)
    gone = [one for one in tried if one.rates["target"].interval[1] <= GONE]
    assert ("none" in why) == (not gone)
    if gone:
        assert tried[best] in gone and tried[best].kept == max(one.kept for one in gone)
    else:
        assert tried[best].erased + tried[best].kept == max(one.erased + one.kept for one in tried)


@given(st.lists(st.tuples(COUNTS, st.none() | COUNTS), min_size=1, max_size=8))
def test_a_trial_that_measured_nothing_else_is_taken_only_where_all_did_so(counts: list) -> None:
    tried = [trial(*one) for one in counts]
    known = [i for i, (_, same) in enumerate(counts) if same]
    best, why = recommend(tried)
    assert [i for i, one in enumerate(tried) if one.kept is not None] == known and set(unbeaten(tried)) <= set(known)
    if not known:
        assert why == UNKEPT and tried[best].erased == max(one.erased for one in tried)
    else:
        assert known[recommend([tried[i] for i in known])[0]] == best
        assert ("left aside" in why) == (len(known) < len(tried))


def test_what_was_not_measured_is_not_kept(tmp_path: Path) -> None:
    finished.training(tmp_path / "sweep/0", (0.95, 0.0, 200), {}, eta=1.0)
    finished.training(tmp_path / "sweep/1", (0.95, 0.0, 200), {"same_domain": (0.95, 0.93, 100)}, eta=2.0)
    found = read(tmp_path / "sweep")
    assert isinstance(found, Sweep)
    write_table(tmp_path / "sweep.csv", trials(found.runs))
    told = [(row["kept"], row["on_front"], row["recommended"]) for row in table(tmp_path / "sweep.csv")]
    assert told == [("", "False", "False"), ("0.98", "True", "True")]


@given(st.lists(COUNTS, min_size=1, max_size=5))
def test_counting_together_is_the_mean_where_all_have_as_many_pictures(counts: list[tuple[int, int]]) -> None:
    together = pool([{"target": Rate(*one, 100)} for one in counts])["target"]
    assert together.n == 100 * len(counts)
    assert together.after == pytest.approx(sum(after for _, after in counts) / together.n)
    assert together.drop == pytest.approx(sum(before - after for before, after in counts) / together.n)


def test_what_should_go_is_no_drop() -> None:
    rates = {"target": Rate(95, 0, 100), "implied": Rate(90, 0, 100), "cross_domain": Rate(90, 88, 100)}
    assert largest_drop(rates) == ("cross_domain", pytest.approx(0.02))
    assert largest_drop({"target": Rate(95, 0, 100)}) == ("", 0.0)
    risen = {"target": Rate(95, 0, 100), "cross_domain": Rate(80, 90, 100)}
    assert Trial({}, (), risen).kept == 1


def test_a_setting_that_an_older_run_did_not_know_is_no_other_setting_if_it_is_null() -> None:
    old = {"objective.eta": 1.0}
    new = old | {"objective.null": None, "device": "cpu", "training.save_every": 7}
    assert swept([old, new]) == []
    assert swept([old, new | {"objective.eta": 2.0}]) == ["objective.eta"]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Four settings, of two seeds each: the gentle ones leave the target, a strong one costs the rest."""
    kept = {1.0: (0.95, 0.94, 100), 2.0: (0.95, 0.8, 100)}
    left = {(1.0, "esd_x"): 0.3, (1.0, "esd_u"): 0.02, (2.0, "esd_x"): 0.02, (2.0, "esd_u"): 0.0}
    combinations = itertools.product((1.0, 2.0), ("esd_x", "esd_u"), (0, 1))
    for number, (eta, selection, seed) in enumerate(combinations):
        finished.training(
            tmp_path / "sweep" / f"{number}_eta_{eta:g}",
            (0.95, left[eta, selection], 100),
            {"same_domain": kept[eta]},
            eta=eta,
            selection=selection,
            seed=seed,
        )
    found = read(tmp_path / "sweep")
    assert isinstance(found, Sweep)
    return found


def test_seeds_of_a_setting_are_one_trial(sweep: Sweep) -> None:
    tried = trials(sweep.runs)
    assert [one.label for one in tried] == [
        "selection=esd_x, eta=1", "selection=esd_u, eta=1", "selection=esd_x, eta=2", "selection=esd_u, eta=2",
    ]  # fmt: skip
    assert all(len(one.runs) == 2 and one.rates["target"].n == 200 for one in tried)
    best, _ = recommend(tried)
    assert tried[best].label == "selection=esd_u, eta=1"
    apart = trials(sweep.runs, over=())
    assert len(apart) == 8 and "seed=1" in apart[1].label


def test_the_table_says_what_was_tried_and_what_to_take(sweep: Sweep, tmp_path: Path) -> None:
    write_table(tmp_path / "sweep.csv", trials(sweep.runs))
    rows = table(tmp_path / "sweep.csv")
    assert [row["objective.eta"] for row in rows] == ["1", "1", "2", "2"]
    assert [row["recommended"] for row in rows] == ["False", "True", "False", "False"]
    assert [row["on_front"] for row in rows] == ["False", "True", "False", "True"]
    assert float(rows[1]["erased"]) == pytest.approx(0.98) and float(rows[1]["kept"]) == pytest.approx(0.99)
    assert rows[1]["target.n"] == "200" and rows[1]["fell_most"] == "same_domain"


def test_jobs_are_listed_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        finished.training(tmp_path / f"{number}_eta_1")
    found = read(tmp_path)
    assert isinstance(found, Sweep) and [run.name[:2] for run in found.runs] == ["1_", "9_", "10"]
    assert all(isinstance(run, Run) for run in found.runs)
