"""images.csv: what judges read, with probabilities, from which rates follow under any threshold without a judge."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esd.errors import UserError
from esd.evaluation import reading, table
from esd.evaluation.generate import Drawn, Manifest
from esd.evaluation.judges import PairJudge, Readings
from esd.evaluation.metrics import erasure_rates, wilson
from esd.evaluation.prompts import PromptRow
from esd.evaluation.vocabulary import Target

TARGETS = [Target("thing", "cat")]
LABELS = [{"thing": thing, "style": style} for thing in ("cat", "dog") for style in ("neon", "mosaic")] * 3


class Brightness:
    """Reads a thing and a style from two colours, and how much it is to be believed from the third."""

    name, version, hash, threshold, validated = "bright", "1", "ab", 0.5, "anything"
    questions: tuple[str, ...] = ("thing", "style")
    unsure: tuple[str, ...] = ("thing",)
    size: int | None = None

    def __call__(self, images: np.ndarray) -> Readings:
        colour = images[:, 0, 0] / 255.0
        names = {
            "thing": ["cat, felis" if red > 0.5 else "dog" for red in colour[:, 0]],
            "style": ["neon" if green > 0.5 else "mosaic" for green in colour[:, 1]],
        }
        parts = [[("red", red), ("blue", blue)] for red, _, blue in colour.tolist()]
        return Readings(names, {"thing": colour[:, 2], "style": np.ones(len(images))}, {"thing": 0.5}, parts)

    def agreement(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return np.array([len(prompt) / 100 for prompt in prompts])


class Difference(PairJudge):
    name, version, hash = "difference", "1", ""

    def __call__(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.abs(before.astype(float) - after).mean((1, 2, 3))


def drawn(folder: Path, seed: int) -> Manifest:
    """A folder of flat pictures, one of them of another size."""
    folder.mkdir()
    colours = np.random.default_rng(seed).integers(0, 256, (len(LABELS), 3), np.uint8)
    images = []
    for i, (colour, labels) in enumerate(zip(colours, LABELS, strict=True)):
        size = (8, 8) if i else (4, 8)
        Image.fromarray(np.broadcast_to(colour, (*size, 3)).copy()).save(folder / f"{i}_0.png")
        images.append(Drawn(f"{i}_0.png", i, 0, f"a {labels['thing']}", i, 4.0, labels))
    return Manifest(folder, {}, None, None, 2, tuple(images))


@pytest.fixture
def manifests(tmp_path: Path) -> dict[str, Manifest]:
    return {name: drawn(tmp_path / name, seed) for seed, name in enumerate(("base", "erased"))}


def test_a_picture_that_a_judge_cannot_take_for_its_size_is_corrupt(manifests: dict[str, Manifest]) -> None:
    judge = Brightness()
    judge.size = 8
    rows = reading.read("base", manifests["base"], [judge])
    assert [row["state"] for row in rows] == ["corrupt"] + ["ok"] * (len(LABELS) - 1)
    assert "bright.thing" not in rows[0] and "bright.thing" in rows[1]


def read(manifests: dict[str, Manifest]) -> list[table.Row]:
    judges, pairs = [Brightness()], [Difference()]
    base = reading.read("base", manifests["base"], judges)
    return base + reading.read("erased", manifests["erased"], judges, pairs, manifests["base"])


JUDGES = {"bright": table.facts(Brightness()), "difference": table.facts(Difference())}


def test_rates_under_another_threshold_are_those_a_judge_with_it_would_give(
    tmp_path: Path, manifests: dict[str, Manifest]
) -> None:
    path = tmp_path / "images.csv"
    table.write_table(path, read(manifests))
    rows, judges = table.read_table(path), json.loads(json.dumps(JUDGES))  # as a reader of the run directory has them
    seen = {}
    for threshold in (0.1, 0.5, 0.9):
        found = table.rates(rows, judges, {"bright": threshold})
        readings = {}
        for model, manifest in manifests.items():
            colour = np.array([reading.opened(manifest.folder / image.file)[0, 0] for image in manifest.images]) / 255
            things = ["cat" if red > 0.5 else "dog" for red in colour[:, 0]]
            styles = ["neon" if green > 0.5 else "mosaic" for green in colour[:, 1]]
            sure = colour[:, 2] >= threshold
            hits = [bool(s) and thing == own["thing"] for s, thing, own in zip(sure, things, LABELS, strict=True)]
            told = found[model]["bright"]
            parts = {"red": int((colour[:, 0] >= threshold).sum()), "blue": int(sure.sum())}
            counted = table.counts(rows, judges, {"bright": threshold})[model]["bright"]
            assert counted == {part: n for part, n in parts.items() if n}
            assert (told["thing"]["k"], told["thing"]["n"]) == (sum(hits), len(LABELS))
            assert told["thing"]["interval"] == list(wilson(sum(hits), len(LABELS)))
            assert told["style"]["k"] == sum(style == own["style"] for style, own in zip(styles, LABELS, strict=True))
            cats = [hit for hit, own in zip(hits, LABELS, strict=True) if own["thing"] == "cat"]
            assert told["thing"]["by_label"]["cat"]["k"] == sum(cats)
            seen[model, threshold] = sum(hits)
            p = {"thing": colour[:, 2], "style": np.ones(len(LABELS))}
            readings[model] = Readings({"thing": things, "style": styles}, p, {"thing": threshold})
        asked = [PromptRow(i, "", i, labels=labels) for i, labels in enumerate(LABELS)]
        expected = erasure_rates(asked, readings["base"], readings["erased"], TARGETS)
        assert table.erasure(rows, "bright", threshold, TARGETS) == expected
    counts = {(seen["base", threshold], seen["erased", threshold]) for threshold in (0.1, 0.5, 0.9)}
    assert len(counts) == 3, "the thresholds do differ"


def test_a_row_says_everything_that_was_asked_and_read(manifests: dict[str, Manifest]) -> None:
    rows = read(manifests)
    assert [row["model"] for row in rows] == ["base"] * len(LABELS) + ["erased"] * len(LABELS)
    row = rows[-1]
    assert (row["file"], row["case_number"], row["seed"], row["guidance"]) == ("erased/11_0.png", "11", "11", "4.0")
    assert (row["label.thing"], row["label.style"], row["state"]) == ("dog", "mosaic", "ok")
    assert row["bright.thing"] in ("cat, felis", "dog") and 0 <= float(row["bright.thing.p"]) <= 1
    assert float(row["bright.cos"]) == pytest.approx(0.05)
    pair = [reading.opened(m.folder / "11_0.png").astype(float) for m in manifests.values()]
    assert float(row["difference"]) == pytest.approx(np.abs(pair[0] - pair[1]).mean(), rel=1e-5)
    assert "difference" not in rows[0]
    means = table.scores(rows, JUDGES)
    assert means["base"]["bright"]["clip_cos"] == pytest.approx(0.05)
    assert means["base"]["bright"]["clip_2.5max0cos"] == pytest.approx(0.125)
    values = [float(row["difference"]) for row in rows if "difference" in row]
    assert means["erased"]["difference"] == {"mean": pytest.approx(np.mean(values)), "n": 12}
    assert "difference" not in means["base"]


def test_images_that_are_missing_or_corrupt_are_counted_and_count_nowhere_else(manifests: dict[str, Manifest]) -> None:
    (manifests["erased"].folder / "3_0.png").unlink()
    (manifests["erased"].folder / "4_0.png").write_bytes(b"\x89PNG")
    (manifests["base"].folder / "5_0.png").unlink()
    rows = read(manifests)
    found = table.rates(rows, JUDGES)
    assert table.states(rows) == {
        "base": {"ok": 11, "missing": 1, "corrupt": 0},
        "erased": {"ok": 10, "missing": 1, "corrupt": 1},
    }
    assert found["erased"]["bright"]["thing"]["n"] == 10
    assert table.scores(rows, JUDGES)["erased"]["difference"]["n"] == 9
    rates = table.erasure(rows, "bright", 0.5, TARGETS)
    assert rates["target"]["n"] + rates["same_domain"]["n"] == 9, "pairs of which both are whole"


def test_without_labels_only_answers_that_may_be_nothing_count(
    manifests: dict[str, Manifest],
) -> None:
    rows = reading.read("base", manifests["base"], [Brightness()])
    for row in rows:
        del row["label.thing"], row["label.style"]
    rates = table.rates(rows, JUDGES)["base"]["bright"]
    told = rates["thing"]
    assert list(rates) == ["thing"]
    assert told["of"] == "flagged" and told["k"] == sum(float(row["bright.thing.p"]) >= 0.5 for row in rows)
    assert "by_label" not in told


@pytest.mark.parametrize(
    ("thresholds", "told"),
    [
        ({"bright": 1.5}, "bright=1.5; allowed: a number from 0 to 1"),
        ({"other": 0.5}, "'other' is no judge asked that has one; allowed: bright"),
        ({"difference": 0.5}, "'difference' is no judge asked"),
    ],
)
def test_a_threshold_that_means_nothing_is_refused(
    manifests: dict[str, Manifest], thresholds: dict[str, float], told: str
) -> None:
    rows = reading.read("base", manifests["base"], [Brightness()])
    with pytest.raises(UserError, match=told):
        table.rates(rows, JUDGES, thresholds)


def test_distances_are_over_what_was_not_erased(manifests: dict[str, Manifest]) -> None:
    def features(images: np.ndarray) -> np.ndarray:
        return images[:, 0, 0].astype(float)

    found = reading.fid_and_kid(manifests["base"], manifests["erased"], features, TARGETS)
    assert found["n"] == 6 and found["fid"] > 0
    same = reading.fid_and_kid(manifests["base"], manifests["base"], features, [])
    assert same["n"] == 12 and same["fid"] == pytest.approx(0, abs=1e-6)
    unlabelled = {
        model: replace(one, images=tuple(replace(image, labels={}) for image in one.images))
        for model, one in manifests.items()
    }
    assert reading.fid_and_kid(unlabelled["base"], unlabelled["erased"], features, TARGETS)["n"] == 6, "by their words"
    nothing = reading.fid_and_kid(manifests["base"], manifests["erased"], features, [*TARGETS, Target("thing", "dog")])
    assert nothing == {"fid": None, "kid": None, "n": 0}


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("a,b\n1,2\n")
    for name in ("images.csv", "none.csv"):
        with pytest.raises(UserError):
            table.read_table(tmp_path / name)
