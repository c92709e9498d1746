"""The canvas: UA, IRA and CRA from a table of answers, who is harmed, and the suite that erases all in turn."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from esd.canvas import Canvas, quoted, settings_of
from esd.checkpoint import load, save
from esd.config.evaluate import EvaluateConfig
from esd.config.paths import conf_dir
from esd.config.train import TrainConfig
from esd.evaluation.canvas import counted, grid, mean, order, scores
from esd.evaluation.foretold import inside
from esd.evaluation.generate import Manifest
from esd.evaluation.metrics import wilson
from esd.evaluation.retention import Retained, area, curve
from esd.evaluation.runs import Run, read
from esd.evaluation.vocabulary import Target
from tests.programs import BUNDLED, Command, composed, erased_weights, known_model, table

THINGS, STYLES = ["cat", "dog", "rose"], ["flat", "neon"]
MODEL = BUNDLED / "emoji-sd"


def pictured(answers: dict[tuple[str, str], tuple[str, str]]) -> list[dict[str, str]]:
    """A picture of every thing in every style, read as asked for unless `answers` says otherwise."""
    return [
        {
            "state": "ok",
            "label.thing": thing,
            "label.style": style,
            "judge.thing": answers.get((thing, style), (thing, style))[0],
            "judge.style": answers.get((thing, style), (thing, style))[1],
        }
        for thing in THINGS
        for style in STYLES
    ]


def test_scores_are_the_accuracies_that_unlearncanvas_defines() -> None:
    base = pictured({("dog", "neon"): ("cat", "neon")})
    erased = pictured(
        {
            ("cat", "flat"): ("dog", "flat"),
            ("cat", "neon"): ("cat", "flat"),
            ("dog", "flat"): ("rose", "flat"),
            ("dog", "neon"): ("rose", "neon"),
        }
    )
    found = scores(Target("thing", "cat"), counted(base, "judge"), counted(erased, "judge"))
    assert (found["UA"]["rate"], found["UA"]["n"]) == (1 / 2, 2)  # one cat of two is still taken for one
    assert (found["IRA"]["rate"], found["IRA"]["n"]) == (2 / 4, 4)  # mean of dogs 0/2 and roses 2/2
    assert (found["CRA"]["rate"], found["CRA"]["n"]) == (5 / 6, 6)  # over all styles, the cats' pictures among them
    assert (found["IRA"]["base"], found["IRA"]["of_base"]) == (3 / 4, (2 / 4) / (3 / 4))
    assert (found["UA"]["base"], found["UA"]["of_base"]) == (0, 1 - 1 / 2)
    low, high = found["IRA"]["interval"]
    assert low < 1 / 2 < high
    style = scores(Target("style", "flat"), counted(base, "judge"), counted(erased, "judge"))
    assert (style["UA"]["rate"], style["IRA"]["rate"], style["CRA"]["rate"]) == (0, 2 / 3, 3 / 6)


def test_pictures_that_are_not_there_count_nowhere() -> None:
    rows = pictured({})
    rows[0] = {name: value for name, value in rows[0].items() if not name.startswith("judge")} | {"state": "missing"}
    assert counted(rows, "judge")["thing"] == {"cat": (1, 1), "dog": (2, 2), "rose": (2, 2)}


def test_what_the_base_cannot_draw_has_no_share_of_it() -> None:
    blind = pictured({(thing, style): ("", "") for thing in THINGS for style in STYLES})
    found = scores(Target("thing", "cat"), counted(blind, "judge"), counted(blind, "judge"))
    assert found["UA"]["rate"] == 1 and all(score["of_base"] is None for score in found.values())


@given(st.data())
def test_a_model_that_changed_nothing_keeps_all_that_the_base_has(data: st.DataObject) -> None:
    answer = st.sampled_from(THINGS), st.sampled_from(STYLES)
    rows = pictured({(t, s): data.draw(st.tuples(*answer)) for t in THINGS for s in STYLES})
    counts = counted(rows, "judge")
    for target in order(THINGS, STYLES):
        found = scores(target, counts, counts)
        assert all(score["rate"] == score["base"] for score in found.values())
        assert found["UA"]["of_base"] in (0, None) and found["CRA"]["of_base"] in (1, None)


def test_means_weigh_erasures_alike_and_tell_how_many_there_are() -> None:
    base = counted(pictured({}), "judge")
    gone = counted(pictured({("cat", "flat"): ("dog", "flat"), ("cat", "neon"): ("dog", "neon")}), "judge")
    told = mean([scores(Target("thing", name), base, gone) for name in ("cat", "dog")])
    assert (told["UA"]["rate"], told["UA"]["base"], told["UA"]["of_base"]) == ((1 + 0) / 2, 0, (1 + 0) / 2)
    assert told["UA"]["erasures"] == told["UA"]["of_base_erasures"] == 2


def test_the_mean_of_one_erasure_has_the_interval_of_its_own_pictures() -> None:
    base = counted(pictured({("dog", "neon"): ("cat", "neon")}), "judge")
    gone = counted(pictured({("cat", "flat"): ("dog", "flat"), ("rose", "flat"): ("dog", "flat")}), "judge")
    one = scores(Target("thing", "cat"), base, gone)
    told = mean([one])
    for name in ("UA", "IRA", "CRA"):
        hits, n = round(one[name]["rate"] * one[name]["n"]), one[name]["n"]
        assert told[name]["interval"] == pytest.approx(wilson(hits, n))
        assert told[name]["of_base_interval"] == pytest.approx(one[name]["of_base_interval"])
        low, high = one[name]["of_base_interval"]
        assert low <= one[name]["of_base"] <= high and high - low > 0.1, "few pictures tell little"


def test_the_mean_of_many_has_an_interval_over_them_and_none_is_certain_for_being_alike() -> None:
    def erasure(ua: float) -> dict[str, dict[str, Any]]:
        score = {"rate": ua, "n": 30, "base": 0.0, "n_base": 30, "of_base": ua}
        return dict.fromkeys(("UA", "IRA", "CRA"), score)

    far = mean([erasure(ua) for ua in (0.1, 0.4, 1.0)])["UA"]
    assert far["interval"] == [0, 1], "three that differ so tell nothing"  # 0.5 -+ 4.303 * 0.458 / sqrt(3)
    near = mean([erasure(ua) for ua in (0.4, 0.5, 0.6) * 4])["UA"]
    low, high = near["interval"]
    assert (low, high) == pytest.approx((0.5 - 0.0542, 0.5 + 0.0542), abs=2e-3)  # t of 11: 2.201 * 0.0853 / sqrt(12)
    alike = mean([erasure(1.0)] * 5)["UA"]
    assert alike["interval"] == pytest.approx(wilson(150, 150)) and alike["of_base_interval"][0] < 1
    assert alike["of_base_interval"][1] == 1
    nothing = mean([])["UA"]
    assert nothing["rate"] is nothing["interval"] is nothing["of_base_interval"] is None and nothing["erasures"] == 0


def test_every_beginning_of_the_order_has_its_share_of_both_domains() -> None:
    things, styles = [f"thing {i}" for i in range(20)], [f"style {i}" for i in range(10)]
    targets = order(things, styles)
    assert sorted(target.name for target in targets) == sorted(things + styles)
    for n in range(1, 31):
        assert abs(sum(target.domain == "thing" for target in targets[:n]) - n * 2 / 3) <= 1
    firsts = [things.index(target.name) for target in targets[:10] if target.domain == "thing"]
    assert len({first // 5 for first in firsts}) == 4, "from every quarter of the list"


@pytest.mark.parametrize("text", ["runs/it's mine", "a, b = {c}", "$x (y) [z]", "plain"])
def test_a_folder_of_any_name_is_read_back_as_it_is(text: str) -> None:
    (read,) = OverridesParser.create().parse_overrides([f"run_dir={quoted(text)}"])
    assert read.value() == text


def test_every_picture_of_the_grid_has_a_seed_of_its_own() -> None:
    rows = grid("a {thing}, {style}", THINGS, STYLES, seed=5, samples=3)
    seeds = [row.evaluation_seed + sample for row in rows for sample in range(3)]
    assert seeds == list(range(5, 5 + 3 * 6))
    assert rows[1].prompt == "a cat, neon" and rows[1].labels == {"thing": "cat", "style": "neon"}


def test_a_drop_at_the_most_alike_concept_alone_is_a_small_area_and_everywhere_a_large_one() -> None:
    def points(*drops: float) -> list[Retained]:
        return [Retained(str(i), 0.1 + 0.2 * i, 1.0, 1.0 - drop, 10) for i, drop in enumerate(drops)]

    assert area(points(0, 0, 0)) == 0
    assert area(points(0.5, 0.5, 0.5)) == pytest.approx(0.5)
    assert area(points(0, 0, 1)) == pytest.approx(1 / 4)  # a triangle over the last half
    assert area(points(0)) is None
    assert area([Retained("a", 0.3, 1, 0, 1), Retained("b", 0.3, 1, 0, 1)]) is None


def test_the_retention_curve_leaves_the_erased_out_and_rises_in_likeness() -> None:
    likeness = {("cat", "dog"): 0.9, ("cat", "rose"): -0.2, ("cat", "cat"): 1.0}
    before, after = {"cat": (4, 4), "dog": (4, 4), "rose": (2, 4)}, {"cat": (0, 4), "dog": (1, 4), "rose": (2, 4)}
    found = curve("cat", before, after, likeness)
    assert [(point.name, point.drop) for point in found] == [("rose", 0), ("dog", 0.75)]


CANVAS = ("suite=emoji_canvas", f"model.path={MODEL}")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ((*CANVAS,), "needs a method to erase by, such as method=esd_u"),
        ((*CANVAS, "method=esd_y"), "method=esd_y: allowed: esd_all, esd_u, esd_x, esd_x_strict, lora"),
        ((*CANVAS, "method=esd_u", "suite.things=[cat,unicorn]"), "'unicorn' is not known to the model"),
        ((*CANVAS, "method=esd_u", "suite.styles=[flat,flat]"), "'flat' stands there twice"),
        ((*CANVAS, "method=esd_u", "suite.styles=[flat]"), "allowed: two or more"),
        ((*CANVAS, "method=esd_u", "method.training=['erase_from=[dog]']"), "is the canvas' to set"),
        ((*CANVAS, "method=esd_u", "prompts=[a cat]"), "says nothing to suite=emoji_canvas"),
        ((*CANVAS, "method=esd_u", "method.training=['concepts=[cat]']"), "is the canvas' to set"),
        (
            (*CANVAS, "method=esd_x", 'method.training=["prompts=[a]"]'),
            "method.training: 'prompts=[a]' is the canvas' to set",
        ),
        ((*CANVAS, "method=esd_x", "method.styles=['seed=1']"), "method.styles: 'seed=1' is the canvas' to set"),
        (("prompts=[a cat]", "method=esd_u"), "method=esd_u says nothing to suite=prompts"),
        (("suite=emoji_canvas", "method=esd_u", "model.path=base"), "ships no vocabulary.json"),
    ],
    ids=str,
)
def test_a_canvas_that_cannot_be_is_refused_before_anything_is_loaded(
    command: Command, settings: tuple[str, ...], told: str
) -> None:
    ended = command("evaluate", *settings)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not [name for name in command.files() if name.startswith("runs")]


def test_a_method_may_erase_styles_otherwise_than_things() -> None:
    config = composed("evaluate", [*CANVAS, "method=esd_u"])
    assert isinstance(config, EvaluateConfig)
    thing, style = (
        composed("train", settings_of(config, Target(domain, name), Path("there")))
        for name, domain in (("cat", "thing"), ("neon", "style"))
    )
    assert isinstance(thing, TrainConfig) and isinstance(style, TrainConfig)
    assert thing.selection == style.selection == "esd_u" and thing.objective == style.objective
    assert (thing.training.lr, thing.training.updates) == (1e-4, 100)
    assert (style.training.lr, style.training.updates) == (2e-4, 200)
    assert style.prompts == ["a {thing} in the {} style"] and "a {}" in thing.prompts
    assert style.run_dir == "there/training"


SMALL = ["training.updates=1", "training.batch_size=1", "trajectory.num_steps=2", "trajectory.rollouts=1"]


@pytest.fixture
def known(command: Command) -> tuple[str, ...]:
    """A canvas of two things in two styles on a tiny model that draws pictures of the judge's size, as arguments."""
    grid = ("suite.things=[cat,dog]", "suite.styles=[flat,neon]", "images_per_prompt=1", "num_steps=2")
    return (
        "suite=emoji_canvas",
        f"model.path={known_model(command.folder)}",
        *grid,
        "device=cpu",
        "run_dir=canvas",
        "base_images=null",
    )


@pytest.mark.slow(reason="starts five Pythons of its own, which import torch, diffusers and transformers")
def test_an_adapter_is_measured_as_any_method_and_what_is_refused_leaves_all_as_it_was(
    command: Command, known: tuple[str, ...]
) -> None:
    odd = command("evaluate", *known, "method=lora", "method.training=['training.lr=-1']")
    assert odd.code == 2 and not (command.folder / "canvas").exists(), "told before anything is drawn"
    style = command("evaluate", *known, "method=lora", "method.styles=['training.lr=-2']", "limit=2")
    assert style.code == 2 and not (command.folder / "canvas").exists(), "also of a style, which comes second"
    settings = OmegaConf.load(conf_dir() / "method/lora.yaml").training
    training = f"method.training=[{','.join(map(quoted, [*settings, *SMALL]))}]"
    ended = command("evaluate", *known, "method=lora", training, "limit=1", "denoiser_points=2")
    assert ended.code == 0, ended.err
    (erasure,) = json.loads((command.folder / "canvas/metrics.json").read_text())["erasures"]
    assert [erasure[name]["n"] for name in ("UA", "IRA", "CRA")] == [2, 2, 4]
    assert (command.folder / "canvas/thing-cat/training/lora.safetensors").is_file()
    assert len(erasure["denoiser"]["erased"]["points"]) == 2
    assert erasure["peak_gib"]["process"] > 0.1 and [erasure[name]["n_base"] for name in ("UA", "IRA")] == [2, 2]
    assert "things, mean of 1 erasures:" in ended.out and ended.out.count(", n=1)") >= 3, "with interval and n"
    (line,) = table(command.folder / "canvas/canvas.csv")
    assert float(line["peak_gib_process"]) == erasure["peak_gib"]["process"] and line["peak_gib_gpu"] == ""
    assert float(line["residual"]) == inside(erasure["denoiser"])["residual"] and float(line["drift"]) >= 0
    made = {path: path.stat().st_mtime_ns for path in (command.folder / "canvas/thing-cat").rglob("*.png")}
    trained = shutil.copytree(
        command.folder / "canvas/thing-cat/training", command.folder / "canvas/style-flat/training"
    )
    for limit, names in (("2", ["cat", "flat"]), ("1", ["cat"])):  # goes on; tells of fewer, and deletes nothing
        ended = command("evaluate", *known, "method=lora", training, f"limit={limit}", "denoiser_points=0")
        assert ended.code == 0, ended.err
        told = json.loads((command.folder / "canvas/metrics.json").read_text())
        assert [one["name"] for one in told["erasures"]] == names and told["planned"] == len(names)
        assert told["erasures"][0]["peak_gib"] == erasure["peak_gib"], "of the training, not of who reads it"
    assert made == {path: path.stat().st_mtime_ns for path in (command.folder / "canvas/thing-cat").rglob("*.png")}
    assert trained.is_dir() and len([*(command.folder / "canvas/style-flat/erased").glob("*.png")]) == 4
    before = (command.folder / "canvas/config.yaml").read_bytes()
    manifest = command.folder / "canvas/base/manifest.json"
    manifest.write_text(manifest.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    again = command("evaluate", *known, "method=lora", training, "limit=1", "denoiser_points=3")
    assert again.code == 2 and "holds other images" in again.err
    assert (command.folder / "canvas/config.yaml").read_bytes() == before


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, known: tuple[str, ...]) -> tuple[str, ...]:
    """The same canvas, whose erasures are made up at once, as a version made them that did not tell their memory."""

    def train(self: Canvas, target: Target) -> int:
        folder = self.folder(target) / "training"
        made = load(erased_weights(folder / "erased.safetensors"))
        save(made.path, made.differences, made.provenance | {"seconds": 1.0, "parameters": 3})
        (folder / "summary.json").write_text("{}")
        return 0

    monkeypatch.setattr(Canvas, "train", train)
    monkeypatch.setattr(Canvas, "refuse", lambda self, targets: 0)
    return (*known, "method=esd_u", "denoiser_points=0")


def test_pictures_that_a_canvas_lacks_are_counted_and_warned_of(command: Command, quick: tuple[str, ...]) -> None:
    ended = command("evaluate", *quick, "limit=1")
    assert ended.code == 0 and not ended.err, ended.err
    canvas = command.folder / "canvas"
    (canvas / "base/0_0.png").write_bytes(b"no picture")
    Image.new("RGB", (32, 32)).save(canvas / "thing-cat/erased/2_0.png")
    ended = command("evaluate", *quick, "limit=1")
    assert ended.code == 0, ended.err
    assert "warning: images of base: 1 corrupt, the first base/0_0.png; they count in no rate" in ended.err
    assert "images of cat: 1 corrupt, the first thing-cat/erased/2_0.png" in ended.err, "also one of another size"
    told = json.loads((canvas / "metrics.json").read_text())
    assert told["images"] == {name: {"ok": 3, "missing": 0, "corrupt": 1} for name in ("base", "cat")}
    (cat,) = told["erasures"]
    assert (cat["UA"]["n"], cat["UA"]["n_base"], cat["IRA"]["n"], cat["IRA"]["n_base"]) == (2, 1, 1, 2)
    run = read(canvas)
    assert isinstance(run, Run) and run.notes == ("pictures that are in no rate: base: 1 corrupt; cat: 1 corrupt",)


def test_a_finished_canvas_that_is_stopped_while_it_is_read_again_keeps_all_it_told(
    command: Command, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("evaluate", *quick, "limit=2").code == 0
    files = [command.folder / "canvas" / name for name in ("metrics.json", "canvas.csv", "images.csv")]
    before, whole = [file.read_bytes() for file in files], Canvas.read

    def read_then_stop(self: Canvas, model: str, manifest: Manifest) -> list[dict[str, str]]:
        if model == "flat":
            raise KeyboardInterrupt
        return whole(self, model, manifest)

    with monkeypatch.context() as patched:
        patched.setattr(Canvas, "read", read_then_stop)
        try:
            stopped = command("evaluate", *quick, "limit=2").code
        except KeyboardInterrupt:
            stopped = 130
    assert stopped == 130 and before == [file.read_bytes() for file in files]
    told = json.loads(before[0])
    for erasure in told["erasures"]:  # as earlier versions told them
        assert erasure.pop("peak_gib") is None
        for name in ("UA", "IRA", "CRA"):
            del erasure[name]["n_base"], erasure[name]["of_base_interval"]
    files[0].write_text(json.dumps(told))
    assert command("evaluate", *quick, "limit=2").code == 0 and files[0].read_bytes() == before[0]


@pytest.mark.slow(reason="a whole erasure of the bundled model, and eight hundred pictures")
def test_one_erasure_of_the_canvas_is_told_and_resumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    command = Command(monkeypatch, capsys, tmp_path)
    settings = (*CANVAS, "method=esd_u", "limit=1", "images_per_prompt=1", "device=cpu", "run_dir=canvas")
    ended = command("evaluate", *settings)
    assert ended.code == 0, ended.err
    told = json.loads((tmp_path / "canvas/metrics.json").read_text())
    (erasure,) = told["erasures"]
    assert (erasure["name"], erasure["UA"]["n"], erasure["IRA"]["n"], erasure["CRA"]["n"]) == ("cat", 10, 190, 200)
    assert erasure["UA"]["rate"] >= 0.9 and erasure["IRA"]["of_base"] >= 0.85 and erasure["CRA"]["of_base"] >= 0.9
    assert len(erasure["retention"]) == 19 and -0.1 < erasure["over_erasure"] < 0.2
    (line,) = table(tmp_path / "canvas/canvas.csv")
    assert float(line["UA"]) == erasure["UA"]["rate"] and line["name"] == "cat"
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "canvas").rglob("*.png")}
    assert len(drawn) == 401  # and the preview
    assert command("evaluate", *settings).code == 0
    assert drawn == {path: path.stat().st_mtime_ns for path in (tmp_path / "canvas").rglob("*.png")}
