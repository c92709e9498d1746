"""What would be trained, in lines for a person to read before it starts; a plan that cannot work is found here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esd import float8, lora
from esd.errors import UserError
from esd.families import Family
from esd.learner import check_optimizer, point_sources
from esd.lora import Lora
from esd.plan import TrainPlan
from esd.sources import Bank, Source


def describe(family: Family, plan: TrainPlan, num_processes: int = 1, *, drawn: tuple[int, float] | None = None) -> str:
    """What would be trained, for a person to read before it starts; finds whatever is wrong with the plan.

    Args:
        family: of the base.
        plan: what is trained.
        num_processes: that share an update.
        drawn: (num_steps, guidance_scale) of the pictures drawn afterwards; None for none.

    Raises:
        UserError: the selection matches nothing, no latents have the size asked for, blocks are to be compiled and
            diffusers knows none in this denoiser, or see `point_sources` and `check_optimizer`.
    """
    if plan.compile and not getattr(family.denoiser, "_repeated_blocks", None):
        raise UserError(
            f"training.compile=true: diffusers names no blocks of {type(family.denoiser).__name__} to compile; set "
            "training.compile=false"
        )
    erasing, preserving = point_sources(family, plan, None, None, num_processes)
    objective, sampling = plan.objective, plan.sampling
    chosen = family.select(plan.selection)
    check_optimizer(plan, largest(family, plan, chosen.names))
    texts = [*plan.prompts, *plan.erase_from, *plan.preserve]
    selection = chosen.describe().replace("\n", f"\n{'':11}")
    points = plan.batch_size * plan.gradient_accumulation * num_processes
    shared = f" in {num_processes} processes" if num_processes > 1 else ""
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
        "frozen": plan.frozen and f"{len(float8.linears(family.denoiser))} matrices stored in {plan.frozen}",
        "prompts": listed(plan.prompts) + used(erasing, plan.prompts, plan.updates),
        "from": plan.erase_from and listed(plan.erase_from) + drawn_with(plan),
        "preserve": preserving
        and f"{listed(plan.preserve)}{used(preserving, plan.preserve, plan.updates)}, weight {plan.preserve_weight:g}",
        "objective": f"anchor {objective.anchor}, eta {objective.eta:g}, weighting {objective.weighting}",
        "points": f"sampled by the {plan.sampler} in {sampling.num_steps} steps {guidance}, "
        f"latents {height} x {width}, {served(erasing, plan, points)}",
        "updates": f"{plan.updates} of {points} points{shared}, lr {plan.lr:g} {plan.lr_schedule}",
    }
    warnings = [f"{'cut':<10} {prompt!r} is too long; not read: {end!r}" for prompt, end in family.cut(texts).items()]
    partly = family.partly_read(texts)
    warnings += [f"{'mind':<10} {prompt!r}: only T5 reads the end, CLIP not: {end!r}" for prompt, end in partly.items()]
    settings = {"trajectory": (sampling.num_steps, sampling.guidance_scale)} | ({"evaluation": drawn} if drawn else {})
    warnings += [f"{'mind':<10} {name}.{told}" for name, how in settings.items() for told in family.advice(*how)]
    warnings += [f"{'mind':<10} {told}" for told in without_effect(family, plan, chosen.names)]
    return "\n".join([*(f"{name:<10} {text}" for name, text in lines.items() if text), *warnings])


def without_effect(family: Family, plan: TrainPlan, names: Sequence[str]) -> list[str]:
    """Settings that are legal and change nothing here."""
    told = []
    if plan.sample_with == "concept" and not plan.erase_from:
        told.append("trajectory.sample_with=concept: without erase_from every rollout is of the concept")
    if plan.lora:
        most = max(min(rows, columns) for rows, columns in lora.shapes(family.denoiser, names).values())
        if plan.lora.rank > most:
            told.append(f"weights.rank={plan.lora.rank}: no change to these matrices has a rank above {most}")
    return told


def largest(family: Family, plan: TrainPlan, names: Sequence[str]) -> int:
    """How many values the largest trained tensor has."""
    if plan.lora:
        return plan.lora.rank * max(map(max, lora.shapes(family.denoiser, names).values()))
    parameters = dict(family.denoiser.named_parameters())
    return max(parameters[name].numel() for name in names)


def drawn_with(plan: TrainPlan) -> str:
    """Which prompt the rollouts draw, where an attribute is erased from a concept."""
    return "; rollouts draw the concept" if plan.sample_with == "concept" else ", which rollouts draw"


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
