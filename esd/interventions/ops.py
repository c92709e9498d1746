"""What an op is: an intervention as a value, and what it gets to see when it is called.

An op answers the questions that it has an answer to: other inputs or outputs of a site, other probabilities of an
attention, other latents between two steps. Whoever calls it puts the answer in the rows that it may change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor

from esd.errors import UserError
from esd.families import Family

from .clock import Moment, Pass, Scope, check_range, check_schedule
from .probabilities import Attention
from .sites import Site, Streams, halvings, is_attention, resolve

On = Pass | Literal["both"]
Predict = Callable[[Any, Tensor, Tensor], Tensor]  # (solver, x, t) -> guided prediction


@dataclass(frozen=True)
class Source:
    """Another run whose tensors an op takes: what it draws, from which noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """What is known before the denoiser is first called.

    Attributes:
        family: of the model.
        num_steps: of the scheduler; None where nothing samples.
        guided: whether the null prompt is evaluated beside each prompt.
        rows: samples in the batch.
        latents: their (h, w).
        prompts: of each sample, where they are known.
        sources: row of the batch that draws each source.
    """

    family: Family
    num_steps: int | None
    guided: bool
    rows: int
    latents: tuple[int, int]
    prompts: Sequence[str] | None = None
    sources: Mapping[Source, int] = field(default_factory=dict)

    def taking(self, op: Op) -> tuple[list[int], int | None]:
        """The samples that an op may change, and the one that it takes from."""
        source = source_of(op)
        row = self.sources[source] if isinstance(source, Source) else source
        serving = {*self.sources.values()} if op.rows is None else set()
        return [i for i in (range(self.rows) if op.rows is None else op.rows) if i not in serving], row

    def prompt(self, row: int) -> str:
        """What a sample draws.

        Raises:
            UserError: nobody said so.
        """
        if self.prompts is None or len(self.prompts) != self.rows:
            raise UserError(
                f"ops that speak of words need the prompt of each of {self.rows} samples; draw with "
                "esd.interventions.sample, or give attach(prompts=[...])"
            )
        return self.prompts[row]

    def grid(self, site: Site) -> tuple[int, int]:
        """(h, w) of the image tokens that an attention works on."""
        height, width = (edge // self.family.patch for edge in self.latents)
        for _ in range(halvings(self.family.denoiser, site)):
            height, width = -(-height // 2), -(-width // 2)
        return height, width


@dataclass
class Call:
    """One call of one site, as an op sees it.

    Attributes:
        site: that is called.
        moment: of the denoiser's call.
        given: each stream's tensor as it came to the site, before any op; the whole batch first.
        inputs: the same as the site works on it; an op returns others, it does not write into them.
        outputs: the same of what the site returned; empty before it ran.
        positions: rows of the batch that the op may change.
        source: row of the batch that each of `positions` takes from; empty for an op without a source.
        sampling: that it belongs to.
    """

    site: Site
    moment: Moment
    given: Streams
    inputs: Streams
    outputs: Streams
    positions: list[int]
    source: list[int]
    sampling: Sampling

    @property
    def family(self) -> Family:
        """Of the model."""
        return self.sampling.family

    def prompt(self, position: int) -> str:
        """What a row of the batch draws; see `Sampling.prompt`."""
        return self.sampling.prompt(position % self.moment.rows)


@dataclass(frozen=True)
class Latents:
    """Latents between two steps, as an op sees them.

    Attributes:
        moment: of the step that is to come, or that was taken.
        x: (b, c, h, w), as the solver has them; an op returns others, it does not write into them.
        rows: samples that the op may change.
        source: the sample that each of `rows` takes from; empty for an op without a source.
        solver: the scheduler.
        t: the time of the step to come; 0 after the last.
        predict: the guided prediction (b, c, h, w) for latents like x at a time, which gradients do not enter.
        family: of the model.
    """

    moment: Moment
    x: Tensor
    rows: list[int]
    source: list[int]
    solver: Any
    t: Tensor
    predict: Predict
    family: Family


@dataclass(frozen=True, kw_only=True)
class Op:
    """An intervention; subclasses say what it does.

    Attributes:
        steps: half-open range of scheduler steps, as numbers (0, 5) or as fractions of all of them (0.0, 0.5); None
            for all.
        on: the pass that it works on.
        rows: samples of the batch; None for all but those that only serve as a source.
    """

    steps: Scope = None
    on: On = "both"
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a range of steps that holds none, a pass of another name, or rows that are none."""
        if self.steps is not None:
            check_range("steps", self.steps)
            if self.steps[0] == self.steps[1]:
                raise UserError(f"steps={self.steps} holds no step; allowed: numbers such as (0, 5), the second larger")
        if self.on not in ("cond", "uncond", "both"):
            raise UserError(f"on={self.on!r}: allowed: cond, uncond, both")
        if self.rows is not None and not _numbers(self.rows):
            raise UserError(f"rows={self.rows!r}: allowed: numbers of samples from 0, such as (0,); None for all")

    def sites(self, family: Family) -> list[Site]:
        """Where it takes hold.

        Raises:
            UserError: nowhere, or at a site that it cannot work on.
        """
        return []

    def fits(self, sampling: Sampling, sites: Sequence[Site]) -> None:
        """Holds it against a sampling, before the denoiser is called.

        Args:
            sampling: that is to begin.
            sites: where it takes hold.

        Raises:
            UserError: it would change nothing, or names steps, rows, a pass or anything else that is not there.
        """
        name, (rows, source) = type(self).__name__, sampling.taking(self)
        if self.steps is not None:
            check_schedule(f"{name}: steps", self.steps, sampling.num_steps)
        if self.on == "uncond" and not sampling.guided:
            raise UserError(
                f"{name}(on='uncond'): the null prompt is not evaluated here; sample under classifier-free guidance, "
                "such as guidance_scale=4, or leave `on`"
            )
        for what, row in (*(("rows", row) for row in rows), ("source", source)):
            if row is not None and not 0 <= row < sampling.rows:
                raise UserError(f"{name}({what}={row}): allowed: 0 or more, below {sampling.rows}, the batch's samples")
        if not rows or {*rows} == {source}:
            what = f"takes from sample {source} what that has itself" if rows else "has no sample to change"
            raise UserError(f"{name} {what}, so that it does nothing; give other rows, or another source")

    def renew(self) -> None:
        """Called when a sampling begins: forgets what was kept of one before."""

    def leave(self, moment: Moment) -> None:
        """Called before each evaluation of the denoiser, of all ops before any begins."""

    def begin(self, moment: Moment) -> None:
        """Called before each evaluation of the denoiser."""

    def before(self, call: Call) -> Streams | None:
        """Other inputs for the site, of streams that change; None to leave them."""
        return None

    def after(self, call: Call) -> Streams | None:
        """Other outputs, of streams that change; None to leave them."""
        return None

    def attend(self, call: Call, attention: Attention) -> Tensor | None:
        """Other attention probabilities (len(call.positions), heads, queries, keys), float32; None to leave them.

        Called for some heads at a time, of sites that are attentions as a whole.
        """
        return None

    def before_step(self, latents: Latents) -> Tensor | None:
        """Other latents (b, c, h, w) to begin a step with; None to leave them. Only where this package samples."""
        return None

    def after_step(self, latents: Latents) -> Tensor | None:
        """Other latents (b, c, h, w) to go on with after a step; None to leave them; as `before_step`."""
        return None

    @contextmanager
    def attached(self, family: Family) -> Iterator[None]:
        """What holds for the length of the `with` block beside hooks."""
        yield


@dataclass(frozen=True, kw_only=True)
class SiteOp(Op):
    """An op that takes hold of sites.

    Attributes:
        where: an expression, see `esd.interventions.sites.resolve`; or sites.
    """

    where: str | Sequence[Site] = field(kw_only=False)

    def sites(self, family: Family) -> list[Site]:
        """The sites that `where` names, each held against `check`.

        Raises:
            UserError: there are none, or they are of another model.
        """
        found = self.named(family)
        if not found:
            raise UserError(f"{type(self).__name__}: no site is given; give at least one")
        for site in found:
            self.check(site)
        return found

    def named(self, family: Family) -> list[Site]:
        """The sites that `where` names, as they are."""
        return resolve(family, self.where) if isinstance(self.where, str) else _own(family, self)

    def check(self, site: Site) -> None:
        """Raises UserError for a site that it cannot work on."""

    @property
    def told(self) -> str:
        """`where` in a message."""
        return repr(shorten(self.where, 60, placeholder=" ...")) if isinstance(self.where, str) else "where"


@dataclass(frozen=True, kw_only=True)
class AttentionOp(SiteOp):
    """An op that takes hold of attention probabilities.

    Attributes:
        where: names whole attentions: "cross", "up.self", "double + single", ...
        on: the prompt's pass, unless said otherwise.
    """

    on: On = "cond"

    def named(self, family: Family) -> list[Site]:
        """The attentions that `where` names.

        Raises:
            UserError: a site is none, or one stream of a joint attention, whose probabilities are of both.
        """
        found = resolve(family, self.where, is_attention) if isinstance(self.where, str) else _own(family, self)
        for site in found:
            if not site.attention:
                raise UserError(f"{type(self).__name__}: {site.label} is no attention as a whole; name attentions")
            if site.part == "joint" and site.stream is not None:
                raise UserError(f"{type(self).__name__}: {self.told} names one stream of {site.label}; name both")
        return found


def source_of(op: Op) -> Source | int | None:
    """Where an op takes tensors from: another run, the number of a sample in the batch, or nowhere.

    Raises:
        UserError: a text; it lacks the seed.
    """
    source = getattr(op, "source", None)
    if isinstance(source, str):
        name = type(op).__name__
        raise UserError(f"{name}(source={source!r}): allowed: Source({source!r}, seed), or the number of a sample")
    return source if isinstance(source, (Source, Integral)) else None  # type: ignore[return-value]


def check_finite(op: Op, name: str, value: Any) -> None:
    """Raises UserError unless a setting of an op is a finite number."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{type(op).__name__}({name}={value!r}): allowed: a finite number")


def placed(old: Tensor, new: Tensor, positions: Sequence[int]) -> Tensor:
    """`old` (b, ...) with the rows of `new` (b, ...) at some positions."""
    if sorted(positions) == list(range(len(old))):
        return new
    index = torch.tensor(positions, device=old.device)
    return old.index_copy(0, index, new[index].to(old.dtype))


def _numbers(rows: Any) -> bool:
    """Whether these are numbers of samples, at least one and none twice."""
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Integral) for row in rows):
        return False
    return min(rows) >= 0 and len({*rows}) == len(rows)


def _own(family: Family, op: SiteOp) -> list[Site]:
    """The sites that an op was given.

    Raises:
        UserError: one is none, or not of this model as it is.
    """
    name, modules = type(op).__name__, dict(family.denoiser.named_modules())
    for site in op.where:
        if not isinstance(site, Site):
            raise UserError(f"{name}(where=[{site!r}, ...]): allowed: an expression, or sites that resolve() gave")
        if modules.get(site.path) is not site.module:
            raise UserError(f"{name}: {site.label} is of another model, or of this one before it changed; resolve anew")
    return list(op.where)  # type: ignore[arg-type]
