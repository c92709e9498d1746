"""Attacks on an erased model, by name: each counted in gradients, queries and seconds, beside its controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "make",
]

_ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind for kind in (NoiseProbe, Completion, Inpainting, SoftPrompt, Inversion)
}


def make(name: str, settings: Mapping[str, Any]) -> Attack:
    """The attack of a name, with settings as YAML and JSON have them.

    Raises:
        UserError: there is none of that name, it has no such setting, or a value is of the wrong kind or out of range.
    """
    if name not in _ATTACKS:
        raise UserError(f"attack is {name!r}; allowed: {', '.join(_ATTACKS)}")
    own = vars(_ATTACKS[name]())
    for setting, value in settings.items():
        if setting not in own:
            raise UserError(f"{name}.{setting} is no setting of this attack; allowed: {', '.join(own)}")
        if not _alike(value, own[setting]):
            raise UserError(f"{name}.{setting} is {value!r}; allowed: a value such as {own[setting]!r}")
    told = {setting: tuple(value) if isinstance(value, list) else value for setting, value in settings.items()}
    return _ATTACKS[name](**told)


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a setting's default; a whole number may stand for a float."""
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(_alike(one, default[0]) for one in value)
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)
