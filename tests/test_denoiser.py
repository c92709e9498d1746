"""The denoiser against the base's: 1 and 0 where nothing changed, 0 where it no longer sees the prompt."""

from pathlib import Path

import pytest
import torch

from esd import checkpoint
from esd.evaluation.denoiser import sensitivity
from esd.families import Family, family_of
from tests import tiny

SETTINGS = {"num_steps": 4, "guidance_scale": 3.0, "max_points": 3}
PROMPTS = ["a cat", "a dog", "a rose in mosaic style"]


def erased_by(family: Family, path: Path, part: str, scale: float) -> checkpoint.Erased:
    """A checkpoint that adds `scale` times the weights whose name holds `part`."""
    base = {name: value.detach() for name, value in family.denoiser.named_parameters() if part in name}
    assert base
    told = {"fingerprint": checkpoint.fingerprint(base), "concepts": ["cat"], "base": "tiny"}
    checkpoint.save(path, {name: scale * value for name, value in base.items()}, told)
    return checkpoint.load(path)


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl", "flux-dev"])
def test_weights_that_change_nothing_leave_a_residual_of_one_and_no_drift(tmp_path: Path, name: str) -> None:
    family = family_of(tiny.every(name))
    part = "attn.to_k" if name == "flux-dev" else "attn2.to_k"
    rows = sensitivity(family, erased_by(family, tmp_path / "e.safetensors", part, 0.0), PROMPTS, **SETTINGS)
    assert [(row["residual"], row["drift"], row["n"]) for row in rows] == [(1.0, 0.0, 3)] * 3
    assert [row["t"] for row in rows] == sorted((row["t"] for row in rows), reverse=True)


def test_a_denoiser_blind_to_the_prompt_has_no_residual(tmp_path: Path) -> None:
    family = family_of(tiny.every("sd1"))
    before = {name: value.clone() for name, value in family.denoiser.named_parameters()}
    rows = sensitivity(family, erased_by(family, tmp_path / "e.safetensors", "attn2.to_v", -1.0), PROMPTS, **SETTINGS)
    assert all(row["residual"] < 1e-4 and row["drift"] > 0.1 for row in rows)
    assert all(torch.equal(value, before[name]) for name, value in family.denoiser.named_parameters())


def test_how_many_prompts_go_through_at_once_changes_nothing(tmp_path: Path) -> None:
    family = family_of(tiny.every("sd1"))
    weights = erased_by(family, tmp_path / "e.safetensors", "attn2", 0.5)
    whole = sensitivity(family, weights, PROMPTS, **SETTINGS)
    parts = sensitivity(family, weights, PROMPTS, max_batch=2, **SETTINGS)
    for one, two in zip(whole, parts, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    assert sensitivity(family, weights, PROMPTS[:1], **SETTINGS)[0]["residual"] != whole[0]["residual"]
