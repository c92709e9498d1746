"""The training loop: what it changes, what it never touches; stopping and splitting change nothing."""

import dataclasses
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from esd import checkpoint, learner, trainer
from esd.description import describe
from esd.errors import UserError
from esd.families import Family, family_of
from esd.objectives import Objective
from esd.plan import TrainPlan
from esd.storage import load_state, save_state
from tests import tiny
from tests.plans import PLAN, metrics, same


def plan(**changes: Any) -> TrainPlan:
    return dataclasses.replace(PLAN, **changes)


def family(dtype: torch.dtype = torch.float32) -> Family:
    return family_of(tiny.pipeline().to(dtype))


def run(
    folder: Path, plan: TrainPlan, mixed_precision: str = "no", on: Family | None = None
) -> dict[str, torch.Tensor]:
    """The differences that training leaves in folder/erased.safetensors."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder.mkdir(exist_ok=True)
    result = trainer.train(on or family(), plan, folder, Accelerator(cpu=True, mixed_precision=mixed_precision))
    return checkpoint.load(result.path).differences


def test_training_moves_the_selected_weights_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = family()
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    differences = run(tmp_path, PLAN, on=model)
    assert set(differences) == set(model.select(PLAN.selection).names)
    assert all(difference.abs().max() > 0 for difference in differences.values())
    assert all(torch.equal(before[name], value) for name, value in model.denoiser.state_dict().items())


def test_the_precision_of_autocast_is_recorded_and_resuming_in_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
    with pytest.raises(RuntimeError, match="cut off"):
        run(tmp_path, plan(save_every=2), mixed_precision="bf16")
    monkeypatch.setattr(checkpoint, "save", publish)
    with pytest.raises(UserError, match="mixed precision"):
        run(tmp_path, plan(save_every=2))
    run(tmp_path, plan(save_every=2), mixed_precision="bf16")
    assert checkpoint.load(tmp_path).provenance["mixed_precision"] == "bf16"


def test_training_without_masters_stays_in_bf16_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, publish = plan(masters=False, save_every=2), checkpoint.save
    whole = run(tmp_path / "whole", narrow, on=family(torch.bfloat16))
    assert not same(whole, run(tmp_path / "masters", plan(), "bf16", on=family(torch.bfloat16)))
    base = dict(family(torch.bfloat16).denoiser.named_parameters())
    for name, difference in whole.items():
        student = base[name].float() + difference
        assert torch.equal(student.bfloat16().float(), student)  # a bf16 value, and not a float32 one
    monkeypatch.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
    with pytest.raises(RuntimeError, match="cut off"):
        run(tmp_path / "parts", narrow, on=family(torch.bfloat16))
    monkeypatch.setattr(checkpoint, "save", publish)
    assert same(whole, run(tmp_path / "parts", narrow, on=family(torch.bfloat16)))


def test_every_update_leaves_a_line_of_metrics(tmp_path: Path) -> None:
    run(tmp_path, PLAN)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) == {
        "step",
        "loss",
        "loss_erase",
        "loss_preserve",
        "lr",
        "grad_norm",
        "delta_norm",
        "seconds",
    }
    assert [line["delta_norm"] for line in lines] == sorted(line["delta_norm"] for line in lines)


def test_a_log_that_goes_on_keeps_the_lines_of_the_updates_done_and_no_half_ones(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1}\n{"step": 3, "loss": 1}\n\n{"step": 2, "loss": 1}\n{"ste')
    with trainer.Log(file, 2, 4, enabled=True) as log:
        assert [line["step"] for line in metrics(tmp_path)] == [1, 2]  # before anything is written
        log.write({"step": 3, "loss": 0.5, "seconds": 1.0})
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_the_loss_falls(tmp_path: Path) -> None:
    run(tmp_path, plan(updates=60, batch_size=9, reuse=60, lr=1e-3, objective=Objective(eta=20.0)))
    lines = metrics(tmp_path)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_nothing_to_push_away_from_means_nothing_to_learn(tmp_path: Path) -> None:
    run(tmp_path, plan(objective=Objective(anchor="concept", eta=0.0), updates=1))
    assert metrics(tmp_path)[0]["loss"] < 1e-10


STALE = {"sampler": "student", "staleness": 2, "objective": Objective(eta=20.0)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler": "student", "staleness": 1, "rollouts": 0},
        {**STALE, "rollouts": 0},
        {**STALE, "rollouts": 0, "gradient_accumulation": 2, "preserve": ("a dog", "a rose")},
        {**STALE, "staleness": 8, "rollouts": 2, "reuse": 1},  # a bank that is used up after two updates
        STALE,
        {"sampler": "teacher", "rollouts": 0, "gradient_accumulation": 2},
        {"preserve": ("a dog", "a rose"), "weight_decay": 0.1, "lr_schedule": "cosine", "warmup": 1},
    ],
    ids=[
        *("bank", "student", "stale student", "stale student in passes", "student's bank", "student's bank cut short"),
        *("teacher", "preserve"),
    ],
)
def test_stopping_and_resuming_equals_never_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    whole = run(tmp_path / "whole", plan(**changes))
    write = trainer.Log.write

    def write_then_stop(log: trainer.Log, line: dict[str, float]) -> None:
        write(log, line)
        if line["step"] == 3:  # amid the second pair of updates: the student that drew its points is not the base
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Log, "write", write_then_stop)
        with pytest.raises(trainer.Stopped, match="after update 3 of 4"):
            run(tmp_path / "parts", plan(**changes))
    assert not (tmp_path / "parts" / "erased.safetensors").exists()
    parts = run(tmp_path / "parts", plan(**changes))
    assert same(whole, parts)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [1, 2, 3, 4]


def test_a_state_of_another_plan_is_refused_and_a_damaged_one_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, plan(save_every=3))
    assert (tmp_path / "state").is_dir()
    with pytest.raises(UserError, match="another plan"):
        run(tmp_path, plan(save_every=3, lr=2e-3))
    saved = load_state(tmp_path / "state")
    assert saved is not None
    two = {**saved.facts["identity"], "number of processes": 2}
    save_state(tmp_path / "state", dataclasses.replace(saved, facts={**saved.facts, "identity": two}))
    with pytest.raises(UserError, match="another number of processes: 2 there, 1 here; start it as it was started"):
        run(tmp_path, plan(save_every=3))
    save_state(tmp_path / "state", saved)
    file = tmp_path / "state" / "00000003" / "student.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert load_state(tmp_path / "state") is None
    assert same(whole, run(tmp_path, plan(save_every=3)))


def test_a_state_counts_however_often_states_are_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path, plan(save_every=3))
    assert same(whole, run(tmp_path, plan(save_every=2)))
    assert "resuming after update 3 of 4" in capsys.readouterr().out


def test_a_preserved_prompt_starts_at_no_loss_and_is_held(tmp_path: Path) -> None:
    ends = {}
    for weight in (0.0, 1e4):
        folder = tmp_path / str(weight)
        run(folder, plan(updates=12, preserve=("a dog",), preserve_weight=weight))
        assert metrics(folder)[0]["loss_preserve"] < 1e-10
        ends[weight] = metrics(folder)[-1]["loss_preserve"]
    assert ends[1e4] < 0.5 * ends[0.0]


def test_an_attribute_is_erased_from_a_concept(tmp_path: Path) -> None:
    run(tmp_path, plan(erase_from=("a photo", "the photo"), objective=Objective(anchor="erase_from")))
    assert len(metrics(tmp_path)) == 4
    assert checkpoint.load(tmp_path).provenance["objective"]["anchor"] == "erase_from"


@pytest.mark.parametrize("changes", [{"erase_from": ("a dog",)}, {"objective": Objective(anchor="erase_from")}])
def test_an_anchor_without_its_prompts_and_prompts_without_their_anchor_are_refused(changes: Any) -> None:
    with pytest.raises(UserError, match="go together"):
        plan(**changes)


def test_points_may_be_of_another_size_than_the_models_own(tmp_path: Path) -> None:
    usual = run(tmp_path / "usual", PLAN)
    large = run(tmp_path / "large", plan(sampling=dataclasses.replace(PLAN.sampling, size=20)))
    assert large.keys() == usual.keys() and not same(large, usual)


def test_weight_decay_pulls_towards_the_base(tmp_path: Path) -> None:
    loose = run(tmp_path / "loose", PLAN)
    held = run(tmp_path / "held", plan(weight_decay=500.0))
    assert sum(d.norm() for d in held.values()) < 0.8 * sum(d.norm() for d in loose.values())


def test_a_bfloat16_base_trains_float32_weights_under_autocast(tmp_path: Path) -> None:
    model = family(torch.bfloat16)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    differences = run(tmp_path, PLAN, mixed_precision="bf16", on=model)
    # a step of Adam is about lr, far below bf16's resolution of these weights
    assert all(difference.dtype == torch.float32 and difference.abs().max() > 0 for difference in differences.values())
    assert all(
        value.dtype == torch.bfloat16 and torch.equal(before[name], value)
        for name, value in model.denoiser.state_dict().items()
    )
    prediction = model.predict(
        model.denoiser, torch.zeros(1, *model.sample_shape), torch.tensor(1), model.encode(["cat"])
    )
    assert prediction.isfinite().all()


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    erased, calls = {}, {}
    for asked in (False, True):
        model, counted = family(), []
        block: Any = model.denoiser.get_submodule("up_blocks.1.resnets.1")  # behind trained weights
        block.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        erased[asked] = run(tmp_path / str(asked), plan(gradient_checkpointing=asked), on=model)
        calls[asked] = len(counted)
    assert calls[True] == calls[False] + PLAN.updates  # every backward runs the block once more
    assert all(torch.allclose(erased[False][name], erased[True][name], atol=1e-7) for name in erased[False])


def test_accumulated_passes_see_what_one_large_pass_sees(tmp_path: Path) -> None:
    once = run(tmp_path / "once", plan(batch_size=6))
    twice = run(tmp_path / "twice", plan(batch_size=3, gradient_accumulation=2))
    assert all(torch.allclose(once[name], twice[name], atol=1e-5) for name in once)


@pytest.mark.parametrize(("processes", "accumulation", "batch"), [(1, 1, 4), (2, 1, 3), (3, 2, 5)])
def test_processes_and_passes_share_out_the_samples_of_an_update(processes: int, accumulation: int, batch: int) -> None:
    asked = plan(batch_size=batch, gradient_accumulation=accumulation)
    taken = [
        i
        for micro in range(accumulation)
        for process in range(processes)
        for i in learner.sample_indices(asked, micro, process, processes)
    ]
    assert sorted(taken) == list(range(processes * accumulation * batch))


def test_the_learning_rate_rises_then_follows_its_schedule() -> None:
    rates = [
        learner.learning_rate(plan(updates=10, warmup=2, lr=3.0, lr_schedule="linear"), step) for step in range(10)
    ]
    assert rates[:3] == [1.0, 2.0, 3.0]
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0
    assert learner.learning_rate(plan(lr=3.0), 3) == 3.0


@pytest.mark.parametrize("updates", [1, 6], ids=["in the last update", "before"])
def test_divergence_stops_training_with_advice_and_publishes_nothing(tmp_path: Path, updates: int) -> None:
    model = family()
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    with pytest.raises(UserError, match=r"lower training\.lr .* another run_dir, or remove"):
        run(tmp_path, plan(lr=1e30, updates=updates, clip_norm=0.0, selection="esd_all"), on=model)
    assert not (tmp_path / checkpoint.FILE_NAME).exists()
    assert all(math.isfinite(value) for line in metrics(tmp_path) for value in line.values())
    assert all(torch.equal(before[name], value) for name, value in model.denoiser.state_dict().items())


@pytest.mark.parametrize("error", [UserError("here"), trainer.Stopped("here", 15), KeyboardInterrupt("here")], ids=repr)
def test_whatever_ends_training_the_model_is_the_base_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model = family(torch.bfloat16)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}

    def fail(log: trainer.Log, line: dict[str, float]) -> None:
        raise error

    monkeypatch.setattr(trainer.Log, "write", fail)
    with pytest.raises(type(error), match="here"):
        run(tmp_path, plan(gradient_checkpointing=True), mixed_precision="bf16", on=model)
    denoiser: Any = model.denoiser
    assert all(torch.equal(before[name], value) for name, value in denoiser.state_dict().items())
    assert all(value.dtype == torch.bfloat16 and value.requires_grad for value in denoiser.parameters())
    assert not denoiser.is_gradient_checkpointing
    inputs = (torch.zeros(1, *model.sample_shape), torch.tensor(1), model.encode(["cat"]))
    with torch.no_grad():
        fresh = family(torch.bfloat16)
        assert torch.equal(model.predict(denoiser, *inputs), fresh.predict(fresh.denoiser, *inputs))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"staleness": 1, "rollouts": 0}, "anew for every update"),
        ({"staleness": 4, "rollouts": 0}, "anew for every 4 updates"),
        (
            {"staleness": 8, "rollouts": 3},
            "a bank of 3 rollouts, each of its 9 points used up to 2 times, anew for every 6 updates",
        ),
        (
            {"staleness": 2, "rollouts": 3},
            "a bank of 3 rollouts, 6 of its 9 points used once, anew for every 2 updates",
        ),
    ],
)
def test_the_description_says_how_long_points_by_the_student_serve(changes: Any, told: str) -> None:
    assert told in describe(family(), plan(sampler="student", **changes))


@pytest.mark.parametrize("changes", [{"staleness": 1}, {"sampler": "student"}])
def test_points_grow_stale_where_the_student_draws_them_and_only_there(changes: Any) -> None:
    with pytest.raises(UserError, match="go together"):
        plan(**changes)


def test_only_points_that_cannot_be_drawn_again_are_kept_for_resuming(tmp_path: Path) -> None:
    for staleness, kept in ((1, False), (3, True)):
        folder = tmp_path / str(staleness)
        run(folder, plan(sampler="student", staleness=staleness, rollouts=0, save_every=2))
        state = load_state(folder / "state")
        assert state is not None and ("points" in state.tensors) is kept


def test_the_description_names_what_is_trained() -> None:
    told = describe(family(), PLAN)
    assert "cross.k + cross.v: 8 tensors" in told and "'cat', 'a cat'" in told and "4 of 3 points" in told
    assert "uses" not in told and "not read" not in told and "processes" not in told
    assert "4 of 6 points in 2 processes" in describe(family(), PLAN, 2)


@pytest.mark.parametrize("rollouts", [0, 3])
def test_the_description_counts_the_prompts_a_run_will_visit_and_tells_what_is_cut(rollouts: int) -> None:
    many = tuple("a " * n + "dog" for n in range(9)) * 6
    long = "a photo of the dog in mosaic style in the cat style"
    told = describe(family(), plan(preserve=(*many, long), updates=1, rollouts=rollouts))
    assert re.search(r"preserve .*; uses [123] of 10 prompts, weight 1", told)
    assert told.splitlines()[-1].split(None, 1) == ["cut", f"{long!r} is too long; not read: 'cat style'"]
