"""Families of the tiny pipelines, and the guidance that each is sampled with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from esd.families import family_of
from tests import tiny

GUIDANCE = {  # as each model is sampled
    "sd1": 3.0, "sd2-v": 3.0, "sdxl": 3.0, "sdxl-turbo": 0.0, "sd3": 3.0, "sd3.5": 3.0,
    "flux-dev": 3.5, "flux-schnell": 0.0, "klein": 1.0, "klein-base": 4.0, "pixart": 3.0,
}  # fmt: skip
FEW_WORDS = {"sd3", "sd3.5", "flux-dev", "flux-schnell", "klein", "klein-base", "pixart"}
TOLD: dict[str, dict[str, Any]] = {  # what a family's pipeline must be told to do no more than sample
    "pixart-sigma": {"use_resolution_binning": False, "clean_caption": False},
}


def documented() -> Any:
    """The class of the family that docs/add-a-family.md adds, as it stands there."""
    page = (Path(__file__).parents[1] / "docs" / "add-a-family.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 150
    written: dict[str, Any] = {}
    exec(compile(code, "add-a-family.md", "exec"), written)
    return written["PixArtSigma"]


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh family, reading few tokens of a prompt."""
    pipe = tiny.every(name).to(dtype)
    family = documented()(pipe) if name == "pixart" else family_of(pipe)
    if name in FEW_WORDS:
        family.max_tokens = tiny.TOKENS  # type: ignore[attr-defined]
    return family


FAMILIES: dict[str, Any] = {}


def shared(name: str) -> Any:
    """One family for all tests that only read it."""
    if name not in FAMILIES:
        FAMILIES[name] = make(name)
    return FAMILIES[name]
