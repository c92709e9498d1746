"""`python -m esd.evaluate`: what it leaves, that it resumes and refuses, and that its table says it all again."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from esd import checkpoint
from esd.errors import UserError
from esd.evaluation import runs
from esd.evaluation.generate import Manifest
from esd.evaluation.table import agrees, rates, read_table
from tests import tiny
from tests.programs import BUNDLED, DRAW, Command, erased_weights, known_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
FAST = (*DRAW, "denoiser_points=0", "run_dir=out")


@pytest.fixture
def asked(command: Command) -> tuple[str, ...]:
    """An erased checkpoint, and prompts with labels, as arguments."""
    erased_weights(command.folder / "weights/erased.safetensors")
    rows = "".join(f"{i},a {name},{i},{name}\n" for i, name in enumerate(["cat", "dog", "rose"] * 2))
    (command.folder / "p.csv").write_text("case_number,prompt,evaluation_seed,class\n" + rows)
    return "prompts=p.csv", "checkpoint=weights", *FAST


def metrics(command: Command) -> dict:
    told: dict = json.loads((command.folder / "out/metrics.json").read_text())
    return told


def test_images_a_table_and_metrics_are_left_and_the_table_says_the_rates_again(
    command: Command,
    asked: tuple[str, ...],
    tiny_clip: Path,
) -> None:
    ended = command("evaluate", *asked, f"judges=['clip:{tiny_clip}',ssim]", "denoiser_points=2")
    assert ended.code == 0, ended.err
    told, rows = metrics(command), read_table(command.folder / "out/images.csv")
    left = {f"out/{folder}/{name}" for folder in ("base", "erased") for name in ("0_0.png", "5_0.png", "manifest.json")}
    assert left <= command.files()
    assert [row["model"] for row in rows] == ["base"] * 6 + ["erased"] * 6
    assert rates(rows, told["judges"]) == told["rates"], "from the two files alone"
    found = told["rates"]["erased"][f"clip:{tiny_clip}"]["class"]
    assert found["n"] == 6 and set(found["by_label"]) == {"cat", "dog", "rose"} and len(found["interval"]) == 2
    assert -1 <= told["scores"]["base"][f"clip:{tiny_clip}"]["clip_cos"] <= 1
    assert told["scores"]["erased"]["ssim"]["n"] == 6 and told["scores"]["erased"]["ssim"]["mean"] < 1
    assert told["checkpoint"]["concepts"] == ["cat"] and told["checkpoint"]["bytes"] > 0
    points = told["denoiser"]["erased"]["points"]
    assert len(points) == 2 and all(point["residual"] >= 0 for point in points)
    assert points[0]["t"] > points[1]["t"] and told["denoiser"]["erased"]["prompts"] == ["a cat"]
    assert told["images_drawn"] == 12 and told["seconds"]["drawing"] > 0 and told["peak_gib"]["process"] > 0


def asked_for(command: Command, concept: str, classes: str) -> tuple[str, ...]:
    """Prompts of these classes, and a checkpoint that erased the concept, as arguments."""
    found = checkpoint.load(erased_weights(command.folder / "weights/erased.safetensors"))
    checkpoint.save(found.path, found.differences, found.provenance | {"concepts": [concept]})
    rows = "".join(f"{i},a {name},{i},{name}\n" for i, name in enumerate(classes.split(",")))
    (command.folder / "p.csv").write_text("case_number,prompt,evaluation_seed,class\n" + rows)
    return "prompts=p.csv", "checkpoint=weights", *FAST


@pytest.mark.parametrize("judge", ["clip", "resnet50"])
def test_a_model_without_a_vocabulary_is_judged_by_the_labels_of_its_prompts(
    command: Command, tiny_clip: Path, judge: str
) -> None:
    if judge == "clip":
        name, asked = f"clip:{tiny_clip}", asked_for(command, "A Cat", "cat,dog,Cat,rose,dog")
    else:  # which transformers finds as a folder
        tiny.save_resnet(command.folder / "microsoft/resnet-50")
        name, asked = judge, asked_for(command, "tench", "tench,nsfw,Tinca tinca,sfw,nsfw")
    ended = command("evaluate", *asked, f"judges=['{name}']")
    assert ended.code == 0, ended.err
    told, rows = metrics(command), read_table(command.folder / "out/images.csv")
    assert told["erasure"]["judge"] == name and told["reason"] is None and told["erasure"]["neither"] is None
    assert [target["domain"] for target in told["erasure"]["targets"]] == ["class", "class"]
    run = runs.read(command.folder / "out")
    assert isinstance(run, runs.Run) and set(run.rates) == {"target", "same_domain"}
    for rate, cases in (("target", "02"), ("same_domain", "134")):
        shown = {
            model: sum(
                agrees(row[f"{name}.class"], row["label.class"])
                for row in rows
                if row["model"] == model and row["case_number"] in cases
            )
            for model in ("base", "erased")
        }
        found = run.rates[rate]
        assert (found.shown_before, found.shown_after, found.n) == (shown["base"], shown["erased"], len(cases))
        assert told["erasure"][rate]["interval"] == list(found.interval)
    bound = 0.0 if run.rates["target"].erased == 1 else 1.0
    assert command("compare", "out").code == 0 and "n=2" in command("compare", "out").out
    assert command("compare", "out", "--min-ua", str(bound)).code == (3 if bound else 0)
    if judge == "clip":
        assert told["distances"]["n"] == 3 and told["distances"]["fid"] > 0 and told["distances_reason"] is None
        assert told["distances"]["features"].startswith(name)
    else:
        assert told["distances"] is None and "no judge asked has features" in told["distances_reason"]
        assert "no FID and KID: no judge asked has features" in ended.out
    assert command("report", "out").code == 0
    page = (command.folder / "report.html").read_text()
    assert "no judge" not in page and f"{run.rates['target'].shown_after} of 2 pictures that ask for" in page


def test_it_is_told_why_labels_give_no_rate_of_what_was_erased(command: Command, tiny_clip: Path) -> None:
    asked = asked_for(command, "cat", "dog,rose,dog")
    assert command("evaluate", *asked, f"judges=['clip:{tiny_clip}']").code == 0
    told = metrics(command)
    assert told["erasure"] is None and told["distances"] is None
    assert "no prompt is labelled 'cat' under what the judges read: class (dog, rose, ...)" in told["reason"]
    assert command("report", "out").code == 0
    assert "no judge has read these pictures" not in (command.folder / "report.html").read_text()
    ended = command("evaluate", *asked, "judges=[ssim]")
    assert ended.code == 0 and "no judge reads a label of the prompts" in metrics(command)["reason"]


def test_too_few_pictures_of_what_was_erased_are_warned_of(command: Command, tiny_clip: Path) -> None:
    asked = (*asked_for(command, "cat", "cat,dog,cat,rose,dog"), f"judges=['clip:{tiny_clip}']", "plan_only=true")
    ended = command("evaluate", *asked)
    assert ended.code == 0 and "2 of 5 pictures are labelled as asking for 'cat', of which even none" in ended.err
    assert "up to 66% possible; add prompts of class 'cat', or images_per_prompt=15" in ended.err
    assert "labelled as asking" not in command("evaluate", *asked, "images_per_prompt=15").err
    known_model(command.folder)
    known = ("evaluate", *asked[1:-2], "model.path=base-known", "judges=[emoji-judge]", "plan_only=true")
    few = command(*known, "prompts=['a {thing} in the {style} style']", "limit=100")
    assert "1 of 100 pictures are labelled as asking for 'cat'" in few.err and "without a limit" in few.err
    assert "such as 'a cat in the {style} style'" in few.err
    (line,) = [line for line in README.splitlines() if "esd.evaluate checkpoint=" in line]
    told = [one.replace("dog", "cat") for one in shlex.split(line.partition("#")[0])[3:]]
    wanted = [one for one in told if one.partition("=")[0] not in ("checkpoint", "run_dir")]
    enough = command(*known, *wanted)
    assert enough.code == 0 and "labelled as asking" not in enough.err, enough.err
    none = command(*known, "prompts=['a rose in the {style} style']")
    assert "0 of 10 pictures" in none.err and "there will be no rate of it" in none.err


def test_a_run_that_is_stopped_while_it_measures_is_not_finished(
    command: Command, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("evaluate", *asked, "judges=[ssim]").code == 0
    out = command.folder / "out"
    before = {name: (out / name).read_bytes() for name in ("metrics.json", "images.csv")}

    def stopped(*_: object) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr("esd.evaluate.look_inside", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            command("evaluate", *asked, "limit=3", "judges=[ssim]", "denoiser_points=2")
    assert before == {name: (out / name).read_bytes() for name in before}, "nothing is replaced before all is known"
    told = r"begun again with limit=3 \(null before\), denoiser_points=2 \(0 before\), and is not finished"
    with pytest.raises(UserError, match=told):
        runs.read(out)
    with monkeypatch.context() as patched:
        patched.setattr("esd.storage.write_json", lambda file, told: stopped() if file.name == "metrics.json" else None)
        with pytest.raises(RuntimeError, match="stopped"):
            command("evaluate", *asked, "limit=3", "judges=[ssim]")
    assert len(read_table(out / "images.csv")) == 6
    with pytest.raises(UserError, match=r"not finished \(no metrics\.json\)"):
        runs.read(out)


def test_the_denoiser_is_not_measured_beside_pictures_drawn_under_interventions(
    command: Command, asked: tuple[str, ...]
) -> None:
    under = 'interventions=["Scale(mid.ff, activation=0.5)"]'
    ended = command("evaluate", *asked, "judges=[ssim]", under, "denoiser_points=2")
    assert ended.code == 0 and "without the interventions of the pictures" in ended.out
    told = metrics(command)
    assert told["denoiser"] is None and "interventions" in told["denoiser_reason"]


def test_the_same_command_draws_nothing_anew_and_other_settings_are_refused(
    command: Command, asked: tuple[str, ...]
) -> None:
    assert command("evaluate", *asked).code == 0
    drawn = {path: path.stat().st_mtime_ns for path in (command.folder / "out").rglob("*.png")}
    assert command("evaluate", *asked, "denoiser_points=1", "batch_size=2").code == 0
    assert metrics(command)["images_drawn"] == 0 and metrics(command)["denoiser"]
    assert drawn == {path: path.stat().st_mtime_ns for path in (command.folder / "out").rglob("*.png")}
    ended = command("evaluate", *asked, "num_steps=3")
    assert ended.code == 2 and "num_steps=2 there, 3 here" in ended.err


def test_another_erased_model_finds_the_images_of_the_base(command: Command, asked: tuple[str, ...]) -> None:
    assert command("evaluate", *asked).code == 0
    kept = list((command.folder / "runs/.base-images").iterdir())
    assert len(kept) == 6
    for file in kept:  # a mark that only a copy has
        file.write_bytes(file.read_bytes() + b"kept")
    assert command("evaluate", *asked, "run_dir=two").code == 0
    assert json.loads((command.folder / "two/metrics.json").read_text())["images_drawn"] == 6, "copies are not drawn"
    assert all((command.folder / f"two/base/{i}_0.png").read_bytes().endswith(b"kept") for i in range(6))
    assert not (command.folder / "two/erased/0_0.png").read_bytes().endswith(b"kept")


def test_labels_are_read_as_the_model_knows_them(command: Command) -> None:
    erased_weights(command.folder / "weights/erased.safetensors")
    model = known_model(command.folder)
    rows = [
        "a cat,cat",
        "a Cat,A Cat",
        "a kitty,kitty",
        "a dog,Dog",
        "a rose,rose",
        "a zeppelin,zeppelin",
        "a cat asleep,",
    ]
    text = "\n".join(["prompt,thing", *rows, "two cats,"])
    (command.folder / "p.csv").write_text(f"{text}\n")
    read = ("judges=[emoji-judge]", f"model.path={model}")
    ended = command("evaluate", "prompts=p.csv", "checkpoint=weights", *FAST, *read)
    assert ended.code == 0, ended.err
    assert "labelled thing=zeppelin, which the model's vocabulary.json lacks" in ended.err
    told = metrics(command)
    assert [told["erasure"][name]["n"] for name in ("target", "implied", "same_domain")] == [2, 1, 3]
    assert told["distances"]["n"] == 4, "dog, rose, zeppelin and cats; no prompt of a cat, with label or without"
    assert {point["name"]: point["n"] for point in told["harm"]["retention"]} == {"dog": 1, "rose": 1}
    assert -1 <= told["harm"]["over_erasure"] <= 1 and told["harm"]["name"] == "cat"
    assert command("report", "out").code == 0
    assert "What other things lost" in (command.folder / "report.html").read_text()


def test_damaged_images_are_counted_and_warned_of(command: Command, asked: tuple[str, ...]) -> None:
    assert command("evaluate", *asked).code == 0
    (command.folder / "out/erased/2_0.png").write_bytes(b"no picture")
    ended = command("evaluate", *asked)
    assert ended.code == 0 and "images of erased: 1 corrupt; they count in no rate" in ended.err
    assert metrics(command)["images"]["erased"] == {"ok": 5, "missing": 0, "corrupt": 1}


def test_a_limit_takes_prompts_from_all_over_the_set(command: Command, asked: tuple[str, ...]) -> None:
    assert command("evaluate", *asked, "limit=3", "judges=[ssim]").code == 0
    assert [row["case_number"] for row in read_table(command.folder / "out/images.csv")] == ["0", "2", "4"] * 2


def test_another_limit_goes_on_with_what_is_there_and_tells_of_what_it_asks(
    command: Command, asked: tuple[str, ...]
) -> None:
    for limit, cases, drawn in (("3", "024", 6), ("4", "0134", 4), ("null", "012345", 2), ("3", "024", 0)):
        assert command("evaluate", *asked, f"limit={limit}", "judges=[ssim]").code == 0
        told = metrics(command)
        assert told["images_drawn"] == drawn and told["asked"]["limit"] == yaml.safe_load(limit)
        assert told["images"]["erased"]["ok"] == told["scores"]["erased"]["ssim"]["n"] == len(cases)
        rows = read_table(command.folder / "out/images.csv")
        assert [row["case_number"] for row in rows] == [*cases, *cases]
    for folder in ("base", "erased"):
        known = {image.file for image in Manifest.load(command.folder / "out" / folder).images}
        assert known == {path.name for path in (command.folder / "out" / folder).glob("*.png")} and len(known) == 6


def test_the_base_alone_is_measured(command: Command) -> None:
    ended = command("evaluate", "prompts=[a cat]", *FAST)
    assert ended.code == 0, ended.err
    told = metrics(command)
    assert told["checkpoint"] is None and told["denoiser"] is None and "erasure" not in told
    assert list(told["rates"]) == list(told["images"]) == ["base"]


def test_a_plan_draws_nothing(command: Command, asked: tuple[str, ...]) -> None:
    before = command.files()
    ended = command("evaluate", *asked, "plan_only=true")
    assert ended.code == 0 and command.files() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["prompts=empty.csv"], "holds no prompts"),
        (["prompts=[a cat]", "judges=[blip]"], "no judge is called 'blip'"),
        (["prompts=[a cat]", "judges=[emoji-judge]"], "comes without it"),
        (["prompts=[a cat]", "thresholds={nudenet: 1.5}"], "nudenet=1.5; allowed: a number from 0 to 1"),
        (["prompts=[a cat]", "thresholds={nudenet: 0.5}"], "'nudenet' is no judge asked that has one; allowed: none"),
        (["prompts=[a cat]", "judges=[ssim]"], "compares base and erased, and checkpoint=null draws the base alone"),
        (["prompts=[a cat]", "thresholds=0.5"], "allowed: judges with numbers"),
        (["prompts=[a cat]", "limit=0"], "limit=0"),
        (["prompts=[a cat]", "suite=attack"], "suite=attack: allowed: "),
        ([], "nothing to draw"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(command: Command, arguments: list[str], told: str) -> None:
    (command.folder / "empty.csv").write_text("prompt\n")
    ended = command("evaluate", *FAST, *arguments)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not (command.folder / "out").exists()


def test_pictures_that_the_bundled_judge_cannot_read_are_told_before_they_are_drawn(command: Command) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-mine")
    shutil.copy(BUNDLED / "emoji-sd/vocabulary.json", command.folder / "base-mine")
    (command.folder / "emoji-judge").symlink_to(BUNDLED / "emoji-judge")
    ended = command("evaluate", "prompts=[a cat]", *FAST, "model.path=base-mine", "judges=[emoji-judge]")
    assert ended.code == 2 and "reads pictures of 64 pixels, and the model's pictures are not" in ended.err


def test_a_judge_that_never_saw_such_pictures_is_warned_of(command: Command, tiny_clip: Path) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-mine")
    shutil.copy(BUNDLED / "emoji-sd/vocabulary.json", command.folder / "base-mine")
    (command.folder / "emoji-judge").symlink_to(BUNDLED / "emoji-judge")
    asked = ("evaluate", "prompts=['a {thing}']", "limit=1", *FAST, "model.path=base-mine", "plan_only=true")
    ended = command(*asked, f"judges=['clip:{tiny_clip}']")
    assert ended.code == 0 and "never on emoji-sd's pictures; its rates may mean nothing" in ended.err
