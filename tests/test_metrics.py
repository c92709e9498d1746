"""Rates: the interval is Wilson's, targets are told from the retained, and every row of the exam is fair."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esd.evaluation.erasure import exam, known_targets, preview_lines
from esd.evaluation.judges import Readings
from esd.evaluation.metrics import NO_RATE, erasure_rates, mean_interval, ratio_interval, wilson
from esd.evaluation.prompts import PromptRow
from esd.evaluation.vocabulary import Entry, Target, Vocabulary

HELD_OUT = {
    "both": ["a {thing} in {style}", "{style} art: {thing}"],
    "thing": ["one {thing}"],
    "style": ["{style} art"],
}
VOCABULARY = Vocabulary(
    tuple(
        Entry(name, group, ("kitty", "odd cat") if name == "cat" else ())
        for name, group in [
            ("cat", "animals"),
            ("dog", "animals"),
            ("fox", "animals"),
            ("cow", "animals"),
            ("rose", "plants"),
            ("car", ""),
        ]
    ),
    tuple(Entry(name) for name in ("mosaic", "neon", "ink", "chalk", "pixel")),
    {"held_out": HELD_OUT},
    frozenset({("cat", "neon"), ("dog", "ink")}),
)

CAT, INK = Target("thing", "cat"), Target("style", "ink")


def read(things: list[str], styles: list[str], neither: list[bool]) -> Readings:
    p = {"thing": np.where(neither, 0.4, 0.6), "style": np.ones(len(styles))}
    return Readings({"thing": things, "style": styles}, p, {"thing": 0.5})


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20
    for k, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_inside_zero_and_one(counts: tuple[int, int]) -> None:
    k, n = counts
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_no_rate_of_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="no rate"):
        wilson(k, n)


def rows(*labels: dict[str, str]) -> list[PromptRow]:
    return [PromptRow(i, "", i, labels=label) for i, label in enumerate(labels)]


def test_target_same_domain_and_cross_domain_are_counted_apart() -> None:
    asked = rows(
        {"thing": "cat", "style": "neon"},
        {"thing": "cat"},
        {"thing": "dog", "style": "ink"},
        {"thing": "car", "style": "ink"},
    )
    before = read(["cat", "cat", "dog", "car"], ["neon", "ink", "ink", "ink"], [False] * 4)
    after = read(["dog", "cat", "dog", "cat"], ["neon", "ink", "ink", "neon"], [False, True, False, False])
    rates = erasure_rates(asked, before, after, [CAT])
    assert (rates["target"]["before"], rates["target"]["after"], rates["target"]["n"]) == (1.0, 0.0, 2)
    assert (rates["same_domain"]["before"], rates["same_domain"]["after"], rates["same_domain"]["n"]) == (
        1.0,
        0.5,
        2,
    )
    assert (rates["cross_domain"]["after"], rates["target_style"]["after"], rates["target_style"]["n"]) == (
        0.5,
        1.0,
        1,
    )
    assert rates["neither"] == 0.5
    assert rates["target"]["interval"] == list(wilson(0, 2))


COUNTS = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS, COUNTS.filter(lambda base: base[0] > 0))
def test_the_interval_of_a_ratio_holds_it_and_narrows_with_the_pictures(own: tuple, base: tuple) -> None:
    low, high = ratio_interval(*own, *base)
    ratio = (own[0] / own[1]) / (base[0] / base[1])
    assert 0 <= low <= ratio <= high and low < high
    more = ratio_interval(*(100 * count for count in (*own, *base)))
    assert low <= more[0] + 1e-9 and more[1] <= high + 1e-9
    assert (low == 0) == (own[0] == 0)


def test_beside_a_base_that_is_known_well_a_ratio_is_a_rate() -> None:
    assert ratio_interval(3, 10, 10**7, 10**7) == pytest.approx(wilson(3, 10), rel=1e-3)
    half = ratio_interval(3, 10, 5 * 10**6, 10**7)
    assert half == pytest.approx([2 * end for end in wilson(3, 10)], rel=1e-2)
    with pytest.raises(ValueError, match="0 of 5 is no base"):
        ratio_interval(1, 2, 0, 5)


def test_the_interval_of_a_ratio_holds_the_true_one_about_as_often_as_it_says() -> None:
    draws, n, rates = np.random.default_rng(0), 60, (0.5, 0.8, 0.95)
    for rate, base in itertools.product(rates, rates):
        pairs = zip(draws.binomial(n, rate, 400), draws.binomial(n, base, 400), strict=True)
        ends = [ratio_interval(int(k), n, int(k_base), n) for k, k_base in pairs]
        assert np.mean([low <= rate / base <= high for low, high in ends]) > 0.92


def test_the_interval_of_a_mean_is_students() -> None:
    assert mean_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3 - 1.963, 3 + 1.963), abs=1e-3)  # 2.776 x 0.7071
    assert mean_interval([0.25]) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_what_implies_the_concept_is_neither_target_nor_retained() -> None:
    asked = rows({"thing": "cat", "style": "ink"}, {"thing": "cat", "style": "ink", "called": "kitty"})
    before = read(["cat", "cat"], ["ink", "ink"], [False, False])
    after = read(["dog", "cat"], ["ink", "neon"], [True, False])
    rates = erasure_rates(asked, before, after, [CAT])
    assert (rates["target"]["after"], rates["target"]["n"], rates["neither"]) == (0.0, 1, 1.0)
    assert (rates["implied"]["before"], rates["implied"]["after"], rates["implied"]["n"]) == (1.0, 1.0, 1)
    assert rates["target_style"]["n"] == 1 and rates["same_domain"] == rates["cross_domain"] == NO_RATE


def test_an_erased_style_swaps_the_domains() -> None:
    asked = rows({"thing": "cat", "style": "neon"}, {"thing": "cat", "style": "ink"})
    same = read(["cat", "cat"], ["neon", "ink"], [False, False])
    rates = erasure_rates(asked, same, same, [Target("style", "neon")])
    assert rates["target"]["n"] == rates["target_thing"]["n"] == rates["cross_domain"]["n"] == 1


def test_a_domain_without_rows_has_no_rate() -> None:
    same = read(["cat"], ["neon"], [False])
    assert erasure_rates(rows({"thing": "cat"}), same, same, [CAT])["same_domain"] == NO_RATE


@pytest.mark.parametrize("targets", [[CAT], [INK], [CAT, INK]])
def test_the_exam_asks_for_targets_and_for_everything_else_but_never_for_unseen_pairs(
    targets: list[Target],
) -> None:
    asked = exam(VOCABULARY, targets, 40, 60, 0)
    named = [set(row.labels.values()) & {target.name for target in targets} for row in asked]
    assert all(named[:40]) and not any(named[40:])
    assert len({row.evaluation_seed for row in asked}) == len(asked) == 100
    assert not {(row.labels.get("thing"), row.labels.get("style")) for row in asked} & VOCABULARY.held_out_pairs
    assert all({"thing", "style"} == set(row.labels) for row in asked[40:])
    assert asked == exam(VOCABULARY, targets, 40, 60, 0)


def test_the_exam_spreads_over_styles() -> None:
    styles = [row.labels.get("style") for row in exam(VOCABULARY, [CAT], 90, 0, 0)]
    counts = {style: styles.count(style) for style in set(styles)}
    assert counts == {"mosaic": 20, "ink": 20, "chalk": 20, "pixel": 20, None: 10}


def test_the_implied_name_the_concept_by_other_words_and_leave_the_rest_of_the_exam_as_it_was() -> None:
    asked, without = (exam(VOCABULARY, [CAT], 10, 20, count) for count in (36, 0))
    implied = asked[30:]
    assert asked[:30] == without and len(implied) == 36
    assert all(row.labels["thing"] == "cat" and row.labels["called"] in row.prompt for row in implied)
    assert {row.prompt for row in implied if len(row.labels) == 2} == {"one kitty", "one odd cat"}
    assert {"a kitty in chalk", "an odd cat in ink"} <= {row.prompt for row in implied}
    assert not any(row.labels.get("style") == "neon" for row in implied)  # a pair that was never seen
    assert exam(VOCABULARY, [INK], 10, 20, 36) == exam(VOCABULARY, [INK], 10, 20, 0)


def test_erased_from_one_thing_both_are_read_elsewhere() -> None:
    target = Target("style", "ink", within="cat")
    asked = rows(
        {"thing": "cat", "style": "ink"},
        {"thing": "dog", "style": "ink"},
        {"thing": "cat", "style": "neon"},
        {"thing": "dog", "style": "neon"},
    )
    before = read(["cat", "dog", "cat", "dog"], ["ink", "ink", "neon", "neon"], [False] * 4)
    after = read(["cat", "cow", "cat", "dog"], ["neon", "ink", "ink", "ink"], [False] * 4)
    rates = erasure_rates(asked, before, after, [target])
    counted = {name: (rate["after"], rate["n"]) for name, rate in rates.items() if isinstance(rate, dict) and rate["n"]}
    assert counted == {
        "target": (0.0, 1), "target_thing": (1.0, 1), "elsewhere": (1.0, 1), "elsewhere_thing": (1.0, 1),
        "same_domain": (0.0, 1), "cross_domain": (1.0, 1),
    }  # fmt: skip


def test_the_exam_of_a_style_erased_from_one_thing_asks_for_the_pair_and_for_each_without_the_other() -> None:
    asked = exam(VOCABULARY, [Target("style", "ink", within="cat")], 8, 10, 0)
    named = [(row.labels["thing"], row.labels["style"]) for row in asked]
    pair, rest, ink, cat = named[:8], named[8:18], named[18:22], named[22:]
    assert set(pair) == {("cat", "ink")} and not any("cat" in both or "ink" in both for both in rest)
    assert all(style == "ink" and thing != "cat" for thing, style in ink) and len(ink) == 4
    assert all(thing == "cat" and style != "ink" for thing, style in cat) and len(cat) == 4


def test_rates_are_refused_with_their_reason() -> None:
    judge = object()
    assert known_targets(["cat"], VOCABULARY, judge) == ([CAT], None)
    assert "no 'unicorn'" in str(known_targets(["unicorn"], VOCABULARY, judge)[1])
    assert "no judge" in str(known_targets(["cat"], VOCABULARY, None)[1])
    assert "no vocabulary" in str(known_targets(["cat"], None, judge)[1])
    assert known_targets(["ink"], VOCABULARY, judge, ["odd cat"]) == ([Target("style", "ink", "cat")], None)
    assert "erased from 'a dog'" in str(known_targets(["cat"], VOCABULARY, judge, ["a dog"])[1])
    assert "erased from 'dog in mosaic'" in str(known_targets(["cat"], VOCABULARY, judge, ["dog in mosaic"])[1])
    assert "never saw 'cat' in 'neon'" in str(known_targets(["neon"], VOCABULARY, judge, ["cat"])[1])


@pytest.mark.parametrize("concept", ["dog", "Dogs", "a brown dog", "fruit", "Van Gogh's portrait", "lakes"])
@pytest.mark.parametrize("vocabulary", [None, VOCABULARY])
def test_no_other_row_of_the_preview_shows_the_target(concept: str, vocabulary: Vocabulary | None) -> None:
    lines, _ = preview_lines([concept], vocabulary, 2)
    word = concept.lower().split()[-1].removesuffix("s")
    others = [line for line in lines if line.role != "target"]
    assert others and not any(word in prompt for line in others for prompt in line.prompts)


def test_the_preview_of_several_concepts_shows_each_as_a_target_only() -> None:
    lines, _ = preview_lines(["van gogh", "woman", "dog"], None, 2)
    assert [line.role for line in lines] == ["target"] * 3 + ["unrelated"] * 2


def test_words_that_only_join_others_keep_no_row_out() -> None:
    lines, _ = preview_lines(["a man of steel on the moon"], None, 2)
    assert [line.role for line in lines] == ["target"] + ["unrelated"] * 4


def test_the_preview_of_a_thing_runs_across_styles_and_of_a_style_across_things() -> None:
    lines, columns = preview_lines(["cat"], VOCABULARY, 3)
    assert [(line.label, line.role) for line in lines] == [
        ("cat", "target"),
        ("dog", "neighbour"),
        ("fox", "neighbour"),
        ("cow", "neighbour"),
        ("rose", "unrelated"),
        ("car", "unrelated"),
    ]
    assert columns == ["mosaic", "neon", "chalk"] and lines[0].prompts[0] == "a cat in mosaic"
    lines, columns = preview_lines(["ink"], VOCABULARY, 2)
    assert [line.role for line in lines] == ["target", "neighbour", "neighbour", "neighbour", "unrelated"]
    assert columns == ["cat", "cow"] and lines[-1].prompts == ("one cat", "one cow")
    targets = [Target("style", "ink", "rose"), Target("style", "chalk", "rose"), Target("thing", "cat", "neon")]
    assert preview_lines(["ink", "chalk", "cat"], VOCABULARY, 2, targets)[1] == [
        "rose",
        "dog",
    ]  # what it is erased from
    lines, columns = preview_lines(["van gogh"], None, 2)
    assert lines[0].prompts == ("van gogh", "van gogh") and columns == ["seed 1", "seed 2"]
