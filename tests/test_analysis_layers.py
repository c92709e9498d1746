"""analysis=layers: what its tables must say on models whose layers do what their formulas say."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esd.analysis import Results, Subject, layers
from esd.analysis.edits import (
    KINDS,
    Plain,
    Study,
    picked,
    rate,
    readers,
    seen,
    selection,
    short,
    told_rate,
    where,
    whiskers,
    windows,
)
from esd.analysis.injection import LITTLE, carried, depends, of_each_picture, shortest
from esd.analysis.layers import furthest_alone, goes_with, lost, rms
from esd.config.analyses import LayersConfig
from esd.errors import UserError
from esd.evaluation.metrics import wilson
from esd.interventions import InjectText, Record, Source, resolve, sample
from esd.interventions import layers as all_layers
from tests import tiny
from tests.families import GUIDANCE, shared
from tests.programs import table

PROMPTS, THINGS, STYLES = (
    ["a cat", "the dog"],
    ["a dog", "the cat"],
    ["a cat in mosaic style", "the dog in mosaic style"],
)
TABLES = ("vitality", "windows", "injection", "suggestion", "start", "cross-seed", "weights", "activations")
FIGURES = ("vitality", "without", "windows", "windows-pictures", "injection-thing", "injection-style",
           "injection-pictures", "start", "cross-seed", "weights", "activations")  # fmt: skip


@pytest.fixture(scope="module", params=["flux-dev", "sd3", "klein", "sd1"])
def analysed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny model's name, and the folder of its analysis."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    layers.analyse(
        subject(name), Results(folder), prompts=PROMPTS, other_things=THINGS, other_styles=STYLES, pictures=1,
        window_pictures=1, lengths=[], weights=[1.0, 5.0],
    )  # fmt: skip
    return name, folder


def subject(name: str) -> Subject:
    return Subject(shared(name), num_steps=2, guidance_scale=GUIDANCE[name])


def test_every_table_and_every_figure_is_there_and_has_a_caption(analysed: tuple[str, Path]) -> None:
    _, folder = analysed
    assert {path.stem for path in folder.glob("*.csv")} == set(TABLES)
    assert {path.stem for path in folder.glob("*.png")} == set(FIGURES)
    captions = (folder / "captions.md").read_text()
    assert all(f"]({name}.png)" in captions for name in FIGURES) and "nan" not in captions


def test_leaving_a_layer_out_moves_the_picture_and_leaving_none_does_not(analysed: tuple[str, Path]) -> None:
    name, folder = analysed
    rows = table(folder / "vitality.csv")
    assert [row["short"] for row in rows] == ["none", *map(short, all_layers(shared(name)))]
    assert float(rows[0]["moved"]) == 0 and any(float(row["moved"]) > 0 for row in rows[1:])
    assert all(row["thing"] == row["style"] == "" for row in rows), "nobody reads these pictures"
    count = len(rows) - 1
    assert len(table(folder / "windows.csv")) == count * (count + 1) // 2


def test_another_prompt_in_all_layers_of_a_unet_is_that_prompt_whatever_seed_it_was_drawn_from(
    analysed: tuple[str, Path],
) -> None:
    name, folder = analysed
    rows, starts = table(folder / "injection.csv"), table(folder / "start.csv")
    whole = [float(row["towards"]) for row in rows if int(row["length"]) == len(readers(shared(name)))]
    assert all(0 <= float(row["towards"]) <= 1 for row in rows)
    if name == "sd1":
        assert whole == pytest.approx([1, 1], abs=0.02) and {row["seed"] for row in starts} == {""}
    else:
        assert all(float(row["seed"]) >= 0 for row in starts)
    assert float(starts[0]["prompt"]) > 0
    for curve, of in (("own", 2), ("prompt", 1)) if name == "sd1" else (("own", 4), ("prompt", 2), ("seed", 2)):
        for row in starts:
            assert (row[f"{curve}_n"], row[f"{curve}_of"]) == ("2", str(of)), "pictures, and distances of each"
            assert float(row[f"{curve}_low"]) <= float(row[curve]) <= float(row[f"{curve}_high"])


def test_distances_of_one_picture_are_one_value() -> None:
    found = of_each_picture("own", [np.array([1.0, 3.0, 5.0]), np.array([3.0, 3.0, 3.0])])
    assert (found["own"], found["own_n"], found["own_of"]) == (3.0, 3, 2)
    assert (found["own_low"], found["own_high"]) == pytest.approx((3 - 4.3027 / 3**0.5, 3 + 4.3027 / 3**0.5), rel=1e-4)
    assert set(of_each_picture("seed", []).values()) == {None}


@pytest.mark.parametrize(("seed", "words"), [
    ([0.5, 0.4, 0.6], "it is the seed of the other run that counts more"),
    ([0.1, 0.0, 0.19], "it is the prompt of the other run that counts more"),
    ([0.3, 0.2, 0.4], "which of the two counts more towards the end is not shown"),
    ([0.9, None, None], "which of the two counts more towards the end is not shown"),
    ([None] * 3, "No text flows"),
])  # fmt: skip
def test_what_counts_more_is_told_where_intervals_part(seed: list[float | None], words: str) -> None:
    prompt = [0.25, None, None] if seed[0] and seed[1] is None else [0.25, 0.2, 0.3]
    row: dict[str, Any] = {"version": "base", "start": "double0"}
    for name, found in (("seed", seed), ("prompt", prompt)):
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
    assert words in depends([row, row])


def test_the_last_single_block_of_flux_does_not_know_the_weight_of_its_text(analysed: tuple[str, Path]) -> None:
    name, folder = analysed
    if name not in ("flux-dev", "klein"):
        pytest.skip("has no single blocks")
    rows = [row for row in table(folder / "weights.csv") if row["layer"] == "single1"]
    assert len(rows) == 2 and rows[0]["moved"] == rows[1]["moved"]
    first = [row["moved"] for row in table(folder / "weights.csv") if row["layer"] == "double0"]
    assert first[0] != first[1] or name == "klein"  # whose decoder shows little


def test_what_is_suggested_can_be_trained(analysed: tuple[str, Path]) -> None:
    name, folder = analysed
    for row in table(folder / "suggestion.csv"):
        assert row["erase"] in KINDS and (float(row["all"]) < LITTLE) == (row["selection"] == "")
        if row["selection"]:
            assert shared(name).select(row["selection"]).numel == int(row["parameters"]) > 0


@pytest.mark.parametrize("name", list(tiny.PIPELINES))
def test_a_suggestion_names_the_weights_of_its_layers_and_no_others(name: str) -> None:
    family = shared(name)
    found, preset = readers(family), set(family.select("esd_x").names)
    for first, last in windows(len(found)):
        chosen = found[first : last + 1]
        assert [site.path for site in resolve(family, where(chosen))] == [site.path for site in chosen]
        inside = {n for n in preset if any(n.startswith(f"{site.path}.") for site in chosen)}
        assert set(family.select(selection(family, chosen)).names) == inside


def carrying(*values: float) -> list[dict[str, Any]]:
    """Rows of base windows of one layer each, and of all of them, that carry so much."""
    one = {"version": "base", "other": None, "other_low": 0.0, "other_high": 1.0, "n": 4}
    *alone, whole = values
    rows = [one | {"first": f"l{i}", "last": f"l{i}", "length": 1, "towards": x} for i, x in enumerate(alone)]
    return [*rows, one | {"first": "l0", "last": f"l{len(alone) - 1}", "length": len(alone), "towards": whole}]


def test_a_window_is_held_against_all_layers_together_and_none_is_found_where_these_do_nothing() -> None:
    found = shortest(carrying(0.1, 0.7, 0.9, 0.85), "towards")
    assert found is not None and found["first"] == "l2"
    whole = shortest(carrying(0.1, 0.2, 0.1, 0.9), "towards")
    assert (
        whole is not None
        and whole["length"] == 3
        and "No shorter window" in carried(carrying(0.1, 0.2, 0.1, 0.9), "towards", "thing")
    )
    assert shortest(carrying(0.0, 0.05, 0.0, 0.0), "towards") is None
    assert "one layer alone" not in carried(carrying(0.1, 0.2, 0.1, 0.9)[-1:], "towards", "thing"), "none was tried"
    told_of = carried(carrying(0.0, 0.05, 0.0, 0.0), "towards", "thing")
    assert told_of.startswith("Where l0 to l2 read the other prompt") and "too little" in told_of


def test_all_layers_together_are_drawn_whatever_the_lengths(tmp_path: Path) -> None:
    layers.analyse(
        subject("sd1"), Results(tmp_path), prompts=PROMPTS, other_things=THINGS, other_styles=STYLES, pictures=1,
        window_pictures=1, lengths=[1], weights=[2.0],
    )  # fmt: skip
    count = len(readers(shared("sd1")))
    lengths = [int(row["length"]) for row in table(tmp_path / "injection.csv")]
    assert lengths == [*[1] * 2 * count, *[count] * 2]
    assert [float(row["all"]) for row in table(tmp_path / "suggestion.csv")] == pytest.approx([1, 1], abs=0.02)


def test_windows_longer_than_the_model_are_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    settings = LayersConfig(PROMPTS, THINGS, STYLES, lengths=[1, 99])
    count = len(all_layers(shared("sd1")))
    with pytest.raises(
        UserError, match=rf"layers\.lengths=\[99\]: this model has {count} layers; allowed: 1 to {count}"
    ):
        layers.analyse(subject("sd1"), Results(tmp_path / "out"), **vars(settings))
    assert not (tmp_path / "out").exists()


def test_shares_have_their_intervals() -> None:
    found = rate("thing", [True, True, False, True])
    assert found["thing"] == 0.75 and found["thing_n"] == 4
    assert (found["thing_low"], found["thing_high"]) == wilson(3, 4)
    assert whiskers([found], "thing") == pytest.approx(np.array([[0.75 - wilson(3, 4)[0]], [wilson(3, 4)[1] - 0.75]]))
    assert told_rate(found, "thing") == "75% [30 to 95]"


def test_captions_say_something_only_where_there_is_something() -> None:
    rows = [{"short": name, "moved": moved, **rate("thing", [seen])} for name, moved, seen in
            (("double0", 0.3, True), ("double1", 0.2, True))]  # fmt: skip
    assert furthest_alone(rows) == ("Left out alone, double0 (0.30) moves the picture furthest, double1 least (0.20). ")
    assert "no layer" in furthest_alone([row | {"moved": 0.0} for row in rows]).lower()
    assert "too few to lose" in lost("thing", rate("thing", [False] * 4), rows)
    assert "at the least" in lost("thing", rate("thing", [True] * 4), rows)


def test_activations_are_told_of_every_layer_stream_and_step(analysed: tuple[str, Path]) -> None:
    name, folder = analysed
    rows = table(folder / "activations.csv")
    assert {row["stream"] for row in rows} == ({"image"} if name == "sd1" else {"image", "text"})
    image = [row for row in rows if row["stream"] == "image"]
    assert len(image) == 2 * len(all_layers(shared(name))) and all(float(row["through"]) > 0 for row in image)


def test_what_passes_through_a_layer_is_what_the_one_before_it_left(analysed: tuple[str, Path]) -> None:
    name, folder = analysed
    if name != "sd3":
        pytest.skip("has layers with others between them, or tokens that are joined")
    family, one = shared(name), subject(name)
    left = Record(where(all_layers(family)), what="output", reduce=rms, on="cond")
    sample(family, PROMPTS, [0, 0], left, num_steps=one.num_steps, guidance_scale=one.guidance_scale)
    rows = [row for row in table(folder / "activations.csv") if row["stream"] == "image"]
    labels = [site.label for site in all_layers(family)]
    for before, after in pairwise(labels):
        through = [float(row["through"]) for row in rows if row["layer"] == after]
        assert through == pytest.approx(left.recording.of(before).mean(1).tolist(), rel=1e-4)


def test_whether_layers_that_add_more_matter_more_is_told_where_it_is_shown() -> None:
    share = np.arange(8.0)
    assert "without layers that add more it moves further" in goes_with(share, list(share + [0, 1] * 4))
    assert "it moves less far" in goes_with(share, list(-share + [0, 1] * 4))
    told_of = goes_with(share, [1, 0, 0, 1, 0, 1, 1, 0])
    assert "n = 8 layers" in told_of and "does not show that the two go together, nor that they do not" in told_of
    assert goes_with(share[:3], [1, 2, 3]) == goes_with(share, [1.0] * 8) == ""


def test_windows_are_all_runs_of_a_length_each_once() -> None:
    found = list(windows(4))
    assert len(found) == len(set(found)) == 10 and found[:2] == [(0, 0), (1, 1)] and found[-1] == (0, 3)
    assert list(windows(4, [3])) == [(0, 2), (1, 3)] and list(windows(2, [3])) == []


def test_picking_keeps_the_ends() -> None:
    assert picked(range(57), 5) == [0, 14, 28, 42, 56] and picked([3, 1], 5) == [3, 1]


def test_distances_are_told_in_those_of_other_prompts() -> None:
    one = subject("sd1")
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[1:] = np.array([51, 102], np.uint8)[:, None, None, None]
    plain = Plain(one, ["a", "a", "b"], images)
    assert plain.unit == pytest.approx((0.4 + 0.2) / 2)
    assert plain.moved(images[::-1]) == pytest.approx(np.array([0.4, 0, 0.4]) / 0.3)
    assert plain.moved(images[:1], np.array([1])) == pytest.approx([0.2 / 0.3])
    found = seen(one, images, ["a"] * 3)
    assert found["thing"] is found["style_low"] is None and found["thing_n"] == 0


def test_layers_that_read_the_own_prompt_change_nothing(tmp_path: Path) -> None:
    own = {kind: {"a cat": "a cat", "a dog": "a dog"} for kind in KINDS}
    study = Study(subject("sd1"), Results(tmp_path), ["a cat", "a dog"], 2, own)
    plain = study.plain["base"].images
    assert study.first(1).tolist() == [0, 2] and study.asked(study.first(1)) == (["a cat", "a dog"], [0, 0])
    for images in study.injected("base", study.first(2), 0, 3):
        assert np.abs(images.astype(int) - plain).max() <= 1
    assert (study.without("base", 1, 1, study.first(1)) == study.without("base", 1, 1)[[0, 2]]).all()


def test_every_picture_takes_from_its_own_source_whatever_the_batch() -> None:
    family, prompts, seeds = shared("flux-dev"), ["a cat", "a dog", "a cat"], [0, 1, 2]
    rose, dog = Source("a rose", 3), Source("the dog in mosaic style", 4)

    def drawn(sources: list[Source], size: int) -> np.ndarray:
        one = Subject(family, num_steps=2, guidance_scale=3.5, batch_size=size)
        return one.draw_from(
            prompts, seeds, sources, lambda run, rows: InjectText("double[0]", source=run, rows=rows)
        ).astype(int)

    together = drawn([rose, dog, rose], 3)
    assert np.abs(together - drawn([rose, dog, rose], 1)).max() <= 1
    changed = np.abs(together - drawn([dog, rose, rose], 3)).reshape(3, -1).max(axis=1)
    assert (changed > 1).tolist() == [True, True, False]
