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

from esd.analysis import estimates
from esd.errors import UserError
from esd.evaluation.metrics import wilson
from esd.evaluation.pixels import images_of
from esd.families import Denoiser, Family
from esd.interventions import Graft, Op, Patch, Record, Recording, Site, blocks, resolve, sample
from esd.interventions.sites import is_attention

from .slices import mixed, slices

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
        restoration_low, restoration_high: 95% interval of R over the pictures; None of one.
    """

    kind: str
    where: str
    restoration: float
    k: int | None
    n: int
    restoration_low: float | None = None
    restoration_high: float | None = None

    def row(self) -> dict[str, Any]:
        """As a table has it."""
        told = {
            name: getattr(self, name)
            for name in ("kind", "where", "restoration", "restoration_low", "restoration_high")
        }
        if self.k is None:
            return told | {"n": self.n}
        low, high = wilson(self.k, self.n)
        return told | {"rate": self.k / self.n, "k": self.k, "n": self.n, "low": low, "high": high}


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
        found = estimates.mean((1 - near / far).cpu().numpy())
        return Restored(kind, where, found.value, k, found.n, found.low, found.high)

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
    """Grafts of each layer alone, and of all but each."""
    every = restorer.originals
    found = []
    for site in restorer.touched():
        own = restorer.inside([site])
        found += [
            restorer.graft("layer", site.label, own),
            restorer.graft("all but layer", site.label, {n: w for n, w in every.items() if n not in own}),
        ]
    return found


def by_window(restorer: Restorer, most: int = 6) -> list[Restored]:
    """Grafts of every window of consecutive layers, first to last; see `runs`."""
    inside = runs(restorer.touched(), most)
    return [restorer.graft("window", where, restorer.inside(sites)) for where, sites in inside.items()]


def runs(sites: Sequence[Site], most: int = 6) -> dict[str, Sequence[Site]]:
    """Every window of consecutive layers, by its first and last; many layers are taken some at a time.

    Args:
        sites: layers, in the order they run.
        most: groups of layers that a window begins and ends with.
    """
    groups = np.array_split(np.arange(len(sites)), min(most, len(sites)))
    inside = [sites[first[0] : last[-1] + 1] for i, first in enumerate(groups) for last in groups[i:]]
    return {f"{window[0].label} to {window[-1].label}": window for window in inside}


def by_contribution(restorer: Restorer, windows: int) -> list[Restored]:
    """Patches of the contributions of each layer, of windows of consecutive ones, and of all in windows of steps."""
    able = [site for site in restorer.touched() if not site.changes_shape]
    if not able:
        return []
    recording = restorer.recorded(able, "contribution")

    def patched(kind: str, where: str, sites: Sequence[Site], steps: Any = None) -> Restored:
        return restorer.score(kind, where, restorer.draw(Patch(sites, source=recording, steps=steps)))

    return [
        *(patched("contribution", site.label, [site]) for site in able),
        *(patched("contributions of layers", where, sites) for where, sites in runs(able).items()),
        *(patched("contributions in steps", between(scope), able, scope) for scope in cut(restorer.num_steps, windows)),
    ]


def cut(num_steps: int, windows: int) -> list[tuple[int, int]]:
    """Half-open ranges of steps, as many as asked for, but none without a step."""
    edges = sorted({round(i * num_steps / windows) for i in range(windows + 1)})
    return list(pairwise(edges))


def between(scope: tuple[int, int]) -> str:
    """A range of steps as people count them."""
    low, high = scope
    return f"{low + 1}" if high == low + 1 else f"{low + 1} to {high}"


def by_steps(restorer: Restorer, windows: int) -> list[Restored]:
    """Grafts of everything in windows of steps, and in all steps up to and from each."""
    drawn: dict[tuple[int, int], Tensor] = {}
    found = []
    for low, high in cut(restorer.num_steps, windows):
        for kind, scope in (
            ("steps", (low, high)), ("first steps", (0, high)), ("last steps", (low, restorer.num_steps)),
        ):  # fmt: skip
            if scope not in drawn:
                drawn[scope] = restorer.grafted(restorer.originals, scope)
            found.append(restorer.score(kind, between(scope), drawn[scope]))
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


def by_head(restorer: Restorer, attentions: Sequence[Site]) -> list[Restored]:
    """Grafts and patches of single heads of those attentions that changed.

    Grafted is what of the weights is one head's own. Patched is what a head adds: the base's values under the base's
    probabilities, from the base's own run, by its columns of the base's output projection.
    """
    family, originals = restorer.family, restorer.originals
    live = dict(family.denoiser.named_parameters())
    every = {site: slices(family.denoiser, site) for site in attentions}
    changed = {site: own for site, own in every.items() if any(one.name in originals and one.heads for one in own)}
    outs = {site: [one for one in own if one.dim == 1] for site, own in changed.items()}
    projections = {site: _modules(family, [one.module for one in outs[site]]) for site in changed}
    recording = restorer.recorded([out for several in projections.values() for out in several], "input")
    found = []
    for site, own in changed.items():
        for head in range(outs[site][0].heads):
            where, columns = f"{site.label}, head {head}", [one.of_head(head) for one in outs[site]]
            grafted = mixed(live, originals, [one.of_head(head) for one in own if one.heads])
            written = mixed(live, originals, columns)
            ops: list[Op] = [Graft("all", weights=written)] if written else []
            channels = columns[0].start, columns[0].stop
            ops.append(Patch(projections[site], source=recording, what="input", channels=channels))
            found += [
                restorer.graft("head", where, grafted),
                restorer.score("contribution of a head", where, restorer.draw(*ops)),
            ]
    return found


def _modules(family: Family, paths: Sequence[str]) -> list[Site]:
    """Single modules of a denoiser as sites."""
    modules = [family.denoiser.get_submodule(path) for path in paths]
    return resolve(family, "all", lambda module: module in modules)


def attentions(family: Family, sites: Sequence[Site]) -> list[Site]:
    """The attentions inside some layers."""
    paths = tuple(f"{site.path}." for site in sites)
    return [site for site in resolve(family, "all", is_attention) if f"{site.path}.".startswith(paths)]
