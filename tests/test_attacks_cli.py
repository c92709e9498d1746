"""`python -m esd.evaluate suite=attacks`: what it leaves, that it resumes, and what it refuses before loading."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.programs import BUNDLED, DRAW, Command, erased_weights

SMALL = (
    "suite.settings.soft_prompt.steps=2",
    "suite.settings.soft_prompt.every=2",
    "suite.settings.completion.interrupts=[1]",
)
FAST = (*DRAW, "suite=attacks", "suite.attacks=[completion,soft_prompt]", *SMALL, "run_dir=out")


@pytest.fixture
def asked(command: Command, tiny_resnet: Path) -> tuple[str, ...]:
    """An erased checkpoint, prompts and a judge that needs no labels, as arguments."""
    erased_weights(command.folder / "weights/erased.safetensors")
    return "prompts=[a cat, the cat]", "checkpoint=weights", f"judges=['nsfw:{tiny_resnet}']", *FAST


def test_curves_a_figure_and_pictures_are_left_and_the_same_command_attacks_nothing_anew(
    command: Command, asked: tuple[str, ...]
) -> None:
    ended = command("evaluate", *asked, "suite.budget.queries=500")
    assert ended.code == 0, ended.err
    told = json.loads((command.folder / "out/metrics.json").read_text())
    assert list(told["attacks"]) == ["completion", "soft_prompt"] and told["checkpoint"]["concepts"] == ["cat"]
    assert told["budget"]["queries"] == 500 and told["scorer"]["threshold"] == 0.5
    assert told["attacks"]["soft_prompt"]["settings"]["steps"] == 2 and len(told["rows"]) == 2
    left = {"out/recovery.png", "out/completion.png", "out/soft_prompt/erased/0.png", "out/config.yaml"}
    assert left <= command.files()
    assert "completion: erased" in ended.out and "results are in out" in ended.out
    assert set(yaml.safe_load((command.folder / "out/config.yaml").read_text())["suite"]["settings"]) == {
        *told["attacks"]
    }
    again = command("evaluate", *asked, "suite.budget.queries=500")
    assert again.code == 0 and again.out.count("done already") == 2
    before = (command.folder / "out/config.yaml").read_bytes()
    (judge,) = [one.partition("=")[2].strip("[']").replace(":", r"\:") for one in asked if one.startswith("judges")]
    other = command("evaluate", *asked, "suite.budget.queries=500", f"thresholds={{{judge}: 0.6}}")
    assert other.code == 2 and "(scorer.threshold is 0.5 there, 0.6 here)" in other.err
    assert (command.folder / "out/config.yaml").read_bytes() == before, "what is refused leaves all as it was"
    other = command("evaluate", *asked, "suite.budget.queries=400")
    assert other.code == 2 and "suite.budget.queries=500 there, 400 here" in other.err


def test_a_model_with_a_vocabulary_is_asked_for_what_was_erased(command: Command, asked: tuple[str, ...]) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-mine")
    shutil.copy(BUNDLED / "emoji-sd/vocabulary.json", command.folder / "base-mine")
    (command.folder / "emoji-judge").symlink_to(BUNDLED / "emoji-judge")
    own = [one for one in asked if not one.startswith(("prompts", "judges", "model"))]
    own += ["model.path=base-mine", "plan_only=true"]
    ended = command("evaluate", *own)
    assert ended.code == 0 and "on 16 prompts" in ended.out and not (command.folder / "out").exists()
    assert "cat" in ended.out.split("such as")[1] and "read by emoji-judge: cat" in ended.out
    for labels, told in (("dog,mosaic\n1,a dog,dog", "share is dog (thing), mosaic (style)"),
                         ("rose,mosaic\n1,a cat,cat", "share is mosaic (style)")):  # fmt: skip
        (command.folder / "p.csv").write_text(f"case_number,prompt,thing,style\n0,a pet,{labels},mosaic\n")
        odd = command("evaluate", *own, "prompts=p.csv")
        assert odd.code == 2 and told in odd.err and "bring back 'cat'" in odd.err, odd.err
    (command.folder / "p.csv").write_text("case_number,prompt,thing\n0,a kitty,kitty\n1,kitty,kitty\n")
    called = command("evaluate", *own, "prompts=p.csv")
    assert called.code == 0 and "read by emoji-judge: cat" in called.out, called.err
    ended = command("evaluate", *own, "limit=3", "suite.concept=dog")
    assert ended.code == 0 and "on 3 prompts" in ended.out and "dog" in ended.out.split("such as")[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["suite.attacks=[telepathy]"], "allowed: one or more of noise, completion"),
        (["suite.attacks=[]"], "allowed: one or more of"),
        (["suite.attacks=[noise,noise]"], "each once"),
        (["suite.settings.soft_prompt.tokens=0"], "soft_prompt.tokens is 0; allowed"),
        (["suite.settings.soft_prompt.tokens=many"], "soft_prompt.tokens is 'many'; allowed"),
        (["+suite.settings.soft_prompt.token=2"], "soft_prompt.token is no setting"),
        (["+suite.settings.telepathy.steps=2"], "allowed: settings of noise"),
        (["suite.budget.queries=0"], "suite.budget.queries=0"),
        (["suite.budget.gradients=3.5"], "suite.budget.gradients"),
        (["checkpoint=null"], "nothing to attack"),
        (["checkpoint=nowhere"], "there is no file"),
        (["images_per_prompt=2"], "images_per_prompt=2 says nothing"),
        (["suite.attacks=[noise]"], "suite.settings.soft_prompt.steps=2: this run does not read it"),
        (["prompts=null"], "has no vocabulary.json that knows 'cat'"),
        (["judges=[]"], "one judge of single pictures"),
        (["judges=[ssim]"], "one judge of single pictures"),
        (["judges=[emoji-judge]"], "comes without it"),
        (["suite=prompts", "suite.concept=cat"], "says nothing to suite=prompts; set suite=attacks"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    command: Command, asked: tuple[str, ...], arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("esd.attacks.load", never)
    kept = [one for one in asked if "=" in one and not any(one.split("=")[0] == a.split("=")[0] for a in arguments)]
    if "suite=prompts" in arguments:
        kept = [one for one in kept if not one.startswith("suite")]
    ended = command("evaluate", *kept, *arguments)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not (command.folder / "out").exists()


def test_what_does_not_fit_the_model_is_told_before_anything_is_written(
    command: Command, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting, told in (
        ("suite.settings.completion.interrupts=[9]", "num_steps=2 makes 3 steps"),
        ("suite.budget.queries=5", "ends before the first 2 pictures"),
    ):
        ended = command("evaluate", *asked[:-1], "run_dir=out", setting)
        assert ended.code == 2 and told in ended.err and not (command.folder / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = command("evaluate", *asked)
    assert ended.code == 2 and "one process" in ended.err
