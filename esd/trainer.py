"""The training loop, read top to bottom: teach a denoiser to steer away from a concept.

One update: training points (x_t, t) with all the teacher's predictions come from a source (`esd.sources`);
the objective makes the target of them; the student predicts; squared error, backward, clip, Adam, and a
pull towards the base. Optionally a second source gives points of prompts to preserve, on which the student
must go on saying what the teacher says: these points lie on the teacher's own paths for those prompts,
where the erased model will walk, and the teacher's prediction there comes for free.

Accelerate does devices, processes and mixed precision. Every random draw is keyed by (seed, purpose,
update, sample), so a resumed run needs no saved generator, and n processes draw what one would. To resume,
run the same command again; what it does is what an unbroken run would have done.

Source: Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023 (arXiv:2303.07345). Ours: the
bank, the preservation term on the teacher's paths, weight decay towards the base.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esd import checkpoint, float8, objectives, seeding
from esd.errors import UserError
from esd.families import Conditioning, Family
from esd.lora import LoraViews, LowRank
from esd.objectives import Anchor, Objective
from esd.plan import TrainPlan
from esd.progress import Log, termination
from esd.resuming import identity_of, resume, state
from esd.sources import ALL, Bank, Conditions, OnPolicy, Points, Source
from esd.storage import save_state
from esd.weights import Views, WeightViews

LEAST_8BIT = 4096  # values of a tensor whose moments 8-bit Adam keeps in 8 bits
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
        UserError: see `esd.description.describe`, `student_views` and `make_adam`; the state in run_dir is of another
            plan or base; or training diverged.
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
    erasing, preserving = point_sources(family, plan, views.student, views.teacher, accelerator.num_processes)
    adam = make_adam(plan, views.parameters())
    student, optimizer = accelerator.prepare(views.student, adam)
    identity = identity_of(plan, views, accelerator)
    first, earlier = resume(run_dir / "state", views, adam, accelerator.scaler, identity, erasing)
    if first:
        accelerator.print(f"resuming after update {first} of {plan.updates}")
    log = Log(run_dir / "metrics.jsonl", first, plan.updates, enabled=accelerator.is_main_process)
    started = time.perf_counter()

    def spent() -> float:
        return earlier + time.perf_counter() - started

    with log, termination() as stopping:
        for step in range(first, plan.updates):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, step)
            losses = torch.zeros(2, device=accelerator.device)  # erase, preserve
            for micro in range(plan.gradient_accumulation):
                indices = sample_indices(plan, micro, accelerator.process_index, accelerator.num_processes)
                erase = erasing.points(step, indices)
                keep = preserving.points(step, indices) if preserving else None
                last = micro == plan.gradient_accumulation - 1
                with nullcontext() if last else accelerator.no_sync(student):
                    terms = loss_terms(family, plan.objective, student, erase, erasing, keep, preserving)
                    total = terms[0] + plan.preserve_weight * terms[1]
                    accelerator.backward(total / plan.gradient_accumulation)
                losses += terms.detach() / plan.gradient_accumulation
            norm = accelerator.clip_grad_norm_(views.parameters(), plan.clip_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.step_was_skipped:  # fp16 overflowed and the scaler backs off: nothing moved, by no gradient
                norm = torch.zeros(())
            moved = views.pull(learning_rate(plan, step) * plan.weight_decay)
            erase_loss, preserve_loss = accelerator.reduce(losses, "mean").tolist()
            metrics = {
                "step": step + 1,
                "loss": erase_loss + plan.preserve_weight * preserve_loss,
                "loss_erase": erase_loss,
                "loss_preserve": preserve_loss,
                "lr": learning_rate(plan, step),
                "grad_norm": float(norm),
                "delta_norm": moved,
                "seconds": spent(),
            }
            if odd := [name for name, value in metrics.items() if not math.isfinite(value)]:
                raise UserError(
                    f"training.lr={plan.lr}: {odd[0]} is {metrics[odd[0]]} in update {step + 1}, training diverged; "
                    f"lower training.lr (or objective.eta) and choose another run_dir, or remove {run_dir}"
                )
            log.write(metrics)
            accelerator.log({name: value for name, value in metrics.items() if name != "step"}, step=step + 1)
            stop = largest(accelerator, stopping())  # the signal that any process got, or 0
            if stop or (plan.save_every and (step + 1) % plan.save_every == 0 and step + 1 < plan.updates):
                in_use: Mapping[str, Tensor] = {}
                if plan.sampler == "student" and not erasing.begins(step + 1):
                    in_use = erasing.in_use(accelerator.gather)  # the student that drew them is no more
                if accelerator.is_main_process:
                    done = state(step + 1, views, adam, accelerator.scaler, identity, spent(), in_use)
                    save_state(run_dir / "state", done)
                accelerator.wait_for_everyone()
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


def point_sources(
    family: Family,
    plan: TrainPlan,
    student: Any,
    teacher: Any,
    num_processes: int,
    *,
    stand_in: Conditioning | None = None,
) -> tuple[Source, Source | None]:
    """Where the points to erase and to preserve come from; encodes every prompt and samples nothing yet.

    Preserved points are always the teacher's, and so is all they say: they are what must not change.

    Args:
        family: of the model.
        plan: what is trained.
        student: the live denoiser.
        teacher: the frozen one.
        num_processes: that share an update.
        stand_in: one row for every prompt, where points are only counted; None encodes them.

    Raises:
        UserError: the time rule does not fit the scheduler, the bank cannot fill one update, or the model knows no
            such null prompt, negative prompt or embedded guidance.
    """
    objective, told = plan.objective, plan.objective.embedded_guidance
    if told != 1 and family.guidance != "distilled":
        raise UserError(
            f"objective.embedded_guidance={told:g}: {family.name} is not told a guidance scale; allowed: 1, and "
            "trajectory.guidance_scale for sampling"
        )
    if plan.sampling.negative and family.guidance != "cfg":
        raise UserError(
            f"trajectory.negative={plan.sampling.negative}: {family.name} takes no classifier-free guidance, and so no "
            "negative prompt; leave it out"
        )
    null = family.with_guidance(stand_in or family.null(objective.null), told)
    negative = (stand_in or family.null(plan.sampling.negative)) if plan.sampling.negative else None

    def encoded(prompts: Sequence[str]) -> Conditioning:
        rows = stand_in[[0] * len(prompts)] if stand_in else family.encode(prompts)
        return family.with_guidance(rows, told)

    per_update = plan.batch_size * plan.gradient_accumulation * num_processes

    def source(conditions: Conditions, by: str, seed: int, wanted: Collection[Anchor] = ALL) -> Source:
        how: Any = {"per_update": per_update, "seed": seed, "wanted": wanted}
        if not plan.rollouts:
            sampler = student if by == "student" else teacher
            return OnPolicy(family, teacher, sampler, conditions, plan.sampling, staleness=plan.staleness or 1, **how)
        if by == "student":
            how |= {"sampler": student, "staleness": plan.staleness}
        return Bank(family, teacher, conditions, plan.sampling, rollouts=plan.rollouts, reuse=plan.reuse, **how)

    erase_from = encoded(plan.erase_from) if plan.erase_from else None
    conditions = Conditions(encoded(plan.prompts), null, erase_from, plan.sample_with, negative)
    erasing = source(conditions, plan.sampler, plan.seed)
    if not plan.preserve:
        return erasing, None
    kept = Conditions(encoded(plan.preserve), null, negative=negative)
    itself: tuple[Anchor, ...] = ("concept",)  # here the prompt to preserve
    return erasing, source(kept, "teacher", seeding.derive(plan.seed, "preserve"), wanted=itself)


def loss_terms(
    family: Family,
    objective: Objective,
    student: Any,
    erase: Points,
    erasing: Source,
    keep: Points | None,
    preserving: Source | None,
) -> Tensor:
    """(erase, preserve) losses, float32 (2,), from one call of the student over both batches."""
    parts = [
        (
            erase,
            erasing.conditions,
            objectives.target(
                erase.prediction(objective.anchor), erase.concept, erase.prediction("null"), eta=objective.eta
            ),
        )
    ]
    if keep is not None and preserving is not None:
        parts.append((keep, preserving.conditions, keep.concept))
    cond = Conditioning.cat([conditions.student[points.prompt] for points, conditions, _ in parts])
    x, t = (torch.cat([getattr(points, name) for points, _, _ in parts]) for name in ("x", "t"))
    predictions = family.predict(student, x, t, cond).split([len(points) for points, _, _ in parts])
    losses = []
    for (points, _, target), prediction in zip(parts, predictions, strict=True):
        weight = None
        if objective.weighting != "native":
            alpha, sigma = family.alpha_sigma(points.t)
            weight = objectives.weight(objective.weighting, family.prediction_type, alpha, sigma)
        losses.append(objectives.loss(prediction, target, weight))
    return torch.stack(losses if len(losses) == 2 else [losses[0], torch.zeros_like(losses[0])])


def sample_indices(plan: TrainPlan, micro: int, process: int, num_processes: int) -> range:
    """Sample numbers, within the update and over all processes, of one forward pass of one process."""
    start = (micro * num_processes + process) * plan.batch_size
    return range(start, start + plan.batch_size)


def learning_rate(plan: TrainPlan, step: int) -> float:
    """Learning rate of update `step` (from 0): a rise over `warmup` updates, then the schedule, never 0."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / (plan.warmup + 1)
    done = (step - plan.warmup) / max(1, plan.updates - plan.warmup)
    shape = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    return plan.lr * shape[plan.lr_schedule]


def make_views(denoiser: torch.nn.Module, names: Sequence[str], plan: TrainPlan) -> Views:
    """Student and teacher, as the plan has them learn: an adapter, or the weights themselves."""
    if plan.lora:
        return LoraViews(denoiser, names, plan.lora, plan.seed)
    return WeightViews(denoiser, names, plan.masters)


def check_optimizer(plan: TrainPlan, largest: int) -> None:
    """Raises UserError where 8 bits would change nothing: the largest trained tensor has too few values for them."""
    if plan.optimizer == "adam8bit" and largest < LEAST_8BIT:
        raise UserError(
            f"training.optimizer=adam8bit changes nothing: no trained tensor has {LEAST_8BIT} values; set "
            "training.optimizer=adam"
        )


def make_adam(plan: TrainPlan, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Adam, its moments float32, or in 8 bits for every tensor of 4096 values and more.

    Raises:
        UserError: see `check_optimizer`.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022 (bitsandbytes).
    """
    check_optimizer(plan, max(parameter.numel() for parameter in parameters))
    if plan.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=plan.lr, betas=plan.betas)
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(parameters, lr=plan.lr, betas=plan.betas, min_8bit_size=LEAST_8BIT)


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
