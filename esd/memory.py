"""How much memory a run takes, phase by phase, before it takes any.

    encode  the text encoders, and nothing else
    sample  the denoiser rolls out x_t and the teacher is asked, without gradients
    train   the student's forward and backward pass, and Adam's step
    draw    the stock pipeline, its parts one after the other

Parts that stay are counted from the model's own tensors, and what comes and goes by running one update without values
(`esd.activations`).

Not counted: what the kernels of a card use besides their results, the gaps that its allocator leaves, its context
(`RESERVE` stands for these), and the activations of a text encoder, which reads one prompt at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esd import activations, float8
from esd.families import Conditioning, Family
from esd.learner import LEAST_8BIT, point_sources
from esd.plan import TrainPlan
from esd.sources import Source
from esd.trajectory import times

GB = 2**30  # as cards are sold
RESERVE = 1.0  # GB of a card that are not a run's to fill


@dataclass(frozen=True)
class Phase:
    """What is on the device at the worst moment of one phase.

    Attributes:
        name: of the phase.
        parts: bytes by what they are.
        mends: settings that would make it smaller.
    """

    name: str
    parts: Mapping[str, int]
    mends: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        shown = [f"{what} {amount(size)}" for what, size in self.parts.items() if size > self.total / 200]
        return f"{self.name} {amount(self.total)}" + (f": {', '.join(shown)}" if len(shown) > 1 else "")


@dataclass(frozen=True)
class Memory:
    """The phases of a run in their order; its peak is the largest of them."""

    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    def verdict(self, card: float | None) -> str:
        """Which phase is the largest, and whether a card of so many GB has room for it; None for no card."""
        most = self.largest
        peak = f"at most {amount(most.total)}, in the phase {most.name!r}"
        if card is None:
            return peak
        if most.total / GB + RESERVE <= card:
            return f"{peak}; fits {card:g} GB"
        over = [phase for phase in self.phases if phase.total / GB + RESERVE > card]
        mends = dict.fromkeys(mend for phase in over for mend in phase.mends)
        return f"{peak}; does not fit {card:g} GB, of which {RESERVE:g} is the device's own; " + (
            f"smaller with {', '.join(mends)}" if mends else "no setting makes it smaller"
        )


def measure(
    family: Family,
    plan: TrainPlan,
    cond: Conditioning,
    *,
    mixed_precision: str = "no",
    processes: int = 1,
    images: int = 0,
    guidance_scale: float = 1.0,
) -> Memory:
    """The memory that a run takes on each device; nothing is allocated, and no weight is read.

    Args:
        family: of the base; its modules may be on the meta device.
        plan: what is trained.
        cond: of one prompt, for its shapes.
        mixed_precision: of autocast, "no", "bf16" or "fp16".
        processes: that share an update; more than one hold as many bytes again as the gradients take, in the buckets
            that DDP sends them in.
        images: pictures drawn in one call afterwards, 0 for none.
        guidance_scale: of these pictures.
    """
    names, cond = family.select(plan.selection).names, cond.to(dtype=family.dtype)
    latents = family.latent_shape(plan.sampling.size)
    guided = family.guidance == "cfg" and guidance_scale > 1
    blank = Conditioning({name: torch.ones(1) for name in cond.tensors})
    student, teacher = object(), object()  # asked nothing here: only that they are two
    erasing, preserving = point_sources(family, plan, student, teacher, processes, stand_in=blank)
    sources = [source for source in (erasing, preserving) if source]
    sampled = max(source.most_rows(plan.batch_size) for source in sources)
    with activations.stand_in(family, plan, names, cond, mixed_precision) as model:
        parameters = model.views.parameters()
        trained = sum(map(_size, parameters))
        copies = 0 if plan.lora else sum(_size(tensor) for tensor in model.views.base.values())
        passing = model.passing(sampled, latents)
        learning = model.learning(plan, latents) - trained
    drawing = activations.drawing(family, plan, names, cond, images * (2 if guided else 1)) if images else 0
    denoiser, gradients = weights(family.denoiser), trained
    # pictures are of erased weights, which float8 would round away: those selected are drawn with as they are
    frozen, drawn = float8.spared(family.denoiser), float8.spared(family.denoiser, but=names)
    stay = {
        "frozen weights": denoiser - (0 if plan.lora else copies) - (frozen if plan.frozen else 0),
        "trained weights": trained,
        "their base": copies,
        "Adam's moments": moments(plan, parameters),
        "DDP's buckets": gradients if processes > 1 else 0,
    }
    kept, making = points(family, plan, cond, sources)
    keeps_gradients = plan.rollouts == 0 and plan.gradient_accumulation > 1
    parts = {
        "encode": {"text encoders": sum(map(weights, family.modules("encoders")))},
        "sample": {**stay, "gradients": gradients * keeps_gradients, "activations": passing, "points": making},
        # Adam's step makes one more copy of the moments' roots, when the activations are gone
        "train": {**stay, "gradients": gradients, "activations": max(learning, trained), "points": kept},
    }
    if images:
        parts["draw"] = _largest_part(family, denoiser - (drawn if plan.frozen else 0), drawing, images)
    eight = moments(plan, parameters) - moments(dataclasses.replace(plan, optimizer="adam8bit"), parameters)
    spares = {"Adam's moments": eight} | ({} if plan.frozen else {"frozen weights": frozen, "denoiser": drawn})
    phases = [Phase(*phase, _mends(*phase, plan, family, spares, sampled, images)) for phase in parts.items()]
    return Memory(tuple(phases))


def _mends(
    name: str,
    parts: Mapping[str, int],
    plan: TrainPlan,
    family: Family,
    spares: Mapping[str, int],
    sampled: int,
    images: int,
) -> tuple[str, ...]:
    """The settings that would make a phase smaller by more than a fiftieth.

    Args:
        name: of the phase.
        parts: of it.
        plan: as it is.
        family: of the model.
        spares: bytes that fewer bits of a part would spare: float8 of weights, 8 of Adam's moments.
        sampled: most rows in a call of the sampler.
        images: pictures drawn in one call.
    """
    least = sum(parts.values()) / 50

    def much(*of: str) -> bool:
        return sum(parts.get(part, 0) for part in of) > least

    samples, trains, makes = name == "sample", name == "train", much("activations")
    full = plan.lora is None and much("trained weights", "their base", "Adam's moments", "gradients")
    narrow, eight = (
        any(part in parts and spares.get(part, 0) > least for part in among)
        for among in (("frozen weights", "denoiser"), ("Adam's moments",))
    )
    offers = [
        (family.dtype == torch.float32, "model.precision=bfloat16"),
        (trains and makes and not plan.gradient_checkpointing, "training.gradient_checkpointing=true"),
        (trains and makes and plan.batch_size > 1, "a smaller training.batch_size with training.gradient_accumulation"),
        (full, "weights=lora"),
        (full, "a narrower selection"),
        (narrow, "weights.frozen=float8" if plan.lora else "weights=lora weights.frozen=float8"),
        (eight, "training.optimizer=adam8bit"),
        (samples and makes and sampled > 2, "a smaller trajectory.max_batch"),
        (samples and much("points") and (plan.staleness or 1) > 1, "a smaller trajectory.staleness"),
        (much("points") and plan.rollouts > 1, "fewer trajectory.rollouts"),
        ((samples or trains) and much("activations", "points"), "a smaller trajectory.size"),
        (name == "draw" and makes and images > 1, "a smaller evaluation.batch_size"),
    ]
    return tuple(mend for helps, mend in offers if helps)


def _largest_part(family: Family, denoiser: int, made: int, images: int) -> dict[str, int]:
    """The part of the stock pipeline that takes most while it works, with what it makes."""
    decoding = {"VAE": sum(map(weights, family.modules("vae"))), "activations": activations.decoder(family, images)}
    encoding = {"text encoder": max(map(weights, family.modules("encoders")))}
    return max(({"denoiser": denoiser, "activations": made}, decoding, encoding), key=lambda part: sum(part.values()))


def weights(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(map(_size, tensors))


def moments(plan: TrainPlan, parameters: Iterable[Tensor]) -> int:
    """Bytes of Adam's two moments: as precise as the weights, or a byte each and a scale for every 256 of them."""
    if plan.optimizer == "adam":
        return sum(2 * _size(parameter) for parameter in parameters)
    sizes = [parameter.numel() for parameter in parameters]
    return sum(2 * (n + 4 * math.ceil(n / 256) + 4 * 256) if n >= LEAST_8BIT else 8 * n for n in sizes)


def points(family: Family, plan: TrainPlan, cond: Conditioning, sources: Sequence[Source]) -> tuple[int, int]:
    """Bytes of training points and encoded prompts: those that are kept, and the most there is while they are made.

    A bank's points are x_t and the teacher's predictions, float32. While they are made there are the rollout, of x_t
    before and after scaling and two predictions, as the solver leaves it and stacked; and in the end the points
    themselves beside their parts. Where predictions are asked for besides, the rollout is there as it was stacked,
    with x_t, the free predictions and, for each that is asked for, x_t once more and the answers, in parts and joined.
    """
    sampling = plan.sampling
    latents = family.latent_shape(sampling.size)
    one = 4 * math.prod(latents)
    prompts = len(plan.prompts) + len(plan.erase_from) + len(plan.preserve) + 1 + bool(sampling.negative)
    encoded = prompts * sum(_size(tensor) for tensor in cond.tensors.values())
    erasing, preserving = 4 if plan.erase_from else 3, 2 if plan.preserve else 0
    if not plan.rollouts:
        made = plan.batch_size * (plan.staleness or 1)  # by one call
        serving = plan.gradient_accumulation if plan.staleness and plan.staleness > 1 else 1
        kept = (made * serving * erasing + plan.batch_size * preserving) * one
        return encoded + kept, encoded + kept + 4 * made * one
    visits = len(times(sampling.time_rule, family.scheduler(sampling.num_steps, sampling.scheduler, latents)).stops)
    part = min(plan.rollouts, max(1, sampling.max_batch // 2))
    kept = plan.rollouts * visits * (erasing + preserving) * one
    last = plan.rollouts * visits * max(erasing, preserving) * one
    asked = max(len(source.missing) for source in sources)
    making = max(last, part * visits * max(8, 6 + 3 * asked if asked else 0) * one)
    return encoded + kept, encoded * (2 if asked else 1) + kept + making


def amount(size: int) -> str:
    """Bytes in GB, or in MB where that says more."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 2**20:.3g} MB"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
