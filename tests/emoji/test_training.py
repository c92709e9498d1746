"""The loop that every stage runs in: resuming, stopping, remembering; and files written whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def toy(folder: Path, steps: int = 4, model: torch.nn.Module | None = None, **changes: Any) -> Any:
    """Return a stage that trains a linear map, and its loss."""
    from training import Origin, Recipe, Stage

    torch.manual_seed(0)
    model = model or torch.nn.Linear(4, 3)
    told = {"batch": 2, "lr": 0.1, "warmup": 1, "save_every": 2}
    made_from = changes.pop("made_from", {"pool": "one"})
    changed, own = changes.pop("changed", False), changes.pop("arguments", {"scenes": 0.33})
    recipe = Recipe(steps=steps, **{**told, **changes})
    stage = Stage("toy", model, recipe, folder, Origin(made_from, own, changed))

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        return model(torch.from_numpy(rng.normal(size=(2, 4))).float()).pow(2).sum()

    return stage, loss_of


def train(folder: Path, steps: int, **changes: Any) -> dict[str, torch.Tensor]:
    """Train a linear map for `steps`, in `folder`, and return its weights and their average."""
    stage, loss_of = toy(folder, steps, **changes)
    stage.run(loss_of)
    return {**stage.average, **{f"raw.{k}": v for k, v in stage.model.state_dict().items()}}


@pytest.fixture
def constant_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of a step does not depend on how many there will be."""
    import training

    monkeypatch.setattr(training, "learning_rate", lambda recipe, step: recipe.lr)


def state(folder: Path) -> Path:
    return folder / "state" / "toy" / "state.safetensors"


def test_four_steps_equal_two_and_resume_and_two(tmp_path: Path, constant_rate: None) -> None:
    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    resumed = train(tmp_path / "parts", 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(
    tmp_path: Path, constant_rate: None, number: signal.Signals
) -> None:
    whole = train(tmp_path / "whole", 6)
    stage, loss_of = toy(tmp_path / "parts", 6, save_every=100)
    handler = signal.getsignal(number)

    def interrupted(rng: np.random.Generator) -> torch.Tensor:
        if stage.step == 2:
            os.kill(os.getpid(), number)
        return loss_of(rng)

    with pytest.raises(SystemExit) as left:
        stage.run(interrupted)
    assert left.value.code == 128 + number and signal.getsignal(number) == handler
    resumed = train(tmp_path / "parts", 6)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_every_run_is_remembered(tmp_path: Path) -> None:
    train(tmp_path, 2)
    train(tmp_path, 2)  # nothing to do, nothing to tell
    train(tmp_path, 5, lr=0.2)
    first, second = toy(tmp_path)[0].runs["toy"]
    assert (first["from"], first["to"], second["from"], second["to"]) == (0, 2, 2, 5)
    assert first["recipe"]["lr"] == 0.1 and second["recipe"]["lr"] == 0.2
    assert second["made_from"] == {"pool": "one"} and second["arguments"] == {"scenes": 0.33}


def test_a_state_of_before_there_was_a_history_is_gone_on_with(tmp_path: Path) -> None:
    train(tmp_path, 2)
    with safe_open(state(tmp_path), "pt") as stored:
        told = stored.metadata()
    save_file(load_file(state(tmp_path)), state(tmp_path), {"step": told["step"], "recipe": told["recipe"]})
    assert toy(tmp_path)[0].runs["toy"] == []
    train(tmp_path, 4, made_from={"pool": "another"})
    assert [(run["from"], run["to"]) for run in toy(tmp_path, made_from={"pool": "another"})[0].runs["toy"]] == [(2, 4)]


def test_a_part_is_told_from_one_that_an_earlier_state_made(tmp_path: Path) -> None:
    from training import tell

    part = tmp_path / "part"
    part.mkdir()
    stage, loss_of = toy(tmp_path, 2)
    assert not stage.made(part)
    stage.run(loss_of)
    tell(part, stage.runs)
    assert stage.made(part) and toy(tmp_path, 2)[0].made(part) and not toy(tmp_path, 4)[0].made(part)
    train(tmp_path, 4)
    assert not toy(tmp_path, 4)[0].made(part)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 3}, "batch"),
        ({"seed": 1}, "seed"),
        ({"made_from": {"pool": "two"}}, "pool"),
        ({"arguments": {"scenes": 0.5}}, "scenes"),
    ],
)
def test_another_recipe_or_other_data_has_to_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    train(tmp_path, 2)
    with pytest.raises(SystemExit, match=f"{said} changed since .* give --changed"):
        train(tmp_path, 4, **changes)
    assert f"toy: {said} is " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"all 2 steps were taken before {said} changed; ask for more --steps than 2"):
        train(tmp_path, 2, changed=True, **changes)
    train(tmp_path, 4, changed=True, **changes)


def test_steps_rate_and_how_often_it_saves_may_change(tmp_path: Path) -> None:
    train(tmp_path, 2)
    train(tmp_path, 4, lr=0.01, save_every=1, report_every=7)


def test_parameters_that_are_given_are_neither_saved_nor_resumed(tmp_path: Path) -> None:
    def model(value: float) -> torch.nn.Module:
        given = torch.nn.Linear(4, 4)
        torch.nn.init.constant_(given.weight, value)
        return torch.nn.Sequential(given.requires_grad_(False), torch.nn.Linear(4, 3))

    first = model(1)
    train(tmp_path, 2, model=first)
    saved = load_file(state(tmp_path))
    assert not [name for name in saved if "0.weight" in name.removeprefix("optimizer.")]
    # an older state holds them, weights and average
    with safe_open(state(tmp_path), "pt") as stored:
        told = stored.metadata()
    old = {
        f"{part}.{name}": p.detach().clone() for part in ("weights", "average") for name, p in first.named_parameters()
    }
    save_file({**old, **saved}, state(tmp_path), told)
    second = model(5)
    stage, loss_of = toy(tmp_path, 4, model=second)
    stage.run(loss_of)
    with stage.averaged():
        assert (second[0].weight == 5).all()
    assert torch.equal(load_file(state(tmp_path))["weights.1.weight"], second[1].weight)


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path: Path) -> None:
    stage, _ = toy(tmp_path)
    with pytest.raises(SystemExit, match="lower --lr"):
        stage.run(lambda rng: stage.model(torch.full((1, 4), float("inf"))).sum())


def test_a_report_comes_as_often_as_asked_and_sees_the_average(tmp_path: Path) -> None:
    stage, loss_of = toy(tmp_path, 7, report_every=3)
    seen = []

    def report() -> str:
        seen.append((stage.step, torch.equal(stage.model.weight, stage.average["weight"])))
        return "fine"

    stage.run(loss_of, report)
    assert seen == [(3, True), (6, True), (7, True)]


def wait_for(true: Callable[[], bool]) -> None:
    """Wait until something is true, a minute at most."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_make_passes_a_signal_on_and_leaves_with_the_status_of_its_stage(tmp_path: Path) -> None:
    scripts = Path(__file__).resolve().parents[2] / "scripts" / "emoji"
    child = (
        "import pathlib, signal, sys, time\n"
        "def leave(number, frame):\n    pathlib.Path('saved').touch()\n    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "pathlib.Path('begun').touch()\n"
        "time.sleep(60)\n"
    )
    parent = f"import make, sys; sys.exit(make.run([sys.executable, '-c', {child!r}]))"
    environment = {**os.environ, "PYTHONPATH": str(scripts)}
    running = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    wait_for((tmp_path / "begun").exists)
    running.terminate()
    assert running.wait(60) == 128 + signal.SIGTERM and (tmp_path / "saved").exists()


def test_a_stage_has_a_session_of_its_own() -> None:
    import make

    handlers = [signal.getsignal(number) for number in make.SIGNALS]
    assert make.run([sys.executable, "-c", "import os, sys; sys.exit(os.getsid(0) != os.getpid())"]) == 0
    assert handlers == [signal.getsignal(number) for number in make.SIGNALS]


def test_make_stops_at_a_stage_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import make

    commands: list[list[str]] = []
    monkeypatch.setattr(make, "run", lambda command: commands.append(command) or 3)
    options = ["--device", "cpu", "--start", "checkpoints/emoji-sd"]
    monkeypatch.setattr(sys, "argv", ["make", "--data", str(tmp_path), "--from", "vae", *options])
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            make.main()
        (tmp_path / "state" / "vae").mkdir(parents=True, exist_ok=True)
        (tmp_path / "state" / "vae" / "state.safetensors").touch()
    assert [command[4:] for command in commands] == [options, options[:2]]  # a stage that has begun has no other start
    assert left.value.code == 3 and "vae stopped with status 3; run again with --from vae" in capsys.readouterr().err


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    from files import whole

    target = tmp_path / "pool.npz"
    with whole(target) as partial:
        partial.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(target) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["pool.npz"]


def folders(path: Path) -> dict[str, str]:
    """Return what a folder's folders say."""
    return {folder.name: (folder / "says").read_text() for folder in path.iterdir()}


def write(folder: Path, says: str) -> None:
    folder.mkdir(parents=True)
    (folder / "says").write_text(says)


def test_folders_are_replaced_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import files

    staged, target = tmp_path / "part.x", tmp_path / "target"
    for name in ("text", "unet"):
        write(target / name, "old")
    write(staged / "new" / "left", "by a run that was killed")
    with files.whole_folders(staged, target) as new:
        for name in ("text", "unet"):
            write(new / name, "new")
    assert folders(target) == {"text": "new", "unet": "new"} and not staged.exists()

    move = files.shutil.move

    def fail_at_the_second(source: Path, goal: Path) -> None:
        if source.parent.name == "new" and source.name == "unet":
            raise OSError("no space left on device")
        move(source, goal)

    monkeypatch.setattr(files.shutil, "move", fail_at_the_second)
    with pytest.raises(OSError, match="no space"), files.whole_folders(staged, target) as new:
        for name in ("text", "unet"):
            write(new / name, "newer")
    assert folders(target) == {"text": "new", "unet": "new"} and not staged.exists()


def test_folders_set_aside_by_a_run_that_was_killed_are_put_back(tmp_path: Path) -> None:
    import files

    staged, target = tmp_path / "part.x", tmp_path / "target"
    write(staged / "old" / "text", "old")
    write(staged / "old" / "unet", "old")
    write(target / "unet", "half-copied")
    with pytest.raises(KeyboardInterrupt), files.whole_folders(staged, target):
        assert folders(target) == {"text": "old", "unet": "old"}
        raise KeyboardInterrupt
    assert folders(target) == {"text": "old", "unet": "old"} and not staged.exists()


def test_a_program_that_is_terminated_leaves_as_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    import files

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["program"])
    try:
        files.arguments(argparse.ArgumentParser())
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 128 + signal.SIGTERM


def test_long_work_tells_how_much_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    import files

    assert list(files.counted("abc", "letters", seconds=0)) == ["a", "b", "c"]
    assert capsys.readouterr().out == "letters: 1 of 3, 0.0 min left\nletters: 2 of 3, 0.0 min left\n"


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    import files

    (tmp_path / "pool.npz").write_bytes(b"PK damaged")
    with pytest.raises(SystemExit, match=r"pool.npz is damaged or of an older make .* run pool.py again"):
        files.arrays(tmp_path / "pool.npz", "pool.py", ["images"])
    np.savez(tmp_path / "pool.npz", images=np.zeros(3))
    with pytest.raises(SystemExit, match=r"pool.npz is damaged or of an older make .*style.* run pool.py again"):
        files.arrays(tmp_path / "pool.npz", "pool.py", ["images", "style"])
    with pytest.raises(SystemExit, match=r"pool.npz is a file; name a folder"):
        files.need(tmp_path / "pool.npz", 1)
    (tmp_path / "vae").mkdir()
    with pytest.raises(SystemExit, match=r"tokenizer.json is missing; remove .*vae and run the stage"):
        files.folder_digest(tmp_path / "vae")
    with pytest.raises(SystemExit, match=r"there is no vae in .*; run train_vae.py first"):
        files.made_by("train_vae.py", tmp_path / "vae")
