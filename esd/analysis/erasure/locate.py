"""Where an erasure sits: what each part of the model says otherwise when it sees just what the base's part saw.

*Teacher-forced*: the base denoises; at every step the erased model gets the base's x_t, and each of its parts the
input that the base's part had there. A difference between their outputs is then that part's own doing, and nothing
that an earlier part passed on:

    D(part, t) = ||erased part(h_base) - base part(h_base)|| / ||contribution of the base's part||

Beside it stand the size of the change in its weights, ||W_erased - W_base|| / ||W_base||, and D on prompts that should
be left alone; the quotient of the two is the part's selectivity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esd.analysis import estimates
from esd.analysis.estimates import Estimate
from esd.families import Denoiser, Family
from esd.interventions import Patch, Record, Recording, Site, attach, blocks, resolve, sample
from esd.interventions.sites import is_part
from esd.trajectory import first_stages


@dataclass(frozen=True)
class Part:
    """A working part of a model, and how far its weights moved.

    Attributes:
        site: where it is.
        layer: label of the block that it belongs to; its own where it belongs to none.
        moved: ||W_erased - W_base|| / ||W_base|| over its parameters; 0 where none changed.
    """

    site: Site
    layer: str
    moved: float


@dataclass(frozen=True)
class Difference:
    """What one part says otherwise at one step.

    Attributes:
        part: see `Part`.
        step: of the scheduler, 0 the first.
        t: time, in the scheduler's units.
        each: D of each prompt.
        rms: root mean square of the difference, mean over the prompts.
    """

    part: Part
    step: int
    t: float
    each: Sequence[float]
    rms: float

    @property
    def relative(self) -> float:
        """D, mean over the prompts."""
        return sum(self.each) / len(self.each)


@torch.no_grad()
def parts(family: Family, originals: Mapping[str, Tensor]) -> list[Part]:
    """Every part of a model, in the order they run.

    Args:
        family: whose denoiser wears erased weights.
        originals: the base's values of the parameters that these changed, by full name.
    """
    live = dict(family.denoiser.named_parameters())
    layers = {site.path: site.label for site in blocks(family)}
    found = []
    for site in resolve(family, "all", is_part):
        inside = [name for name in live if name.startswith(f"{site.path}.")]
        base = {name: originals.get(name, live[name]).float().cpu() for name in inside}
        change = sum(float((live[name].float().cpu() - value).square().sum()) for name, value in base.items())
        size = sum(float(value.square().sum()) for value in base.values())
        layer = next((label for path, label in layers.items() if f"{site.path}.".startswith(f"{path}.")), site.label)
        found.append(Part(site, layer, (change / size) ** 0.5 if size else 0.0))
    return found


@torch.no_grad()
def differences(
    family: Family,
    base: Denoiser,
    every: Sequence[Part],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
) -> list[Difference]:
    """D of every part whose weights moved, at every step of the base's own trajectories.

    Parts that did not move say the same by construction.

    Args:
        family: whose denoiser wears erased weights.
        base: the base under them; see `esd.checkpoint.base_view`.
        every: all parts of the model.
        prompts, seeds: what the base draws, b of each.
        num_steps, guidance_scale: of sampling.
    """
    cond, sites = family.encode(list(prompts)), [part.site for part in every]
    kept = [site for site in sites if not site.changes_shape]
    passed = sample(
        family, prompts, seeds, num_steps=num_steps, guidance_scale=guidance_scale, denoiser=base
    ).trajectory  # fmt: skip
    found: list[Difference] = []
    for step, entry in enumerate(first_stages(family.scheduler(num_steps, latent_shape=passed.inputs.shape[2:]))):
        x, t = passed.inputs[entry], passed.t[entry, 0]
        told, own, added = Record(sites), Record(sites), Record(kept, what="contribution")
        with attach(family, told, added):
            family.predict(base, x, t, cond)
        with attach(family, own, Patch(sites, source=told.recording, what="output")):
            family.predict(family.denoiser, x, t, cond)
        for part in every:
            if part.moved:
                each, rms = _apart(part.site, own.recording, told.recording, added.recording)
                found.append(Difference(part, step, float(t), each, rms))
    return found


def means(several: Sequence[Difference]) -> dict[str, Estimate]:
    """By label of a part, D: mean over prompts and steps, and its interval over the prompts."""
    return {label: estimates.mean(each) for label, each in _by_prompt(several).items()}


def selectivity(target: Sequence[Difference], retained: Sequence[Difference]) -> dict[str, Estimate]:
    """By label of a part, its mean D on target prompts over that on as many retained ones; 1 is none."""
    over, under = _by_prompt(target), _by_prompt(retained)
    return {label: estimates.quotient(over[label], under[label]) for label in over if under[label].any()}


def _by_prompt(several: Sequence[Difference]) -> dict[str, np.ndarray]:
    """By label of a part, D of each prompt (prompts,), mean over the steps."""
    found: dict[str, list[Sequence[float]]] = {}
    for difference in several:
        found.setdefault(difference.part.site.label, []).append(difference.each)
    return {label: np.mean(each, axis=0) for label, each in found.items()}


def _apart(site: Site, own: Recording, told: Recording, added: Recording) -> tuple[list[float], float]:
    """(D of each row, mean rms) of a site, over its streams."""
    keys = [key for key in told.values if key.path == site.path]
    zero = torch.zeros(len(told.values[keys[0]]))
    change = sum(((own.values[key] - told.values[key]).float().flatten(1).square().sum(1) for key in keys), zero)
    size = sum((added.values.get(key, told.values[key]).float().flatten(1).square().sum(1) for key in keys), zero)
    count = sum(told.values[key][0].numel() for key in keys)
    return (change / size).sqrt().tolist(), float((change / count).sqrt().mean())
