"""analysis=attention: pictures under edits of attention, what is read on their sides, maps of words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esd.analysis import Results, Subject, attention, estimates, scenes
from esd.analysis.maps import heat_picture, label, left_share, shown_tokens
from esd.config.analyses import AttentionConfig
from esd.config.common import ModelConfig
from esd.errors import UserError
from esd.evaluation.judges import load_judge
from esd.evaluation.metrics import wilson
from esd.evaluation.vocabulary import Vocabulary
from esd.interventions import AttentionEdit
from esd.model import load
from tests.families import GUIDANCE, shared
from tests.programs import Command, table

SCENE = scenes.Scene("a cat in the photo", "a dog in the photo", "a cat in the mosaic photo")
SMALL: Any = {"pictures": 2, "resolution": None, "shares": [0.5, 1.0], "weights": [0.0, 3.0]}


def settings(**changed: Any) -> dict[str, Any]:
    """Of one scene, in words that tiny models know."""
    told = {"prompts": [SCENE.prompt], "replaced": [SCENE.replaced], "refined": [SCENE.refined]}
    return vars(AttentionConfig(**(told | SMALL | changed)))


def test_what_is_seen_is_left_in_tables_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(shared("flux-dev"), num_steps=3, guidance_scale=3.5, batch_size=6)
    attention.analyse(subject, Results(tmp_path), **settings())
    edits = {(row["edit"], float(row["value"])): row for row in table(tmp_path / "edits.csv")}
    assert float(edits["the prompt", 0.0]["moved"]) == float(edits["reweight", 1.0]["moved"]) == 0
    assert float(edits["no control", 0.0]["moved"]) > 0 and edits["no control", 0.0]["changed"] == ""
    assert float(edits["steps", 1.0]["moved"]) == pytest.approx(float(edits["layers", 1.0]["moved"]), abs=0.003)
    pictures = table(tmp_path / "pictures.csv")
    assert len(pictures) == 2 * len(edits)
    free, replaced = ([float(row["moved"]) for row in pictures if row["edit"] == name] for name in
                      ("no control", "replace"))  # fmt: skip
    for found, name in ((replaced, "moved"), (np.subtract(replaced, free), "moved_over")):
        told, expected = edits["replace", 0.8], estimates.mean(found).row(name)
        assert {key: float(told[key]) for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert {edits[edit]["moved_over"] for edit in (("no control", 0.0), ("refined, no control", 0.0))} == {"0"}
    paths = table(tmp_path / "paths.csv")
    assert all(float(row["apart"]) == 0 for row in paths if row["step"] == "0" and row["edit"] != "another seed")
    assert {row["edit"] for row in paths if float(row["apart"]) > 0} == {row["edit"] for row in paths}
    mass = [float(row["mass"]) for row in table(tmp_path / "maps.csv")]
    assert all(0 <= one <= 1 for one in mass) and max(mass) > 0.01
    maps, heads = table(tmp_path / "maps.csv"), table(tmp_path / "heads.csv")
    place = heads[0]["place"]
    for token in {row["token"] for row in heads}:
        several = [float(row["mass"]) for row in heads if row["token"] == token]
        (mean,) = (float(row["mass"]) for row in maps if (row["token"], row["place"]) == (token, place))
        assert len(several) > 1 and np.mean(several) == pytest.approx(mean, rel=1e-3)
    assert {row["place"] for row in heads} == {place} and len({row["mass"] for row in heads}) > 1
    captions = (tmp_path / "captions.md").read_text(encoding="utf-8")
    assert len(list(tmp_path.glob("*.png"))) == captions.count("![") == 11
    before = {path: path.read_bytes() for path in tmp_path.glob("*.csv")}
    monkeypatch.setattr(scenes, "sample", lambda *_: 1 // 0)  # nothing is drawn again
    attention.analyse(subject, Results(tmp_path), **settings())
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.csv")}


@pytest.mark.parametrize("name", ["sd1", "flux-dev", "sd3.5", "klein-base"])
def test_a_pair_holds_what_the_subject_draws_whatever_the_batch(name: str, tmp_path: Path) -> None:
    family, scale = shared(name), GUIDANCE[name]
    places = scenes.places_of(family, None)
    knobs = scenes.Knobs(places, scenes.with_selves(places), 1.0, 1.0, 256, 0.3, None, [0.5, 1.0], [1.0, 2.0])
    drawn = []
    for size in (4, 32):
        subject = Subject(family, num_steps=3, guidance_scale=scale, batch_size=size)
        drawn.append(scenes.draw_pair(subject, Results(tmp_path / str(size)), "pair", SCENE, 5, knobs))
    small, large = drawn
    assert np.abs(small.images.astype(int) - large.images).max() <= 1
    assert np.allclose(small.apart, large.apart, atol=1e-4)
    edits = list(knobs.edits(SCENE))
    subject = Subject(family, num_steps=3, guidance_scale=scale)
    plain = subject.draw([SCENE.prompt, SCENE.replaced, SCENE.refined], [5, 5, 5])
    for edit, own in ((scenes.PLAIN, 0), (scenes.NO_CONTROL, 1), (("refined, no control", 0.0), 2)):
        assert np.abs(small.images[edits.index(edit)].astype(int) - plain[own]).max() <= 1
    assert not small.apart[edits.index(scenes.PLAIN)].any() and not small.apart[edits.index(("reweight", 1.0))].any()
    assert small.maps.shape[0] == 3 and len(small.by_place) == len(places) and small.maps.ndim == 4


def test_self_attention_is_replaced_where_it_is_as_small_as_asked_for(tmp_path: Path) -> None:
    subject = Subject(shared("sd1"), num_steps=2, guidance_scale=3.0)
    told = settings(self_tokens=1)
    with pytest.raises(UserError, match=r"self_tokens=1\): .* allowed: from 16"):
        attention.analyse(subject, Results(tmp_path / "few"), **told)
    places = scenes.places_of(subject.family, None)
    edits = {
        tokens: scenes.Knobs(places, scenes.with_selves(places), 0.5, 1.0, tokens, 0.3, None, [], []).edits(SCENE)
        for tokens in (16, 256)
    }
    drawn = {}
    for tokens, ops in edits.items():
        prompt, (op,) = ops["replace + self", 1.0]
        assert isinstance(op, AttentionEdit) and op.self_tokens == tokens
        drawn[tokens] = subject.draw([SCENE.prompt, prompt], [0, 0], dataclasses.replace(op, rows=(1,)))[1]
    assert (drawn[16] != drawn[256]).any()


def test_heads_are_of_one_attention_that_reads_text(tmp_path: Path) -> None:
    subject = Subject(shared("sd1"), num_steps=1, guidance_scale=3.0)
    for where, told in (
        ("cross", "names [0-9]+ attentions; name one"),
        ("croos", "croos"),
        ("mid.self", "reads no text"),
    ):
        with pytest.raises(UserError, match=told):
            attention.analyse(subject, Results(tmp_path / "out"), **settings(heads=where))
        assert not (tmp_path / "out").exists()


def test_words_that_two_encoders_read_are_told_apart(tmp_path: Path) -> None:
    subject = Subject(shared("sd3"), num_steps=1, guidance_scale=3.0)
    study = scenes.Drawn(
        subject, Results(tmp_path), [SCENE], [0], scenes.Knobs([], "", 1.0, 1.0, 256, 0.3, None, [], [])
    )
    words = [label(study, SCENE, i, text) for i, text in shown_tokens(study, SCENE)]
    assert {"cat\nCLIP", "cat\nT5"} <= set(words) and len(set(words)) == len(words)


def test_on_the_bundled_model_words_have_their_sides_and_the_judge_reads_both(tmp_path: Path) -> None:
    family = load(ModelConfig(), "cpu")
    path = ModelConfig().path
    subject = Subject(family, None, Vocabulary.load(path), load_judge(path), num_steps=5, seed=1)
    scene = scenes.Scene("a cat and a rose", "a dog and a rose", "a cat and a rose in the mosaic style")
    places = scenes.places_of(family, None)
    knobs = scenes.Knobs(places, scenes.with_selves(places), 0.8, 0.4, 256, 0.3, 8, [1.0], [1.0])
    study = scenes.Drawn(subject, Results(tmp_path), [scene], [1], knobs)
    (pair,) = study.pairs(scene)
    share = {text: left_share(pair.maps.mean(0)[i]) for i, text in shown_tokens(study, scene)}
    assert share["cat"] > 0.6 > 0.4 > share["rose"]
    attention.edits_table(study)
    pictures = {(row["edit"], float(row["value"])): row for row in table(tmp_path / "pictures.csv")}
    for row in table(tmp_path / "edits.csv"):
        assert (float(row["kept_low"]), float(row["kept_high"])) == pytest.approx(
            wilson(int(float(row["kept"])), 1), rel=1e-4
        )
    free = pictures["no control", 0.0]
    assert free["was"] == "0" and free["kept"] == "1"
    assert float(free["moved_changed"]) > float(free["moved_kept"]) > 0
    blended = pictures["replace + self + blend", 0.3]
    assert float(blended["moved_kept"]) < float(free["moved_kept"])
    assert scenes.things(subject, "a rose") is None and scenes.things(subject, "a rose and a kitty") == ["rose", "cat"]


def test_sides_are_those_of_the_thing_that_is_replaced() -> None:
    path = ModelConfig().path
    subject = Subject(shared("sd1"), None, Vocabulary.load(path), load_judge(path))
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[:, :, 32:] = 255
    left = scenes.sides(
        subject, images, 0 * images, scenes.Scene("a cat and a rose", "a dog and a rose", ""), "a cat and a rose"
    )
    right = scenes.sides(
        subject, images, 0 * images, scenes.Scene("a rose and a cat", "a rose and a dog", ""), "a rose and a cat"
    )
    assert left is not None and right is not None
    assert left.moved.tolist() == [[0, 1]] * 2 and right.moved.tolist() == [[1, 0]] * 2
    assert scenes.sides(subject, images, images, SCENE, SCENE.prompt) is None


def test_maps_are_measured_and_drawn_cell_by_cell() -> None:
    values = np.array([[3.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    assert left_share(values) == pytest.approx((3 + 1) / 6)
    drawn = heat_picture(values, np.zeros((4, 6, 3), np.uint8))
    assert drawn.shape == (4, 6, 3) and (drawn[:2, :2] == drawn[0, 0]).all()
    assert (drawn[0, 0] != drawn[0, 2]).any() and (drawn[0, 2] == drawn[2, 0]).all()
    assert (heat_picture(values * 1e-9, drawn) == drawn[0, 2]).all()  # too faint to show


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["attention.replaced=[a dog]"], "attention.replaced has 1 for 2 attention.prompts; give one for each"),
        (
            ["attention.prompts=[a cat]", "attention.replaced=[a big dog]", "attention.refined=[a cat]"],
            "attention.replaced: 'a big dog' for 'a cat'; allowed: as many words",
        ),
        (["attention.cross_replace=0"], "attention.cross_replace=0"),
        (["attention.prompts=[a cat, a cat]"], "names a prompt twice"),
        (["layers.pictures=3"], "says nothing to analysis=attention"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(command: Command, arguments: list[str], told: str) -> None:
    ended = command("analyze", "model.path=base", "analysis=attention", "run_dir=out", *arguments)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not (command.folder / "out").exists()
