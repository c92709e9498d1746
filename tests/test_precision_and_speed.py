"""Settings for precision and speed: none changes what is learned by more than rounding, and none does nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from esd import checkpoint, trainer
from esd.description import describe
from esd.errors import UserError
from esd.families import family_of
from esd.lora import Lora
from esd.plan import TrainPlan
from tests import tiny
from tests.plans import PLAN, metrics, same
from tests.programs import Command, train


def accelerator() -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def scaling(scale: float) -> Any:
    """As an Accelerator is on a card with fp16: gradients are scaled, and an update that overflows is skipped."""
    made = accelerator()
    made.state._mixed_precision, made.native_amp = "fp16", True
    made.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return made


def run(folder: Path, plan: TrainPlan, launched: Any = None, pipe: Any = None) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    result = trainer.train(family_of(pipe or tiny.pipeline()), plan, folder, launched or accelerator())
    return dict(checkpoint.load(result.path).differences)


def cut_off(folder: Path, monkeypatch: pytest.MonkeyPatch, *how: Any) -> None:
    """A run that leaves its last state and no checkpoint."""
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
        with pytest.raises(RuntimeError, match="cut off"):
            run(folder, *how)


def test_an_update_that_fp16_overflows_is_skipped_and_not_taken_for_divergence(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(PLAN, updates=24), scaling(2.0**30))
    lines = metrics(tmp_path)
    skipped = [line["step"] for line in lines if line["grad_norm"] == 0]
    assert skipped and skipped[0] == 1 and len(skipped) < 24
    before = 0.0
    for line in lines:
        assert (line["delta_norm"] == before) == (line["step"] in skipped)
        before = line["delta_norm"]


@pytest.mark.parametrize("scale", [2.0**10, 2.0**30], ids=["none skipped", "all skipped so far"])
def test_a_run_in_fp16_that_was_cut_off_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    plan = dataclasses.replace(PLAN, updates=18, save_every=8)
    whole = run(tmp_path / "whole", plan, scaling(scale))
    cut_off(tmp_path / "parts", monkeypatch, plan, scaling(scale))
    assert same(whole, run(tmp_path / "parts", plan, scaling(2.0**5)))
    norms = [[line["grad_norm"] for line in metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert norms[0] == norms[1]


def test_eight_bit_adam_learns_nearly_the_same_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")

    def large() -> Any:
        return tiny.pipeline(size="large")

    plan = dataclasses.replace(PLAN, selection="esd_all", updates=8, save_every=3)
    eight = dataclasses.replace(plan, optimizer="adam8bit")
    usual = run(tmp_path / "usual", plan, None, large())
    whole = run(tmp_path / "whole", eight, None, large())
    assert not same(whole, usual)
    gap = sum((whole[name] - usual[name]).square().sum() for name in usual) ** 0.5
    assert gap < 0.3 * sum(value.square().sum() for value in usual.values()) ** 0.5
    cut_off(tmp_path / "parts", monkeypatch, eight, None, large())
    assert same(whole, run(tmp_path / "parts", eight, None, large()))
    with pytest.raises(UserError, match="adam8bit changes nothing: no trained tensor has 4096 values"):
        run(tmp_path / "small", dataclasses.replace(eight, selection="cross.k"))


@pytest.mark.parametrize("adapter", [None, Lora(2, 2.0)], ids=["weights", "adapter"])
def test_eight_bits_that_change_nothing_are_refused_before_anything_starts(adapter: Any) -> None:
    plan = dataclasses.replace(PLAN, selection="cross.k", optimizer="adam8bit", lora=adapter)
    with pytest.raises(UserError, match="adam8bit changes nothing"):
        describe(family_of(tiny.pipeline()), plan)
    wide = dataclasses.replace(plan, lora=adapter and Lora(2000, 2.0), selection="cross.k" if adapter else "esd_all")
    assert "updates" in describe(family_of(tiny.pipeline(size="large")), wide)


def test_eight_bit_adam_asks_for_its_extra(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = train(command, "training.optimizer=adam8bit")
    assert ended.code == 2 and "install the extra 8bit" in ended.err and command.files() == set()


def test_channels_last_learns_the_same_and_is_refused_where_it_does_nothing(command: Command, tmp_path: Path) -> None:
    usual = run(tmp_path / "usual", PLAN)
    pipe = tiny.pipeline()
    family_of(pipe).channels_last()
    kernel = pipe.unet.down_blocks[0].resnets[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    last = run(tmp_path / "last", PLAN, None, pipe)
    assert all(torch.allclose(last[name], usual[name], atol=1e-5) for name in usual)
    tiny.every("sd3").save_pretrained(command.folder / "base-3")
    ended = train(command, "training.channels_last=true", "model.path=base-3", "plan_only=true")
    assert ended.code == 2 and "SD3Transformer2DModel has no convolutions" in ended.err, ended.err
    assert train(command, "training.channels_last=true").code == 0


def test_a_model_whose_blocks_diffusers_does_not_name_is_not_compiled(command: Command) -> None:
    tiny.every("sd3").save_pretrained(command.folder / "base-3")
    ended = train(command, "training.compile=true", "model.path=base-3", "trajectory.size=16")
    assert ended.code == 2 and "names no blocks of SD3Transformer2DModel" in ended.err, ended.err
    assert not command.files()


@pytest.mark.slow(reason="torch.compile takes up to a minute for each of these")
@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True}, {"lora": Lora(2, 2.0)}, {"lora": Lora(2, 2.0), "frozen": "float8"}],
    ids=str,
)
def test_compiled_blocks_learn_the_same_and_are_taken_off(tmp_path: Path, changes: Any) -> None:
    plan = dataclasses.replace(PLAN, selection="esd_x", **changes)
    usual, pipe, compiled = run(tmp_path / "usual", plan), tiny.pipeline(), []
    compile_module = nn.Module.compile

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        compiled.append(type(self).__name__)
        compile_module(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.Module, "compile", counted)
        fast = run(tmp_path / "fast", dataclasses.replace(plan, compile=True), None, pipe)
    assert set(compiled) == {"BasicTransformerBlock"}
    assert all(torch.allclose(fast[name], usual[name], atol=1e-4) for name in usual)  # after 4 updates of 1e-3
    assert all(module._compiled_call_impl is None for module in pipe.unet.modules())


@pytest.mark.parametrize(
    ("variables", "settings", "told"),
    [
        ({}, ["training.processes=2"], "start it as accelerate launch --num_processes 2 -m esd.train"),
        ({"WORLD_SIZE": "2"}, ["training.processes=1"], "this launch has 2; start it as python -m esd.train"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "configured for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "configured for DeepSpeed"),
        ({}, ["training.mixed_precision=fp16"], "error: training.mixed_precision=fp16 on cpu"),
        ({}, ["model.precision=float16"], "error: model.precision=float16 on cpu"),
        ({}, ["model.precision=float16", "plan_only=true"], "error: model.precision=float16 on cpu"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], "error: accelerate launch --mixed_precision fp16 on cpu"),
        ({}, ["model.precision=float16", "training.mixed_precision=bf16"], "allowed: auto, fp16"),
        ({}, ["model.precision=bfloat16", "training.mixed_precision=fp16"], "allowed: auto, bf16"),
    ],
    ids=str,
)
def test_a_launch_or_a_precision_that_cannot_be_is_refused_before_anything_is_loaded(
    command: Command, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], settings: list[str], told: str
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("esd.families.load_pipeline", loads)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ended = train(command, *settings)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert command.files() == set()


@pytest.mark.parametrize(
    "settings",
    [["model.precision=float16"], ["training.mixed_precision=fp16"], ["training.processes=2"], ["device=cuda"]],
)
def test_what_only_another_machine_can_do_is_planned_for_its_card_here(command: Command, settings: list[str]) -> None:
    ended = train(command, *settings, "plan_only=true", "device_memory=24")
    assert ended.code == 0 and "fits 24 GB" in ended.out, ended.err
    usual = train(command, "plan_only=true", "device_memory=24")
    assert (ended.out == usual.out) == (settings == ["device=cuda"])  # the others take another amount
    ended = train(command, *settings, "plan_only=true")
    assert ended.code == 2 and settings[0] in ended.err and len(ended.err.splitlines()) == 1


def test_the_processes_that_were_asked_for_are_no_error(command: Command) -> None:
    assert train(command, "training.processes=1", "plan_only=true").code == 0
