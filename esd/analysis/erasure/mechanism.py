"""How an erasure works: by another attention (where to look), by other values (what is read there), or outside of both.

The base's queries and keys are put back in the erased model, which then looks as the base would at what it has drawn so
far; or the base's values and output projections; or both; or everything that is not of an attention. Weights are put
back, and not probabilities patched in from a run of the base: in its own run the base attends to the picture of the
concept that it has drawn already, and its probabilities would bring that picture along.
"""

from __future__ import annotations

import torch

from esd.interventions import resolve
from esd.interventions.sites import is_attention

from .restore import Restored, Restorer
from .slices import Makes, Slice, mixed, slices

HOLD: dict[Makes, str] = {"probabilities": "probabilities (q, k)", "values": "values (v, out)"}


def swapped(restorer: Restorer) -> list[Restored]:
    """What the base's weights bring back of probabilities, of values, of both, in each kind of attention that changed,
    over all blocks, and what those outside of attention do."""
    denoiser = restorer.family.denoiser
    live, changed = dict(denoiser.named_parameters()), restorer.originals
    kinds: dict[str, list[Slice]] = {}
    for site in resolve(restorer.family, "all", is_attention):
        inside = [one for one in slices(denoiser, site) if one.name in changed]
        if inside:
            kinds.setdefault(f"{site.part} attention", []).extend(inside)
    found = []
    for kind, every in kinds.items():
        by = {name: [one for one in every if one.makes == makes] for makes, name in HOLD.items()}
        by |= {"both": every} if all(by.values()) else {}
        for what, chosen in by.items():
            if chosen:
                found.append(restorer.graft(kind, what, mixed(live, changed, chosen)))
    attended = mixed(changed, live, (one for every in kinds.values() for one in every))
    rest = {name: attended.get(name, value) for name, value in changed.items()}
    rest = {name: value for name, value in rest.items() if not torch.equal(value.cpu(), live[name].detach().cpu())}
    if rest:
        found.append(restorer.graft("outside attention", "all", rest))
    return found
