"""Real models by their published configurations: every preset trains as many parameters as docs/families.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from esd.families import Family, family_of
from tests import published, tiny

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "families.md"


def documented() -> dict[str, dict[str, int]]:
    """Model to preset (or "all of it") to parameters, from the table of counts."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## How many parameters")[1]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", section, re.M)]
    models = rows[0][1:]
    table: dict[str, dict[str, int]] = {model: {} for model in models}
    for preset, *counts in rows[2:]:
        for model, count in zip(models, counts, strict=True):
            if count != "-":
                table[model][preset.strip("`")] = int(count.replace(",", ""))
    return table


def family(name: str) -> Family:
    pipe = tiny.every(published.TINY[name])
    setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", published.denoiser(name))
    return family_of(pipe)


@pytest.mark.parametrize("name", list(published.DENOISERS))
def test_every_preset_trains_what_the_document_says(name: str) -> None:
    real = family(name)
    counts = {preset: real.select(preset).numel for preset in real.presets if preset not in real.absent}
    assert {"all of it": sum(p.numel() for p in real.denoiser.parameters()), **counts} == documented()[name]


def test_keys_and_values_of_cross_attention_are_counted_by_their_shapes() -> None:
    """SD 1.4's strict preset by hand: two matrices of width x 768 in each transformer block, 16 of those."""
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
    assert family("SD 1.4").select("esd_x_strict").numel == sum(2 * width * 768 for width in widths)


@pytest.mark.parametrize("name", ["SD 1.4", "SDXL"])
def test_upstream_rule_by_name_and_kind_of_layer_is_the_preset(name: str) -> None:
    real = family(name)
    modules = {
        module_name: module
        for module_name, module in real.denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    inside = {n for n in modules if name != "SDXL" or ("block" in n and "emb" not in n)}
    expected = {
        "esd_x": {n for n in modules if "attn2" in n},
        "esd_x_strict": {n for n in modules if n.endswith(("attn2.to_k", "attn2.to_v"))},
        "esd_u": {n for n in inside if "attn2" not in n},
    }
    for preset, chosen in expected.items():
        parameters = {f"{n}.{p}" for n in chosen for p, _ in modules[n].named_parameters()}
        assert set(real.select(preset).names) == parameters, preset
