"""Attacks on an erased model, by name: each counted in gradients, queries and seconds, beside its controls."""

from __future__ import annotations

from esd.errors import UserError

from .attack import Attack
from .budget import Budget
from .completion import Completion
from .inpainting import Inpainting
from .inversion import Inversion
from .noise import NoiseProbe
from .recovery import Curve, Point, Recovery
from .scorer import ConceptScorer, Scorer
from .soft_prompt import SoftPrompt
from .subject import Model

__all__ = [
    "Attack",
    "Budget",
    "Completion",
    "ConceptScorer",
    "Curve",
    "Inpainting",
    "Inversion",
    "Model",
    "NoiseProbe",
    "Point",
    "Recovery",
    "Scorer",
    "SoftPrompt",
    "find",
]

_ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind for kind in (NoiseProbe, Completion, Inpainting, SoftPrompt, Inversion)
}


def find(name: str) -> type[Attack]:
    """The attack of that name, a dataclass of its settings.

    Raises:
        UserError: there is none.
    """
    if name not in _ATTACKS:
        raise UserError(f"attack is {name!r}; allowed: {', '.join(_ATTACKS)}")
    return _ATTACKS[name]
