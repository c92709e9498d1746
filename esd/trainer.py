"""The training loop: teach a denoiser to steer away from a concept, update by update (`esd.learner`).

Accelerate does devices, processes and mixed precision. No draw needs a saved generator, so to resume run the same
command again; what it does is what an unbroken run would have done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from esd import checkpoint, float8
from esd.errors import UserError
from esd.families import Family
from esd.learner import Learner, make_views, point_sources
from esd.lora import LowRank
from esd.plan import TrainPlan
from esd.progress import Log, termination
from esd.weights import Views

MOST_VERSIONS = 64  # of a compiled block; past them dynamo runs it as it is


class Stopped(Exception):
    """SIGTERM or Ctrl-C came between two updates: the state is saved, the same command resumes.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class TrainResult:
    """What training left: the checkpoint, how many values were trained, and how long all sittings took."""

    path: Path
    parameters: int
    seconds: float


def train(
    family: Family,
    plan: TrainPlan,
    run_dir: Path,
    accelerator: Any,
    *,
    versions: Mapping[str, str] | None = None,
    held: Callable[[], Mapping[str, float]] = dict,
) -> TrainResult:
    """Trains, and writes `run_dir/erased.safetensors`; the family's model is the base again afterwards, on the CPU.

    The text encoders are on the device while prompts are encoded, and the denoiser from then on: never all at once.

    Args:
        family: of a model that works on the accelerator's device.
        plan: what to do.
        run_dir: gets metrics.jsonl, the checkpoint and, while training, state/.
        accelerator: an `accelerate.Accelerator`, its trackers started if there are any.
        versions: for provenance.
        held: tells the most memory that was held so far, in GiB by what holds it; for provenance.

    Raises:
        UserError: see `esd.description.describe`, `student_views` and `esd.learner.make_adam`; the state in run_dir is
            of another plan or base; or training diverged.
        Stopped: SIGTERM or Ctrl-C came; the state is saved.
    """
    family.place("encoders")
    point_sources(family, plan, None, None, accelerator.num_processes)  # encodes every prompt
    with student_views(family, plan, accelerator) as views:
        return _train(family, plan, views, run_dir, accelerator, versions or {}, held)


@contextmanager
def student_views(family: Family, plan: TrainPlan, accelerator: Any) -> Iterator[Views]:
    """The family's model as student and teacher on the device, for the length of a `with` block; the base again, on the
    CPU, on any exit.

    Raises:
        UserError: see `esd.weights.WeightViews` and `esd.lora.LoraViews`.
    """
    denoiser: Any = family.denoiser
    names = family.select(plan.selection).names
    with float8.stored(denoiser) if plan.frozen else nullcontext():  # before it takes any of the device
        family.place("denoiser")
        views = make_views(denoiser, names, plan)
        try:
            if plan.gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()
            if plan.compile:
                denoiser.compile_repeated_blocks()
            # every size of latents and of batch makes a version of a block, student and teacher another: dynamo keeps 8
            with torch._dynamo.config.patch(recompile_limit=MOST_VERSIONS) if plan.compile else nullcontext():
                yield views
        finally:
            accelerator.unwrap_model(denoiser, keep_fp32_wrapper=False)  # takes autocast off the model's forward
            if plan.gradient_checkpointing:
                denoiser.disable_gradient_checkpointing()
            if plan.compile:
                for module in denoiser.modules():
                    module._compiled_call_impl = None  # what nn.Module.compile sets, and offers no way back from
            views.restore()
            family.place()


def _train(
    family: Family,
    plan: TrainPlan,
    views: Views,
    run_dir: Path,
    accelerator: Any,
    versions: Mapping[str, str],
    held: Callable[[], Mapping[str, float]],
) -> TrainResult:
    """What `train` says, with the model already made trainable."""
    learner = Learner(family, plan, views, accelerator)
    first, earlier = learner.resume(run_dir / "state")
    if first:
        accelerator.print(f"resuming after update {first} of {plan.updates}")
    log = Log(run_dir / "metrics.jsonl", first, plan.updates, enabled=accelerator.is_main_process)
    started = time.perf_counter()

    def spent() -> float:
        return earlier + time.perf_counter() - started

    with log, termination() as stopping:
        for step in range(first, plan.updates):
            metrics = {"step": step + 1, **learner.update(step), "seconds": spent()}
            if odd := [name for name, value in metrics.items() if not math.isfinite(value)]:
                raise UserError(
                    f"training.lr={plan.lr}: {odd[0]} is {metrics[odd[0]]} in update {step + 1}, training diverged; "
                    f"lower training.lr (or objective.eta) and choose another run_dir, or remove {run_dir}"
                )
            log.write(metrics)
            accelerator.log({name: value for name, value in metrics.items() if name != "step"}, step=step + 1)
            stop = largest(accelerator, stopping())  # the signal that any process got, or 0
            if stop or (plan.save_every and (step + 1) % plan.save_every == 0 and step + 1 < plan.updates):
                learner.save(run_dir / "state", step + 1, spent())
            if stop:
                raise Stopped(f"stopped after update {step + 1} of {plan.updates}; the same command resumes", stop)

    seconds, path = spent(), run_dir / checkpoint.FILE_NAME
    if accelerator.is_main_process:
        differences = views.differences()
        told = provenance(family, plan, views, seconds, held(), versions, accelerator.mixed_precision)
        checkpoint.save(path, differences, told)
        if isinstance(differences, LowRank):
            checkpoint.write_lora(family.pipe, differences, run_dir / checkpoint.LORA_NAME)
    accelerator.wait_for_everyone()
    return TrainResult(path, sum(p.numel() for p in views.parameters()), seconds)


def provenance(
    family: Family,
    plan: TrainPlan,
    views: Views,
    seconds: float,
    held: Mapping[str, float],
    versions: Mapping[str, str],
    mixed_precision: str,
) -> dict[str, Any]:
    """What a checkpoint says about itself: enough to recognise its base and to train it again."""
    return {
        "base": family.base_name,
        "revision": family.base_revision,
        "family": family.name,
        "fingerprint": checkpoint.fingerprint(views.base),
        **asdict(plan),
        "mixed_precision": mixed_precision,
        "parameters": sum(p.numel() for p in views.parameters()),
        "seconds": round(seconds, 3),
        "peak_gib": dict(held),
        "versions": dict(versions),
    }


def largest(accelerator: Any, number: int) -> int:
    """The largest of all processes' numbers; all processes get the same answer."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
