"""One update of the student: from what it learns, what the loss is, how Adam moves it.

Training points (x_t, t) with all the teacher's predictions come from a source (`esd.sources`); the objective makes the
target of them; the student predicts; squared error, backward, clip, Adam, and a pull towards the base. Optionally a
second source gives points of prompts to preserve, on which the student must go on saying what the teacher says: these
points lie on the teacher's own paths for those prompts, where the erased model will walk, and the teacher's prediction
there comes for free.

Every random draw is keyed by (seed, purpose, update, sample), so n processes draw what one would.

Source: Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023 (arXiv:2303.07345). Ours: the bank, the
preservation term on the teacher's paths, weight decay towards the base.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esd import objectives, seeding
from esd.errors import UserError
from esd.families import Conditioning, Family
from esd.lora import LoraViews
from esd.objectives import Anchor, Objective
from esd.plan import TrainPlan
from esd.resuming import identity_of, resume, state
from esd.sources import ALL, Bank, Conditions, OnPolicy, Points, Source
from esd.storage import save_state
from esd.weights import Views, WeightViews

LEAST_8BIT = 4096  # values of a tensor whose moments 8-bit Adam keeps in 8 bits


class Learner:
    """The student with its optimizer, and the points it learns from."""

    def __init__(self, family: Family, plan: TrainPlan, views: Views, accelerator: Any) -> None:
        self.family, self.plan, self.views, self.accelerator = family, plan, views, accelerator
        self.erasing, self.preserving = point_sources(
            family, plan, views.student, views.teacher, accelerator.num_processes
        )
        self.adam = make_adam(plan, views.parameters())
        self.student, self.optimizer = accelerator.prepare(views.student, self.adam)
        self.identity = identity_of(plan, views, accelerator)

    def resume(self, folder: Path) -> tuple[int, float]:
        """(updates done, seconds spent) of the state in a folder, from which it goes on; zeros where there is none."""
        return resume(folder, self.views, self.adam, self.accelerator.scaler, self.identity, self.erasing)

    def update(self, step: int) -> dict[str, float]:
        """One update, counted from 0: points, targets, prediction, backward, clip, Adam, pull. Returns its metrics."""
        plan, accelerator = self.plan, self.accelerator
        lr = learning_rate(plan, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = torch.zeros(2, device=accelerator.device)  # erase, preserve
        for micro in range(plan.gradient_accumulation):
            indices = sample_indices(plan, micro, accelerator.process_index, accelerator.num_processes)
            erase = self.erasing.points(step, indices)
            keep = self.preserving.points(step, indices) if self.preserving else None
            last = micro == plan.gradient_accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.student):
                terms = loss_terms(
                    self.family, plan.objective, self.student, erase, self.erasing, keep, self.preserving
                )
                total = terms[0] + plan.preserve_weight * terms[1]
                accelerator.backward(total / plan.gradient_accumulation)
            losses += terms.detach() / plan.gradient_accumulation
        norm = accelerator.clip_grad_norm_(self.views.parameters(), plan.clip_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.optimizer.step_was_skipped:  # fp16 overflowed and the scaler backs off: nothing moved, by no gradient
            norm = torch.zeros(())
        moved = self.views.pull(lr * plan.weight_decay)
        erase_loss, preserve_loss = accelerator.reduce(losses, "mean").tolist()
        return {
            "loss": erase_loss + plan.preserve_weight * preserve_loss,
            "loss_erase": erase_loss,
            "loss_preserve": preserve_loss,
            "lr": lr,
            "grad_norm": float(norm),
            "delta_norm": moved,
        }

    def save(self, folder: Path, done: int, seconds: float) -> None:
        """Writes the state after so many updates, from the main process; all processes wait for it."""
        in_use: Mapping[str, Tensor] = {}
        if self.plan.sampler == "student" and not self.erasing.begins(done):
            in_use = self.erasing.in_use(self.accelerator.gather)  # the student that drew them is no more
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            save_state(folder, state(done, self.views, self.adam, scaler, self.identity, seconds, in_use))
        self.accelerator.wait_for_everyone()


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
    check_guidance(family, plan)
    objective, told = plan.objective, plan.objective.embedded_guidance
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


def check_guidance(family: Family, plan: TrainPlan) -> None:
    """Raises UserError for an embedded guidance or a negative prompt of a model that takes none."""
    told = plan.objective.embedded_guidance
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
