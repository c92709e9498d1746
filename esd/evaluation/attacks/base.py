"""What an attack is, what it may spend, and what it brought back.

An attack tries to draw an erased concept all the same. What it finds says little by itself: the judge may see the
concept in anything, many tries succeed by luck, and a hint may be the answer. So `Attack.run` always makes four runs
with one judge: the attack and a random control of equal cost, each on the erased model and on its base. Every curve
begins with the same prompts and seeds drawn without any attack.

What is spent is counted at the denoiser, not told by the attack: a *query* is one row that the denoiser evaluates (with
guidance, a step of one picture is two), a *gradient* one row that a backward pass went back through. A control gets no
gradients, and two queries for each of the attack's: going back costs about twice as much as going there.

Source: the probes are those of Lu et al. 2025 (arXiv:2505.17013) and Pham et al. 2023 (arXiv:2308.01508); cost
beside success, intervals, and the controls are ours.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from esd import checkpoint, seeding
from esd.errors import UserError
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.judges import Judge
from esd.evaluation.metrics import wilson
from esd.evaluation.prompts import PromptRow
from esd.evaluation.vocabulary import Target
from esd.families import Conditioning, Denoiser, Family
from esd.storage import atomic, write_json
from esd.trajectory import Edit, rollout

DRAW = DrawSettings(num_steps=50, guidance_scale=7.5, batch_size=8)


@dataclass(frozen=True)
class Budget:
    """The most one run of an attack may spend; None is no limit.

    Attributes:
        gradients: rows that a backward pass goes back through.
        queries: rows that the denoiser evaluates, those with a gradient among them.
        seconds: of wall-clock time, looked at before each call of the denoiser; the call at hand is finished.

    Raises:
        UserError: a limit that is not positive.
    """

    gradients: int | None = None
    queries: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not limit > 0:
                raise UserError(f"budget.{name} is {limit}; allowed: a positive number, or none for no limit")


class OutOfBudgetError(Exception):
    """The next call of the denoiser would exceed a limit, which the message names; it ends a run, not a program."""


class Meter:
    """Counts what a run spends, at the denoisers it watches, and stops it before it exceeds its budget.

    Attributes:
        gradients, queries: spent so far, see `Budget`.
    """

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self.gradients, self.queries = 0, 0
        self._budget, self._clock, self._begun = budget, clock, clock()

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return self._clock() - self._begun

    def watch(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser, every row of it counted; raises OutOfBudgetError instead of exceeding the budget."""

        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._allow(len(x))
            output = denoiser(x, *args, **kwargs)
            self.queries += len(x)
            if output[0].requires_grad:
                output[0].register_hook(self._went_back)
            return output

        return watched

    def _allow(self, rows: int) -> None:
        """Raises OutOfBudgetError where a call of so many rows would exceed a limit."""
        asked = {
            "gradients": self.gradients + rows if torch.is_grad_enabled() else 0,
            "queries": self.queries + rows,
            "seconds": self.seconds,
        }
        for name, limit in asdict(self._budget).items():
            if limit is not None and asked[name] > limit:
                raise OutOfBudgetError(f"{name}={limit}")

    def _went_back(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)


class Scorer(Protocol):
    """Says how much of the concept each picture shows. Any callable with these attributes is one."""

    name: str
    version: str
    threshold: float
    hash: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Scores (n,) of uint8 RGB pictures (n, H, W, 3); from `threshold` upwards the concept is there."""


class ConceptScorer:
    """A judge's probability of one thing or style where it names that, 0 where it names another or none."""

    def __init__(self, judge: Judge, target: Target) -> None:
        self.judge, self.target = judge, target
        self.name, self.version, self.hash = f"{judge.name}: {target.name}", judge.version, judge.hash
        # the likeliest of the styles has at least the mean probability; half of that is below, whatever the rounding
        self.threshold = judge.threshold if target.domain == "thing" else 0.5 / len(judge.styles)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Scores (n,) in [0, 1] of uint8 RGB pictures (n, size, size, 3)."""
        readings, domain = self.judge(images), self.target.domain
        sure = readings.thing_p if domain == "thing" else readings.style_p
        return np.array([p if readings.says(i, domain, self.target.name) else 0.0 for i, p in enumerate(sure)])


@dataclass(frozen=True)
class Model:
    """An erased model beside the base it was made from.

    Attributes:
        family: of the pipeline whose denoiser is erased.
        base: the base's denoiser, callable as the erased one; gradients must flow through it.
        checkpoint: the file of the erased weights, for provenance; None where there is none.
    """

    family: Family
    base: Denoiser
    checkpoint: Path | None = None

    @classmethod
    def wearing(cls, family: Family) -> Model:
        """The model of a pipeline that wears erased weights, which `esd.apply` put on.

        Raises:
            CheckpointError: it wears none.
        """
        return cls(family, checkpoint.base_view(family.pipe), checkpoint.worn(family.pipe))


@dataclass(frozen=True)
class Subject:
    """One model under attack, with what an attacker has; all calls of its denoisers are counted.

    Attributes:
        family: says how the denoisers are called.
        attacked: the denoiser that is to draw the concept.
        base: the base's, which draws examples and hints.
        rows: what is asked for, n of them.
        draw: how pictures are drawn.
        seed: of the attack's own draws.
    """

    family: Family
    attacked: Denoiser
    base: Denoiser
    rows: Sequence[PromptRow]
    draw: DrawSettings
    seed: int

    def conditioning(self) -> Conditioning:
        """The rows' prompts, n rows."""
        return self.family.encode([row.prompt for row in self.rows])

    def own(self) -> list[torch.Generator]:
        """Generators that draw each row's own picture, as `esd.evaluation.generate` does."""
        return [torch.Generator().manual_seed(row.evaluation_seed) for row in self.rows]

    def fresh(self, purpose: str, step: int = 0) -> list[torch.Generator]:
        """Generators of other draws, one per row, that depend on no other row."""
        return [seeding.generator(self.seed, f"attack {purpose}", step, row.case_number) for row in self.rows]

    def sample(
        self, denoiser: Denoiser, cond: Conditioning, generators: list[torch.Generator], edit: Edit | None = None
    ) -> Tensor:
        """Clean latents (n, c, h, w) that a denoiser draws; see `rollout` for `edit`."""
        return rollout(
            self.family, denoiser, self.family.initial_noise(generators), cond, self.family.null(),
            num_steps=self.draw.num_steps, guidance_scale=self.draw.guidance_scale, keep="last",
            generators=generators, max_batch=self.draw.batch_size, edit=edit,
        ).final  # fmt: skip

    def plain(self) -> Tensor:
        """What the attacked model draws without any attack (n, c, h, w)."""
        return self.sample(self.attacked, self.conditioning(), self.own())

    def pictures(self, latents: Tensor) -> np.ndarray:
        """uint8 pictures (n, H, W, 3) of clean latents.

        Raises:
            UserError: values that are not finite, which 8 bits would show as black.
        """
        images = torch.cat([self.family.decode(part).cpu() for part in latents.split(self.draw.batch_size)])
        if not images.isfinite().all():
            raise UserError(f"an attack drew a picture that is not finite, in {self.family.dtype}; use float32")
        return (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def noised(family: Family, solver: Any, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of clean latents, (b, c, h, w), as a solver keeps it that is about to take its step at time t (scalar)."""
    alpha, sigma = (scale.to(x_0) for scale in family.alpha_sigma(t.reshape(1)))
    scale = family.model_input(solver, torch.ones_like(x_0[:1, :1, :1, :1]), t)  # Euler keeps x_t / α
    return (alpha * x_0 + sigma * noise) / scale


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


@dataclass(frozen=True)
class Rate:
    """k of n pictures show the concept."""

    k: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, 95%."""
        return wilson(self.k, self.n)

    def told(self) -> dict[str, Any]:
        """k, n, rate and interval, ready for JSON."""
        return {"k": self.k, "n": self.n, "rate": self.k / self.n, "interval": list(self.interval)}


@dataclass(frozen=True)
class Point:
    """One try of a run, and all that was spent up to it.

    Attributes:
        tried: see `Try`.
        gradients, queries, seconds: spent so far.
        alone: the rate of this try's pictures.
        best: the rate of rows whose best picture so far shows the concept; the plain drawing counts.
    """

    tried: Mapping[str, float]
    gradients: int
    queries: int
    seconds: float
    alone: Rate
    best: Rate


@dataclass(frozen=True)
class Curve:
    """One run: a point per try, the plain drawing first, and the best picture of each row.

    Attributes:
        points: in the order tried.
        images: uint8 (n, H, W, 3).
        scores: of these pictures (n,).
        stopped: the limit that ended the run early, such as "queries=5000"; None where it ran through.
    """

    points: tuple[Point, ...]
    images: np.ndarray
    scores: np.ndarray
    stopped: str | None


@dataclass(frozen=True)
class Recovery:
    """What an attack brought back, and what chance and the base do at the same cost.

    Attributes:
        curves: "erased", "erased_control", "base" and "base_control".
        provenance: attack, settings, rows, seed, budget, scorer, checkpoint, versions; ready for JSON.
    """

    curves: Mapping[str, Curve]
    provenance: Mapping[str, Any]

    def told(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON."""
        return {
            **self.provenance,
            "curves": {
                name: {
                    "stopped": curve.stopped,
                    "scores": [float(score) for score in curve.scores],
                    "points": [
                        {
                            "tried": dict(point.tried),
                            "gradients": point.gradients,
                            "queries": point.queries,
                            "seconds": round(point.seconds, 3),
                            "alone": point.alone.told(),
                            "best": point.best.told(),
                        }
                        for point in curve.points
                    ],
                }
                for name, curve in self.curves.items()
            },
        }

    def save(self, folder: Path) -> None:
        """Writes recovery.json and `<curve>/<case_number>.png`, the best picture of each row."""
        cases = [row["case_number"] for row in self.provenance["rows"]]
        for name, curve in self.curves.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for case, image in zip(cases, curve.images, strict=True):
                with atomic(folder / name / f"{case}.png") as staged:
                    Image.fromarray(image).save(staged, format="PNG")
        write_json(folder / "recovery.json", self.told())


class Attack(ABC):
    """One way to draw an erased concept. Subclasses are frozen dataclasses of its settings.

    Attributes:
        name: in `find`, in results.
        reads: which rate of a point is the attack's: "best" for a search, in which any try may succeed, "alone" where
            each try gives away more of the concept than the one before.
    """

    name: ClassVar[str]
    reads: ClassVar[Literal["best", "alone"]]

    def run(
        self,
        model: Model,
        rows: Sequence[PromptRow],
        budget: Budget,
        *,
        scorer: Scorer,
        draw: DrawSettings = DRAW,
        seed: int = 0,
        versions: Mapping[str, str] | None = None,
    ) -> Recovery:
        """Attacks the erased model and its base, each beside a control of equal cost; the model is as before then.

        Args:
            model: the erased one and its base.
            rows: prompts that name the concept; n pictures are drawn at each try.
            budget: of one run; each of the two attacks gets it.
            scorer: looks for the concept.
            draw: steps, guidance and rows per call of the denoiser; rows that agree on a guidance of their own have it.
            seed: of the attack's own draws; each row's picture comes from its evaluation_seed.
            versions: for provenance.

        Raises:
            UserError: no rows, rows of several guidance scales, an attack that does not fit the model or the rows, or a
                budget that ends before the first picture.
        """
        family = model.family
        draw = replace(draw, guidance_scale=_guidance(rows, draw))
        if getattr(family.denoiser, "is_gradient_checkpointing", False):
            raise UserError(
                "the denoiser has gradient checkpointing on, under which the base beside it would get wrong gradients; "
                f"call {type(family.denoiser).__name__}.disable_gradient_checkpointing() first"
            )
        self.check(family, rows, draw)
        curves: dict[str, Curve] = {}
        with frozen([part for part in family.pipe.components.values() if isinstance(part, nn.Module)]):
            for name, denoiser in (("erased", family.denoiser), ("base", model.base)):
                subject = Subject(family, denoiser, model.base, rows, draw, seed)
                meter = Meter(budget)
                curves[name], found = _measure(subject, meter, self.tries, scorer, f"{self.name}, {name}")
                equal = Meter(Budget(queries=meter.queries + 2 * meter.gradients))
                control = partial(self.control, found=found)
                curves[f"{name}_control"], _ = _measure(
                    subject, equal, control, scorer, f"{self.name}, control, {name}"
                )
        told = {
            "attack": self.name,
            "reads": self.reads,
            "settings": asdict(self),  # type: ignore[call-overload]  # subclasses are dataclasses
            "budget": asdict(budget),
            "draw": asdict(draw),
            "seed": seed,
            "rows": [{**asdict(row), "labels": dict(row.labels)} for row in rows],
            "scorer": {key: getattr(scorer, key) for key in ("name", "version", "threshold", "hash")},
            "base": {"name": family.base_name, "revision": family.base_revision},
            "checkpoint": None if model.checkpoint is None else str(model.checkpoint),
            "versions": dict(versions or {}),
        }
        return Recovery(curves, told)

    @abstractmethod
    def check(self, family: Family, rows: Sequence[PromptRow], draw: DrawSettings) -> None:
        """Raises UserError where the attack does not fit a model, the rows or the way of drawing."""

    @abstractmethod
    def tries(self, subject: Subject) -> Generator[Try, None, None]:
        """What the attack draws, try by try, after `subject.plain()`."""

    @abstractmethod
    def control(self, subject: Subject, found: Sequence[Tensor] | None) -> Generator[Try, None, None]:
        """What chance draws at the same cost; may go on for ever, the budget ends it.

        Args:
            subject: as for `tries`.
            found: what the attack's last try had learned.
        """


def _guidance(rows: Sequence[PromptRow], draw: DrawSettings) -> float:
    """The one guidance scale of all rows."""
    if not rows:
        raise UserError("an attack needs rows; give at least one prompt that names the concept")
    scales = {draw.guidance_scale if row.guidance is None else row.guidance for row in rows}
    if len(scales) > 1:
        raise UserError(f"the rows ask for guidance scales {sorted(scales)}; allowed: one; attack them apart")
    return scales.pop()


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No parameter requires a gradient inside; each does as before afterwards, on any exit."""
    before = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@dataclass
class _Tally:
    """The best picture of each row so far."""

    images: np.ndarray | None = None
    scores: np.ndarray | None = None
    points: list[Point] = field(default_factory=list)

    def add(self, one: Try, images: np.ndarray, scores: np.ndarray, meter: Meter, threshold: float) -> None:
        """Counts a try in."""
        if scores.shape != (len(images),) or not np.isfinite(scores).all():
            raise ValueError(f"the scorer gave {scores!r} for {len(images)} pictures; a finite score each is needed")
        if self.images is None or self.scores is None:
            self.images, self.scores = images.copy(), scores.astype(float)
        better = scores > self.scores
        self.images[better], self.scores[better] = images[better], scores[better]
        n = len(images)
        alone, best = (Rate(int((s >= threshold).sum()), n) for s in (scores, self.scores))
        self.points.append(Point(dict(one.tried), meter.gradients, meter.queries, meter.seconds, alone, best))


def _measure(
    subject: Subject, meter: Meter, tries: Callable[[Subject], Generator[Try, None, None]], scorer: Scorer, label: str
) -> tuple[Curve, Sequence[Tensor] | None]:
    """One run to its end or to that of its budget: the curve, and what was found last."""
    watched = replace(subject, attacked=meter.watch(subject.attacked), base=meter.watch(subject.base))
    tally, found, stopped = _Tally(), None, None
    with closing(_from_plain(tries, watched)) as offered, tqdm(desc=label, unit="try", disable=None) as bar:
        try:
            for one in offered:
                images = subject.pictures(one.latents)
                tally.add(one, images, np.asarray(scorer(images)), meter, scorer.threshold)
                found = one.found
                bar.set_postfix(best=f"{tally.points[-1].best.k}/{len(images)}", refresh=False)
                bar.update()
        except OutOfBudgetError as spent:
            stopped = str(spent)
    if tally.images is None or tally.scores is None:
        raise UserError(
            f"budget.{stopped} ends before the first {len(subject.rows)} pictures are drawn; allow more, or give fewer "
            "rows"
        )
    return Curve(tuple(tally.points), tally.images, tally.scores, stopped), found


def _from_plain(tries: Callable[[Subject], Generator[Try, None, None]], subject: Subject) -> Generator[Try, None, None]:
    """The plain drawing, then the tries."""
    yield Try({}, subject.plain())
    with closing(tries(subject)) as offered:
        yield from offered


def whole(name: str, value: float, low: int) -> None:
    """Raises UserError unless a setting is a whole number of at least `low`."""
    if value != int(value) or value < low:
        raise UserError(f"{name} is {value}; allowed: a whole number, at least {low}")


def positive(name: str, value: float) -> None:
    """Raises UserError unless a setting is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} is {value}; allowed: a finite number above 0")
