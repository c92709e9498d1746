"""What the model is trained on: things, styles, words and pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the recipe needs the `emoji` extra")


def test_catalogue_is_fully_crossed_and_free_of_double_meanings() -> None:
    from catalogue import STYLES, THINGS

    words = [t.name for t in THINGS] + [word for t in THINGS for word in t.synonyms]
    assert len(THINGS) >= 100 and len(STYLES) >= 8
    assert len(set(words)) == len(words)
    assert not {t.name for t in THINGS} & set(STYLES)


def test_five_percent_of_the_pairs_are_held_out_over_all_styles() -> None:
    from catalogue import STYLES, THINGS
    from pages import held_out_pairs

    pairs = held_out_pairs()
    assert len(pairs) == round(0.05 * len(THINGS) * len(STYLES))
    assert {style for _, style in pairs} == set(range(len(STYLES)))


def test_no_trained_page_shows_a_held_out_pair() -> None:
    from pages import held_out_pairs, random_page

    rng, unseen = np.random.default_rng(0), held_out_pairs()
    pages = [random_page(rng, scenes=0.5, unseen=unseen) for _ in range(2000)]
    assert not any((thing, page.style) in unseen for page in pages for thing in page.things)


def test_phrasings_for_measuring_are_not_trained_on() -> None:
    from catalogue import PHRASINGS

    for slot, phrases in PHRASINGS["held_out"].items():
        assert not set(phrases) & set(PHRASINGS["train"][slot])


@pytest.mark.parametrize(
    ("phrasing", "words", "expected"),
    [
        ("a {thing} in the {style} style", {"thing": "owl", "style": "neon"}, "an owl in the neon style"),
        ("a {thing}", {"thing": "grapes"}, "grapes"),
        ("a {first} and a {second}", {"first": "cat", "second": "orange"}, "a cat and an orange"),
    ],
)
def test_captions_take_the_right_article(phrasing: str, words: dict[str, str], expected: str) -> None:
    from esd.evaluation.prompts import say

    assert say(phrasing, words) == expected


def test_a_tenth_of_the_captions_implies_its_thing_without_naming_it() -> None:
    from catalogue import THINGS
    from pages import Page, caption

    rng = np.random.default_rng(0)
    captions = [caption(Page((0,), 3), rng, kind="both") for _ in range(2000)]
    implied = np.mean([THINGS[0].name not in text.split() and "cat," not in text for text in captions])
    assert 0.10 <= implied <= 0.20


@pytest.mark.parametrize("style", range(10))
def test_every_style_draws_one_thing_two_things_and_repeats_itself(data: Path, style: int) -> None:
    from pages import Drawings, Page, draw_page

    drawings = Drawings(data / "drawings.npz")
    for page in (Page((0,), style), Page((0, 1), style)):
        first, again = (draw_page(drawings, page, np.random.default_rng(5)) for _ in range(2))
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8 and first.std() > 1
        assert np.array_equal(first, again)


def test_a_changed_drawing_set_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    from drawings import DrawingsError, build

    (tmp_path / "twemoji.json").write_text('{"icons": {}}')
    with pytest.raises(DrawingsError, match=r"sha256.*delete the file"):
        build(tmp_path)
    assert not (tmp_path / "drawings.npz").exists()


def test_a_missing_npm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from drawings import DrawingsError, build

    monkeypatch.setenv("PATH", "")
    with pytest.raises(DrawingsError, match="npm was not found"):
        build(tmp_path)


def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import drawings

    monkeypatch.setattr(drawings, "NEEDED_BYTES", 2**70)
    with pytest.raises(drawings.DrawingsError, match="less than"):
        drawings.build(tmp_path)
    assert not list(tmp_path.iterdir())
