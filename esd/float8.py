"""Frozen weights in a byte each: stored as float8, and brought up to the precision of the work while their layer works.

A value becomes float8 e4m3 (1 sign, 4 exponent and 3 mantissa bits) times one power of two for the whole matrix, the
largest that keeps every value in range. So a value is off by at most one part in 16 unless it is under 2^-14 of the
matrix's largest. Without the power that would be so under 2^-6, as many weights of wide layers are.

What is stored this way are the linear layers of blocks that repeat, which is nearly all of a transformer. Embeddings,
first and last layers, norms and the layers that modulate them by the time stay: they are small or touchy.

The product remembers the narrow weight for its backward pass and widens it there again. A plain
`F.linear(x, weight.to(x.dtype))` would keep the wide copy of every layer from the forward to the backward pass, and
`enable_layerwise_casting` of diffusers, which swaps a parameter's data before and after the layer, would show the
backward pass the narrow ones.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433 (e4m3, scaling per tensor); diffusers,
hooks/layerwise_casting.py (which layers to leave out).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_KIND = torch.float8_e4m3fn
_IN_BLOCKS = re.compile(r"\.\d+\.")  # a number in the path: one of blocks that repeat
_TOUCHY = re.compile(r"norm|time|embed")


class Float8Linear(nn.Linear):
    """A linear layer while it is stored; its weight is uint8 (out, in), the bytes of the float8.

    As integers, because nothing casts these, and every way to send tensors between processes takes them.

    Attributes:
        scale: what the float8 are to be multiplied by, float32 ().
        whole: the parameter as it was; no parameter of this module, so that it stays where it is, on the CPU.
    """

    scale: Tensor
    whole: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, in autocast's precision where there is autocast, else in that of x."""
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        product: Tensor = _Product.apply(x.to(kind), self.weight, self.scale, self.bias)
        return product


class _Product(torch.autograd.Function):
    """The product that keeps the narrow weight for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, _widened(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), (weight, scale) = gradients, ctx.saved_tensors
        return gradient @ _widened(weight, scale, gradient.dtype), None, None, None


@contextmanager
def stored(module: nn.Module, *, but: Collection[str] = ()) -> Iterator[None]:
    """Stores a denoiser's weights in float8 for the length of a `with` block; afterwards they are back bit for bit.

    Args:
        module: the denoiser, on the CPU; it may go elsewhere and back inside the block.
        but: names of weights that stay as they are.
    """
    layers = linears(module, but=but)
    try:
        for layer in layers:
            _narrow(layer)
        yield
    finally:
        for layer in layers:
            _restore(layer)


def linears(module: nn.Module, *, but: Collection[str] = ()) -> list[nn.Linear]:
    """The layers of a denoiser whose weights `stored` would store."""
    return [
        layer
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear
        and _IN_BLOCKS.search(f"{name}.")
        and not _TOUCHY.search(name)
        and f"{name}.weight" not in but
    ]


def spared(module: nn.Module, *, but: Collection[str] = ()) -> int:
    """Bytes that `stored` makes a denoiser smaller by."""
    weights = [layer.weight for layer in linears(module, but=but)]
    return sum((weight.element_size() - 1) * weight.numel() for weight in weights)


def whole(layer: nn.Module) -> Tensor:
    """The weight of a layer as it is in the base, stored or not."""
    weight: Any = layer.whole if isinstance(layer, Float8Linear) else layer.weight
    return weight.detach()


@torch.no_grad()
def _narrow(layer: nn.Linear) -> None:
    """Turns a layer into a `Float8Linear`."""
    weight = layer.weight
    most = weight.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    power = torch.exp2(torch.floor(torch.log2(torch.finfo(_KIND).max / most)).clamp(max=126))
    narrow = (weight.float() * power).to(_KIND)
    layer.__class__ = Float8Linear
    layer.__dict__["whole"] = weight  # past nn.Module, which would take it for one of the layer's parameters
    layer.register_buffer("scale", 1 / power, persistent=False)
    layer.weight = nn.Parameter(narrow.view(torch.uint8), requires_grad=False)


def _restore(layer: nn.Linear) -> None:
    """The layer as it was before `_narrow`."""
    if isinstance(layer, Float8Linear):
        layer.weight = layer.__dict__.pop("whole")
        del layer.scale
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def _widened(weight: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """The values of a stored weight, exact in every precision that has float8's range around its scale."""
    return weight.view(_KIND).to(kind).mul_(scale)
