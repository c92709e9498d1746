"""Which rows and columns of an attention's weights say where it looks, what it reads there, and which are a head's.

Queries and keys, with their norms, make the probabilities. Values and the output projection make what is read under
them. Some weights hold more than one of these, or something else besides:

    to_qkv_mlp_proj   rows of queries, keys, values, in this order, then those of the feed-forward
    to_out, proj_out  of a single block: columns of the attention, then those of the feed-forward

Source: diffusers 0.42, models/attention_processor.py, models/transformers/transformer_flux.py and transformer_flux2.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from esd.interventions import Site

Makes = Literal["probabilities", "values"]

_MAKES: dict[Makes, tuple[str, ...]] = {
    "probabilities": ("to_q", "to_k", "add_q_proj", "add_k_proj", "norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    "values": ("to_v", "add_v_proj", "to_out", "to_add_out"),
}
_OUTPUTS = ("to_out", "to_add_out")


@dataclass(frozen=True)
class Slice:
    """Some rows or columns of a parameter.

    Attributes:
        name: of the parameter, in full.
        makes: "probabilities" or "values".
        dim: 0 for rows, 1 for columns.
        start, stop: half-open range of them.
        heads: among which they are shared out evenly; 0 where all heads share each of them.
    """

    name: str
    makes: Makes
    dim: int
    start: int
    stop: int
    heads: int = 0

    def of_head(self, head: int) -> Slice:
        """The rows or columns of one head, numbered from 0."""
        width = (self.stop - self.start) // self.heads
        return replace(self, start=self.start + head * width, stop=self.start + (head + 1) * width, heads=1)

    @property
    def module(self) -> str:
        """Path of the module whose parameter it is."""
        return self.name.rpartition(".")[0]

    @property
    def index(self) -> tuple[slice, ...]:
        """What takes it out of its parameter."""
        return (slice(None),) * self.dim + (slice(self.start, self.stop),)


def slices(denoiser: nn.Module, site: Site) -> list[Slice]:
    """Those of an attention; weights that make neither probabilities nor values are left out.

    Args:
        denoiser: of the model.
        site: an attention as a whole.
    """
    heads, inner = int(site.module.heads), int(site.module.inner_dim)  # type: ignore[arg-type]
    live = dict(denoiser.named_parameters())
    found = []
    for name in (name for name in live if name.startswith(f"{site.path}.")):
        word, size = name.removeprefix(f"{site.path}.").split(".")[0], live[name].shape
        if word == "to_qkv_mlp_proj":
            rows: tuple[Makes, ...] = ("probabilities", "probabilities", "values")
            found += [Slice(name, what, 0, i * inner, (i + 1) * inner, heads) for i, what in enumerate(rows)]
        elif word in _OUTPUTS and len(size) > 1:
            found.append(Slice(name, "values", 1, 0, inner, heads))
        elif makes := next((makes for makes, words in _MAKES.items() if word in words), None):
            whole = size[0] == inner and word not in _OUTPUTS  # an output's bias belongs to no head
            found.append(Slice(name, makes, 0, 0, size[0], heads if whole else 0))
    outer = f"{site.path.rpartition('.')[0]}.proj_out.weight"
    if outer in live and site.stack == "single":
        found.append(Slice(outer, "values", 1, 0, inner, heads))
    return found


def mixed(into: Mapping[str, Tensor], of: Mapping[str, Tensor], chosen: Iterable[Slice]) -> dict[str, Tensor]:
    """Copies of the parameters that some slices belong to, on the CPU, with these slices of other values.

    Args:
        into: parameters by name.
        of: the other values.
        chosen: slices; those whose parameter lacks another value are left out.
    """
    found: dict[str, Tensor] = {}
    for one in chosen:
        if one.name in of:
            if one.name not in found:
                found[one.name] = into[one.name].detach().to("cpu", copy=True)
            found[one.name][one.index] = of[one.name].detach().to(found[one.name])[one.index]
    return found
