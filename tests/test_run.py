"""Run directories: two runs never mix, writing is atomic, and what is private stays so."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from esd.config.generate import GenerateConfig
from esd.config.train import TrainConfig
from esd.config.train_sections import TrackerConfig
from esd.errors import UserError
from esd.run import RunDirectory, flat, tracker_arguments, versions
from esd.storage import State, atomic, load_state, save_state


def config(eta: float = 1.0, **settings: object) -> TrainConfig:
    made = TrainConfig(concepts=["cat"], **settings)  # type: ignore[arg-type]
    made.objective.eta = eta
    return made


def created(path: Path, config: TrainConfig) -> RunDirectory:
    run = RunDirectory(path, config)
    with run.claimed():
        return run


def test_a_run_records_its_settings_command_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "concepts=[cat]", "prompts=['a\nb']", "hydra.sweep.dir='x'"])
    created(tmp_path / "run", config(eta=3.0))
    text = (tmp_path / "run/config.yaml").read_text()
    assert text.startswith("# python -m esd.train 'concepts=[cat]'") and "sweep" not in text and "torch 2" in text
    assert yaml.safe_load(text)["objective"]["eta"] == 3.0


def test_looking_at_a_run_directory_writes_nothing(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "a/b/c", config())
    assert list(tmp_path.iterdir()) == []


def test_the_same_settings_may_come_back_and_others_may_not(tmp_path: Path) -> None:
    created(tmp_path / "run", config(eta=2.0))
    RunDirectory(tmp_path / "run", config(eta=2.0, device="cpu", plan_only=True))
    with pytest.raises(UserError, match=r"holds another run \(objective\.eta=2\.0 there, 1\.0 here\)"):
        RunDirectory(tmp_path / "run", config(eta=1.0))


def test_how_often_states_are_saved_and_how_many_processes_are_asked_for_make_no_other_run(tmp_path: Path) -> None:
    created(tmp_path / "run", config())
    other = config()
    other.training.save_every, other.training.processes = 7, 2
    created(tmp_path / "run", other)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["training"]["save_every"] == 7
    other.training.updates = 7
    with pytest.raises(UserError, match=r"training\.updates=150 there, 7 here"):
        RunDirectory(tmp_path / "run", other)


def test_a_setting_that_the_run_did_not_know_yet_counts_as_its_default(tmp_path: Path) -> None:
    created(tmp_path / "run", config())
    file = tmp_path / "run/config.yaml"
    told = yaml.safe_load(file.read_text())
    del told["weights"]["masters"], told["device_memory"]
    file.write_text(yaml.safe_dump(told))
    RunDirectory(tmp_path / "run", config())
    other = config()
    other.weights.masters = False
    with pytest.raises(UserError, match=r"weights\.masters=True there, False here"):
        RunDirectory(tmp_path / "run", other)


def test_settings_that_say_nothing_to_a_run_are_neither_written_nor_compared(tmp_path: Path) -> None:
    unused = {"preserve", "objective.eta"}
    with RunDirectory(tmp_path / "run", config(eta=2.0), unused=unused).claimed():
        told = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert "preserve" not in told and "eta" not in told["objective"] and told["objective"]["weighting"] == "native"
    other = config(eta=3.0)
    other.preserve.weight = 7.0
    RunDirectory(tmp_path / "run", other, unused=unused)
    created(tmp_path / "whole", config(eta=2.0))  # as a version that wrote all of them left it
    RunDirectory(tmp_path / "whole", other, unused=unused)
    other.objective.weighting = "eps"
    for folder in ("run", "whole"):
        with pytest.raises(UserError, match=r"objective\.weighting=native there, eps here"):
            RunDirectory(tmp_path / folder, other, unused=unused)


def test_a_setting_may_be_neutral_to_one_kind_of_run(tmp_path: Path) -> None:
    created(tmp_path / "run", config(eta=2.0))
    RunDirectory(tmp_path / "run", config(eta=1.0), neutral=["objective.eta"])
    with pytest.raises(UserError, match="seed=0 there, 1 here"):
        RunDirectory(tmp_path / "run", config(eta=1.0, seed=1), neutral=["objective.eta"])


def test_the_first_setting_that_differs_is_named_in_the_order_of_declaration(tmp_path: Path) -> None:
    created(tmp_path / "run", config(eta=2.0))
    other = config(eta=1.0)
    other.seed, other.objective.weighting, other.training.lr = 7, "eps", 1.0
    with pytest.raises(UserError, match="seed=0 there, 7 here"):
        RunDirectory(tmp_path / "run", other)
    other.seed = 0
    with pytest.raises(UserError, match=r"objective\.eta=2\.0 there, 1\.0 here"):
        RunDirectory(tmp_path / "run", other)


def test_a_run_of_another_program_is_told_as_one(tmp_path: Path) -> None:
    created(tmp_path / "run", config())
    with pytest.raises(UserError, match="holds a run of another program or version of esd, which sets concepts"):
        RunDirectory(tmp_path / "run", GenerateConfig(prompts=["a cat"]))


def test_a_run_that_did_not_know_a_setting_comes_back_where_that_is_null(tmp_path: Path) -> None:
    created(tmp_path / "run", config())
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace("  size: null\n", ""))
    RunDirectory(tmp_path / "run", config())
    other = config()
    other.trajectory.size = 1024
    with pytest.raises(UserError, match=r"trajectory\.size=None there, 1024 here"):
        RunDirectory(tmp_path / "run", other)


def test_a_directory_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="no run of esd"):
        RunDirectory(tmp_path, config())


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(UserError, match="no directory that you may write to"):
            RunDirectory(path, config())


def test_a_name_that_no_file_system_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose another run_dir"):
        RunDirectory(tmp_path / ("x" * 300), config())


def test_a_directory_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write everywhere
    with pytest.raises(UserError, match="write to"):
        RunDirectory(tmp_path / "run", config())


def test_an_evaluation_counts_only_for_what_it_was_made_with(tmp_path: Path) -> None:
    run = created(tmp_path / "run", config())
    facts = {"judge": {"hash": "ab"}, "vocabulary": "cd", "evaluation": dataclasses.asdict(config().evaluation)}
    assert run.unmeasured(facts) == "there is no summary.json"
    (run / "summary.json").write_text("{}")
    assert run.unmeasured(facts)
    (run / "summary.json").write_text(json.dumps(facts | {"seconds": 1}))
    assert run.unmeasured(facts) == ""
    assert run.unmeasured(facts | {"judge": {"hash": "ef"}}) == "judge.hash=ab there, ef here"
    assert run.unmeasured(facts | {"vocabulary": None}) == "vocabulary=cd there, None here"
    other = dataclasses.replace(config().evaluation, target_images=7)
    assert "target_images=200 there, 7 here" in run.unmeasured(facts | {"evaluation": dataclasses.asdict(other)})


def test_a_directory_in_which_a_process_is_at_work_is_refused_to_a_second(tmp_path: Path) -> None:
    first, second = (RunDirectory(tmp_path / "run", config()) for _ in range(2))
    with first.claimed():
        with pytest.raises(UserError, match="another process is at work there"), second.claimed():
            pass
        with second.claimed(main=False):  # another rank of the same launch
            pass
    with second.claimed():
        pass


def test_a_run_that_came_between_looking_and_writing_is_refused(tmp_path: Path) -> None:
    late = RunDirectory(tmp_path / "run", config(eta=2.0))
    created(tmp_path / "run", config(eta=1.0))
    with pytest.raises(UserError, match="holds another run"), late.claimed():
        pass


def test_settings_refused_before_anything_came_of_them_leave_the_place_to_others(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no such layer"), RunDirectory(run, config(eta=1.0)).claimed():
        raise UserError("no such layer")
    with pytest.raises(UserError, match="too late"), RunDirectory(run, config(eta=2.0)).claimed():
        (run / "metrics.jsonl").touch()
        raise UserError("too late")
    with pytest.raises(UserError, match=r"objective\.eta=2\.0 there, 1\.0 here"):
        RunDirectory(run, config(eta=1.0))


def test_a_run_killed_before_it_wrote_its_settings_can_be_started_again(tmp_path: Path) -> None:
    for name in (".lock", ".tmp-7-config.yaml"):
        (tmp_path / name).touch()
    assert created(tmp_path, config()).stored is None


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "file") as staged:
        staged.write_text("new")
        raise RuntimeError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def state(step: int) -> State:
    return State(step, {"student": {"a.weight": torch.full((2, 3), float(step))}}, {"seconds": 1.5})


def test_the_newest_whole_state_is_read_and_older_ones_are_removed(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    save_state(tmp_path, state(2))
    save_state(tmp_path, state(10))
    found = load_state(tmp_path)
    assert found is not None and (found.step, found.facts["seconds"]) == (10, 1.5)
    assert torch.equal(found.tensors["student"]["a.weight"], torch.full((2, 3), 10.0))
    assert [path.name for path in tmp_path.iterdir()] == ["00000010"]


def test_what_is_no_state_is_left_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "mine").mkdir()
    for step in (2, 10):
        save_state(tmp_path, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "mine", "notes.txt"]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "no manifest"])
def test_a_harmed_state_is_no_state(tmp_path: Path, harm: str) -> None:
    save_state(tmp_path, state(2))
    file = tmp_path / "00000002/student.safetensors"
    data = file.read_bytes()
    if harm == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "cut":
        file.write_bytes(data[:-4])
    else:
        (file if harm == "remove" else file.with_name("MANIFEST.json")).unlink()
    assert load_state(tmp_path) is None


def test_settings_are_flat_for_trackers() -> None:
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": 1, "a.c": "[1, 2]", "d": "None"}


def test_wandb_is_told_to_keep_commands_and_code_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("WANDB_X_DISABLE_META", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert tracker_arguments(TrackerConfig("wandb"), tmp_path)["log_with"] == "wandb"
    assert [os.environ[name] for name in names] == ["true"] * 3
    assert tracker_arguments(TrackerConfig(), tmp_path) == {}


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        tracker_arguments(TrackerConfig("wandb"), tmp_path)


def test_versions_name_what_numbers_depend_on() -> None:
    assert {"esd", "python", "torch", "diffusers"} <= set(versions())
