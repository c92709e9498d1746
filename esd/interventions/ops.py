"""What an op is: an intervention as a value, and what it gets to see when it is called.

An op answers the questions that it has an answer to: other inputs or outputs of a site, other probabilities of an
attention, other latents between two steps. Whoever calls it puts the answer in the rows that it may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from esd.errors import UserError
from esd.families import Family

from .clock import Moment, Pass, Scope
from .probabilities import Attention
from .sites import Site, Streams, is_attention, resolve

On = Pass | Literal["both"]
Predict = Callable[[Any, Tensor, Tensor], Tensor]  # (solver, x, t) -> guided prediction


@dataclass(frozen=True)
class Source:
    """Another run whose tensors an op takes: what it draws, from which noise."""

    prompt: str
    seed: int


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
        prompts: of each sample, where they are known.
        family: of the model.
    """

    site: Site
    moment: Moment
    given: Streams
    inputs: Streams
    outputs: Streams
    positions: list[int]
    source: list[int]
    prompts: Sequence[str] | None
    family: Family

    def prompt(self, position: int) -> str:
        """What a row of the batch draws.

        Raises:
            UserError: nobody said so.
        """
        if self.prompts is None or len(self.prompts) != self.moment.rows:
            raise UserError(
                f"{self.site.label}: ops that speak of words need the prompt of each of {self.moment.rows} samples; "
                "draw with esd.interventions.sample, or give attach(prompts=[...])"
            )
        return self.prompts[position % self.moment.rows]


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
        """Raises UserError for a range of steps that holds none, or a pass of another name."""
        if self.steps is not None:
            low, high = self.steps
            fractions = isinstance(low, float) or isinstance(high, float)
            if not 0 <= low < high or (fractions and high > 1):
                raise UserError(f"steps={self.steps}: allowed: numbers such as (0, 5), or fractions such as (0.0, 0.5)")
        if self.on not in ("cond", "uncond", "both"):
            raise UserError(f"on={self.on!r}: allowed: cond, uncond, both")

    def sites(self, family: Family) -> list[Site]:
        """Where it takes hold.

        Raises:
            UserError: nowhere, or at a site that it cannot work on.
        """
        return []

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
        """The sites that `where` names, each held against `check`."""
        found = resolve(family, self.where) if isinstance(self.where, str) else list(self.where)
        if not found:
            raise UserError(f"{type(self).__name__}: no site is given; give at least one")
        for site in found:
            self.check(site)
        return found

    def check(self, site: Site) -> None:
        """Raises UserError for a site that it cannot work on."""


@dataclass(frozen=True, kw_only=True)
class AttentionOp(SiteOp):
    """An op that takes hold of attention probabilities.

    Attributes:
        where: names whole attentions: "cross", "up.self", "double + single", ...
        on: the prompt's pass, unless said otherwise.
    """

    on: On = "cond"

    def sites(self, family: Family) -> list[Site]:
        """The attentions that `where` names, each held against `check`.

        Raises:
            UserError: a stream of a joint attention, whose probabilities are of both.
        """
        found = resolve(family, self.where, is_attention) if isinstance(self.where, str) else list(self.where)
        for site in found:
            if site.part == "joint" and site.stream is not None:
                raise UserError(f"{type(self).__name__}: {self.where!r} names one stream of {site.label}; name both")
            self.check(site)
        return found


def source_of(op: Op) -> Source | int | None:
    """Where an op takes tensors from: another run, the number of a sample in the batch, or nowhere."""
    source = getattr(op, "source", None)
    return source if isinstance(source, (Source, int)) else None


def placed(old: Tensor, new: Tensor, positions: Sequence[int]) -> Tensor:
    """`old` (b, ...) with the rows of `new` (b, ...) at some positions."""
    if len(positions) == len(old):
        return new
    index = torch.tensor(positions, device=old.device)
    return old.index_copy(0, index, new[index].to(old.dtype))
