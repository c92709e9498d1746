from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from esd.errors import UserError
from esd.families import Family, family_of
from esd.sources import Bank, Conditions, OnPolicy, Points, Sampling, dealt
from esd.weights import WeightViews
from tests import tiny
from tests.plans import SAMPLING

PROMPTS = ["a cat", "cat in mosaic style", "photo of a cat"]
FROM = ["a dog", "dog in mosaic style", "photo of a dog"]


class Counting:
    """A denoiser that counts the rows it evaluates."""

    def __init__(self, family: Family) -> None:
        self.family, self.rows, self.calls, self.largest = family, 0, 0, 0

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.rows, self.calls, self.largest = self.rows + len(x), self.calls + 1, max(self.largest, len(x))
        return self.family.denoiser(x, *args, **kwargs)


def conditions(family: Family, **more: Any) -> Conditions:
    return Conditions(family.encode(PROMPTS), family.encode([""]), **more)


def sampling(**more: Any) -> Sampling:
    return dataclasses.replace(SAMPLING, **{"num_steps": 4, "scheduler": "ddim", **more})


def bank(family: Family, c: Conditions, s: Sampling, teacher: Any = None, **more: Any) -> Bank:
    how = {"rollouts": 6, "reuse": 2, "per_update": 8, "seed": 5, **more}
    return Bank(family, teacher or family.denoiser, c, s, **how)


def on_policy(family: Family, c: Conditions, s: Sampling, sampler: Any = None, **more: Any) -> OnPolicy:
    how = {"per_update": 8, "seed": 5, **more}
    return OnPolicy(family, family.denoiser, sampler or family.denoiser, c, s, **how)


def on_policy_for_three(family: Family, c: Conditions, s: Sampling, **more: Any) -> OnPolicy:
    """On policy, the points of three updates drawn at once."""
    return on_policy(family, c, s, staleness=3, **more)


def students_bank(family: Family, c: Conditions, s: Sampling, **more: Any) -> Bank:
    """A bank that a student fills and that is thrown away after two updates, whatever is left in it."""
    return bank(family, c, s, sampler=Counting(family), staleness=2, **more)


MAKERS = [bank, on_policy, on_policy_for_three, students_bank]


def assert_complete(family: Family, points: Points, c: Conditions) -> None:
    """Every prediction is the teacher's own at (x, t), for the point's own prompt."""
    expected = {"concept": c.concept, "null": c.null[[0] * len(c.concept)], "erase_from": c.erase_from}
    for name, rows in expected.items():
        got = getattr(points, name)
        if rows is None:
            assert got is None
            continue
        with torch.no_grad():
            direct = family.predict(family.denoiser, points.x, points.t, rows[points.prompt])
        torch.testing.assert_close(got, direct, atol=2e-5, rtol=1e-3)


def same(a: Points, b: Points, **tolerance: float) -> None:
    for name in ("x", "t", "prompt", "concept", "null"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)


CASES: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0},
    {"scheduler": "euler"},
    {"scheduler": "pndm"},
    {"scheduler": "heun"},
    {"scheduler": "euler_a"},
    {"time_rule": "index", "scheduler": "pndm"},
    {"time_rule": "compvis"},
    {"time_rule": "alt"},
    {"max_batch": 3},
]


def check_both_sources(family: Family, case: dict[str, Any], with_from: bool) -> None:
    c = conditions(family, erase_from=family.encode(FROM) if with_from else None)
    for source in (bank(family, c, sampling(**case)), on_policy(family, c, sampling(**case))):
        points = source.points(3, range(8))
        assert len(points) == 8
        assert points.x.shape == (8, *family.sample_shape)
        assert points.x.dtype == torch.float32
        assert set(points.prompt.tolist()) <= {0, 1, 2}
        assert_complete(family, points, c)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("with_from", [False, True])
def test_points_of_both_sources_are_complete(tiny_family: Family, case: dict, with_from: bool) -> None:
    check_both_sources(tiny_family, case, with_from)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_so_they_are_for_a_larger_v_predicting_model(tiny_v_family: Family, scheduler: str) -> None:
    check_both_sources(tiny_v_family, {"scheduler": scheduler}, with_from=True)


def test_a_bank_gets_both_predictions_for_nothing(tiny_family: Family) -> None:
    teacher = Counting(tiny_family)
    source = bank(tiny_family, conditions(tiny_family), sampling(), teacher)
    for step in range(source.updates_per_build):
        source.points(step, range(8))
    assert source.size == 24
    assert source.updates_per_build == 6
    assert teacher.rows == 2 * 24  # one guided rollout per trajectory, and not a call more


@pytest.mark.parametrize(
    ("case", "erase", "rows"),
    [
        ({"guidance_scale": 1.0}, False, 2),  # concept free, null computed
        ({}, True, 3),  # erase_from and null free, concept computed
        ({"time_rule": "alt"}, False, None),  # jittered labels: nothing is free
    ],
)
def test_what_a_bank_must_still_compute(tiny_family: Family, case: dict, erase: bool, rows: int | None) -> None:
    teacher = Counting(tiny_family)
    c = conditions(tiny_family, erase_from=tiny_family.encode(FROM) if erase else None)
    source = bank(tiny_family, c, sampling(**case), teacher)
    source.points(0, range(8))
    assert teacher.rows == (rows * 24 if rows else 2 * 24 + 2 * source.size)


@pytest.mark.parametrize(("case", "calls"), [({}, 0), ({"guidance_scale": 1.0}, 0), ({"time_rule": "alt"}, 1)])
def test_what_nobody_will_read_is_not_computed(tiny_family: Family, case: dict, calls: int) -> None:
    teacher, c = Counting(tiny_family), conditions(tiny_family)
    source = bank(tiny_family, c, sampling(**case), teacher, wanted=("concept",))
    points = source.points(0, range(8))
    rolled = 24 if case.get("guidance_scale") == 1 else 2 * 24
    assert points.null is None and teacher.rows == rolled + calls * source.size
    whole = bank(tiny_family, c, sampling(**case)).points(0, range(8))
    torch.testing.assert_close(points.concept, whole.concept, atol=1e-5, rtol=1e-4)
    fresh = on_policy(tiny_family, c, sampling(**case), wanted=("concept",)).points(0, range(8))
    assert fresh.null is None


def test_a_bank_uses_every_point_at_most_reuse_times(tiny_family: Family) -> None:
    source = bank(tiny_family, conditions(tiny_family), sampling(), per_update=7, reuse=3)
    used = Counter(
        tuple(x.flatten()[:4].tolist())
        for step in range(source.updates_per_build)
        for x in source.points(step, range(7)).x
    )
    assert source.updates_per_build == 24 * 3 // 7
    assert len(used) == 24
    assert max(used.values()) == 3


def test_a_bank_is_rebuilt_when_used_up_and_goes_round_the_prompts(tiny_family: Family) -> None:
    source = bank(tiny_family, conditions(tiny_family), sampling(), rollouts=2, reuse=1)
    first, second = source.points(0, range(8)), source.points(1, range(8))
    assert set(first.prompt.tolist()) == set(dealt(5, [0, 1], 3).tolist())
    assert set(second.prompt.tolist()) == set(dealt(5, [2, 3], 3).tolist())
    assert {0, 1, 2} == set(first.prompt.tolist()) | set(second.prompt.tolist())
    assert not torch.equal(first.x.sort(0).values, second.x.sort(0).values)


def test_prompts_are_dealt_evenly_each_pass_in_a_new_order() -> None:
    passes = dealt(5, range(3 * 50), 50).view(3, 50)
    assert all(sorted(order.tolist()) == list(range(50)) for order in passes)
    assert len({tuple(order.tolist()) for order in passes}) == 3
    assert dealt(5, range(40, 60), 50).tolist() == passes.flatten()[40:60].tolist()  # replays from any place
    assert dealt(6, range(50), 50).tolist() != passes[0].tolist()


def test_a_window_of_a_deal_is_a_sample_of_the_whole_list() -> None:
    means = [dealt(seed, range(24), 1060).float().mean() for seed in range(20)]
    assert abs(sum(means) / 20 - 1059 / 2) < 60  # taken in order it would be 11.5
    assert max(dealt(0, range(24), 1060)) > 800


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("updates", [1, 2, 5])
def test_the_prompts_said_to_be_visited_are_those_of_the_points(tiny_family: Family, make: Any, updates: int) -> None:
    many = [f"{'a ' * n}cat" for n in range(25)]
    more = {"rollouts": 2, "reuse": 2} if make in (bank, students_bank) else {}
    source = make(
        tiny_family, Conditions(tiny_family.encode(many), tiny_family.encode([""])), sampling(), per_update=3, **more
    )
    seen = {p for step in range(updates) for p in source.points(step, range(3)).prompt.tolist()}
    assert source.visited(updates) == seen
    assert len(source.visited(10_000)) == 25


def test_a_bank_that_cannot_fill_an_update_says_so(tiny_family: Family) -> None:
    with pytest.raises(UserError, match="raise rollouts or reuse"):
        bank(tiny_family, conditions(tiny_family), sampling(), rollouts=1, reuse=1)


@pytest.mark.parametrize("make", MAKERS)
def test_a_resumed_run_replays_its_draws(tiny_family: Family, make: Any) -> None:
    c = conditions(tiny_family)
    for case in ({}, {"time_rule": "compvis"}, {"scheduler": "euler_a"}):
        through, resumed = make(tiny_family, c, sampling(**case)), make(tiny_family, c, sampling(**case))
        for step in range(7):
            points = through.points(step, range(8))
        same(points, resumed.points(6, range(8)), atol=0, rtol=0)


@pytest.mark.parametrize("make", MAKERS)
def test_shards_of_an_update_are_those_of_the_whole(tiny_family: Family, make: Any) -> None:
    c = conditions(tiny_family)
    for case in ({}, {"time_rule": "compvis"}, {"scheduler": "euler_a"}):
        source = make(tiny_family, c, sampling(**case))
        whole = source.points(2, range(8))
        same(source.points(2, [6, 3, 4]), whole[[6, 3, 4]], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("make", MAKERS)
def test_another_seed_draws_other_points(tiny_family: Family, make: Any) -> None:
    c = conditions(tiny_family)
    one, other = (make(tiny_family, c, sampling(), seed=seed).points(0, range(8)) for seed in (1, 2))
    assert not torch.equal(one.x, other.x)


@pytest.mark.parametrize("make", MAKERS)
def test_every_time_is_drawn(tiny_family: Family, make: Any) -> None:
    source = make(tiny_family, conditions(tiny_family), sampling(num_steps=3))
    drawn = Counter(t for step in range(6) for t in source.points(step, range(8)).t.tolist())
    assert sorted(drawn) == sorted(tiny_family.scheduler(3, "ddim").timesteps.float().tolist())


def test_compvis_labels_fill_their_bins(tiny_family: Family) -> None:
    source = on_policy(tiny_family, conditions(tiny_family), sampling(time_rule="compvis"))
    labels = torch.cat([source.points(step, range(8)).t for step in range(6)])
    assert labels.min() >= 0
    assert labels.max() < 1000
    assert len(labels.unique()) > 40  # not just the four visited times


def test_max_batch_bounds_every_call_and_changes_nothing(tiny_family: Family) -> None:
    for case in ({}, {"time_rule": "compvis"}):
        c, teacher = conditions(tiny_family), Counting(tiny_family)
        cut = bank(tiny_family, c, sampling(**case, max_batch=3), teacher)
        plain = bank(tiny_family, c, sampling(**case))
        same(cut.points(1, range(8)), plain.points(1, range(8)), atol=1e-4, rtol=1e-3)
        assert teacher.largest <= 3


def test_a_student_that_moved_changes_where_points_are_but_not_what_the_teacher_says() -> None:
    family = family_of(tiny.pipeline())
    views = WeightViews(family.denoiser, family.select("esd_x").names)
    c = conditions(family)
    before = OnPolicy(family, views.teacher, views.student, c, sampling(), per_update=8, seed=5).points(0, range(8))
    with torch.no_grad():
        for parameter in views.parameters():
            parameter.mul_(1.5)
    after = OnPolicy(family, views.teacher, views.student, c, sampling(), per_update=8, seed=5).points(0, range(8))
    frozen = OnPolicy(family, views.teacher, views.teacher, c, sampling(), per_update=8, seed=5).points(0, range(8))
    same(before, frozen, atol=0, rtol=0)
    assert torch.equal(before.t, after.t)
    assert not torch.equal(before.x, after.x)
    fresh = family_of(tiny.pipeline())
    assert_complete(fresh, after, c)


def test_a_bank_rolled_out_by_the_student_asks_the_teacher() -> None:
    family = family_of(tiny.pipeline())
    views = WeightViews(family.denoiser, family.select("esd_x").names)
    c = conditions(family)
    with torch.no_grad():
        for parameter in views.parameters():
            parameter.mul_(1.5)
    source = Bank(
        family, views.teacher, c, sampling(), rollouts=2, reuse=2, per_update=8, seed=5, sampler=views.student
    )
    assert_complete(family_of(tiny.pipeline()), source.points(0, range(8)), c)


def moved(views: WeightViews) -> None:
    """A student that an update has changed."""
    with torch.no_grad():
        for parameter in views.parameters():
            parameter.mul_(1.5)


@pytest.mark.parametrize("make", [OnPolicy, Bank])
def test_points_serve_as_many_updates_as_they_may_and_then_the_student_draws_anew(make: Any) -> None:
    family = family_of(tiny.pipeline())
    views = WeightViews(family.denoiser, family.select("esd_x").names)
    how: dict[str, Any] = {"per_update": 8, "seed": 5, "staleness": 2}

    def source() -> Any:
        if make is Bank:
            how.update(rollouts=6, reuse=2, sampler=views.student)
            return Bank(family, views.teacher, conditions(family), sampling(), **how)
        return OnPolicy(family, views.teacher, views.student, conditions(family), sampling(), **how)

    stale, early, late = source(), source(), source()
    steps = [early.points(step, range(8)) for step in range(4)]
    same(steps[0], stale.points(0, range(8)), atol=0, rtol=0)
    moved(views)
    same(steps[1], stale.points(1, range(8)), atol=0, rtol=0)
    after = stale.points(2, range(8))
    same(after, late.points(2, range(8)), atol=0, rtol=0)
    assert not torch.equal(after.x, steps[2].x) and torch.equal(after.t, steps[2].t)


@pytest.mark.parametrize("make", MAKERS)
def test_points_in_use_are_put_back_into_another_sitting(tiny_family: Family, make: Any) -> None:
    c = conditions(tiny_family)
    first, second, later = (make(tiny_family, c, sampling()) for _ in range(3))
    drawn = first.points(3, range(5)), second.points(3, range(5, 8))  # two processes
    if make in (bank, students_bank):
        told = first.in_use(lambda tensor: tensor)
    else:
        others = iter(second.in_use(lambda tensor: tensor).values())
        told = first.in_use(lambda tensor: torch.cat([tensor, next(others)]))
    later.sampler = None  # so that nothing can be drawn
    later.put_back(3, {name: tensor.clone() for name, tensor in told.items()})
    same(later.points(3, range(8)), Points.cat(drawn), atol=0, rtol=0)


def test_the_points_of_several_updates_are_those_of_each_but_drawn_at_once(tiny_family: Family) -> None:
    c, one, many = conditions(tiny_family), Counting(tiny_family), Counting(tiny_family)
    anew = on_policy(tiny_family, c, sampling(), one)
    at_once = on_policy(tiny_family, c, sampling(), many, staleness=4)
    for step in range(6):  # more than one build, and the second one cut short
        same(at_once.points(step, range(8)), anew.points(step, range(8)), atol=1e-4, rtol=1e-3)
    assert many.calls <= 2 * 4 < one.calls  # builds x steps
    fresh = on_policy(tiny_family, c, sampling(), staleness=4)
    for micro in (range(5, 8), range(5)):  # forward passes and processes ask for their own share
        same(fresh.points(4, micro), at_once.points(4, range(8))[micro], atol=1e-4, rtol=1e-3)
        same(fresh.points(5, micro), at_once.points(5, range(8))[micro], atol=1e-4, rtol=1e-3)


def test_a_bank_thrown_away_early_serves_points_of_all_rollouts_and_times(tiny_family: Family) -> None:
    c = Conditions(tiny_family.encode([f"{'a ' * n}cat" for n in range(6)]), tiny_family.encode([""]))
    teacher, student = Counting(tiny_family), Counting(tiny_family)
    source = bank(
        tiny_family, c, sampling(num_steps=8), teacher, sampler=student, per_update=9, reuse=3, staleness=2
    )  # fmt: skip
    assert source.updates_per_build == 2 and source.size == 48
    times: Counter[float] = Counter()
    for build in range(4):
        parts = [source.points(step, range(9)) for step in (2 * build, 2 * build + 1)]
        points = Points.cat(parts)
        assert len(points.x.flatten(1).unique(dim=0)) == 18  # none serves twice while others wait
        assert set(points.prompt.tolist()) == set(range(6))  # there is one rollout for each prompt
        assert not torch.equal(parts[0].t, parts[0].t.sort().values)
        times.update(points.t.tolist())
    assert len(times) == 8 and max(times.values()) <= 3 * min(times.values())
    assert student.rows == 4 * 2 * 48  # whole rollouts with guidance
    assert teacher.rows == 4 * 2 * 18  # but the teacher is asked about the points that serve


def test_a_small_bank_is_used_up_before_it_is_stale(tiny_family: Family) -> None:
    c = conditions(tiny_family)
    assert students_bank(tiny_family, c, sampling(), rollouts=2, reuse=1).updates_per_build == 1
    assert bank(tiny_family, c, sampling(), staleness=100).updates_per_build == 6
    assert on_policy(tiny_family, c, sampling()).updates_per_build == 1


def test_rollouts_follow_the_prompt_erased_from_unless_told_otherwise(tiny_family: Family) -> None:
    both = {"erase_from": tiny_family.encode(FROM)}
    usual, alt = conditions(tiny_family, **both), conditions(tiny_family, **both, sample_with="concept")
    plain = conditions(tiny_family)
    points = {name: bank(tiny_family, c, sampling()).points(0, range(8)) for name, c in
              (("usual", usual), ("alt", alt), ("plain", plain))}  # fmt: skip
    assert torch.equal(points["alt"].x, points["plain"].x)
    assert not torch.equal(points["usual"].x, points["plain"].x)
    for c, name in ((usual, "usual"), (alt, "alt")):
        assert_complete(tiny_family, points[name], c)
        assert c.student is c.erase_from


def test_the_anchor_is_the_prompt_erased_from_else_what_the_objective_names() -> None:
    a, b, c = (torch.full((2, 4, 3, 3), value) for value in (1.0, 2.0, 3.0))
    points = Points(a, torch.zeros(2), torch.zeros(2, dtype=torch.long), concept=a, null=b)
    assert points.prediction("null") is b
    assert points.prediction("concept") is a
    assert Points(a, points.t, points.prompt, a, b, erase_from=c).prediction("erase_from") is c
    with pytest.raises(ValueError, match="no such prediction"):
        points.prediction("erase_from")


def test_points_can_be_cut_and_joined() -> None:
    x = torch.randn(4, 4, 3, 5)
    points = Points(x, torch.arange(4.0), torch.arange(4), x + 1, x + 2)
    joined = Points.cat([points[:1], points[[3, 1]]])
    assert joined.t.tolist() == [0, 3, 1]
    assert torch.equal(joined.null, x[[0, 3, 1]] + 2)
    assert joined.erase_from is None


def test_bf16_autocast_gives_float32_points_near_the_float32_ones(tiny_family: Family) -> None:
    c = conditions(tiny_family)
    exact = bank(tiny_family, c, sampling()).points(0, range(8))
    with torch.autocast("cpu", torch.bfloat16):
        rough = bank(tiny_family, c, sampling()).points(0, range(8))
    assert rough.x.dtype == rough.concept.dtype == torch.float32
    torch.testing.assert_close(rough.concept, exact.concept, atol=0.2, rtol=0.1)


@pytest.mark.parametrize(
    "wrong", [{"num_steps": 0}, {"guidance_scale": float("nan")}, {"time_rule": "all"}, {"max_batch": 1}]
)
def test_sampling_names_the_value_it_refuses(wrong: dict) -> None:
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        sampling(**wrong)
