"""Families of the tiny pipelines, and the guidance that each is sampled with."""

from __future__ import annotations

from typing import Any

import torch

from esd.families import family_of
from tests import tiny

GUIDANCE = {  # as each model is sampled
    "sd1": 3.0, "sd2-v": 3.0, "sdxl": 3.0, "sdxl-turbo": 0.0, "sd3": 3.0, "sd3.5": 3.0,
    "flux-dev": 3.5, "flux-schnell": 0.0, "klein": 1.0, "klein-base": 4.0,
}  # fmt: skip
FEW_WORDS = {"sd3", "sd3.5", "flux-dev", "flux-schnell", "klein", "klein-base"}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh family, reading few tokens of a prompt."""
    family = family_of(tiny.every(name).to(dtype))
    if name in FEW_WORDS:
        family.max_tokens = tiny.TOKENS  # type: ignore[attr-defined]
    return family


FAMILIES: dict[str, Any] = {}


def shared(name: str) -> Any:
    """One family for all tests that only read it."""
    if name not in FAMILIES:
        FAMILIES[name] = make(name)
    return FAMILIES[name]
