"""How an erasure works: by another attention (where to look), by other values (what is read there), or after both.

The base's queries and keys make its attention probabilities; patched into the erased model's attentions they give it
the base's gating with its own values. Patched values give the converse. What comes back by neither was not erased in
attention.
"""

from __future__ import annotations

from esd.interventions import Patch, resolve
from esd.selection import SelectionError

from .restore import Restored, Restorer

KINDS = {
    "cross": {"probabilities": "cross.q + cross.k", "values": "cross.v"},
    "self": {"probabilities": "self.q + self.k", "values": "self.v"},
    "joint": {"probabilities": "joint.q + joint.k + joint.add_q + joint.add_k", "values": "joint.v + joint.add_v"},
}


def swapped(restorer: Restorer) -> list[Restored]:
    """What the base's probabilities, its values, or both bring back, in each kind of attention that the model has."""
    found = []
    for kind, by in KINDS.items():
        for what in (*by, "both"):
            try:
                sites = resolve(restorer.family, " + ".join(by.values()) if what == "both" else by[what])
            except SelectionError:
                continue  # not on this architecture, or fused
            recording = restorer.recorded(sites, "output")
            patched = restorer.draw(Patch(sites, source=recording, what="output"))
            found.append(restorer.score(f"{kind} attention", what, patched))
    return found
