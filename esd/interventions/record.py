"""`Record` keeps what passes through sites; `Recording` is what it kept, to look at or to patch into another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from esd.errors import UserError

from .clock import Pass
from .ops import Call, Op, Sampling, SiteOp, check_finite
from .sites import Site, Stream, Streams

What = Literal["input", "output", "contribution"]


class Key(NamedTuple):
    """Of what a tensor is: site and stream, and the call it was seen in."""

    path: str
    stream: Stream
    step: int | None
    stage: int
    passes: tuple[Pass, ...]

    @classmethod
    def of(cls, call: Call, stream: Stream) -> Key:
        """Of one stream at the site of a call."""
        return cls(call.site.path, stream, call.moment.step, call.moment.stage, call.moment.passes)


class Circumstances(NamedTuple):
    """In what a sampling must be like another, for tensors of the one to stand in the other's places.

    Attributes:
        steps: of the scheduler; None where nothing samples.
        samples: that the op works on.
        on: the pass that it works on, of those there are.
        latents: their (h, w).
    """

    steps: int | None
    samples: int
    on: str
    latents: tuple[int, int]

    @classmethod
    def of(cls, sampling: Sampling, op: Op) -> Circumstances:
        """Of an op in a sampling."""
        on = op.on if sampling.guided else "cond"
        return cls(sampling.num_steps, len(sampling.taking(op)[0]), on, sampling.latents)


@dataclass
class Recording:
    """Tensors that passed through sites.

    Attributes:
        what: of each site, see `Record`.
        on: the pass they are of, or "both".
        whole: whether they are as they were, and not reduced.
        values: a tensor on the CPU for each site, stream and evaluation of the denoiser in the latest sampling; rows
            are those that the op was confined to, of each pass after the other. Outside of sampling, of the latest
            call.
        labels: path to the label of the site.
        circumstances: of the sampling that they are of; None before there is one.
    """

    what: What
    on: str
    whole: bool
    values: dict[Key, Tensor] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    circumstances: Circumstances | None = None

    _bytes: int = 0

    @property
    def gib(self) -> float:
        """What it holds."""
        return self._bytes / 2**30

    def clear(self) -> None:
        """Forgets all."""
        self.values.clear()
        self.labels.clear()
        self._bytes = 0

    def put(self, key: Key, label: str, value: Tensor) -> None:
        """Keeps a tensor of the site of a label, in the place of one of the same key."""
        before = self.values.get(key)
        self.values[key], self.labels[key.path] = value, label
        self._bytes += value.nbytes - (0 if before is None else before.nbytes)

    def of(self, label: str, stream: Stream = "image") -> Tensor:
        """All steps of one site, stacked (steps, rows, ...); of several evaluations in a step the first.

        Raises:
            UserError: it holds nothing of that site or stream.
        """
        found = [
            kept for key, kept in self.values.items()
            if self.labels[key.path] == label and key.stream == stream and not key.stage and "cond" in key.passes
        ]  # fmt: skip
        if not found:
            known = ", ".join(sorted(set(self.labels.values())))
            raise UserError(f"nothing was recorded of the {stream} stream of {label!r}; recorded: {known}")
        return torch.stack(found)

    def check(self, site: Site, what: str) -> None:
        """Raises UserError unless it can stand for a site's `what`."""
        if not self.whole or self.what != what:
            kept = f"{self.what}, {'whole' if self.whole else 'reduced'}"
            raise UserError(f"Patch(what={what!r}) of a recording that holds the {kept}; record what={what!r} whole")
        if site.path not in self.labels:
            raise UserError(f"Patch: the recording holds nothing of {site.label}; record it with the same `where`")

    def fits(self, now: Circumstances) -> None:
        """Raises UserError unless it is of a sampling like this one."""
        for name, there, here in zip(now._fields, self.circumstances or now, now, strict=True):
            if there != here:
                raise UserError(
                    f"Patch: the recording is of a sampling with {name}={there}, and here {name}={here}; sample both "
                    "runs alike, with as many prompts and steps, the same rows, pass and size"
                )

    def batch(self, call: Call, stream: Stream, like: Tensor) -> Tensor:
        """A tensor as `like` (b, ...) with the recorded rows at the call's positions.

        Raises:
            UserError: nothing was recorded in this step, or tensors of another shape.
        """
        kept = self.values.get(Key.of(call, stream))
        wanted = (len(call.positions), *like.shape[1:])
        if kept is None or kept.shape != wanted:
            seen = "nothing was" if kept is None else f"{tuple(kept.shape)} was"
            raise UserError(
                f"Patch: of {call.site.label} {seen} recorded in step {call.moment.step}, {tuple(wanted)} is wanted; "
                "sample both runs alike, with models of one architecture"
            )
        return like.index_copy(0, torch.tensor(call.positions, device=like.device), kept.to(like))


@dataclass(frozen=True, kw_only=True)
class Record(SiteOp):
    """Keeps what passes through sites in `recording`; changes nothing.

    Attributes:
        what: a site's "input", "output", or "contribution" (output - input of a residual site).
        reduce: applied to each tensor (rows, ...) before it is kept, rows first in what it returns; None keeps it
            whole.
        max_gib: most memory that is kept.
        recording: what was kept.
    """

    what: What = "output"
    reduce: Callable[[Tensor], Tensor] | None = None
    max_gib: float = 4.0
    recording: Recording = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Makes an empty recording."""
        super().__post_init__()
        check_what(self, self.what)
        check_finite(self, "max_gib", self.max_gib)
        object.__setattr__(self, "recording", Recording(self.what, self.on, self.reduce is None))

    def check(self, site: Site) -> None:
        """Raises UserError for the contribution of a layer that changes shape."""
        if self.what == "contribution" and site.changes_shape:
            raise UserError(f"Record: {site.label} changes the shape of what goes through; record its output")

    def fits(self, sampling: Sampling, sites: Sequence[Site]) -> None:
        """See `Op.fits`; notes of what sampling the recording is."""
        super().fits(sampling, sites)
        self.recording.circumstances = Circumstances.of(sampling, self)

    def renew(self) -> None:
        """Forgets what it kept of another sampling."""
        self.recording.clear()

    def after(self, call: Call) -> Streams | None:
        """Keeps the tensors; changes nothing."""
        found = call.inputs if self.what == "input" else call.outputs
        for name in call.site.streams:
            if name not in found:
                continue
            value = found[name]
            if self.what == "contribution" and call.site.residual:
                value = value - call.inputs[name]
            self._keep(call, name, value.detach()[call.positions])
        return None

    def _keep(self, call: Call, stream: Stream, value: Tensor) -> None:
        value = self.reduce(value) if self.reduce else value
        self.recording.put(Key.of(call, stream), call.site.label, value.to("cpu", copy=True))
        if self.recording.gib > self.max_gib:
            raise UserError(
                f"Record: what {self.told} keeps takes more than max_gib={self.max_gib:g}; reduce it (such as by "
                "reduce=lambda x: x.flatten(1).norm(dim=1)), name fewer sites or steps, or raise max_gib"
            )


def check_what(op: Op, what: str) -> None:
    """Raises UserError for a name that is none of `What`."""
    if what not in get_args(What):
        raise UserError(f"{type(op).__name__}(what={what!r}): allowed: {', '.join(get_args(What))}")
