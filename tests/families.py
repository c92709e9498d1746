"""Families of the tiny pipelines, the guidance that each is sampled with, and what they draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esd import checkpoint
from esd.families import family_of
from esd.interventions import sample
from tests import tiny

every = pytest.mark.parametrize("name", list(tiny.PIPELINES))
UNETS = ("sd1", "sd2-v", "sdxl", "sdxl-turbo")
MMDITS = tuple(name for name in tiny.PIPELINES if name not in UNETS)

GUIDANCE = {  # as each model is sampled
    "sd1": 3.0, "sd2-v": 3.0, "sdxl": 3.0, "sdxl-turbo": 0.0, "sd3": 3.0, "sd3.5": 3.0,
    "flux-dev": 3.5, "flux-schnell": 0.0, "klein": 1.0, "klein-base": 4.0, "pixart": 3.0,
}  # fmt: skip
TEXT = dict.fromkeys(UNETS, "cross") | dict.fromkeys(MMDITS, "double + single")  # attentions that read the text
TEXT |= {"sd3": "double.joint", "sd3.5": "double.joint"}
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
    if hasattr(family, "max_tokens"):
        family.max_tokens = tiny.TOKENS  # type: ignore[attr-defined]
    return family


FAMILIES: dict[str, Any] = {}


def shared(name: str) -> Any:
    """One family for all tests that only read it."""
    if name not in FAMILIES:
        FAMILIES[name] = make(name)
    return FAMILIES[name]


def drawn(name: str, *ops: Any, prompts: Sequence[str] = ("a cat",), seeds: Sequence[int] = (), **how: Any) -> Tensor:
    """Latents of a few steps under ops.

    Args:
        name: of a tiny pipeline.
        ops: what is done while it draws.
        prompts: what is drawn.
        seeds: one for each prompt; () is 0 for all.
        how: `family` in place of the shared one; the rest goes to `sample`.
    """
    told = {"num_steps": 3, "guidance_scale": GUIDANCE[name], **how}
    family = told.pop("family", None) or shared(name)
    return sample(family, list(prompts), list(seeds) or [0] * len(prompts), *ops, **told).latents


def close(one: Tensor, other: Tensor) -> bool:
    """Whether latents are the same but for rounding."""
    return torch.allclose(one, other, atol=5e-5, rtol=1e-4)


def erased(family: Any, file: Path, *parts: str) -> checkpoint.Erased:
    """A checkpoint that changes, at random and visibly, every weight whose name holds one of these parts."""
    chosen = {key: value for key, value in family.denoiser.named_parameters() if any(part in key for part in parts)}
    differences = {
        key: 0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
        for i, (key, value) in enumerate(chosen.items())
    }
    checkpoint.save(file, differences, {"fingerprint": checkpoint.fingerprint(chosen), "concepts": ["cat"]})
    return checkpoint.load(file)
