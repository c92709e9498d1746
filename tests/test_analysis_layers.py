"""analysis=layers: what its tables must say on models whose layers do what their formulas say."""

from pathlib import Path

import numpy as np
import pytest

from esd.analysis import Results, Subject, layers
from esd.analysis.edits import KINDS, Plain, Study, picked, readers, seen, selection, short, where, windows
from esd.interventions import InjectText, Source, resolve
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
        found = shared(name).select(row["selection"])
        assert found.numel == int(row["parameters"]) > 0 and row["erase"] in KINDS


@pytest.mark.parametrize("name", list(tiny.PIPELINES))
def test_a_suggestion_names_the_weights_of_its_layers_and_no_others(name: str) -> None:
    family = shared(name)
    found, preset = readers(family), set(family.select("esd_x").names)
    for first, last in windows(len(found)):
        chosen = found[first : last + 1]
        assert [site.path for site in resolve(family, where(chosen))] == [site.path for site in chosen]
        inside = {n for n in preset if any(n.startswith(f"{site.path}.") for site in chosen)}
        assert set(family.select(selection(family, chosen)).names) == inside


def test_activations_are_told_of_every_layer_stream_and_step(analysed: tuple[str, Path]) -> None:
    name, folder = analysed
    rows = table(folder / "activations.csv")
    assert {row["stream"] for row in rows} == ({"image"} if name == "sd1" else {"image", "text"})
    image = [row for row in rows if row["stream"] == "image"]
    assert len(image) == 2 * len(all_layers(shared(name))) and all(float(row["through"]) > 0 for row in image)


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
    assert seen(one, images, ["a"] * 3) == {"thing": None, "style": None}


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


def test_the_lines_of_python_on_the_page_make_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/analysis/layers.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0].replace("num_steps=10", "num_steps=1")
    exec(compile(code, "layers.md", "exec"), {"pipe": tiny.pipeline()})
    assert (tmp_path / "vitality.png").is_file()
