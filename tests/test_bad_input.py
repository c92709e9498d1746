"""Bad input: exit code 2, one line that names the value and the mend, and nothing written."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from esd.config.paths import slug
from tests.programs import DRAW, FAST, Command, erased_weights

CAT = "concepts=[cat]"


def refused(command: Command, told: str, program: str, *arguments: str) -> None:
    """The program ends with 2 and one line that holds `told`, and leaves no new file."""
    before = command.files()
    ended = command(program, *arguments)
    assert ended.code == 2, ended
    assert told in ended.err
    assert ended.err.startswith("error: ") and len(ended.err.splitlines()) == 1
    assert command.files() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["concepts=[]"], "concepts=[] names nothing"),
        (["concepts=['']"], "'' is empty"),
        (["concepts=['  ']"], "is empty"),
        ([f"concepts=[{'x' * 10_000}]"], "10000 characters"),
        (['concepts=["cat\ndog"]'], "line break"),
        (["concepts=[Beyonce']"], "quote text"),
        (["concepts=cat"], "give a list"),
        ([CAT, "objective.eta=nan"], "objective.eta=nan: allowed: a finite number, at least 0"),
        ([CAT, "objective.eta=-1"], "objective.eta=-1"),
        ([CAT, "objective.eta=much"], "'much'"),
        ([CAT, "objective.etta=1"], "nearest: objective.eta"),
        ([CAT, "objective=none_such"], "allowed: concept_anchor, esd"),
        ([CAT, "trajectory.num_steps=0"], "trajectory.num_steps=0"),
        ([CAT, "training.updates=0"], "training.updates=0"),
        ([CAT, "model.path=nowhere"], "'nowhere', which does not exist"),
        ([CAT, "prompts=['a dog']"], "never names the concept"),
        ([CAT, "device=abacus"], "device=abacus"),
        ([CAT, "run_dir=base/model_index.json/run"], "no directory that you may write to"),
        ([CAT, "run_dir=base"], "no run of esd"),
        (["concepts=[[cat]]"], "is a list in a list"),
        (["concepts=['${oc.env:HOME}']"], "holds '${'"),
        ([CAT, "+objective.foo=1"], "unknown setting 'objective.foo'"),
        ([CAT, "experiment=erase_thing", "objective=concept_anchor"], "objective.anchor=concept"),
        ([CAT, "-z"], "unknown flag -z"),
        ([CAT, "--force"], "unknown flag --force"),
        ([CAT, "--multirun", "objective.eta=-1"], "objective.eta=-1"),
        ([CAT, "trajectory.scheduler=magic"], "allowed: ddim, ddpm"),
        ([CAT, "trajectory.time_rule=alt", "trajectory.scheduler=euler"], "relabels DDIM's times"),
        ([CAT, "prompts=['a {} in {style}']"], "ships no vocabulary.json"),
        ([CAT, "selection='cross.k + ('"], "cannot be read: it ends where"),
        ([CAT, "model.revision=abc"], "which is a folder here"),
        ([CAT, "objective=null"], "objective=null: allowed: concept_anchor, esd"),
        ([CAT, "model=null"], "model=null: allowed: emoji_sd"),
        ([CAT, "weights=null"], "weights=null: allowed: full, lora"),
        ([CAT, "trajectory="], "trajectory=: allowed: bank, on_policy"),
        ([CAT, "experiment=3"], "experiment=3: allowed: erase_style"),
        ([CAT, "--multirun", "experiment=erase_thing,null"], "experiment=erase_thing,null: allowed: erase_style"),
        ([CAT, "hydra.run.dir=elsewhere"], "hydra.run.dir=elsewhere: Hydra's own settings"),
        ([CAT, "++hydra.output_subdir=x"], "Hydra's own settings"),
        ([CAT, "hydra.job.chdir=true"], "Hydra's own settings"),
        ([CAT, "prompts=['a {} {thng}']"], "'a {} {thng}' holds braces that nothing fills; allowed: {}, {thing}"),
        ([CAT, "preserve.prompts=['a {}']"], "'a {}' holds braces that nothing fills; allowed: {thing}, {style}"),
        ([CAT, "prompts=['a {}']", "preserve.prompts=['a cat']"], "'a cat' is a training prompt too"),
        ([CAT, "weights.frozen=float8"], "weights.frozen=float8 says nothing about weights=full; set weights=lora"),
        ([CAT, "training.warmup=4"], "training.warmup=4 with training.updates=4"),
        (["concepts=[cat,a Cat]"], "names a concept twice"),
        ([CAT, "model.path=checkpoints/emoji-sd"], "comes with a clone of esd"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)
def test_a_mistake_is_told_before_anything_is_loaded(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("esd.families.load_pipeline", loads)
    refused(command, told, "train", *FAST, *arguments)


GLOBAL = "# @package _global_"


@pytest.mark.parametrize("found_by", ["--config-dir=settings", "hydra.searchpath=[file://settings]"])
def test_an_experiment_of_the_users_own_counts_like_those_of_conf(command: Command, found_by: str) -> None:
    for name, lines in {
        "experiment/lab/mine": (
            GLOBAL,
            "defaults: [/experiment/erase_thing, _self_]",
            "prompts: ['{}']",
            "preserve: {prompts: []}",
            "objective: {eta: 1.0}",
        ),
        "experiment/headless": ("prompts: ['{}']",),
        "objective/soft": ("eta: 1e-1",),
    }.items():
        file = command.folder / f"settings/{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines))
    asked = (found_by, "experiment=lab/mine", CAT, *FAST, "plan_only=true")
    ended = command("train", *asked)
    assert ended.code == 0 and "esd_u: " in ended.out, ended.err
    told = "objective=soft would be ignored: experiment=lab/mine sets objective.eta=1.0"
    refused(command, told, "train", *asked, "objective=soft")
    ended = command("train", *asked, "objective=soft", "objective.eta=0.2")
    assert ended.code == 0 and "anchor null, eta 0.2" in ended.out, ended.err
    ended = command("train", found_by, "objective=soft", CAT, *FAST, "plan_only=true")
    assert ended.code == 0 and "anchor null, eta 0.1" in ended.out, ended.err
    refused(command, GLOBAL, "train", found_by, "experiment=headless", CAT, *FAST)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["selection=attn3"], "nearest: attn1, attn2"),
        (["trajectory.time_rule=compvis"], "scheduler=ddim"),
        (["trajectory.num_steps=1000"], "num_steps is 1000: PNDMScheduler would visit t = 1000"),
        (["evaluation.num_steps=1000"], "evaluation.num_steps is 1000: PNDMScheduler would visit t = 1000"),
        (
            ["trajectory.rollouts=1", "trajectory.reuse=1", "training.batch_size=64"],
            "raise rollouts or reuse",
        ),
    ],
    ids=["selection", "time rule", "steps", "evaluation", "bank"],
)
def test_a_mistake_that_only_the_model_can_tell_writes_nothing_either(
    command: Command, arguments: list[str], told: str
) -> None:
    refused(command, told, "train", CAT, *FAST, *arguments)


def test_a_run_directory_of_another_run_is_refused(command: Command) -> None:
    assert command("train", CAT, "run_dir=run", *FAST, "plan_only=false").code == 0
    refused(
        command,
        "holds another run (objective.eta=1.0 there, 2.0 here)",
        "train",
        CAT,
        "run_dir=run",
        *FAST,
        "objective.eta=2",
    )
    refused(command, "holds a run of another program", "generate", "prompts=[a cat]", "run_dir=run", *DRAW)


@pytest.mark.parametrize("concept", ["AC/DC", "../../etc", 'Kilian Eng\'s "art"', "🐱", "-rf", "CON", "a: b"])
def test_a_concept_that_is_no_file_name_still_gets_a_directory(command: Command, concept: str) -> None:
    quoted = json.dumps(concept, ensure_ascii=False)
    ended = command("train", f"concepts=[{quoted}]", *FAST, "plan_only=true")
    assert ended.code == 0, ended.err
    assert f"runs/{slug(concept)}" in ended.out and command.files() == set()


def test_weights_of_another_base_are_refused_before_anything_is_drawn(command: Command) -> None:
    erased_weights(command.folder / "weights/erased.safetensors", seed=1)
    refused(
        command,
        "another base",
        "generate",
        "checkpoint=weights",
        "prompts=[a cat]",
        "run_dir=out",
        *DRAW,
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to draw"),
        (["prompts=[]"], "nothing to draw"),
        (["prompts=none.csv"], "none.csv does not exist"),
        (["prompts=[a cat,null]"], "None is no text"),
        (["prompts=[[a cat]]"], "['a cat'] is no text"),
        (["prompts=[a cat,a cat]"], "stands twice"),
        (["prompts=[a cat]", "checkpoint=nowhere"], "nowhere"),
        (["prompts=[a cat]", f"seed={2**63}"], "seed=9223372036854775808"),
        (["prompts=[a cat]", "num_steps=0"], "num_steps=0"),
        (["prompts=[a cat]", "guidance_scale=nan"], "guidance_scale=nan"),
        (["prompts=[a cat]", "model.path=nowhere"], "does not exist"),
    ],
)
def test_mistakes_in_what_to_draw(command: Command, arguments: list[str], told: str) -> None:
    refused(command, told, "generate", *DRAW, *arguments)


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def foreign(path: Path) -> None:
    save_file(load_file(path), path, metadata={"format": "pt"})


@pytest.mark.parametrize("harm", [damaged, foreign, Path.unlink])
def test_a_checkpoint_that_cannot_be_used(command: Command, harm: object) -> None:
    file = erased_weights(command.folder / "weights/erased.safetensors")
    harm(file)  # type: ignore[operator]
    refused(command, "weights", "files", "inspect", "weights")
    refused(command, "weights", "generate", "checkpoint=weights", "prompts=[a cat]", "run_dir=out", *DRAW)
    shutil.rmtree(command.folder / "weights")


def test_no_experiment_and_no_tracker_may_be_said_as_null(command: Command) -> None:
    ended = command("train", CAT, *FAST, "experiment=null", "tracker=null", "plan_only=true")
    assert ended.code == 0, ended.err


def test_too_many_steps_for_the_scheduler_draw_nothing(command: Command) -> None:
    refused(command, "num_steps is 1000", "generate", "prompts=[a cat]", *DRAW, "num_steps=1000")


@pytest.mark.parametrize("left", [None, "tokenizer.json", "tokenizer_config.json"])
def test_a_pipeline_without_files_of_its_tokenizer_is_refused(command: Command, left: str | None) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-mine")
    folder = command.folder / "base-mine/tokenizer"
    for file in folder.iterdir():
        if file.name != left:
            file.unlink()
    refused(command, "tokenizer", "train", CAT, *FAST, "model.path=base-mine", "plan_only=true")
    if left is None:
        folder.rmdir()
        refused(command, "tokenizer", "train", CAT, *FAST, "model.path=base-mine", "plan_only=true")


def test_a_program_that_does_not_exist(command: Command) -> None:
    ended = command("cli", "erase")
    assert ended.code == 2 and "allowed: train, generate, evaluate, analyze, report, compare, files" in ended.err
