"""Ops on what flows through layers: leave a layer out, weigh what it adds, put another run's tensors in its place.

With z the image stream, p the text stream and c the time and pooled prompt, a two-stream layer maps (z, p, c) to
(z + f(z, p, c), p + g(z, p, c)); f and g are its *contributions*. What another run has in a place is primed.

Source: antoniomari/diffusion-interpretability, whose operations on FLUX these are, for every family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esd.errors import UserError

from .ops import Call, Sampling, SiteOp, Source, check_finite
from .record import Circumstances, Recording, What, check_what
from .sites import Site, Stream, Streams


@dataclass(frozen=True, kw_only=True)
class Skip(SiteOp):
    """Leaves sites out: (z, p) -> (z, p) for a residual layer; a branch adds nothing."""

    def check(self, site: Site) -> None:
        """Raises UserError for a site whose input cannot stand for its output."""
        _same_shape(site, self)

    def after(self, call: Call) -> Streams:
        """The inputs as they came, or zeros."""
        if call.site.residual:
            return {name: call.inputs[name] for name in call.outputs}
        return {name: torch.zeros_like(out) for name, out in call.outputs.items()}


@dataclass(frozen=True, kw_only=True)
class Scale(SiteOp):
    """Weighs what passes through a layer and what it adds: r z + a f(z), of the site's streams.

    Attributes:
        residual: r; 1 leaves it.
        activation: a; 1 leaves it, 0 is `Skip`.
    """

    residual: float = 1.0
    activation: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError for a weight that is no finite number."""
        super().__post_init__()
        check_finite(self, "residual", self.residual)
        check_finite(self, "activation", self.activation)

    def check(self, site: Site) -> None:
        """Raises UserError for a weight of the residual where there is none, or weights that change nothing."""
        if self.residual == self.activation == 1:
            raise UserError("Scale(residual=1, activation=1) changes nothing; give one of them another value")
        _same_shape(site, self)
        if not site.residual and self.residual != 1:
            raise UserError(f"Scale: nothing passes through {site.label}, a branch; leave residual=1")

    def after(self, call: Call) -> Streams:
        """The weighted sum."""
        if not call.site.residual:
            return {name: self.activation * out for name, out in call.outputs.items()}
        return {
            name: self.residual * call.inputs[name] + self.activation * (out - call.inputs[name])
            for name, out in call.outputs.items()
        }


@dataclass(frozen=True, kw_only=True)
class Patch(SiteOp):
    """Puts another run's tensors in the place of a site's own, of the site's streams.

    Attributes:
        source: another prompt and seed, the number of a sample in the batch, or what `Record` kept of any run, such as
            one with other weights.
        what: the site's "input", its "output", or its "contribution" to what passes through. On a model that changed
            in one layer, patched outputs restore everything after that layer too; contributions tell layers apart.
        channels: half-open range of those that are taken, of the input of linear layers; None for all. What one head
            writes lies side by side in the input of its attention's output projection.
    """

    source: Source | int | Recording = field(default=0)
    what: What = "contribution"
    channels: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for another name of `what`, or a range of channels that holds none."""
        super().__post_init__()
        check_what(self, self.what)
        if self.channels is not None and not 0 <= self.channels[0] < self.channels[1]:
            raise UserError(f"Patch(channels={self.channels}): allowed: numbers such as (0, 32), the second larger")

    def check(self, site: Site) -> None:
        """Raises UserError for a recording that lacks the site, and for channels that are not among its input's."""
        if isinstance(self.source, Recording):
            self.source.check(site, self.what)
        width = getattr(site.module, "in_features", 0) if self.what == "input" else 0
        if self.channels is not None and self.channels[1] > width:
            has = f"the input of {site.label} has {width} of them" if width else "the input of a linear layer has some"
            raise UserError(
                f"Patch(what={self.what!r}, channels={self.channels}): {has}; allowed: such as Patch('cross.out', "
                "what='input', channels=(0, 32))"
            )

    def fits(self, sampling: Sampling, sites: Sequence[Site]) -> None:
        """See `Op.fits`; a recording is of another sampling."""
        super().fits(sampling, sites)
        if isinstance(self.source, Recording):
            self.source.fits(Circumstances.of(sampling, self))

    def before(self, call: Call) -> Streams | None:
        """For what="input": the other run's."""
        return {name: self._taken(call, name, call.inputs) for name in call.inputs} if self.what == "input" else None

    def after(self, call: Call) -> Streams | None:
        """The other run's output; or the own input and the other run's contribution."""
        if self.what == "input":
            return None
        if self.what == "output" or not call.site.residual:
            return {name: self._taken(call, name, call.outputs) for name in call.outputs}
        added = {name: out - call.inputs[name] for name, out in call.outputs.items()}
        return {name: call.inputs[name] + self._taken(call, name, added) for name in call.outputs}

    def _taken(self, call: Call, name: Stream, live: Mapping[Stream, Tensor]) -> Tensor:
        own = live[name]
        taken = self.source.batch(call, name, own) if isinstance(self.source, Recording) else moved(own, call)
        if self.channels is None:
            return taken
        inside = slice(*self.channels)
        parted = own.clone()
        parted[..., inside] = taken[..., inside]
        return parted


@dataclass(frozen=True, kw_only=True)
class Transplant(Patch):
    """Puts another run's streams in at a layer, from where they flow on: (z', p) or (z, p') before it.

    Name the stream in `where`: Transplant("double[3].text", source=...).
    """

    what: What = "input"


@dataclass(frozen=True, kw_only=True)
class InjectText(SiteOp):
    """Prompt injection: layers read the text p' that another run has there.

    flow=True:   (z, p, c) -> (z + f(z, p', c), p' + w g(z, p', c)), and the other text flows on
    flow=False:  (z, p, c) -> (z + f(z, p', c), p + w g(z, p', c)), and the own text goes by

    At a layer, p' depends on the other run's seed too, through what came before; in the first it is the encoded prompt
    alone. Layers that only read the text, as a UNet's do, have no g.

    Attributes:
        source: the other prompt and seed, or the number of a sample in the batch.
        weight: w.
        flow: see above.
    """

    source: Source | int = field(default=0)
    weight: float = 1.0
    flow: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for a weight that is no finite number."""
        super().__post_init__()
        check_finite(self, "weight", self.weight)

    def check(self, site: Site) -> None:
        """Raises UserError where no text is read, where all samples read the same, or a weight is given and no text is
        returned."""
        if site.reads is None:
            raise UserError(f"InjectText: {site.label} reads no text; name cross-attention, or blocks of a transformer")
        if site.reads == "only" and self.on == "uncond":
            raise UserError(f"InjectText(on='uncond'): {site.label} reads one null prompt in all samples; leave `on`")
        if site.reads == "only" and self.weight != 1:
            raise UserError(f"InjectText: {site.label} reads the text and adds nothing to it; leave weight=1")

    def before(self, call: Call) -> Streams:
        """The other run's text."""
        return {"text": moved(call.inputs["text"], call)}

    def after(self, call: Call) -> Streams | None:
        """The text that goes on."""
        if "text" not in call.outputs or (self.flow and self.weight == 1):
            return None
        carried = call.inputs["text"] if self.flow else call.given["text"]
        return {"text": carried + self.weight * (call.outputs["text"] - call.inputs["text"])}


@dataclass(frozen=True, kw_only=True)
class CrossSeed(SiteOp):
    """The negative control: (z, p, c) -> (z + f(z', p', c'), p' + g(z', p', c')), all from another run.

    What a layer adds for one noise fits no other noise; pictures come out noisy.

    Attributes:
        source: the other prompt and seed, or the number of a sample in the batch.
    """

    source: Source | int = field(default=0)

    def check(self, site: Site) -> None:
        """Raises UserError for a site that adds nothing to its input."""
        _same_shape(site, self)

    def after(self, call: Call) -> Streams:
        """The own image stream with the other's contribution, and the other's text."""
        out = {name: moved(tensor, call) for name, tensor in call.outputs.items()}
        if call.site.residual:
            own = call.inputs["image"]
            out["image"] = own + moved(call.outputs["image"] - own, call)
        return out


def moved(tensor: Tensor, call: Call) -> Tensor:
    """A tensor (b, ...) with the rows of the sources at the positions that take from them."""
    index = torch.tensor(call.positions, device=tensor.device)
    return tensor.index_copy(0, index, tensor[torch.tensor(call.source, device=tensor.device)])


def _same_shape(site: Site, op: SiteOp) -> None:
    """Raises UserError for a layer whose output is shaped unlike its input."""
    if site.changes_shape:
        raise UserError(
            f"{type(op).__name__}: {site.label} changes the shape of what goes through, so that nothing can stand in "
            "for it; name attentions, cross-attention, or blocks that keep the shape"
        )
