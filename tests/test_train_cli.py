"""`esd.train` as a user meets it: one command, a directory of results, and the same command again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from esd import trainer
from esd.checkpoint import load
from esd.evaluation import judges
from tests.programs import FAST, Command, Ended

LEFT = {"config.yaml", "metrics.jsonl", "erased.safetensors", "preview.png", "summary.json"}
RATE = {"before", "after", "n", "interval", "interval_before"}
VOCABULARY = {
    "things": [{"name": "cat", "group": "animals"}, {"name": "dog", "group": "animals"}, {"name": "rose"}],
    "styles": [{"name": "mosaic"}, {"name": "photo"}],
    "phrasings": {"held_out": {"both": ["a {thing} in {style}"], "thing": ["a {thing}"], "style": ["the {style}"]}},
}


def train(command: Command, *arguments: str) -> Ended:
    return command("train", "concepts=[cat]", "run_dir=runs/cat", *FAST, *arguments)


def test_help_is_useful_and_waits_for_no_heavy_import() -> None:
    script = (
        "import runpy, sys; sys.argv = ['esd.train', '--help']; runpy.run_module('esd.train', run_name='__main__'); "
        "print('loaded', {'torch', 'diffusers', 'transformers', 'hydra', 'omegaconf'} & set(sys.modules))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert "loaded set()" in told.stdout
    assert "python -m esd.train concepts=[cat]" in told.stdout and "objective.eta=1.0" in told.stdout


def test_one_command_leaves_a_run_directory_and_nothing_else(command: Command) -> None:
    ended = train(command, "objective.eta=2")
    assert ended.code == 0
    assert command.files() == {"runs", "runs/cat", *(f"runs/cat/{name}" for name in LEFT)}
    summary = json.loads((command.folder / "runs/cat/summary.json").read_text())
    assert set(summary) == {
        "target",
        "same_domain",
        "cross_domain",
        "neither",
        "seconds",
        "parameters",
        "seed",
        "judge",
        "evaluation",
        "reason",
    }
    assert set(summary["target"]) == RATE and summary["target"]["before"] is None
    assert "no vocabulary.json" in summary["reason"]
    told = load(command.folder / "runs/cat").provenance
    assert (told["concepts"], told["objective"]["eta"], told["seed"]) == (["cat"], 2.0, 0)
    assert yaml.safe_load((command.folder / "runs/cat/config.yaml").read_text())["objective"]["eta"] == 2.0
    assert "esd_x: 20 tensors" in ended.out and "results are in runs/cat" in ended.out


def test_the_same_command_again_does_no_work_twice(command: Command) -> None:
    train(command)
    before = {
        path: path.stat().st_mtime_ns for path in (command.folder / "runs/cat").iterdir() if path.suffix != ".yaml"
    }
    ended = train(command)
    assert ended.code == 0 and "results are in runs/cat" in ended.out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_evaluation_settings_measure_again_without_training_again(command: Command) -> None:
    train(command)
    weights = (command.folder / "runs/cat/erased.safetensors").stat().st_mtime_ns
    picture = Image.open(command.folder / "runs/cat/preview.png").size
    assert train(command, "evaluation.preview_images=3").code == 0
    assert (command.folder / "runs/cat/erased.safetensors").stat().st_mtime_ns == weights
    assert Image.open(command.folder / "runs/cat/preview.png").size > picture


def test_a_terminated_run_exits_143_and_the_same_command_resumes_it(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = trainer.Log.write

    def write_then_stop(log: trainer.Log, line: dict[str, float]) -> None:
        write(log, line)
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Log, "write", write_then_stop)
        ended = train(command)
    assert ended.code == 143 and "the same command resumes" in ended.err
    assert not (command.folder / "runs/cat/erased.safetensors").exists()
    ended = train(command)
    assert ended.code == 0 and "resuming after update 2 of 4" in ended.out
    assert command.files() == {"runs", "runs/cat", *(f"runs/cat/{name}" for name in LEFT)}


def test_a_sweep_gives_each_job_its_own_directory(command: Command) -> None:
    ended = train(command, "--multirun", "objective.eta=1,2", "selection=esd_x,mid")
    assert ended.code == 0
    jobs = sorted(path.name for path in (command.folder / "runs/cat").iterdir())
    assert jobs == [
        "0_objective.eta_1_selection_esd_x",
        "1_objective.eta_1_selection_mid",
        "2_objective.eta_2_selection_esd_x",
        "3_objective.eta_2_selection_mid",
    ]
    for job in jobs:
        told = load(command.folder / "runs/cat" / job).provenance
        assert f"eta_{told['objective']['eta']:g}" in job and told["selection"] in job


def test_a_plan_is_told_and_nothing_is_written(command: Command) -> None:
    ended = train(command, "plan_only=true", "selection=cross.k")
    assert ended.code == 0 and command.files() == set()
    assert "cross.k: 4 tensors" in ended.out and "% of UNet2DConditionModel" in ended.out


def test_a_word_the_text_encoder_never_saw_is_named(command: Command) -> None:
    ended = command("train", "concepts=[a zebra cat]", "plan_only=true", *FAST)
    assert ended.code == 0 and "never seen 'zebra'" in ended.err and "'cat'" not in ended.err


def test_metrics_also_reach_a_tracker(command: Command) -> None:
    assert train(command, "tracker=tensorboard").code == 0
    assert any(name.startswith("runs/cat/tensorboard/") and "tfevents" in name for name in command.files())


def test_rates_are_read_by_the_judge_of_the_model(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-known")
    (command.folder / "base-known/vocabulary.json").write_text(json.dumps(VOCABULARY))
    calls = []

    def judge(images: np.ndarray) -> SimpleNamespace:
        calls.append(images.shape)
        n = len(images)
        return SimpleNamespace(
            thing=["cat" if len(calls) == 1 else "dog"] * n, style=["mosaic"] * n, neither=np.zeros(n, bool)
        )

    identity = {"name": "one", "version": "1", "threshold": 0.5, "hash": "ab"}
    vars(judge).update(identity)
    monkeypatch.setattr(judges, "load_judge", lambda path: judge)
    ended = train(
        command,
        "model.path=base-known",
        "evaluation.target_images=6",
        "evaluation.retained_images=8",
        "prompts=['{}','a {} in {style}']",
    )
    assert ended.code == 0 and "target" in ended.out and "100.0% -> 0.0%" in ended.out
    assert calls == [(14, 16, 16, 3)] * 2
    summary = json.loads((command.folder / "runs/cat/summary.json").read_text())
    assert summary["judge"] == identity
    assert summary["reason"] is None and summary["target"]["n"] == 6 and summary["same_domain"]["n"] == 8
    assert set(summary["cross_domain"]) == set(summary["target_style"]) == RATE
    assert load(command.folder / "runs/cat").provenance["prompts"] == [
        "cat",
        "a cat in mosaic",
        "cat",
        "a cat in photo",
    ]


def test_a_damaged_judge_costs_no_training(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: str) -> None:
        raise KeyError("threshold")

    monkeypatch.setattr(judges, "load_judge", damaged)
    ended = train(command)
    assert ended.code == 2 and "judge cannot be read" in ended.err and command.files() == set()


@pytest.mark.slow(reason="starts accelerate's launcher, which imports torch twice")
def test_accelerate_launches_the_same_program(command: Command) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "-m",
            "esd.train",
            "concepts=[cat]",
            "run_dir=runs/cat",
            *FAST,
        ],
        capture_output=True,
        text=True,
        cwd=command.folder,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert ended.returncode == 0, ended.stderr
    assert {f"runs/cat/{name}" for name in LEFT} <= command.files()
