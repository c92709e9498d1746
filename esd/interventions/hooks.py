"""`attach`: interventions as values in a list, in force for the length of a `with` block.

    with attach(family, Skip("mid"), record := Record("up.cross")):
        family.pipe("a cat")

Each op names the sites it takes hold of, and may be confined to scheduler steps, passes and rows of the batch. At a
site, ops work in the order given, each on what the one before it left. Every hook is gone on any exit, also after an
exception, and the model is bit for bit what it was.

The block follows the stock pipeline's scheduler; `esd.interventions.sampling.sample` samples by this package's own
rollout and tells the clock itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from esd.errors import UserError
from esd.families import Family

from .clock import Clock, Moment, Pass, Scope
from .sites import Site, Streams, resolve

On = Pass | Literal["both"]


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
    """

    site: Site
    moment: Moment
    given: Streams
    inputs: Streams
    outputs: Streams
    positions: list[int]
    source: list[int]


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

    def attend(self, call: Call, probabilities: Tensor, values: Tensor) -> Tensor | None:
        """Other attention probabilities (b, heads, queries, keys), float32; None to leave them."""
        return None

    def edit(self, moment: Moment, x: Tensor) -> Tensor:
        """Other latents x (b, c, h, w) before the step of a moment; only where this package samples."""
        return x

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


class Hooks:
    """The ops in force on one model; what `attach` gives.

    Args:
        family: of the model.
        ops: in the order they work.
        sources: row of the batch that draws each source.
    """

    def __init__(self, family: Family, ops: Sequence[Op], sources: Mapping[Source, int]) -> None:
        self.clock = Clock(family)
        self.ops, self._family, self._sources = tuple(ops), family, sources
        self._now: Moment | None = None
        self.at: dict[str, list[tuple[Site, Op]]] = {}  # path to what holds there, in the order of the ops
        for op in ops:
            for site in op.sites(family):
                self.at.setdefault(site.path, []).append((site, op))
        for op in ops:
            if isinstance(source := source_of(op), Source) and source not in sources:
                raise UserError(
                    f"{type(op).__name__}: {source} is not in the batch; esd.interventions.sample puts it "
                    "there, or give the number of a sample"
                )

    @property
    def now(self) -> Moment:
        """Of the denoiser's call that is under way.

        Raises:
            RuntimeError: a site is called on its own.
        """
        if self._now is None:
            raise RuntimeError("a site was called outside of its denoiser")
        return self._now

    def begin(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the moment of a call of the denoiser."""
        told = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
        text = told.get("encoder_hidden_states")
        x = next(value for name, value in told.items() if name != "self")
        self._now = self.clock.moment(len(x), told["timestep"], None if text is None else text.shape[1])
        for op in self.ops:
            op.begin(self._now)

    def calls(self, path: str) -> Iterator[tuple[Op, Call]]:
        """The ops in force at a site in this moment, each with its call, whose tensors are not set yet."""
        moment = self.now
        for site, op in self.at[path]:
            if not moment.within(op.steps):
                continue
            source = source_of(op)
            source = self._sources[source] if isinstance(source, Source) else source
            serving = {*self._sources.values()} if op.rows is None else set()
            samples = [row for row in (range(moment.rows) if op.rows is None else op.rows) if row not in serving]
            if positions := moment.positions(op.on, samples):
                taken = [] if source is None else [p - p % moment.rows + source for p in positions]
                yield op, Call(site, moment, {}, {}, {}, positions, taken)

    def edit(self, solver: Any, entry: int, x: Tensor) -> Tensor:
        """What `esd.trajectory.rollout` calls before each entry of the solver's times, after `expect`."""
        self.clock.tell(solver, entry, self._expected)
        moment = self.clock.moment(len(x) * len(self._expected), float("nan"), None)
        for op in self.ops:
            if moment.within(op.steps):
                x = op.edit(moment, x)
        return x

    def expect(self, passes: tuple[Pass, ...]) -> None:
        """Says what the batches of the rollout to come consist of."""
        self._expected = passes


@contextmanager
def attach(family: Family, *ops: Op, sources: Mapping[Source, int] | None = None) -> Iterator[Hooks]:
    """Puts ops in force for the length of a `with` block.

    Args:
        family: of the model.
        ops: in the order they work at a site.
        sources: row of the batch that draws each source; `sample` knows them.

    Raises:
        UserError: an op names no site, or one that it cannot work on; or the model keeps results of earlier steps, is
            compiled, or has fused projections, so that hooks would not be called or change nothing.
    """
    denoiser = family.denoiser
    refuse_unhookable(denoiser)
    hooks = Hooks(family, ops, sources or {})
    modules = dict(denoiser.named_modules())
    with ExitStack() as held:
        for op in ops:
            held.enter_context(op.attached(family))
        held.enter_context(hooks.clock.following(family.pipe.scheduler))
        begin = denoiser.register_forward_pre_hook(hooks.begin, with_kwargs=True)
        held.callback(begin.remove)
        for path in hooks.at:
            for handle in _hook(hooks, path, modules[path]):
                held.callback(handle.remove)
        yield hooks


def refuse_unhookable(denoiser: nn.Module) -> None:
    """Raises UserError where hooks on a denoiser would not be called, or not at every step."""
    name = type(denoiser).__name__
    if getattr(denoiser, "is_cache_enabled", False):
        raise UserError(
            f"{name} keeps results of earlier steps (enable_cache), so that interventions would miss calls; call "
            "disable_cache() first"
        )
    compiled = [path for path, m in denoiser.named_modules() if m._compiled_call_impl is not None or _wrapped(m)]
    if compiled or _wrapped(denoiser):
        raise UserError(
            f"{name} is compiled ({compiled[0] or 'as a whole'}), and compiled code does not call hooks that come "
            "later; load the model again, or set training.compile=false"
        )


def _wrapped(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def _hook(hooks: Hooks, path: str, module: nn.Module) -> list[Any]:
    """Hooks one site; returns the handles."""
    site = hooks.at[path][0][0]
    given: Streams = {}  # of the call under way
    inputs: Streams = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal given, inputs
        bound, changed = site.bind(args, kwargs), False
        given = inputs = site.inputs(bound, hooks.now.text_tokens)
        for op, call in hooks.calls(path):
            call.given, call.inputs = given, inputs
            if new := op.before(call):
                inputs, changed = _merged(inputs, new, call), True
        if not changed:
            return None
        site.set_inputs(bound, inputs)
        return bound.args, bound.kwargs

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        outputs, changed = site.outputs(output, hooks.now.text_tokens), False
        for op, call in hooks.calls(path):
            call.given, call.inputs, call.outputs = given, inputs, outputs
            if new := op.after(call):
                outputs, changed = _merged(outputs, new, call), True
        return site.with_outputs(output, outputs) if changed else None

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _merged(streams: Streams, new: Streams, call: Call) -> Streams:
    """The streams with the changed ones in place, in the rows that the op may change and the site's streams only."""
    merged = dict(streams)
    for name in call.site.streams:
        if name in new and name in streams:
            merged[name] = placed(streams[name], new[name], call.positions)
    return merged


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
