"""What brings the concept back: the base's weights, or its contributions, in some places of the erased model.

*Grafting* gives some parameters the base's values; *patching* gives a layer's output the base's contribution, recorded
on the base's own trajectory. Pictures are scored against those of base and erased model from the same noise:

    R = 1 - ||y - y_base|| / ||y_erased - y_base||

over clean latents, 1 where the base's picture is back and 0 where nothing is; and by the judge, where there is one, as
the share of pictures that show the concept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esd.errors import UserError
from esd.evaluation.metrics import wilson
from esd.evaluation.pixels import images_of
from esd.families import Denoiser, Family
from esd.interventions import Graft, Op, Patch, Record, Recording, Site, blocks, sample
from esd.interventions.sites import is_attention

Shows = Callable[[np.ndarray], np.ndarray]  # uint8 pictures (n, H, W, 3) -> bool (n,): is the concept there?


@dataclass(frozen=True)
class Restored:
    """How far something brought the concept back.

    Attributes:
        kind: of what was put back: "layer", "all but layer", "steps", ...
        where: label.
        restoration: R, mean over the pictures.
        k: pictures that show the concept; None without a judge.
        n: pictures.
    """

    kind: str
    where: str
    restoration: float
    k: int | None
    n: int

    def row(self) -> dict[str, Any]:
        """As a table has it."""
        rate = {} if self.k is None else {"rate": self.k / self.n, "k": self.k}
        low, high = (None, None) if self.k is None else wilson(self.k, self.n)
        told = {"kind": self.kind, "where": self.where, "restoration": self.restoration, **rate, "n": self.n}
        return told | ({} if self.k is None else {"low": low, "high": high})


@dataclass
class Restorer:
    """An erased model, its base, and pictures that both were asked for.

    Args:
        family: whose denoiser wears erased weights.
        base: the base under them; see `esd.checkpoint.base_view`.
        originals: the base's values of the parameters that changed.
        prompts, seeds: that ask for the concept, n of each.
        num_steps, guidance_scale: of sampling.
        shows: says which pictures show the concept; None without a judge.

    Raises:
        UserError: base and erased model draw the same, so that nothing can be restored.
    """

    family: Family
    base: Denoiser
    originals: Mapping[str, Tensor]
    prompts: Sequence[str]
    seeds: Sequence[int]
    num_steps: int
    guidance_scale: float
    shows: Shows | None = None
    y_base: Tensor = field(init=False)
    y_erased: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Draws with both models."""
        self.y_base, self.y_erased = self.draw(denoiser=self.base), self.draw()
        if torch.equal(self.y_base, self.y_erased):
            raise UserError("base and erased model draw the same from these prompts; give prompts that ask for the "
                            "concept")  # fmt: skip

    def draw(self, *ops: Op, denoiser: Denoiser | None = None) -> Tensor:
        """Clean latents (n, c, h, w) under ops."""
        return sample(
            self.family, self.prompts, self.seeds, *ops, num_steps=self.num_steps,
            guidance_scale=self.guidance_scale, denoiser=denoiser,
        ).latents  # fmt: skip

    def score(self, kind: str, where: str, latents: Tensor) -> Restored:
        """Of pictures from the same prompts and seeds."""
        far, near = ((y - self.y_base).flatten(1).norm(dim=1) for y in (self.y_erased, latents))
        k = None if self.shows is None else int(self.shows(images_of(self.family, latents)).sum())
        return Restored(kind, where, float((1 - near / far).mean()), k, len(latents))

    def grafted(self, weights: Mapping[str, Tensor], steps: Any = None) -> Tensor:
        """Clean latents (n, c, h, w) with other weights; without any of them the erased model's own."""
        return self.draw(Graft("all", weights=weights, steps=steps)) if weights else self.y_erased

    def graft(self, kind: str, where: str, weights: Mapping[str, Tensor], steps: Any = None) -> Restored:
        """How far other weights bring the concept back."""
        return self.score(kind, where, self.grafted(weights, steps))

    def inside(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The base's values of the changed parameters in some sites."""
        paths = tuple(f"{site.path}." for site in sites)
        return {name: value for name, value in self.originals.items() if name.startswith(paths)}

    def touched(self) -> list[Site]:
        """The blocks in which a parameter changed, in the order they run."""
        return [site for site in blocks(self.family) if self.inside([site])]

    def recorded(self, sites: Sequence[Site], what: Any) -> Recording:
        """What the base has at some sites on its own trajectories."""
        record = Record(sites, what=what)
        self.draw(record, denoiser=self.base)
        return record.recording


def ends(restorer: Restorer) -> list[Restored]:
    """The two ends of the scale: the base, and the erased model."""
    return [
        restorer.score("model", "base", restorer.y_base),
        restorer.score("model", "erased", restorer.y_erased),
    ]


def by_layer(restorer: Restorer) -> list[Restored]:
    """Grafts of each layer alone, of all but each, and of all up to and from each; patches of each contribution."""
    sites = restorer.touched()
    every = dict(restorer.originals)
    found = []
    for i, site in enumerate(sites):
        own = restorer.inside([site])
        found += [
            restorer.graft("layer", site.label, own),
            restorer.graft("all but layer", site.label, {n: w for n, w in every.items() if n not in own}),
            restorer.graft("up to layer", site.label, restorer.inside(sites[: i + 1])),
        ]
    able = [site for site in sites if not site.changes_shape]
    recording = restorer.recorded(able, "contribution")
    for site in able:
        patched = restorer.draw(Patch([site], source=recording))
        found.append(restorer.score("contribution", site.label, patched))
    return found


def by_steps(restorer: Restorer, windows: int) -> list[Restored]:
    """Grafts of everything in windows of steps, and in all steps up to and from each."""
    edges = [i / windows for i in range(windows + 1)]
    found = []
    for low, high in pairwise(edges):
        for kind, scope in (("steps", (low, high)), ("first steps", (0.0, high)), ("last steps", (low, 1.0))):
            label = f"{scope[0]:.0%} to {scope[1]:.0%}"
            found.append(restorer.graft(kind, label, restorer.originals, scope))
    return found


def by_part(restorer: Restorer) -> list[Restored]:
    """Grafts of each kind of part, over the whole depth, alone and left out."""
    roles: dict[str, list[str]] = {}
    for info in restorer.family.parameter_infos():
        if info.name in restorer.originals:
            role = ".".join(word for word in (info.part, info.projection) if word)
            roles.setdefault(role, []).append(info.name)
    every = restorer.originals
    found = []
    for role, names in roles.items():
        found += [
            restorer.graft("part", role, {name: every[name] for name in names}),
            restorer.graft("all but part", role, {name: value for name, value in every.items() if name not in names}),
        ]
    return found


def by_head(restorer: Restorer, sites: Sequence[Site]) -> list[Restored]:
    """Grafts of single heads of attentions: their rows of queries, keys and values, their columns of the output."""
    live = dict(restorer.family.denoiser.named_parameters())
    found = []
    for site in sites:
        heads = int(site.module.heads)  # type: ignore[arg-type]
        for head in range(heads):
            mixed = {}
            for name, base in restorer.inside([site]).items():
                dim = 1 if ".to_out." in name or ".to_add_out." in name else 0
                if base.ndim <= dim or base.shape[dim] % heads:
                    continue  # the output's bias belongs to no head
                width = base.shape[dim] // heads
                value = live[name].detach().to("cpu", copy=True)
                own = slice(head * width, (head + 1) * width)
                index = (slice(None),) * dim + (own,)
                value[index] = base[index]
                mixed[name] = value
            found.append(restorer.graft("head", f"{site.label}, head {head}", mixed))
    return found


def minimal(restorer: Restorer, single: Sequence[Restored], share: float = 0.8) -> tuple[list[Site], list[Restored]]:
    """A small set of layers whose grafts together bring the concept back.

    Layers are added from the one that restores most on its own until the rate, or without a judge R, reaches a share
    of the base's; then each is left out again where that does not lose it.

    Args:
        restorer: of the erased model.
        single: what `by_layer` says of each layer alone.
        share: of the base's rate or restoration.

    Returns:
        The layers in the order they run, and what was tried on the way.
    """
    sites = {site.label: site for site in restorer.touched()}
    rank = sorted((r for r in single if r.kind == "layer"), key=lambda r: (r.restoration, r.k or 0), reverse=True)
    base = restorer.score("model", "base", restorer.y_base)
    tried: list[Restored] = []

    def enough(chosen: Sequence[str]) -> bool:
        weights = restorer.inside([sites[label] for label in chosen])
        result = restorer.graft("set", " + ".join(label for label in sites if label in chosen), weights)
        tried.append(result)
        if result.k is None or not base.k:
            return result.restoration >= share
        return result.k >= share * base.k

    labels = [r.where for r in rank]
    low, high = 1, len(labels)  # the smallest number of layers that is enough
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(labels[:middle]) else (middle + 1, high)
    chosen = labels[:low]
    for label in reversed(chosen[:]):
        fewer = [other for other in chosen if other != label]
        if fewer and enough(fewer):
            chosen = fewer
    enough(chosen)
    return [site for label, site in sites.items() if label in chosen], tried


def attentions(sites: Sequence[Site], every: Sequence[Site]) -> list[Site]:
    """The attentions inside some layers."""
    paths = tuple(f"{site.path}." for site in sites)
    return [site for site in every if is_attention(site.module) and f"{site.path}.".startswith(paths)]


def suggestion(sites: Sequence[Site], selection: str) -> str:
    """A selection for another training: what was trained before, in these layers only.

    Args:
        sites: layers, at least one.
        selection: that the erasure was trained with.
    """
    where = " + ".join(site.expression for site in sites)
    return f"({selection}) & ({where})"
