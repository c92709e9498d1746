"""`esd.train` as a user meets it: one command, a directory of results, and the same command again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from esd import trainer
from esd.checkpoint import load
from esd.evaluation import judges
from esd.evaluation.judges import Readings
from esd.storage import load_state
from tests.programs import FAST, Command, train

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds that a program of a second may take on a busy machine
LEFT = {".lock", "config.yaml", "metrics.jsonl", "erased.safetensors", "preview.png", "summary.json"}
RATE = {"before", "after", "n", "interval", "interval_before"}
VOCABULARY: dict[str, Any] = {
    "things": [{"name": "cat", "group": "animals"}, {"name": "dog", "group": "animals"}, {"name": "rose"}],
    "styles": [{"name": "mosaic"}, {"name": "photo"}],
    "phrasings": {"held_out": {"both": ["a {thing} in {style}"], "thing": ["a {thing}"], "style": ["the {style}"]}},
}


def test_help_is_useful_and_waits_for_no_heavy_import() -> None:
    script = (
        "import runpy, sys; sys.argv = ['esd.train', '--help']; runpy.run_module('esd.train', run_name='__main__'); "
        "print('loaded', {'torch', 'diffusers', 'transformers', 'hydra', 'omegaconf'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
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
        "implied",
        "neither",
        "seconds",
        "peak_gib",
        "parameters",
        "seed",
        "judge",
        "vocabulary",
        "evaluation",
        "reason",
    }
    assert set(summary["target"]) == RATE and summary["target"]["before"] is None
    assert summary["peak_gib"]["process"] > 0.1
    assert "no vocabulary.json" in summary["reason"]
    told = load(command.folder / "runs/cat").provenance
    assert (told["concepts"], told["objective"]["eta"], told["seed"]) == (["cat"], 2.0, 0)
    assert (told["base"], told["revision"]) == (str((command.folder / "base").resolve()), None)
    assert yaml.safe_load((command.folder / "runs/cat/config.yaml").read_text())["objective"]["eta"] == 2.0
    assert "esd_x: 20 tensors" in ended.out and "results are in runs/cat" in ended.out


def test_the_same_command_again_does_no_work_twice(command: Command) -> None:
    train(command)
    before = {
        path: path.stat().st_mtime_ns for path in (command.folder / "runs/cat").iterdir() if path.suffix != ".yaml"
    }
    (command.folder / "runs/cat/state/00000002").mkdir(parents=True)  # as a kill after the last update leaves it
    ended = train(command)
    assert ended.code == 0 and "results are in runs/cat" in ended.out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not (command.folder / "runs/cat/state").exists()


def test_other_evaluation_settings_measure_again_without_training_again(command: Command) -> None:
    train(command)
    weights = (command.folder / "runs/cat/erased.safetensors").stat().st_mtime_ns
    picture = Image.open(command.folder / "runs/cat/preview.png").size
    ended = train(command, "evaluation.preview_images=3")
    assert ended.code == 0 and "measuring, for evaluation.preview_images=2 there, 3 here" in ended.out
    assert (command.folder / "runs/cat/erased.safetensors").stat().st_mtime_ns == weights
    assert Image.open(command.folder / "runs/cat/preview.png").size > picture


def test_a_finished_run_is_refused_once_the_base_in_the_same_folder_is_another(command: Command) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-mine")
    assert train(command, "model.path=base-mine").code == 0
    shutil.copytree(command.folder / "other", command.folder / "base-mine", dirs_exist_ok=True)
    ended = train(command, "model.path=base-mine")
    assert ended.code == 2 and "trained on another base than" in ended.err and "choose another run_dir" in ended.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_so_by_its_exit_code_and_the_same_command_resumes_it(
    command: Command, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    write = trainer.Log.write

    def write_then_stop(log: trainer.Log, line: dict[str, float]) -> None:
        write(log, line)
        if line["step"] == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Log, "write", write_then_stop)
        ended = train(command)
    assert ended.code == code
    assert ended.err.splitlines()[-1] == "stopped after update 2 of 4; the same command resumes"
    assert not (command.folder / "runs/cat/erased.safetensors").exists()
    ended = train(command, "training.save_every=1", "training.processes=1")  # neither makes it another run
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


def test_only_what_is_swept_names_the_jobs_of_a_sweep(command: Command) -> None:
    ended = train(command, "--multirun", "objective.eta=1,2e0", "training.lr=1e-4", "plan_only=true")
    assert ended.code == 0, ended.err
    assert "runs/cat/0_objective.eta_1;" in ended.out and "runs/cat/1_objective.eta_2.0;" in ended.out


def test_the_jobs_of_a_sweep_draw_the_base_once_unless_it_would_draw_something_else(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["evaluation.num_steps=3", "objective.eta=1,2"]
    ended = train(command, "--multirun", *asked, "selection=mid")
    assert ended.out.count("images with the base") == 1 and ended.out.count("images with the erased model") == 2
    ended = train(command, "--multirun", *asked, "selection=mid", "model.path=other,base", "run_dir=runs/several")
    assert ended.out.count("images with the base") == 2, "the other, then this one again; of neither twice"
    monkeypatch.setattr("esd.evaluation.erasure._base_images", {})
    alone = train(command, "evaluation.num_steps=3", "objective.eta=2", "selection=mid", "run_dir=runs/alone")
    assert alone.out.count("images with the base") == 1
    other = train(command, "evaluation.num_steps=3", "training.channels_last=true", "run_dir=runs/other")
    assert other.out.count("images with the base") == 1, "another layout rounds otherwise"
    shared, drawn = (command.folder / f"runs/{name}/preview.png" for name in ("cat/1_objective.eta_2", "alone"))
    assert shared.read_bytes() == drawn.read_bytes()


def test_a_sweep_goes_on_after_a_job_that_failed_and_ends_with_its_code(command: Command) -> None:
    ended = train(command, "--multirun", "objective.eta=-1,2")
    assert ended.code == 2 and ended.err.splitlines()[0].startswith("error: objective.eta=-1")
    assert "runs/cat/1_objective.eta_2/erased.safetensors" in command.files()


def test_a_sweep_that_is_stopped_does_not_go_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("esd.train.measure", interrupted)
    ended = train(command, "--multirun", "objective.eta=1,2")
    assert ended.code == 130
    assert [path.name for path in (command.folder / "runs/cat").iterdir()] == ["0_objective.eta_1"]


def test_a_plan_is_told_and_nothing_is_written(command: Command) -> None:
    ended = train(command, "plan_only=true", "selection=cross.k")
    assert ended.code == 0 and command.files() == set()
    assert "cross.k: 4 tensors" in ended.out and "% of UNet2DConditionModel" in ended.out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["trajectory=on_policy"], "anew for every update"),
        (["trajectory=on_policy", "trajectory.staleness=4"], "anew for every 4 updates"),
        (["trajectory.sampler=student", "trajectory.rollouts=40"], "anew for every 8 updates"),
        (["trajectory=student_bank", "trajectory.rollouts=40", "trajectory.staleness=2"], "anew for every 2 updates"),
    ],
)
def test_points_drawn_by_the_student_serve_one_update_or_with_a_bank_eight(
    command: Command, settings: list[str], told: str
) -> None:
    ended = train(command, "trajectory.rollouts=0", *settings, "plan_only=true")
    assert ended.code == 0 and told in ended.out, ended.err


def test_what_is_erased_from_is_the_anchor_that_the_plan_and_the_checkpoint_name(command: Command) -> None:
    ended = train(command, "erase_from=[dog]", "objective.anchor=concept")
    assert ended.code == 0 and "anchor erase_from, eta 1" in ended.out
    assert load(command.folder / "runs/cat").provenance["objective"]["anchor"] == "erase_from"


@pytest.mark.parametrize("experiment", ["sd14", "upstream_compvis", "upstream_alt", "upstream_2025"])
def test_an_experiment_for_a_large_model_takes_any_other_in_its_place(command: Command, experiment: str) -> None:
    ended = command("train", f"experiment={experiment}", "model.path=base", "concepts=[cat]", "plan_only=true")
    assert ended.code == 0 and "esd_x" in ended.out and "in 50 steps at guidance 3" in ended.out, ended.err


@pytest.mark.parametrize(("size", "shown"), [("null", "8 x 8"), ("20", "10 x 10")])
def test_the_plan_tells_the_size_of_the_latents(command: Command, size: str, shown: str) -> None:
    ended = train(command, "plan_only=true", f"trajectory.size={size}")
    assert ended.code == 0 and f"latents {shown}," in ended.out


def test_a_word_the_text_encoder_never_saw_is_named(command: Command) -> None:
    ended = command("train", "concepts=[a zebra cat]", "plan_only=true", *FAST)
    assert ended.code == 0 and "never seen 'zebra'" in ended.err and "'cat'" not in ended.err


def test_an_interruption_outside_the_loop_ends_in_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("esd.train.measure", interrupted)
        ended = train(command)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "interrupted; the same command goes on from what is saved"
    ended = train(command)
    assert ended.code == 0 and command.files() == {"runs", "runs/cat", *(f"runs/cat/{name}" for name in LEFT)}


def test_metrics_also_reach_a_tracker(command: Command) -> None:
    assert train(command, "tracker=tensorboard").code == 0
    assert any(name.startswith("runs/cat/tensorboard/") and "tfevents" in name for name in command.files())


def test_metrics_reach_wandb_without_a_network_or_a_key(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(command.folder / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert train(command, "tracker=wandb").code == 0
    runs = list((command.folder / "runs/cat/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1 and b"delta_norm" in runs[0].read_bytes()


def test_rates_are_read_by_the_judge_of_the_model(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-known")
    (command.folder / "base-known/vocabulary.json").write_text(json.dumps(VOCABULARY))
    calls = []

    def judge(images: np.ndarray) -> Readings:
        calls.append(images.shape)
        n = len(images)
        thing = "cat" if len(calls) == 1 else "dog"
        return Readings({"thing": [thing] * n, "style": ["mosaic"] * n}, dict.fromkeys(("thing", "style"), np.ones(n)))

    identity = {"name": "one", "version": "1", "threshold": 0.5, "hash": "ab"}
    vars(judge).update(identity, size=16)
    monkeypatch.setattr(judges, "load_judge", lambda path: judge)
    known = (
        "model.path=base-known",
        "evaluation.target_images=6",
        "evaluation.retained_images=8",
        "prompts=['{}','a {} in {style}']",
    )
    ended = train(command, *known)
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
    vars(judge).update(hash="cd")
    ended = train(command, *known)
    assert ended.code == 0 and "trained already; measuring, for judge.hash=ab there, cd here" in ended.out
    assert len(calls) == 4
    vars(judge).update(size=64)
    ended = train(command, *known)
    assert ended.code == 2 and "reads pictures of 64 pixels" in ended.err
    vars(judge).update(size=16)
    styles = [*VOCABULARY["styles"], {"name": "ink"}]
    (command.folder / "base-known/vocabulary.json").write_text(json.dumps(VOCABULARY | {"styles": styles}))
    ended = train(command, *known)
    assert ended.code == 2 and "trained with other prompts than the vocabulary gives now" in ended.err


def test_two_words_for_one_entry_of_the_vocabulary_are_one_concept(command: Command) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-known")
    things = [{"name": "cat", "synonyms": ["kitten"]}, *VOCABULARY["things"][1:]]
    (command.folder / "base-known/vocabulary.json").write_text(json.dumps(VOCABULARY | {"things": things}))
    ended = command("train", "concepts=[cat,kitten]", *FAST, "model.path=base-known", "plan_only=true")
    assert ended.code == 2 and "'cat' and 'kitten' are both 'cat' to this model" in ended.err, ended.err


@pytest.mark.parametrize(
    ("content", "told"),
    [("{}", "its judge cannot be read (KeyError('version'))"), (None, "config.json is missing; name a folder")],
    ids=["damaged", "missing"],
)
def test_a_judge_that_cannot_be_read_costs_no_training(command: Command, content: str | None, told: str) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-known")
    (command.folder / "base-known/vocabulary.json").write_text(json.dumps(VOCABULARY | {"judge": "judge"}))
    if content is not None:
        (command.folder / "base-known/judge").mkdir()
        for name in ("config.json", "model.safetensors"):
            (command.folder / "base-known/judge" / name).write_text(content)
    before = command.files()
    ended = train(command, "model.path=base-known")
    assert ended.code == 2 and told in ended.err and command.files() == before, ended.err


def started(command: Command, *arguments: str) -> subprocess.Popen[str]:
    """`python` with these arguments, in the folder of `command`, on one thread of the CPU."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=command.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


@pytest.mark.slow(reason="starts a Python of its own, which imports torch")
def test_ctrl_c_ends_in_one_line_and_a_state_to_go_on_from(command: Command) -> None:
    endless = ("-m", "esd.train", "concepts=[cat]", "run_dir=runs/cat", *FAST, "training.updates=1000000")
    file = command.folder / "runs/cat/metrics.jsonl"

    def updates() -> int:
        return len(file.read_text().splitlines()) if file.is_file() else 0

    for sitting in ("first", "second"):
        before, process, deadline = updates(), started(command, *endless), time.monotonic() + LIMIT
        try:
            while process.poll() is None and updates() < before + 2 and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
        assert process.returncode == 130, err
        assert ("resuming after update" in out) == (sitting == "second") and "Traceback" not in err
        assert re.fullmatch(r"stopped after update \d+ of 1000000; the same command resumes", err.splitlines()[-1])
    assert load_state(command.folder / "runs/cat/state") is not None


@pytest.mark.slow(reason="starts two Pythons of its own, which import torch")
@pytest.mark.parametrize(
    "sampling",
    [(), ("trajectory=on_policy", "trajectory.staleness=2"), ("weights=lora", "weights.frozen=float8")],
    ids=["bank", "stale student", "float8"],
)
def test_two_processes_train_what_one_would_into_one_directory(command: Command, sampling: tuple[str, ...]) -> None:
    told = ("training.lr=1e-4", "training.save_every=1", "prompts=['{}','a {}']")
    settings = ("concepts=[cat]", *(word for word in FAST if "rollouts" not in word), *sampling, *told)
    assert command("train", *settings, "training.batch_size=6", "run_dir=runs/one").code == 0
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "esd.train")
    process = started(command, *launch, *settings, "training.batch_size=3", "run_dir=runs/two")
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.terminate()  # the launcher ends its processes too
    assert process.returncode == 0, err
    assert "4 of 6 points in 2 processes" in out and out.count("results are in runs/two") == 1
    one, two = (load(command.folder / "runs" / name).differences for name in ("one", "two"))
    assert all(difference.abs().max() > 1e-4 for difference in one.values())
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)
    lines = (command.folder / "runs/two/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.slow(reason="starts accelerate's launcher, which imports torch twice")
def test_accelerate_launches_the_same_program(command: Command) -> None:
    launch = ("-m", "accelerate.commands.launch", "--cpu", "-m", "esd.train")
    process = started(command, *launch, "concepts=[cat]", "run_dir=runs/cat", *FAST)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert {f"runs/cat/{name}" for name in LEFT} <= command.files()
