"""`python -m esd.analyze`: what every analysis leaves, that it resumes and refuses; and what analyses are made of."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from esd import checkpoint
from esd.analysis import Results, Subject, figures, layers
from esd.config.analyses import LayersConfig, RepresentationsConfig
from esd.config.analyze import ANALYSES
from esd.errors import UserError
from tests.families import shared
from tests.programs import Command, erased_weights, table

LAYERS = (
    "layers.prompts=[a cat]", "layers.other_things=[a dog]", "layers.other_styles=[a cat in mosaic style]",
    "layers.pictures=1", "layers.lengths=[1]", "layers.weights=[2]",
)  # fmt: skip
FAST = ("model.path=base", "num_steps=1", "device=cpu", "run_dir=out", *LAYERS)


def test_figures_tables_and_captions_are_left_of_base_and_erased(command: Command) -> None:
    erased_weights(command.folder / "weights/erased.safetensors")
    ended = command("analyze", *FAST, "checkpoint=weights")
    assert ended.code == 0, ended.err
    assert "without cat" in ended.out and "results are in" in ended.out.splitlines()[-1]
    assert "To erase a thing, try 'selection=\"esd_x & " in ended.out
    rows = table(command.folder / "out/vitality.csv")
    assert {row["version"] for row in rows} == {"base", "erased"}
    apart = {v: [row["moved"] for row in rows if row["version"] == v] for v in ("base", "erased")}
    assert apart["base"] != apart["erased"], "the erased weights were on"
    captions = (command.folder / "out/captions.md").read_text()
    pictures = {name.removeprefix("out/") for name in command.files() if name.endswith(".png")}
    assert pictures and all(f"]({name})" in captions for name in pictures)
    assert json.loads((command.folder / "out/facts.json").read_text())["checkpoint"]["concepts"] == ["cat"]


def test_the_same_command_computes_nothing_anew_and_other_settings_are_refused(command: Command) -> None:
    assert command("analyze", *FAST).code == 0
    kept = {path: path.stat().st_mtime_ns for path in (command.folder / "out/kept").iterdir()}
    tables = {path: path.read_bytes() for path in (command.folder / "out").glob("*.csv")}
    assert kept and command("analyze", *FAST, "batch_size=2", "device=auto").code == 0
    assert kept == {path: path.stat().st_mtime_ns for path in (command.folder / "out/kept").iterdir()}
    assert tables == {path: path.read_bytes() for path in (command.folder / "out").glob("*.csv")}
    ended = command("analyze", *FAST, "layers.pictures=2")
    assert ended.code == 2 and "layers.pictures=1 there, 2 here" in ended.err


def test_a_run_holds_the_settings_of_its_own_analysis_and_whatever_the_others_are_by_default(command: Command) -> None:
    assert command("analyze", *FAST).code == 0
    file = command.folder / "out/config.yaml"
    told = yaml.safe_load(file.read_text())
    assert told["layers"]["pictures"] == 1 and not {*ANALYSES} - {"layers"} & {*told}
    file.write_text(yaml.safe_dump(told | {"attention": {"pictures": 99}, "erasure": {"gone": 1}}))
    planned = command("analyze", *FAST, "plan_only=true")
    assert planned.code == 0, "as a version that wrote all of them left it"
    ended = command("analyze", *FAST[:4], "analysis=representations")
    assert ended.code == 2 and "analysis.name=layers there, representations here" in ended.err


def test_a_model_and_a_checkpoint_may_move_and_others_in_their_place_are_refused(command: Command) -> None:
    erased_weights(command.folder / "weights/erased.safetensors")
    assert command("analyze", *FAST, "checkpoint=weights").code == 0
    kept = {path.name: path.stat().st_mtime_ns for path in (command.folder / "out/kept").iterdir()}
    shutil.copytree(command.folder / "base", command.folder / "base-moved")
    for name in ("weights", "out"):
        (command.folder / name).rename(command.folder / f"{name}-moved")
    moved = ("model.path=base-moved", "checkpoint=weights-moved", "run_dir=out-moved")
    ended = command("analyze", *FAST, *moved)
    assert ended.code == 0, ended.err
    assert kept == {path.name: path.stat().st_mtime_ns for path in (command.folder / "out-moved/kept").iterdir()}
    facts = json.loads((command.folder / "out-moved/facts.json").read_text())
    assert facts["base"]["name"].endswith("base-moved") and facts["checkpoint"]["path"].startswith("weights-moved")
    ended = command("analyze", *FAST, *moved, "model.path=other", "checkpoint=null")
    assert ended.code == 2 and "holds results of another base, " in ended.err and "base-moved (fingerprint" in ended.err
    ended = command("analyze", *FAST, *moved, "checkpoint=null")
    assert ended.code == 2 and "holds results of another checkpoint, weights-moved" in ended.err
    saved = checkpoint.load(command.folder / "weights-moved")
    checkpoint.save(saved.path, saved.differences, saved.provenance | {"concepts": ["dog"]})
    ended = command("analyze", *FAST, *moved)
    assert ended.code == 2 and "another checkpoint, weights-moved/erased.safetensors (sha256 is " in ended.err


def test_a_plan_computes_nothing(command: Command) -> None:
    before = command.files()
    ended = command("analyze", *FAST, "plan_only=true")
    assert ended.code == 0 and "layers" in ended.out and command.files() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["analysis=layer"], "analysis=layer: allowed: "),
        (["analysis.name=layer"], "analysis.name=layer: allowed: "),
        (["layers.prompts=[]"], "layers.prompts=[] leaves nothing to look at; allowed: such as layers.prompts="),
        (["layers.other_things=[a dog, a rose]"], "layers.other_things has 2 for 1 layers.prompts; give one for each"),
        (["layers.window_pictures=2"], "layers.window_pictures=2: allowed: at most layers.pictures=1"),
        (["layers.lengths=[0]"], "layers.lengths=[0]: allowed: a finite number, at least 1"),
        (["layers.picture=1"], "unknown setting 'layers.picture'; nearest: layers.pictures"),
        (["checkpoint=nowhere"], "there is no file"),
        (["num_steps=0"], "num_steps=0"),
        (["device=gpu"], "device=gpu"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(command: Command, arguments: list[str], told: str) -> None:
    ended = command("analyze", *FAST, *arguments)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not (command.folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["erasure", "erasure.windows=5", "num_steps=4", "checkpoint=cat"],
            "erasure.windows=5: num_steps=4 steps are cut",
        ),
        (["attention", "attention.shares=[0.5,0.1]", "num_steps=4"], "attention.shares: 0.1 of num_steps=4 is no step"),
        (["attention", "num_steps=1"], "attention.self_replace: 0.4 of num_steps=1 is no step"),
    ],
)
def test_parts_of_the_steps_that_hold_none_are_refused(command: Command, arguments: list[str], told: str) -> None:
    ended = command(
        "analyze", "model.path=base", "device=cpu", "run_dir=out", f"analysis={arguments[0]}", *arguments[1:]
    )
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not (command.folder / "out").exists()


def test_what_is_kept_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(3.0)

    first, again = Results(tmp_path).kept("x", make), Results(tmp_path).kept("x", make)
    assert made == [1] and (first == again).all()


def held(folder: Path, facts: dict[str, Any]) -> None:
    """A folder whose results are of something."""
    results = Results(folder)
    results.hold(facts)
    results.note("seen")


def test_results_know_what_they_are_of_by_hashes_and_not_by_names(tmp_path: Path) -> None:
    held(tmp_path, {"base": {"name": "a", "hash": 1}, "judge": None})
    held(tmp_path, {"base": {"name": "b", "hash": 1}, "judge": None, "vocabulary": {"hash": 3}})  # one not told yet
    assert json.loads((tmp_path / "facts.json").read_text())["base"]["name"] == "b"
    for other, told in (
        ({"base": {"name": "b", "hash": 2}}, r"another base, b \(hash is 1 there, 2 here\)"),
        ({"judge": {"name": "c", "hash": 2}}, r"another judge \(hash is None there, 2 here\)"),
        ({"vocabulary": None}, r"another vocabulary \(hash is 3 there, None here\)"),
    ):
        with pytest.raises(UserError, match=told):
            Results(tmp_path).hold(other)
    assert json.loads((tmp_path / "facts.json").read_text())["base"] == {"name": "b", "hash": 1}


def test_a_folder_of_which_nothing_came_is_free_for_anything(tmp_path: Path) -> None:
    Results(tmp_path / "out").hold({"settings": {"pictures": 1}})
    assert not (tmp_path / "out").exists()
    held(tmp_path / "out", {"settings": {"pictures": 2, "new": 3}})
    Results(tmp_path / "out").hold({"settings": {"pictures": 2}})  # as a version without the new one tells it
    with pytest.raises(UserError, match=r"holds results of other settings \(pictures is 2 there, 1 here\)"):
        Results(tmp_path / "out").hold({"settings": {"pictures": 1}})
    Results(tmp_path / "unknown").kept("x", lambda: np.zeros(1))
    with pytest.raises(UserError, match=r"no facts\.json that says of what"):
        Results(tmp_path / "unknown").hold({"settings": {"pictures": 1}})


def test_in_python_too_other_settings_models_and_steps_are_refused_where_pictures_are_kept(tmp_path: Path) -> None:
    def analysed(subject: Subject, prompt: str) -> str:
        settings = LayersConfig(
            prompts=[prompt], other_things=["a dog"], other_styles=["a cat in mosaic style"], pictures=1, lengths=[1]
        )
        layers.analyse(subject, Results(tmp_path), **vars(settings))
        return (tmp_path / "captions.md").read_text()

    one = Subject(shared("sd1"), num_steps=1, guidance_scale=3.0)
    said = analysed(one, "a cat")
    for other, prompt, told in (
        (one, "a rose", "other settings (prompts is ['a cat'] there, ['a rose'] here)"),
        (dataclasses.replace(one, seed=1), "a cat", "other steps (seed is 0 there, 1 here)"),
        (dataclasses.replace(one, family=shared("sd2-v")), "a cat", "another base, "),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            analysed(other, prompt)
    assert analysed(one, "a cat") == said


def test_settings_that_do_not_hold_cannot_be_made() -> None:
    with pytest.raises(UserError, match=r"layers\.other_things has 4 for 1 layers\.prompts; give one for each"):
        LayersConfig(prompts=["a cat"])
    with pytest.raises(UserError, match=r"layers\.pictures=0: allowed: a finite number, at least 1"):
        LayersConfig(pictures=0)
    with pytest.raises(UserError, match=r"representations\.prompts=\[\] leaves nothing to look at"):
        RepresentationsConfig(prompts=[])


def test_settings_refused_by_the_model_leave_the_place_to_mended_ones(command: Command) -> None:
    layers_of_two = [*FAST[:4], *LAYERS]
    ended = command("analyze", *layers_of_two, "layers.lengths=[99]")
    assert ended.code == 2 and "layers.lengths=[99]" in ended.err and "Traceback" not in ended.err
    ended = command("analyze", *layers_of_two)
    assert ended.code == 0, ended.err
    ended = command("analyze", *FAST[:4], "num_steps=4", "analysis=attention", "attention.where=croos", "run_dir=maps")
    assert (
        ended.code == 2
        and "croos" in ended.err
        and {path.name for path in (command.folder / "maps").iterdir()} <= {".lock"}
    )


def test_a_table_and_a_figure_are_whole_files_with_a_caption(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.table("t", [{"layer": "mid", "share": np.float64(1 / 3), "n": 4, "p": None}])
    assert (tmp_path / "t.csv").read_text() == "layer,share,n,p\nmid,0.333333,4,\n"
    figure, (one, two, three, _) = figures.panels(2, 2, title="all")
    figures.lines(one, [1, 2], {"a": np.ones(2), "b": np.zeros(2)}, x_name="step", y_name="distance")
    figures.bars(two, ["a", "b"], {"base": np.array([1.0, 2.0])}, x_name="distance")
    figures.heat(three, np.array([[1.0, -2.0], [np.nan, 0.0]]), rows="ab", columns="cd", y_name="y", x_name="x",
                 unit="u", signed=True, tell=True)  # fmt: skip
    results.figure("f", figure, "What is\n  seen.")
    grid = figures.pictures(
        np.full((2, 3, 8, 8, 3), 200, np.uint8), title="t", rows=["a", "b"], columns=["1", "2", "3"]
    )
    results.figure("g", grid, "Three.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.md", "f.png", "g.png", "t.csv"]
    assert (tmp_path / "captions.md").read_text().startswith("## f\n\n![f](f.png)\n\nWhat is seen.\n\n## g")


def test_values_that_hardly_differ_stay_inside_of_an_axis_from_zero() -> None:
    _, (ax,) = figures.panels(title="all")
    y = np.array([0.5, 0.5, 0.4999])
    figures.lines(ax, [0, 1, 2], {"a": y}, x_name="x", y_name="y", spread={"a": (y, y + 0.1)})
    figures.from_zero(ax)
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 1.05 * 0.6


def test_a_subject_draws_the_same_whatever_the_batch_and_tells_versions_apart() -> None:
    family = shared("sd1")
    one, many = (Subject(family, num_steps=2, batch_size=size) for size in (1, 3))
    prompts, seeds = ["a cat", "a dog", "a rose"], one.seeds(3)
    assert np.abs(one.draw(prompts, seeds).astype(int) - many.draw(prompts, seeds)).max() <= 1
    pictures = one.draw(prompts, seeds)
    assert one.distance(pictures, pictures).tolist() == [0, 0, 0] and one.distance(pictures, pictures[::-1])[0] > 0
    assert one.versions == ("base",)
