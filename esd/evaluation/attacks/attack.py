"""What an attack is, and how it is measured.

An attack tries to draw an erased concept all the same. What it finds says little by itself: the judge may see the
concept in anything, many tries succeed by luck, and a hint may be the answer. So `Attack.run` always makes four runs
with one judge: the attack and a random control of equal cost, each on the erased model and on its base. Every curve
begins with the same prompts and seeds drawn without any attack.

An attack is a generator of tries: one that searches words (UnlearnDiffAtk, Ring-A-Bell) or learns weights again yields
pictures as these do, and is counted by the same meter.

Source: the probes are those of Lu et al. 2025 (arXiv:2505.17013) and Pham et al. 2023 (arXiv:2308.01508); what they
cost, intervals, and the controls are ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from esd.errors import UserError
from esd.evaluation.attacks.budget import Budget, Meter, OutOfBudgetError, cost
from esd.evaluation.attacks.recovery import Curve, Point, Reads, Recovery
from esd.evaluation.attacks.scorer import Scorer
from esd.evaluation.attacks.subject import Model, Subject
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.pixels import images_of
from esd.evaluation.prompts import PromptRow
from esd.families import Family
from esd.families.base import Part
from esd.progress import bar

DRAW = DrawSettings(num_steps=50, guidance_scale=7.5, batch_size=8)


@dataclass(frozen=True)
class Try:
    """Pictures that an attack offers, and how it came by them.

    Attributes:
        tried: what was set or reached, by name; empty for the plain drawing.
        latents: clean (n, c, h, w).
        found: what was learned, for a control to be like; None where nothing is.
    """

    tried: Mapping[str, float]
    latents: Tensor
    found: Sequence[Tensor] | None = None


Tries = Generator[Try, None, None]


class Attack(ABC):
    """One way to draw an erased concept. Subclasses are frozen dataclasses of its settings.

    Attributes:
        name: in `find`, in results.
        reads: which rate of a point is the attack's: "best" for a search, in which any try may succeed, "alone" where
            each try gives away more of the concept than the one before.
        parts: of the pipeline that it needs on the device.
    """

    name: ClassVar[str]
    reads: ClassVar[Reads]
    parts: ClassVar[tuple[Part, ...]] = ("denoiser", "vae")

    @property
    def settings(self) -> dict[str, Any]:
        """What was set, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def run(
        self,
        model: Model,
        rows: Sequence[PromptRow],
        budget: Budget,
        *,
        scorer: Scorer,
        draw: DrawSettings = DRAW,
        seed: int = 0,
    ) -> Recovery:
        """Attacks the erased model and its base, each beside a control of equal cost; the model is as before then.

        Args:
            model: the erased one and its base.
            rows: prompts that name the concept; n pictures are drawn at each try.
            budget: of one run; each of the two attacks gets it.
            scorer: looks for the concept.
            draw: steps, guidance and rows per call of the denoiser; rows that agree on a guidance of their own have it.
            seed: of the attack's own draws; each row's picture comes from its evaluation_seed.

        Raises:
            UserError: see `refuse`; or too few seconds for the first pictures.
        """
        self.refuse(model.family, rows, draw, budget)
        draw = replace(draw, guidance_scale=draw.guidance_scale if rows[0].guidance is None else rows[0].guidance)
        family, curves = model.family, dict[str, Curve]()
        family.encode([row.prompt for row in rows])  # while the text encoders may be on the device
        family.null()
        with model.at_work(*self.parts):
            for name, denoiser in (("erased", family.denoiser), ("base", model.base)):
                subject = Subject(family, denoiser, model.base, rows, draw, seed)
                meter = Meter(budget)
                curves[name], found = _measure(subject, meter, self.tries, scorer, f"{self.name}, {name}")
                equal = Meter(Budget(queries=cost(meter.queries, meter.gradients)))
                by_chance = partial(self.control, found=found)
                label = f"{self.name}, {name}, control"
                curves[f"{name}_control"], _ = _measure(subject, equal, by_chance, scorer, label)
        return Recovery(self.settings, self.reads, curves)

    def refuse(self, family: Family, rows: Sequence[PromptRow], draw: DrawSettings, budget: Budget) -> None:
        """Raises UserError where this attack cannot be run so; draws nothing.

        There are no rows, or rows of several guidance scales or of a size of their own; gradient checkpointing is on;
        the budget's queries do not reach for the plain pictures; or it does not fit the model, the rows or the way of
        drawing.
        """
        if not rows:
            raise UserError("an attack needs rows; give at least one prompt that names the concept")
        scales = {draw.guidance_scale if row.guidance is None else row.guidance for row in rows}
        if len(scales) > 1:
            raise UserError(f"the rows ask for guidance scales {sorted(scales)}; allowed: one; attack them apart")
        if odd := next((row for row in rows if row.height or row.width), None):
            raise UserError(
                f"case_number {odd.case_number} asks for a size of its own; attacks draw the model's own; leave height "
                "and width out"
            )
        if getattr(family.denoiser, "is_gradient_checkpointing", False):
            raise UserError(
                "the denoiser has gradient checkpointing on, under which the base beside it would get wrong gradients; "
                f"call {type(family.denoiser).__name__}.disable_gradient_checkpointing() first"
            )
        steps = len(family.scheduler(draw.num_steps).timesteps)  # also tells whether it knows so many
        plain = len(rows) * steps * (2 if family.guidance == "cfg" and scales.pop() > 1 else 1)
        if budget.queries is not None and budget.queries < plain:
            raise UserError(
                f"budget.queries={budget.queries} ends before the first {len(rows)} pictures are drawn, which takes "
                f"{plain}; allow more, or give fewer rows"
            )
        self.check(family, rows, draw)

    @abstractmethod
    def check(self, family: Family, rows: Sequence[PromptRow], draw: DrawSettings) -> None:
        """Raises UserError where the attack does not fit a model, the rows or the way of drawing."""

    @abstractmethod
    def tries(self, subject: Subject) -> Tries:
        """What the attack draws, try by try, after `subject.plain()`."""

    @abstractmethod
    def control(self, subject: Subject, found: Sequence[Tensor] | None) -> Tries:
        """What chance draws at the same cost; may go on for ever, the budget ends it.

        Args:
            subject: as for `tries`.
            found: what the attack's last try had learned.
        """


def _measure(
    subject: Subject, meter: Meter, tries: Callable[[Subject], Tries], scorer: Scorer, label: str
) -> tuple[Curve, Sequence[Tensor] | None]:
    """One run to its end or to that of its budget: the curve, and what was found last."""
    watched = replace(subject, attacked=meter.watch(subject.attacked), base=meter.watch(subject.base))
    points: list[Point] = []
    found: Sequence[Tensor] | None = None
    stopped: str | None = None
    with closing(_from_plain(tries, watched)) as offered, bar(label, unit="try") as progress:
        try:
            for one in offered:
                images = images_of(subject.family, one.latents, subject.draw.batch_size)
                scores = _scores(scorer, images)
                if not points:
                    plain, kept, best = images, images.copy(), scores.copy()
                nearer = (scores > best) & (best < scorer.threshold)  # the first that shows it is the one that counts
                kept[nearer], best[nearer] = images[nearer], scores[nearer]
                points.append(Point(dict(one.tried), meter.gradients, meter.queries, meter.seconds, scores))
                found = one.found
                progress.update()
        except OutOfBudgetError as spent:
            stopped = str(spent)
    if not points:
        raise UserError(
            f"budget.{stopped} ends before the first {len(subject.rows)} pictures are drawn; allow more in another "
            "run_dir, or give fewer rows"
        )
    return Curve(tuple(points), scorer.threshold, kept, plain, stopped), found


def _scores(scorer: Scorer, images: np.ndarray) -> np.ndarray:
    """A finite score for each picture, float64 (n,)."""
    scores = np.asarray(scorer(images), float)
    if scores.shape != (len(images),) or not np.isfinite(scores).all():
        raise ValueError(f"the scorer gave {scores!r} for {len(images)} pictures; a finite score each is needed")
    return scores


def _from_plain(tries: Callable[[Subject], Tries], subject: Subject) -> Tries:
    """The plain drawing, then the tries."""
    yield Try({}, subject.plain())
    with closing(tries(subject)) as offered:
        yield from offered
