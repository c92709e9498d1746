"""How much memory a run takes, phase by phase, before it takes any.

    encode  the text encoders, and nothing else
    sample  the denoiser rolls out x_t and the teacher is asked, without gradients
    train   the student's forward and backward pass, and Adam's step
    draw    the stock pipeline, its parts one after the other

Parts that stay are counted from the model's own tensors. What comes and goes is not estimated from formulas: the
denoiser is built once more out of *fake* tensors, which have shapes and no values, one update is run on it by the same
code that trains, and every storage is counted from when it is made till it is freed. So activations, what gradient
checkpointing spares, copies that autocast makes and gradients are all in the figure, for any model and selection.

Not counted: what the kernels of a card use besides their results, the gaps that its allocator leaves, its context
(`RESERVE` stands for these), and the activations of a text encoder, which reads one prompt at a time. Norms under
CUDA's autocast are float32, here they are not.

Source: ours; counting storages under fake tensors is how torch.distributed._tools.mem_tracker does it.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esd import float8, objectives
from esd.families import Conditioning, Family
from esd.learner import LEAST_8BIT, make_views, point_sources
from esd.plan import TrainPlan
from esd.sources import Source
from esd.trajectory import times
from esd.weights import Views

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
    with _stand_in(family, plan, names, cond, mixed_precision) as model:
        parameters = model.views.parameters()
        trained = sum(map(_size, parameters))
        copies = 0 if plan.lora else sum(_size(tensor) for tensor in model.views.base.values())
        passing = model.passing(sampled, latents)
        learning = model.learning(plan, latents) - trained
    drawing = _drawing(family, plan, names, cond, images * (2 if guided else 1)) if images else 0
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


def _largest_part(family: Family, denoiser: int, activations: int, images: int) -> dict[str, int]:
    """The part of the stock pipeline that takes most while it works, with what it makes."""
    decoding = {"VAE": sum(map(weights, family.modules("vae"))), "activations": decoder(family, images)}
    encoding = {"text encoder": max(map(weights, family.modules("encoders")))}
    return max(
        ({"denoiser": denoiser, "activations": activations}, decoding, encoding), key=lambda part: sum(part.values())
    )


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


class Counter(TorchDispatchMode):
    """Counts the bytes of all storages that are made in a `with` block, from when they are made till they are freed.

    Attributes:
        now: bytes there are.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never counts what holds these tensors: they were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._known:
                self._known[storage] = None
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class StandIn:
    """A denoiser of fake tensors as student and teacher, ready to be called as the real one is."""

    family: Family
    views: Views
    cond: Conditioning
    autocast: Callable[[], Any]

    def passing(self, rows: int, latents: Sequence[int]) -> int:
        """The most bytes that a call of so many rows makes, without gradients."""
        with self._counting() as counter, torch.no_grad():
            self._predict(rows, latents)
        return counter.peak

    def learning(self, plan: TrainPlan, latents: Sequence[int]) -> int:
        """The most bytes that a forward and a backward pass of one micro-batch make, gradients included."""
        rows = plan.batch_size * (2 if plan.preserve else 1)
        with self._counting() as counter:
            if plan.gradient_accumulation > 1:  # those of the pass before are there
                for parameter in self.views.parameters():
                    parameter.grad = torch.empty_like(parameter)
            prediction = self._predict(rows, latents)
            objectives.loss(prediction, torch.empty_like(prediction), None).sum().backward()
        return counter.peak

    def _predict(self, rows: int, latents: Sequence[int]) -> Tensor:
        x, t = torch.empty(rows, *latents), torch.empty(rows)
        with self.autocast():
            return self.family.predict(self.views.student, x, t, self.cond[[0] * rows])

    @contextmanager
    def _counting(self) -> Iterator[Counter]:
        counter = Counter()
        there = [*self.views.student.parameters(), *self.views.student.buffers()]
        counter.ignore([*there, *self.cond.tensors.values()])
        with counter:
            yield counter


@contextmanager
def _stand_in(
    family: Family, plan: TrainPlan, names: Sequence[str], cond: Conditioning, mixed_precision: str
) -> Iterator[StandIn]:
    """The family's denoiser out of fake tensors, as the plan trains it; they are fake only inside the block."""
    precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    student = _twin(family.denoiser, family.dtype)
    with float8.stored(student) if plan.frozen else nullcontext():
        views = make_views(student, names, plan)
        if plan.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        with FakeTensorMode():
            _make_fake(student)
            told = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in cond.tensors.items()}
            yield StandIn(
                family,
                views,
                Conditioning(told),
                lambda: torch.autocast("cpu", precision, enabled=mixed_precision != "no"),
            )


def _drawing(family: Family, plan: TrainPlan, names: Sequence[str], cond: Conditioning, rows: int) -> int:
    """The most bytes that a call of the stock pipeline's denoiser makes: without autocast, an adapter merged."""
    denoiser = _twin(family.denoiser, family.dtype)
    with float8.stored(denoiser, but=names) if plan.frozen else nullcontext(), FakeTensorMode():
        _make_fake(denoiser)
        told = Conditioning({name: torch.empty(rows, *t.shape[1:], dtype=t.dtype) for name, t in cond.tensors.items()})
        x, t = torch.empty(rows, *family.latent_shape()), torch.empty(rows)
        counter = Counter()
        counter.ignore([*denoiser.parameters(), *denoiser.buffers()])
        with counter, torch.no_grad():
            family.predict(denoiser, x, t, told)
    return counter.peak


def decoder(family: Family, images: int) -> int:
    """The most bytes that decoding so many pictures makes."""
    (real,) = family.modules("vae")
    vae = _twin(real, family.dtype)
    with FakeTensorMode():
        _make_fake(vae)
        latents = torch.empty(images, *family.decoded_shape(), dtype=family.dtype)
        counter = Counter()
        counter.ignore([*vae.parameters(), *vae.buffers()])
        with counter, torch.no_grad():
            vae.decode(latents, return_dict=False)
    return counter.peak


def _twin(module: Any, dtype: torch.dtype) -> Any:
    """A module as this one is configured, on the meta device, its parameters in another precision."""
    with torch.device("meta"):
        twin = type(module).from_config(module.config)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)
    return twin


def _make_fake(module: nn.Module) -> None:
    """Puts fake tensors of the CPU in place of those on the meta device, whose attention would be another."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def amount(size: int) -> str:
    """Bytes in GB, or in MB where that says more."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 2**20:.3g} MB"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
