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

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from esd.errors import UserError
from esd.families import Family

from .clock import Clock, Moment, Pass
from .ops import AttentionOp, Call, Latents, Op, Predict, Sampling, Source, placed, source_of
from .probabilities import Attention, Interception, Layout
from .sites import Site, Streams, signature_of

_CACHE = re.compile(r"cache|^fbc_|broadcast|taylorseer")  # in the names of hooks by which diffusers skips work
_NONE = SimpleNamespace(hooks={})


class Hooks:
    """The ops in force on one model; what `attach` gives.

    Args:
        family: of the model.
        ops: in the order they work.
        sources: row of the batch that draws each source.
        prompts: of each sample; None where they are not known.
    """

    def __init__(
        self, family: Family, ops: Sequence[Op], sources: Mapping[Source, int], prompts: Sequence[str] | None
    ) -> None:
        self.clock, self.attention = Clock(family), Interception()
        self._family, self._sources, self._prompts = family, sources, prompts
        self._scheduler = family.pipe.scheduler
        self._now: Moment | None = None
        self._begun: tuple[int, Sampling] | None = None  # which run of the scheduler, and what is known of it
        self._rollout: tuple[tuple[Pass, ...], Predict] | None = None
        self._ops = [(op, op.sites(family)) for op in ops]
        self.at: dict[str, list[tuple[Site, Op]]] = {}  # path to what holds there, in the order of the ops
        for op, sites in self._ops:
            for site in sites:
                self.at.setdefault(site.path, []).append((site, op))
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

    def announce(self, sampling: Sampling, predict: Predict) -> None:
        """This package's own rollout is to begin; what it predicts."""
        self._rollout = ("uncond", "cond") if sampling.guided else ("cond",), predict
        self._begins(sampling)

    @property
    def sampling(self) -> Sampling:
        """That is under way.

        Raises:
            RuntimeError: none is.
        """
        if self._begun is None:
            raise RuntimeError("no sampling has begun")
        return self._begun[1]

    def begin(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the moment of a call of the denoiser."""
        if self._family.pipe.scheduler is not self._scheduler:
            raise UserError("pipe.scheduler was replaced inside of attach(...); replace it before, then attach")
        told = signature_of(type(denoiser).forward).bind(*args, **kwargs).arguments
        text = told.get("encoder_hidden_states")
        x = next(iter(told.values()))
        tokens = None if text is None else text.shape[1]
        now = self.clock.moment(len(x), told["timestep"], tokens, told.get("skip_layers") is not None)
        ids = told.get("img_ids")
        latents = _extent(ids, self._family.patch) if ids is not None else (x.shape[-2], x.shape[-1])
        self._now = now
        self._begins(
            Sampling(self._family, now.num_steps, self.clock.guided, now.rows, latents, self._prompts, self._sources)
        )
        for op, _ in self._ops:
            op.leave(now)
        for op, _ in self._ops:
            op.begin(now)

    def _begins(self, sampling: Sampling) -> None:
        """Holds the ops against a sampling, once before its first call; they forget what they kept of one before."""
        if self._begun == (self.clock.runs, sampling):
            return
        for op, sites in self._ops:
            if self._rollout is None and _edits(op):
                raise UserError(
                    f"{type(op).__name__} works on latents between steps, of which a stock pipeline does not tell; "
                    "draw with esd.interventions.sample"
                )
            op.renew()
            op.fits(sampling, sites)
        self._begun = self.clock.runs, sampling

    def calls(self, path: str) -> Iterator[tuple[Op, Call]]:
        """The ops in force at a site in this moment, each with its call, whose tensors are not set yet."""
        moment = self.now
        for site, op in self.at[path]:
            if not moment.within(op.steps):
                continue
            samples, source = self.sampling.taking(op)
            if positions := moment.positions(op.on, samples):
                taken = [] if source is None else [p - p % moment.rows + source for p in positions]
                yield op, Call(site, moment, {}, {}, {}, positions, taken, self.sampling)

    def listen(self, path: str) -> None:
        """An attention is called: its probabilities go to the ops in force there."""
        hearing = [(op, call) for op, call in self.calls(path) if isinstance(op, AttentionOp)]
        if not hearing:
            return
        site = self.at[path][0][0]

        def listener(attention: Attention) -> None:
            for op, call in hearing:
                if (new := op.attend(call, attention)) is not None:
                    attention.put(call.positions, new)

        def layout(queries: int, keys: int) -> Layout:
            text = {"cross": keys, "joint": self.now.text_tokens}.get(site.part or "")
            return Layout.of(queries, keys, text, self._family.text_first, self.sampling.latents)

        self.attention.expect(site.label, layout, listener)

    def edit(self, solver: Any, entry: int, x: Tensor) -> Tensor:
        """What `esd.trajectory.rollout` calls before each entry of the solver's times, after `announce`."""
        if self._rollout is None:
            raise RuntimeError("the rollout was not announced")
        passes, predict = self._rollout
        self.clock.tell(solver, entry, passes)
        moment = self.clock.moment(len(x) * len(passes), float("nan"), None)
        if moment.stage:  # in the middle of a step
            return x
        step, last = moment.step or 0, entry == len(solver.timesteps)
        t = solver.timesteps.new_zeros(()) if last else solver.timesteps[entry]
        ended = [(op, op.after_step, replace(moment, step=step - 1)) for op, _ in self._ops if step]
        begun = [(op, op.before_step, moment) for op, _ in self._ops if not last]
        for op, change, when in ended + begun:
            if when.within(op.steps):
                rows, source = self.sampling.taking(op)
                taken = [] if source is None else [source] * len(rows)
                self.clock.tell(solver, entry, passes, extra=1)  # of what the op itself evaluates
                new = change(Latents(when, x, rows, taken, solver, t, predict, self._family))
                self.clock.tell(solver, entry, passes)
                x = x if new is None else placed(x, new, rows)
        return x


def _extent(ids: Tensor, patch: int) -> tuple[int, int]:
    """(h, w) of latents, of the position ids (..., axes) of tokens, where these are the second and the third."""
    return patch * (int(ids[..., 1].max()) + 1), patch * (int(ids[..., 2].max()) + 1)


def _edits(op: Op) -> bool:
    """Whether an op works on latents between steps."""
    return type(op).before_step is not Op.before_step or type(op).after_step is not Op.after_step


@contextmanager
def attach(
    family: Family, *ops: Op, sources: Mapping[Source, int] | None = None, prompts: Sequence[str] | None = None
) -> Iterator[Hooks]:
    """Puts ops in force for the length of a `with` block.

    Args:
        family: of the model.
        ops: in the order they work at a site.
        sources: row of the batch that draws each source; `sample` knows them.
        prompts: of each sample, for ops that speak of words; `sample` knows them.

    Raises:
        UserError: an op names no site, or one that it cannot work on; or the model keeps results of earlier steps, is
            compiled, or has fused projections, so that hooks would not be called or change nothing.
    """
    denoiser = family.denoiser
    refuse_unhookable(denoiser)
    hooks = Hooks(family, ops, sources or {}, prompts)
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
        held.callback(hooks.attention.forget)
        yield hooks


def attached(denoiser: nn.Module) -> bool:
    """Whether ops are in force on a denoiser."""
    return any(getattr(hook, "__func__", None) is Hooks.begin for hook in denoiser._forward_pre_hooks.values())


def refuse_unhookable(denoiser: nn.Module) -> None:
    """Raises UserError where hooks on a denoiser would not be called, or not at every step."""
    name = type(denoiser).__name__
    held = [hook for module in denoiser.modules() for hook in getattr(module, "_diffusers_hook", _NONE).hooks]
    kept = ["enable_cache"] if getattr(denoiser, "is_cache_enabled", False) else list(filter(_CACHE.search, held))
    if kept:
        raise UserError(
            f"{name} keeps results of earlier steps ({kept[0]}), so that interventions would miss calls; call "
            "disable_cache() first, or load the model again"
        )
    compiled = [path for path, m in denoiser.named_modules() if m._compiled_call_impl is not None or _wrapped(m)]
    if compiled or _wrapped(denoiser):
        raise UserError(
            f"{name} is compiled ({compiled[0] or 'as a whole'}), and compiled code does not call hooks that come "
            "later; load the model again, or set training.compile=false"
        )


def _wrapped(module: nn.Module) -> bool:
    compiled = hasattr(module.forward, "_torchdynamo_orig_callable")
    return compiled or isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def _hook(hooks: Hooks, path: str, module: nn.Module) -> list[Any]:
    """Hooks one site; returns the handles."""
    site = hooks.at[path][0][0]
    given: Streams = {}  # of the call under way
    inputs: Streams = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal given, inputs
        bound, changed = site.bind(args, kwargs), False
        given = inputs = site.inputs(bound, hooks.now.text_tokens)
        hooks.listen(path)
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

    def settle(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if output is None:  # it raised
            hooks.attention.forget()
        else:
            hooks.attention.settle()

    attends = any(isinstance(op, AttentionOp) for _, op in hooks.at[path])
    watch = [module.register_forward_hook(settle, always_call=True)] if attends else []
    return [
        *watch,
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
