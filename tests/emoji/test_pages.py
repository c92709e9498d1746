"""What the model is trained on: things, styles, words and pages."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


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


def test_a_tenth_of_all_captions_implies_a_thing_without_naming_it() -> None:
    from catalogue import THINGS
    from pages import describe, held_out_pairs, random_page

    rng, unseen = np.random.default_rng(0), held_out_pairs()
    implied = 0
    for _ in range(4000):
        page = random_page(rng, scenes=0.33, unseen=unseen)
        words = describe(page, rng)
        implied += words.things is not None and any(THINGS[t].name not in words.text for t in page.things)
    assert 0.10 <= implied / 4000 <= 0.20


def test_scenes_imply_one_of_their_things_too() -> None:
    from pages import Page, caption

    rng = np.random.default_rng(0)
    captions = {caption(Page((0, 40), 3), rng, kind="both") for _ in range(400)}
    assert any("kitty" in text for text in captions) and any("an animal" in text for text in captions)
    assert not any("a an " in text or "a a " in text or "a some" in text for text in captions)


def test_a_hypernym_brings_its_own_article() -> None:
    from catalogue import HYPERNYMS, PHRASINGS
    from pages import without_article

    from esd.evaluation.prompts import say

    words = [word for group in HYPERNYMS.values() for word in group]
    phrasings = [p for kind in ("both", "thing") for p in PHRASINGS["train"][kind]]
    said = {say(without_article(p, "thing"), {"thing": w, "style": "neon"}) for p in phrasings for w in words}
    assert "a plant, neon style" in said and "a neon picture of an animal" in said
    assert not any(f"neon {word}" in text or f"a {word}" in text for text in said for word in words)


def test_a_caption_is_true_of_all_that_it_says() -> None:
    from catalogue import MEMBERS, THINGS
    from pages import Caption, Page

    number = {t.name: i for i, t in enumerate(THINGS)}
    cat, dog, rose = number["cat"], number["dog"], number["rose"]
    animal = Caption("an animal in the mosaic style", (MEMBERS["animals"],), 3)
    assert animal.fits(Page((cat,), 3)) and animal.fits(Page((dog,), 3))
    assert (
        not animal.fits(Page((rose,), 3)) and not animal.fits(Page((cat,), 4)) and not animal.fits(Page((cat, dog), 3))
    )
    scene = Caption("an animal and a rose", (MEMBERS["animals"], frozenset({rose})))
    assert scene.fits(Page((dog, rose), 1)) and not scene.fits(Page((rose, dog), 1)) and not scene.fits(Page((dog,), 1))
    assert Caption("mosaic style", None, 3).fits(Page((cat, rose), 3)) and Caption("").fits(Page((cat,), 0))


def test_words_that_imply_are_words_the_shipped_tokenizer_knows() -> None:
    from catalogue import HYPERNYMS, THINGS
    from transformers import CLIPTokenizer

    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "emoji-sd" / "tokenizer"
    known = CLIPTokenizer.from_pretrained(folder).get_vocab()
    words = {w for t in THINGS for text in (t.name, *t.synonyms, *HYPERNYMS[t.group]) for w in text.split()}
    assert not {w for word in words for w in word.split("-") if f"{w}</w>" not in known}


@pytest.mark.parametrize("style", range(10))
def test_every_style_draws_one_thing_two_things_and_repeats_itself(data: Path, style: int) -> None:
    from pages import Drawings, Page, draw_page

    drawings = Drawings(data / "drawings.npz")
    for page in (Page((0,), style), Page((0, 1), style)):
        first, again = (draw_page(drawings, page, np.random.default_rng(5)) for _ in range(2))
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8 and first.std() > 1
        assert np.array_equal(first, again)


def test_outsiders_show_nothing_listed_and_one_variant_of_each_emoji() -> None:
    from drawings import outside

    things = {"cat", "black-cat", "winking-face", "two-thirty", "bunny", "red-apple", "horse-face", "soft-ice-cream"}
    people = {"man-running", "woman-running-facing-right", "waving-hand-dark-skin-tone", "waving-hand", "woman", "man"}
    assert set(outside(things | people)) == {"man-running", "waving-hand", "man"}
    assert set(outside({"red-heart", "hot-pepper", "ice", "person-in-bed"})) == {
        *("red-heart", "hot-pepper", "ice", "person-in-bed")
    }  # red apple, hot beverage, ice cream and alarm clock share but a word with them


def packed(folder: Path, name: str, body: bytes) -> None:
    """Leave an archive as `npm pack` does."""
    with tarfile.open(folder / "package.tgz", "w:gz") as tar:
        told = tarfile.TarInfo(name)
        told.size = len(body)
        tar.addfile(told, io.BytesIO(body))


@pytest.fixture
def npm(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None], int], None]:
    """Return what puts something in the place of npm: what it leaves in its folder, and its status."""
    import drawings

    def stand_in(leave: Callable[[Path], None], status: int = 0) -> None:
        def pack(command: list[str], cwd: str, **options: object) -> SimpleNamespace:
            leave(Path(cwd))
            return SimpleNamespace(returncode=status, stdout="package.tgz\n", stderr="404 Not Found")

        monkeypatch.setattr(drawings.shutil, "which", lambda name: name)
        monkeypatch.setattr(drawings, "subprocess", SimpleNamespace(run=pack))

    return stand_in


@pytest.mark.parametrize(
    ("leave", "status", "said"),
    [
        (lambda folder: (folder / "half.tgz").write_bytes(b"x"), 1, "could not fetch .*404 Not Found"),
        (lambda folder: None, 0, "could not fetch"),
        (lambda folder: (folder / "broken.tgz").write_bytes(b"no archive"), 0, "holds no icons"),
        (lambda folder: packed(folder, "package/other.json", b"{}"), 0, "holds no icons"),
        (lambda folder: packed(folder, "package/icons.json", b"{}"), 0, "sha256 .* is not"),
    ],
    ids=["status", "nothing", "no archive", "no icons", "changed"],
)
def test_a_package_that_is_not_the_one_leaves_nothing_behind(
    tmp_path: Path, npm: Callable[..., None], leave: Callable[[Path], None], status: int, said: str
) -> None:
    from drawings import DrawingsError, build

    npm(leave, status)
    with pytest.raises(DrawingsError, match=said):
        build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_is_kept_once_its_hash_is_right(
    tmp_path: Path, npm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import drawings

    icons = b'{"icons": {"cat": {"body": "<g/>"}}}'
    monkeypatch.setitem(drawings.PACKAGES, "noto", ("noto@1", hashlib.sha256(icons).hexdigest()))
    npm(lambda folder: packed(folder, "package/icons.json", icons))
    assert list(drawings.fetch("noto", tmp_path)) == ["cat"]
    assert [file.name for file in tmp_path.iterdir()] == ["noto.json"]


def test_a_changed_drawing_set_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    from drawings import DrawingsError, build

    (tmp_path / "twemoji.json").write_text('{"icons": {}}')
    with pytest.raises(DrawingsError, match=r"sha256(.|\n)*delete the file"):
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
    with pytest.raises(SystemExit, match=r"MiB free, less than .* make room"):
        drawings.build(tmp_path)
    assert not list(tmp_path.iterdir())
