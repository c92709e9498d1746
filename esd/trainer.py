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

import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from esd import checkpoint, lora, objectives, seeding
from esd.errors import UserError
from esd.families import Conditioning, Family
from esd.lora import Lora, LoraViews, LowRank
from esd.objectives import Anchor, Objective
from esd.progress import Log, termination
from esd.sources import ALL, Bank, Conditions, OnPolicy, Points, Sampling, Source
from esd.storage import State, load_state, save_state
from esd.weights import Views, WeightViews


class Stopped(Exception):
    """SIGTERM or Ctrl-C came between two updates: the state is saved, the same command resumes.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class TrainPlan:
    """Everything that decides the erased weights, besides the base; `esd.config` has the defaults.

    Attributes:
        concepts: what is erased; provenance only, `prompts` is what is trained on.
        prompts: training prompts that name the concepts; taken in turn, and one may stand several times.
        erase_from: () or as many prompts: erase the concept only as an attribute of these.
        preserve: prompts whose prediction should stay; () for none.
        preserve_weight: of that term.
        selection: expression for the trained parameters.
        lora: train an adapter beside them; None trains them themselves.
        objective: anchor, eta, weighting.
        sampling: how x_t is drawn.
        sampler: who draws it, the "student" (the paper) or the "teacher".
        sample_with: prompt of the rollouts where erase_from is set.
        rollouts: in the bank; 0 keeps none and rolls out anew.
        reuse: of a point in the bank.
        staleness: updates that points drawn by the student serve; None where the teacher draws them.
        updates: optimizer steps.
        batch_size: points per forward pass and process.
        gradient_accumulation: forward passes per update.
        lr: learning rate; lr_schedule "constant", "cosine" or "linear" after `warmup` updates.
        betas: of Adam.
        weight_decay: share of the way back to the base per update, times lr.
        clip_norm: largest gradient norm, 0 for no limit.
        gradient_checkpointing: less memory, more time, same gradients.
        save_every: updates between resumable states, 0 for none but when stopped.
        seed: of every draw.

    Raises:
        UserError: prompts to erase from without the anchor "erase_from", or the other way round; the student as
            sampler without a staleness, or the other way round; a prompt is both trained on and preserved.
    """

    concepts: tuple[str, ...]
    prompts: tuple[str, ...]
    erase_from: tuple[str, ...]
    preserve: tuple[str, ...]
    preserve_weight: float
    selection: str
    lora: Lora | None
    objective: Objective
    sampling: Sampling
    sampler: Literal["student", "teacher"]
    sample_with: Literal["erase_from", "concept"]
    rollouts: int
    reuse: int
    staleness: int | None
    updates: int
    batch_size: int
    gradient_accumulation: int
    lr: float
    lr_schedule: Literal["constant", "cosine", "linear"]
    warmup: int
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    gradient_checkpointing: bool
    save_every: int
    seed: int

    def __post_init__(self) -> None:
        if bool(self.erase_from) != (self.objective.anchor == "erase_from"):
            raise UserError(
                f"objective.anchor={self.objective.anchor} with erase_from={list(self.erase_from)}; prompts to erase "
                "from and the anchor erase_from go together"
            )
        if (self.sampler == "student") != (self.staleness is not None):
            raise UserError(
                f"sampler={self.sampler} with staleness={self.staleness}; points drawn by the student and a staleness, "
                "such as 1, go together"
            )
        if both := set(self.erase_from or self.prompts) & set(self.preserve):
            raise UserError(
                f"preserve.prompts: {min(both)!r} is a training prompt too, so that it would be erased and preserved; "
                "leave it out of one of them"
            )


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
) -> TrainResult:
    """Trains, and writes `run_dir/erased.safetensors`; the family's model is the base again afterwards.

    Args:
        family: of a model on the accelerator's device.
        plan: what to do.
        run_dir: gets metrics.jsonl, the checkpoint and, while training, state/.
        accelerator: an `accelerate.Accelerator`, its trackers started if there are any.
        versions: for provenance.

    Raises:
        UserError: see `describe`; the state in run_dir is of another plan or base; or training diverged.
        Stopped: SIGTERM or Ctrl-C came; the state is saved.
    """
    with student_views(family, plan, accelerator) as views:
        return _train(family, plan, views, run_dir, accelerator, versions or {})


@contextmanager
def student_views(family: Family, plan: TrainPlan, accelerator: Any) -> Iterator[Views]:
    """The family's model as student and teacher, for the length of a `with` block; the base again on any exit."""
    denoiser: Any = family.denoiser
    names = family.select(plan.selection).names
    views = LoraViews(denoiser, names, plan.lora, plan.seed) if plan.lora else WeightViews(denoiser, names)
    try:
        if plan.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        yield views
    finally:
        accelerator.unwrap_model(denoiser, keep_fp32_wrapper=False)  # takes autocast off the model's forward
        if plan.gradient_checkpointing:
            denoiser.disable_gradient_checkpointing()
        views.restore()
        family.recall_encoders()


def _train(
    family: Family,
    plan: TrainPlan,
    views: Views,
    run_dir: Path,
    accelerator: Any,
    versions: Mapping[str, str],
) -> TrainResult:
    """What `train` says, with the model already made trainable."""
    erasing, preserving = point_sources(family, plan, views.student, views.teacher, accelerator.num_processes)
    family.release_encoders()
    adam = torch.optim.Adam(views.parameters(), lr=plan.lr, betas=plan.betas)
    student, optimizer = accelerator.prepare(views.student, adam)
    identity = {
        "plan": json.loads(json.dumps(asdict(plan))),
        "base": checkpoint.fingerprint(views.base),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    first, earlier = resume(run_dir / "state", views, adam, identity, erasing)
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
                    save_state(run_dir / "state", state(step + 1, views, adam, identity, spent(), in_use))
                accelerator.wait_for_everyone()
            if stop:
                raise Stopped(f"stopped after update {step + 1} of {plan.updates}; the same command resumes", stop)

    seconds, path = spent(), run_dir / checkpoint.FILE_NAME
    if accelerator.is_main_process:
        differences = views.differences()
        told = provenance(family, plan, views, seconds, versions, accelerator.mixed_precision)
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
) -> tuple[Source, Source | None]:
    """Where the points to erase and to preserve come from; encodes every prompt and samples nothing yet.

    Preserved points are always the teacher's, and so is all they say: they are what must not change.

    Raises:
        UserError: the time rule does not fit the scheduler, the bank cannot fill one update, or the model knows no
            such null prompt or embedded guidance.
    """
    objective, told = plan.objective, plan.objective.embedded_guidance
    if told != 1 and family.guidance != "distilled":
        raise UserError(
            f"objective.embedded_guidance={told:g}: {family.name} is not told a guidance scale; allowed: 1, and "
            "trajectory.guidance_scale for sampling"
        )
    null = family.with_guidance(family.null(objective.null), told)
    negative = family.null(plan.sampling.negative) if plan.sampling.negative else None

    def encoded(prompts: Sequence[str]) -> Conditioning:
        return family.with_guidance(family.encode(prompts), told)

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


def state(
    step: int,
    views: Views,
    adam: torch.optim.Adam,
    identity: Mapping[str, Any],
    seconds: float,
    in_use: Mapping[str, Tensor],
) -> State:
    """What resuming after `step` updates needs: the student's weights, Adam's moments, the time spent.

    And, where points that the student drew serve further updates, these points.
    """
    moments: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in views.named_parameters().items():
        for moment, tensors in moments.items():
            tensors[name] = adam.state[parameter][moment]
    groups: dict[str, Mapping[str, Tensor]] = {"student": views.values(), **moments}
    if in_use:
        groups["points"] = in_use
    return State(step, groups, {"identity": identity, "seconds": seconds})


def resume(
    folder: Path, views: Views, adam: torch.optim.Adam, identity: Mapping[str, Any], erasing: Source
) -> tuple[int, float]:
    """Puts the newest valid state into the student, Adam and the source of points that the student drew.

    Returns:
        (updates done, seconds spent); zeros where no state is.

    Raises:
        UserError: the state is of another plan, base, number of processes or mixed precision.
    """
    saved = load_state(folder)
    if saved is None:
        return 0, 0.0
    if saved.facts["identity"] != identity:
        raise UserError(
            f"{folder} holds the state of another plan, base, number of processes or mixed precision; "
            "choose another run_dir, or remove it"
        )
    if in_use := saved.tensors.get("points"):
        erasing.put_back(saved.step, in_use)
    views.load_values(saved.tensors["student"])
    for name, parameter in views.named_parameters().items():
        moments = {moment: saved.tensors[moment][name].to(parameter.device) for moment in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.tensor(float(saved.step)), **moments}
    return saved.step, float(saved.facts["seconds"])


def provenance(
    family: Family,
    plan: TrainPlan,
    views: Views,
    seconds: float,
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
        "versions": dict(versions),
    }


def largest(accelerator: Any, number: int) -> int:
    """The largest of all processes' numbers; all processes get the same answer."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def describe(family: Family, plan: TrainPlan, num_processes: int = 1) -> str:
    """What would be trained, for a person to read before it starts; finds whatever is wrong with the plan.

    Raises:
        UserError: the selection matches nothing, no latents have the size asked for, or see `point_sources`.
    """
    erasing, preserving = point_sources(family, plan, None, None, num_processes)
    objective, sampling = plan.objective, plan.sampling
    chosen = family.select(plan.selection)
    selection = chosen.describe().replace("\n", f"\n{'':11}")
    points = plan.batch_size * plan.gradient_accumulation * num_processes
    shared = f" in {num_processes} processes" if num_processes > 1 else ""
    cut = family.cut([*plan.prompts, *plan.erase_from, *plan.preserve])
    _, height, width = family.latent_shape(sampling.size)
    revision = f" at {family.base_revision}" if family.base_revision else ""
    guidance = {
        "cfg": f"at guidance {sampling.guidance_scale:g}" if sampling.guidance_scale > 1 else "without guidance",
        "distilled": f"told guidance {sampling.guidance_scale:g} "
        f"(teacher and student: {objective.embedded_guidance:g})",
        "none": "without guidance",
    }[family.guidance]
    lines = {
        "erase": ", ".join(plan.concepts),
        "base": f"{family.base_name}{revision} ({family.name}, predicts {family.prediction_type})",
        "train": selection,
        "adapter": plan.lora and adapter(family, chosen.names, plan.lora),
        "prompts": listed(plan.prompts) + used(erasing, plan.prompts, plan.updates),
        "from": listed(plan.erase_from),
        "preserve": preserving
        and f"{listed(plan.preserve)}{used(preserving, plan.preserve, plan.updates)}, weight {plan.preserve_weight:g}",
        "objective": f"anchor {objective.anchor}, eta {objective.eta:g}, weighting {objective.weighting}",
        "points": f"sampled by the {plan.sampler} in {sampling.num_steps} steps {guidance}, "
        f"latents {height} x {width}, {served(erasing, plan, points)}",
        "updates": f"{plan.updates} of {points} points{shared}, lr {plan.lr:g} {plan.lr_schedule}",
    }
    warnings = [f"{'cut':<10} {prompt!r} is too long; not read: {end!r}" for prompt, end in cut.items()]
    warnings += [f"{'mind':<10} {told}" for told in family.advice(sampling.num_steps, sampling.guidance_scale)]
    return "\n".join([*(f"{name:<10} {text}" for name, text in lines.items() if text), *warnings])


def adapter(family: Family, names: Sequence[str], how: Lora) -> str:
    """What an adapter on these parameters trains, and what it leaves as it is.

    Raises:
        UserError: see `esd.lora.matrices`.
    """
    beside = len(lora.matrices(family.denoiser, names))
    left = f"; {len(names) - beside} biases, norms and embeddings stay" if beside < len(names) else ""
    values = lora.size(family.denoiser, names, how.rank)
    return f"LoRA of rank {how.rank}, alpha {how.alpha:g}, beside {beside} matrices: {values:,} values{left}"


def served(source: Source, plan: TrainPlan, per_update: int) -> str:
    """How many updates points serve, and of a bank how many of its points and how often."""
    updates = source.updates_per_build
    anew = f"anew for every {updates} updates" if updates > 1 else "anew for every update"
    if not isinstance(source, Bank):
        return anew
    draws = updates * per_update
    part = f"{draws} of its {source.size} points used once"
    if draws >= source.size:
        part = f"each of its {source.size} points used up to {math.ceil(draws / source.size)} times"
    bank = f"a bank of {plan.rollouts} rollouts, {part}"
    return f"{bank}, {anew}" if plan.sampler == "student" else bank


def used(source: Source, texts: Sequence[str], updates: int) -> str:
    """How many different prompts the run trains on, where those are not all."""
    visited, different = {texts[row] for row in source.visited(updates)}, set(texts)
    return "" if visited == different else f"; uses {len(visited)} of {len(different)} prompts"


def listed(texts: Sequence[str], most: int = 6) -> str:
    """The different texts, the first few spelled out and the rest counted."""
    different = list(dict.fromkeys(texts))
    rest = f" and {len(different) - most} more" if len(different) > most else ""
    return ", ".join(repr(text) for text in different[:most]) + rest
