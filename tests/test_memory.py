"""What a run takes of memory: counted on fake tensors, and compared with what real ones take."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from esd import memory, trainer
from esd.activations import Counter
from esd.families import family_of, load_pipeline
from esd.float8 import linears
from esd.lora import Lora
from esd.memory import Memory, Phase
from esd.plan import TrainPlan
from tests import tiny
from tests.plans import PLAN, SAMPLING
from tests.programs import Command, train

ROOT = Path(__file__).parents[1]
BUSY = dataclasses.replace(PLAN, selection="esd_x", batch_size=6, updates=1, preserve=("a dog",))
THIN = dataclasses.replace(BUSY, lora=Lora(2, 2.0), frozen="float8")


def family(name: str) -> Any:
    made = family_of(tiny.every(name))
    if hasattr(made, "max_tokens"):
        made.max_tokens = tiny.TOKENS
    return made


def planned(made: Any, plan: TrainPlan, **how: Any) -> dict[str, Phase]:
    return {phase.name: phase for phase in memory.measure(made, plan, made.encode(["cat"]), **how).phases}


def counted(made: Any, plan: TrainPlan, folder: Path) -> int:
    """The most bytes that a real run makes besides denoiser and prompts: bank, gradients and Adam's moments too."""
    made.encode([*plan.prompts, *plan.preserve, ""])
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    counter = Counter()
    counter.ignore([*made.denoiser.parameters(), *made.denoiser.buffers()])
    with counter:
        trainer.train(made, plan, folder, accelerator)
    return counter.peak


@pytest.mark.parametrize("plan", [BUSY, THIN], ids=["full", "float8"])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3.5", "flux-dev", "klein"])
def test_training_makes_as_many_bytes_as_were_planned(name: str, plan: TrainPlan, tmp_path: Path) -> None:
    """The same count over a real run of one update."""
    made = family(name)
    expected = planned(made, plan)["train"]
    peak = counted(made, plan, tmp_path)
    there = expected.parts["frozen weights"] + expected.parts["trained weights"]
    if plan.frozen:  # adapters are made, and so is what is stored
        there = memory.weights(made.denoiser) - sum(4 * layer.weight.numel() for layer in linears(made.denoiser))
    assert expected.total - there == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("name", "guidance", "how"),
    [
        ("sdxl-turbo", 0.0, {}),
        ("klein", 1.0, {}),
        ("flux-dev", 3.5, {}),
        ("sdxl", 3.0, {"time_rule": "compvis", "scheduler": "ddim"}),
    ],
    ids=["turbo", "klein", "flux-dev", "compvis"],
)
def test_sampling_makes_no_more_bytes_than_were_planned_where_predictions_are_not_free(
    name: str, guidance: float, how: Any, tmp_path: Path
) -> None:
    """The teacher is asked for all points together then, in far larger calls than a rollout's. The plan adds the
    largest call to the most points, which are not there at once, and to Adam's moments, which come later.
    """
    made = family(name)
    sampling = dataclasses.replace(SAMPLING, num_steps=8, guidance_scale=guidance, **how)
    plan = dataclasses.replace(
        PLAN, selection="esd_x_strict", batch_size=1, updates=1, rollouts=4, reuse=1, sampling=sampling
    )
    expected = planned(made, plan)
    assert max(expected.values(), key=lambda phase: phase.total).name == "sample"
    peak = counted(made, plan, tmp_path)
    there = expected["sample"].total - memory.weights(made.denoiser)
    assert 0.75 * there <= peak <= there


def test_what_makes_a_phase_smaller_does() -> None:
    made = family("sd1")
    usual = planned(made, BUSY, images=2)
    assert set(usual) == {"encode", "sample", "train", "draw"}

    def train_with(**changes: Any) -> int:
        return planned(made, dataclasses.replace(BUSY, **changes))["train"].total

    whole = usual["train"].total
    assert train_with(gradient_checkpointing=True) < 0.7 * whole
    assert train_with(batch_size=3) < 0.7 * whole
    thin = planned(made, dataclasses.replace(BUSY, lora=Lora(1, 1.0)))["train"].parts
    assert thin["trained weights"] < usual["train"].parts["trained weights"] and not thin["their base"]
    stored, wide = planned(made, THIN, images=1), planned(made, dataclasses.replace(THIN, frozen=None), images=1)
    spared = sum(3 * layer.weight.numel() for layer in linears(made.denoiser))
    assert wide["train"].parts["frozen weights"] - stored["train"].parts["frozen weights"] == spared
    assert stored["train"].parts["activations"] == pytest.approx(wide["train"].parts["activations"], rel=0.02)
    assert 0 < wide["draw"].total - stored["draw"].total < spared  # with the selected weights as they are
    few = dataclasses.replace(BUSY, sampling=dataclasses.replace(BUSY.sampling, max_batch=2))
    assert planned(made, few)["sample"].total < usual["sample"].total
    assert planned(made, BUSY, images=1)["draw"].total < usual["draw"].total
    for name, phase in planned(made, BUSY, processes=2, images=2).items():  # DDP's buckets are there all the time
        buckets = 4 * made.select(BUSY.selection).numel if name in ("sample", "train") else 0
        assert phase.total - usual[name].total == buckets


def test_adam_and_masters_are_counted_by_the_selection() -> None:
    made = family_of(tiny.pipeline().to(torch.bfloat16))
    values = made.select("esd_x").numel
    parts = planned(made, BUSY, mixed_precision="bf16")["train"].parts
    every = sum(p.numel() for p in made.denoiser.parameters())
    assert (parts["frozen weights"], parts["their base"]) == (2 * (every - values), 2 * values)
    assert (parts["trained weights"], parts["gradients"], parts["Adam's moments"]) == (
        4 * values,
        4 * values,
        8 * values,
    )
    parts = planned(made, dataclasses.replace(BUSY, masters=False))["train"].parts
    assert (parts["trained weights"], parts["gradients"], parts["Adam's moments"]) == (
        2 * values,
        2 * values,
        4 * values,
    )


def test_pictures_are_drawn_without_autocast_and_without_an_adapter() -> None:
    made = family("sd1")
    usual = planned(made, BUSY, images=2)["draw"].total
    assert planned(made, BUSY, images=2, mixed_precision="bf16")["draw"].total == usual
    assert planned(made, dataclasses.replace(BUSY, lora=Lora(8, 8.0)), images=2)["draw"].total == usual


def test_no_weight_is_needed_to_plan() -> None:
    made = family("sd1")
    cond, here = made.encode(["cat"]), planned(made, BUSY)
    for part in ("encoders", "denoiser", "vae"):
        for module in made.modules(part):
            module.to("meta")
    assert {phase.name: phase for phase in memory.measure(made, BUSY, cond).phases} == here


def test_the_verdict_names_the_largest_phase_and_what_would_help() -> None:
    found = Memory(
        (Phase("encode", {"text encoders": memory.GB}, ("a",)), Phase("train", {"x": 30 * memory.GB}, ("b",)))
    )
    assert found.verdict(None) == "at most 30.0 GB, in the phase 'train'"
    assert found.verdict(31).endswith("; fits 31 GB")
    assert found.verdict(24).endswith("; does not fit 24 GB, of which 1 is the device's own; smaller with b")
    assert found.verdict(1.5).endswith("smaller with a, b")
    assert Memory((Phase("encode", {"text encoders": memory.GB}),)).verdict(1).endswith("no setting makes it smaller")


def test_only_what_helps_is_offered() -> None:
    made = family_of(tiny.pipeline(size="large"))
    plan = dataclasses.replace(BUSY, selection="esd_all", rollouts=8, batch_size=2, preserve=())
    whole = planned(made, plan, images=2)
    anyway = {"model.precision=bfloat16", "weights=lora", "a narrower selection", "training.optimizer=adam8bit"}
    assert set(whole["encode"].mends) == {"model.precision=bfloat16"}
    assert anyway | {"a smaller trajectory.max_batch", "fewer trajectory.rollouts"} <= set(whole["sample"].mends)
    batch = "a smaller training.batch_size with training.gradient_accumulation"
    assert anyway | {batch, "training.gradient_checkpointing=true"} <= set(whole["train"].mends)
    assert set(whole["draw"].mends) == {"model.precision=bfloat16", "a smaller evaluation.batch_size"}
    changes: dict[str, dict[str, Any]] = {
        "training.gradient_checkpointing=true": {"gradient_checkpointing": True},
        "weights=lora weights.frozen=float8": {"lora": Lora(2, 2.0), "frozen": "float8"},
    }
    for mend, change in changes.items():
        less = planned(made, dataclasses.replace(plan, **change), images=2)
        assert all(less[name].total < phase.total for name, phase in whole.items() if mend in phase.mends), mend


def test_nothing_is_offered_that_is_as_small_as_it_can_be() -> None:
    made = family_of(tiny.pipeline().to(torch.bfloat16))
    least = dataclasses.replace(
        BUSY, lora=Lora(1, 1.0), frozen="float8", batch_size=1, rollouts=0, sampler="student", staleness=1, preserve=(),
        gradient_checkpointing=True, sampling=dataclasses.replace(BUSY.sampling, max_batch=2),
    )  # fmt: skip
    found = planned(made, least, mixed_precision="bf16", images=1)
    works = ("a smaller trajectory.size",)
    assert {name: phase.mends for name, phase in found.items()} == {
        "encode": (), "sample": works, "train": works, "draw": (),
    }  # fmt: skip


def test_a_plan_tells_every_phase_and_a_run_for_a_card_its_peak(command: Command) -> None:
    ended = train(command, "plan_only=true", "device_memory=24")
    told = [line.split(None, 1)[1] for line in ended.out.splitlines() if line.startswith("memory")]
    assert [line.split()[0] for line in told] == ["encode", "sample", "train", "draw", "at"]
    assert told[-1].endswith("; fits 24 GB"), ended.err
    ended = train(command, "device_memory=0.5")
    told = [line for line in ended.out.splitlines() if line.startswith("memory")]
    assert ended.code == 0 and len(told) == 1 and "does not fit 0.5 GB" in told[0]


MEASURED = """
import dataclasses, gc, pathlib, re, sys
from accelerate import Accelerator
from esd import trainer
from esd.families import family_of, load_pipeline
from tests.plans import PLAN

def size(what):
    return int(re.search(what + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

def run(folder, **changes):
    family, plan = family_of(load_pipeline("checkpoints/emoji-sd")), dataclasses.replace(PLAN, **changes)
    family.encode([*plan.prompts, ""])
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = size("VmRSS")
    trainer.train(family, plan, pathlib.Path(folder), accelerator)
    return size("VmHWM") - before

accelerator = Accelerator(cpu=True)
run(sys.argv[1], selection="mid", updates=1, batch_size=1)  # what libraries take for themselves
for checkpointing in (False, True):
    folder = f"{sys.argv[1]}/{checkpointing}"
    pathlib.Path(folder).mkdir()
    print(run(folder, selection="esd_x", updates=2, batch_size=16, rollouts=6, gradient_checkpointing=checkpointing))
"""


@pytest.mark.slow(reason="starts a Python of its own that trains the bundled model three times")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to tell peaks of memory")
def test_the_bundled_model_takes_as_much_as_was_planned(tmp_path: Path) -> None:
    """Peak resident memory of the process: the plan is exact to a tenth without gradient checkpointing, and to a
    quarter with it, where what numerical libraries take for themselves is a larger share.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    told = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert told.returncode == 0, told.stderr
    made = family_of(load_pipeline(ROOT / "checkpoints/emoji-sd"))
    there = memory.weights(made.denoiser)
    for measured, checkpointing, tolerance in zip(told.stdout.split(), (False, True), (0.1, 0.25), strict=True):
        plan = dataclasses.replace(
            PLAN, selection="esd_x", batch_size=16, rollouts=6, gradient_checkpointing=checkpointing
        )
        found = planned(made, plan)
        expected = max(found["sample"].total, found["train"].total) - there
        assert expected == pytest.approx(int(measured), rel=tolerance), checkpointing
