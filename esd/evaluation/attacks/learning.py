"""What attacks by gradient share: learn what to tell the model, from pictures of the concept, and draw with it.

The base draws examples of the rows' prompts, from seeds that no row has. What is learned minimises the attacked
model's own training loss on them, with all weights frozen: it looks for an input under which the model still denoises
the concept. How far it got is told as the loss on fixed noise, which the gradients never saw. Control: random vectors
of the norms that were learned, fresh ones for each try.

Source: textual inversion (Gal et al. 2022, arXiv:2208.01618) and its use against erased models (Pham et al. 2023,
arXiv:2308.01508).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from esd import objectives, seeding
from esd.errors import UserError
from esd.evaluation.attacks.attack import Attack, Tries, Try
from esd.evaluation.attacks.recovery import Reads
from esd.evaluation.attacks.subject import Subject
from esd.families import Conditioning, Denoiser, Family
from esd.progress import bar

Reader = Callable[[Sequence[Tensor], Sequence[int]], Conditioning]


@dataclass(frozen=True)
class LearningAttack(Attack):
    """Learns vectors by gradient; subclasses say which, and how a prompt is read with them.

    Attributes:
        steps: updates of Adam.
        lr: its learning rate.
        batch_size: examples in each update.
        examples: pictures that the base draws to learn from.
        every: updates between two tries.

    Raises:
        UserError: a value out of range.
    """

    reads: ClassVar[Reads] = "best"
    steps: int = 300
    lr: float = 1e-2
    batch_size: int = 4
    examples: int = 16
    every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "examples", "every"):
            whole(f"{self.name}.{name}", getattr(self, name))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"{self.name}.lr is {self.lr}; allowed: a finite number above 0")

    @abstractmethod
    def start(self, subject: Subject) -> list[Tensor]:
        """Vectors to begin with, float32 (..., d) each."""

    @abstractmethod
    def reader(self, subject: Subject) -> Reader:
        """What reads some of the rows' prompts, given by number, with the vectors in them.

        Gradients flow from the conditioning to the vectors.
        """

    def known(self, subject: Subject, row_of: Sequence[int]) -> Tensor:
        """What it learns from: clean latents (m, c, h, w), example i of row `row_of[i]`."""
        return draw_examples(subject, row_of)

    def tries(self, subject: Subject) -> Tries:
        """A try before the first update, one after every so many, and one after the last."""
        read, vectors = self.reader(subject), [vector.requires_grad_(True) for vector in self.start(subject)]
        row_of = [i % len(subject.rows) for i in range(self.examples)]
        known = self.known(subject, row_of)
        optimiser = torch.optim.Adam(vectors, lr=self.lr)
        with bar(self.name, self.steps, unit="update", leave=False) as progress:
            for step in range(self.steps + 1):
                if step % self.every == 0 or step == self.steps:
                    found = [vector.detach().clone() for vector in vectors]
                    loss = held_out_loss(subject, read, found, known, row_of)
                    yield Try({"update": step, "loss": loss}, _drawn(subject, read, found), found)
                if step == self.steps:
                    return
                sources = seeding.generators(subject.seed, "attack update", step, range(self.batch_size))
                chosen = [seeding.below(source, len(known)) for source in sources]
                optimiser.zero_grad()
                with torch.enable_grad():
                    cond = read(vectors, [row_of[i] for i in chosen])
                    denoising_loss(subject.family, subject.attacked, known[chosen], cond, sources).backward()
                optimiser.step()
                progress.update()

    def control(self, subject: Subject, found: Sequence[Tensor] | None) -> Tries:
        """Random vectors of the same norms, as often as the budget allows; nothing where nothing was learned."""
        read, number = self.reader(subject), 0
        while found is not None:
            source = seeding.generator(subject.seed, "attack by chance", number)
            drawn = [torch.randn(vector.shape, generator=source).to(vector) for vector in found]
            norms = [vector.norm(dim=-1, keepdim=True) for vector in found]
            vectors = [one * norm / one.norm(dim=-1, keepdim=True) for one, norm in zip(drawn, norms, strict=True)]
            yield Try({"number": number}, _drawn(subject, read, vectors))
            number += 1


@torch.no_grad()
def _drawn(subject: Subject, read: Reader, vectors: Sequence[Tensor]) -> Tensor:
    """The rows with these vectors in their prompts, from their own seeds (n, c, h, w)."""
    return subject.sample(subject.attacked, read(vectors, range(len(subject.rows))), subject.own())


def draw_examples(subject: Subject, row_of: Sequence[int]) -> Tensor:
    """Clean latents (m, c, h, w) by the base: example i is of row `row_of[i]`, from a seed that no row has."""
    cond = subject.conditioning()[list(row_of)]
    generators = seeding.generators(subject.seed, "attack example", 0, range(len(row_of)))
    return subject.sample(subject.base, cond, generators)


@torch.no_grad()
def held_out_loss(
    subject: Subject, read: Reader, vectors: Sequence[Tensor], known: Tensor, row_of: Sequence[int]
) -> float:
    """Mean loss of the attacked model on the examples, at times and with noise that no update draws."""
    losses, size = [], subject.draw.batch_size
    for start in range(0, len(known), size):
        part = range(start, min(start + size, len(known)))
        sources = seeding.generators(subject.seed, "attack held out", 0, part)
        cond = read(vectors, [row_of[i] for i in part])
        loss = denoising_loss(subject.family, subject.attacked, known[list(part)], cond, sources)
        losses.append(float(loss) * len(part))
    return sum(losses) / len(known)


def denoising_loss(
    family: Family, denoiser: Denoiser, x_0: Tensor, cond: Conditioning, sources: Sequence[torch.Generator]
) -> Tensor:
    """Mean square error of a denoiser on noised latents, in its own parametrisation; a scalar, float32.

    Args:
        family: of the model.
        denoiser: that predicts.
        x_0: clean latents (b, c, h, w).
        cond: what it is told, b rows.
        sources: b generators; row i draws its time, uniform among the training times but 0, and its noise from its own.
    """
    last = family.pipe.scheduler.config.num_train_timesteps - 1
    t = torch.tensor([1.0 + seeding.below(source, last) for source in sources], device=x_0.device)
    noise = seeding.normal(sources, x_0.shape[1:]).to(x_0)
    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in family.alpha_sigma(t))
    target = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x_0,
        "flow": noise - x_0,
    }[family.prediction_type]
    return objectives.loss(family.predict(denoiser, alpha * x_0 + sigma * noise, t, cond), target)


def whole(name: str, value: float) -> None:
    """Raises UserError unless a setting is a whole number of at least 1."""
    if not (math.isfinite(value) and value == int(value) and value >= 1):
        raise UserError(f"{name} is {value}; allowed: a whole number, at least 1")
