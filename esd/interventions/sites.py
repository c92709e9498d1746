"""Where interventions take hold: modules of a denoiser, named by the language that also says what to train.

An expression of `esd.selection` names parameters; the *sites* that it stands for are the largest modules one can hook
all of whose parameters it names: `cross` the cross-attentions of a UNet, `double[3:5]` two blocks, `up[0].ff` the
feed-forwards of a stack's first block, `cross.v` single linear layers. What trains a part also hooks it.

Two-stream transformers carry text and image tokens side by side. `double.text` is the text stream of a double block:
the module of which all parameters of that stream are named. Single blocks share their weights between the streams, and
here count as both: `single.text`, `single[30:].image`.

A site is *residual* where its input goes through and something is added: its contribution is output - input. Any other
module is a branch whose whole output is its contribution.

Source: calling conventions of diffusers 0.42's blocks, models/unets, models/attention.py and models/transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from esd.families import Family
from esd.selection import ParameterInfo, SelectionError, choose
from esd.weights import refuse_fused

Stream = Literal["image", "text"]
Streams = dict[Stream, Tensor]

STREAMS: tuple[Stream, ...] = ("image", "text")
_WITH_PARTS = ("TransformerBlock", "Transformer2DModel")  # how the names of their classes end
_RESIDUAL = (*_WITH_PARTS, "ResnetBlock2D")
_UNITS = (*_RESIDUAL, "FeedForward", "sample2D", "TimestepEmbedding")
_STACKS = ("in", "time", "down", "mid", "double", "single", "up", "out")  # in the order they run
_WITHIN = {"resnets": 0, "attentions": 1}  # of a UNet's block: resnet n runs before attention n, samplers last
_LAST = 10**6
_TEXT = "encoder_hidden_states"


@dataclass(frozen=True)
class Site:
    """A module that can be hooked, or one stream of it.

    Attributes:
        label: where it is, by roles: "up.0.attentions.1.block.0.cross", "double.3".
        path: of the module in the denoiser.
        module: the live module.
        stack, index, part, projection: roles of its parameters, as in `esd.selection`; part and projection are None
            where it has several.
        stream: the only one it stands for, or None for all that it has.
        residual: whether its input goes through it.
        joined: whether it takes and returns both streams as one tensor, text first.
    """

    label: str
    path: str
    module: nn.Module = field(repr=False, compare=False)
    stack: str
    index: int | None
    part: str | None
    projection: str | None
    stream: Stream | None = None
    residual: bool = False
    joined: bool = False

    @property
    def expression(self) -> str:
        """What names it and nothing else, in the language of `esd.selection`."""
        return f"name:{self.path}.*" + (f" & {self.stack}.{self.stream}" if self.stream else "")

    @property
    def attention(self) -> bool:
        """Whether it is an attention as a whole, with queries, keys and values."""
        return is_attention(self.module)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Which streams it stands for."""
        return (self.stream,) if self.stream else STREAMS

    @property
    def changes_shape(self) -> bool:
        """Whether what comes out is shaped unlike what goes in, of a layer that its input goes through."""
        return _ends(self.module, ("sample2D",)) or getattr(self.module, "conv_shortcut", None) is not None

    @property
    def reads(self) -> Literal["only", "both"] | None:
        """Whether it reads the text: "only" that, or "both" reads it and returns it; None where it does not."""
        if self.stream == "image" or not (self.residual or self.attention):
            return None
        if self.stack in ("double", "single"):
            return "both" if self.part != "self" else None
        return "only" if self.part == "cross" or _ends(self.module, _WITH_PARTS) else None

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """The arguments of a call by name: gradient checkpointing passes by position what is passed by name else."""
        return signature_of(type(self.module).forward).bind(*args, **kwargs)

    def inputs(self, bound: inspect.BoundArguments, text_tokens: int | None) -> Streams:
        """The tensors of each stream among a call's arguments, each (b, tokens, d) or (b, c, h, w)."""
        first, text = next(iter(bound.arguments.values())), bound.arguments.get(_TEXT)
        return self._split(first, text_tokens) if text is None else {"image": first, "text": text}

    def set_inputs(self, bound: inspect.BoundArguments, streams: Streams) -> None:
        """Puts other tensors for the streams into a call's arguments."""
        first = next(iter(bound.arguments))
        if bound.arguments.get(_TEXT) is None:
            bound.arguments[first] = self._join(streams)
        else:
            bound.arguments |= {first: streams["image"], _TEXT: streams["text"]}

    def outputs(self, output: Any, text_tokens: int | None) -> Streams:
        """The tensors of each stream in what the module returned."""
        if not isinstance(output, tuple):
            return self._split(output, text_tokens)
        if len(output) == 1:
            return {"image": output[0]}
        image, text = output if self.attention else reversed(output)  # blocks return the text first, attention last
        return {"image": image} | ({"text": text} if text is not None else {})

    def with_outputs(self, output: Any, streams: Streams) -> Any:
        """What the module returns, with other tensors for the streams."""
        if not isinstance(output, tuple):
            return self._join(streams)
        if len(output) == 1:
            return (streams["image"],)
        pair = streams["image"], streams.get("text")
        return pair if self.attention else pair[::-1]

    def _split(self, tensor: Tensor, text_tokens: int | None) -> Streams:
        if not self.joined:
            return {("text" if self.stream == "text" else "image"): tensor}
        return {"text": tensor[:, :text_tokens], "image": tensor[:, text_tokens:]}

    def _join(self, streams: Streams) -> Tensor:
        return torch.cat([streams["text"], streams["image"]], dim=1) if self.joined else next(iter(streams.values()))


def hookable(module: nn.Module) -> bool:
    """Whether a module can be a site: blocks, attentions, feed-forwards and whatever has nothing inside.

    A layer with a PEFT adapter on it has: the layer as it was, and the adapter's. They are one site.
    """
    leaf = next(module.children(), None) is None or hasattr(module, "base_layer")
    return leaf or _ends(module, _UNITS) or is_attention(module)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention as a whole."""
    return hasattr(module, "to_q") or hasattr(module, "to_qkv_mlp_proj")


def halvings(denoiser: nn.Module, site: Site) -> int:
    """How often a UNet has halved the picture where a site is; 0 in a transformer."""
    if site.stack not in ("down", "mid", "up"):
        return 0
    downs, ups = (list(getattr(denoiser, name)) for name in ("down_blocks", "up_blocks"))
    before = downs[: site.index] if site.stack == "down" else downs
    undone = ups[: site.index] if site.stack == "up" else []
    return sum(bool(block.downsamplers) for block in before) - sum(bool(block.upsamplers) for block in undone)


def resolve(family: Family, expression: str, kind: Callable[[nn.Module], bool] = hookable) -> list[Site]:
    """The sites that an expression names, in the order they run.

    Args:
        family: of the model.
        expression: in the language of `esd.selection`, presets of the family included.
        kind: which modules may be sites, such as `is_attention` for attentions only.

    Raises:
        SelectionError: malformed; a part of it matches nothing; or nothing of what it names can be hooked.
        UserError: the model's projections are fused.
    """
    denoiser = family.denoiser
    refuse_fused(denoiser)
    atoms = [atom for info in family.parameter_infos() for atom in _atoms(info)]
    name = type(denoiser).__name__
    chosen, _ = choose(expression, atoms, family.presets, name, aliases=family.aliases, absent=family.absent)
    left = {(atom.name, atom.stream) for atom in chosen}
    sites: list[Site] = []
    for path, module in denoiser.named_modules():
        inside = [atom for atom in atoms if atom.name.startswith(f"{path}.")] if path and kind(module) else []
        for stream in (None, *STREAMS):
            mine = [atom for atom in inside if stream is None or atom.stream == stream]
            keys = {(atom.name, atom.stream) for atom in mine}
            if keys and keys <= left and (stream is None or len(mine) < len(inside)):
                sites.append(_site(path, module, mine, stream))
                left -= keys
    if not sites:
        what = "an attention as a whole" if kind is is_attention else "a module that can be hooked"
        raise SelectionError(
            f"{expression!r} names no parameters of {name} that make up {what}; see describe(layers())"
        )
    return sorted(sites, key=_order)


def is_part(module: nn.Module) -> bool:
    """Whether a module is one working part of a layer: an attention, a feed-forward, a resnet, a projection, a norm."""
    return hookable(module) and not _ends(module, _WITH_PARTS)


def blocks(family: Family) -> list[Site]:
    """What a denoiser runs one after the other: blocks of a transformer; resnets, attentions and samplers of a UNet."""
    stacks = dict.fromkeys(info.stack for info in family.parameter_infos() if info.index is not None)
    return resolve(family, " + ".join(stacks))


def layers(family: Family) -> list[Site]:
    """Those of `blocks` that can be left out: their input goes through, and keeps its shape."""
    return [site for site in blocks(family) if site.residual and not site.changes_shape]


def describe(sites: Sequence[Site]) -> str:
    """One line: how many sites, and which, the first few by name."""
    named = [site.label + (f" ({site.stream})" if site.stream else "") for site in sites]
    told = named if len(named) <= 6 else [*named[:3], "...", *named[-2:]]
    return f"{len(sites)} site{'s' * (len(sites) != 1)}: {', '.join(told)}"


def _atoms(info: ParameterInfo) -> list[ParameterInfo]:
    """A parameter once for each stream that it serves: those of single blocks serve both."""
    if info.stack == "single":
        return [replace(info, stream=stream) for stream in STREAMS]
    return [info]


def _site(path: str, module: nn.Module, atoms: Sequence[ParameterInfo], stream: Stream | None) -> Site:
    first = atoms[0]
    parts, projections = ({getattr(atom, slot) for atom in atoms} for slot in ("part", "projection"))
    part = parts.pop() if len(parts) == 1 else None
    projection = projections.pop() if len(projections) == 1 else None
    residual = _ends(module, _RESIDUAL)
    words = path.split(".")
    name = words[-2] if words[-1].isdigit() and words[-2] == "to_out" else words[-1]
    label = first.block if residual or not (part or projection) else ".".join(
        [first.block, *(word for word in (part, projection) if word and word not in first.block.split("."))]
    )  # fmt: skip
    if first.part == "resnet" and not residual:
        label = f"{first.block}.{projection or name}"
    alone = next(iter({atom.stream for atom in atoms})) if len({atom.stream for atom in atoms}) == 1 else None
    joined = first.stack == "single"
    side: Any = stream or (alone if not residual and not joined else None)
    return Site(label, path, module, first.stack, first.index, part, projection, side, residual, joined)


def _order(site: Site) -> tuple[int, int, int]:
    """In the order they run; sites that this does not tell apart stay as the model lists them."""
    words = site.path.split(".")
    within = [2 * int(words[i + 1]) + _WITHIN[word] for i, word in enumerate(words) if word in _WITHIN]
    stack = _STACKS.index(site.stack) if site.stack in _STACKS else len(_STACKS)
    return stack, site.index or 0, within[0] if within else _LAST


def _ends(module: nn.Module, endings: Sequence[str]) -> bool:
    return type(module).__name__.endswith(tuple(endings))


@cache
def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """Of a method, without self."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
