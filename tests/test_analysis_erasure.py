"""Where an erasure sits: changes put in by hand are found where they are, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esd import checkpoint
from esd.analysis import Results, Subject, erasure
from esd.analysis.erasure import gaze, leak, locate, mechanism, restore
from esd.config.analyses import ErasureConfig
from esd.errors import UserError
from esd.families import Family
from esd.interventions import blocks, layers
from tests.families import GUIDANCE, make
from tests.programs import table

PROMPTS, SEEDS = ["a cat", "the cat in mosaic style"], [0, 1]
LAST = {"sd1": "up_blocks.1.attentions.0", "flux-dev": "single_transformer_blocks.0", "sd3.5": "transformer_blocks.1",
        "klein-base": "single_transformer_blocks.1", "sdxl": "up_blocks.0.attentions.0"}  # fmt: skip
every = pytest.mark.parametrize("name", LAST)


def changed(name: str, path: str, tmp_path: Path, size: float = 0.5) -> tuple[Family, checkpoint.Erased]:
    """A family, and a checkpoint that changes every weight matrix under a path of its denoiser."""
    family = make(name)
    seed = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {
        key: size * value.std() * torch.randn(value.shape, generator=seed)
        for key, value in family.denoiser.named_parameters()
        if key.startswith(f"{path}.") and value.ndim > 1
    }
    file = tmp_path / checkpoint.FILE_NAME
    told = {
        "concepts": ["cat"], "selection": "all", "base": family.base_name, "revision": None, "parameters": 1,
        "fingerprint": checkpoint.fingerprint({key: family.denoiser.get_parameter(key) for key in found}),
    }  # fmt: skip
    checkpoint.save(file, found, told)
    return family, checkpoint.load(file)


def restorer(name: str, family: Family, **options: Any) -> restore.Restorer:
    return restore.Restorer(
        family, checkpoint.base_view(family.pipe), checkpoint.originals(family.pipe), PROMPTS, SEEDS, 3,
        GUIDANCE[name], **options,
    )  # fmt: skip


@every
def test_a_change_is_found_where_it_is_and_nowhere_else(name: str, tmp_path: Path) -> None:
    family, found = changed(name, LAST[name], tmp_path)
    with checkpoint.erased(family.pipe, found):
        parts = locate.parts(family, checkpoint.originals(family.pipe))
        seen = locate.differences(
            family, checkpoint.base_view(family.pipe), parts, PROMPTS, SEEDS, num_steps=3,
            guidance_scale=GUIDANCE[name],
        )  # fmt: skip
    moved = {part.site.path for part in parts if part.moved}
    assert moved and all(f"{path}.".startswith(LAST[name]) for path in moved)
    assert {d.part.site.path for d in seen} == moved and {d.step for d in seen} == {0, 1, 2}
    assert all(d.relative > 1e-3 for d in seen)


def test_an_earlier_change_is_not_taken_for_a_later_ones(tmp_path: Path) -> None:
    """A part whose own weights moved by nothing differs by nothing, whatever comes to it."""
    family, found = changed("sd1", "down_blocks.0.attentions.0", tmp_path)
    with checkpoint.erased(family.pipe, found):
        parts = locate.parts(family, checkpoint.originals(family.pipe))
        pretended = [locate.Part(part.site, part.layer, 1.0) for part in parts]
        seen = locate.differences(
            family, checkpoint.base_view(family.pipe), pretended, PROMPTS, SEEDS, num_steps=2, guidance_scale=3.0
        )
    largest = {d.part.site.path: d.relative for d in seen}
    inside = {path for path in largest if path.startswith("down_blocks.0.attentions.0.")}
    assert max(largest[path] for path in largest if path not in inside) < 1e-5 < max(largest[p] for p in inside)


@every
def test_the_layer_that_changed_restores_everything_and_no_other_anything(name: str, tmp_path: Path) -> None:
    family, found = changed(name, LAST[name], tmp_path)
    with checkpoint.erased(family.pipe, found):
        tried = restorer(name, family)
        (site,) = tried.touched()
        assert site.path == LAST[name]
        by = {(r.kind, r.where): r.restoration for r in (*restore.ends(tried), *restore.by_layer(tried))}
        assert by["model", "base"] == 1 and by["model", "erased"] == 0
        assert by["layer", site.label] == pytest.approx(1, abs=1e-4) and by["all but layer", site.label] == 0
        fewest, sets = restore.minimal(tried, [restore.Restored("layer", site.label, 1.0, None, 2)])
        assert fewest == [site] and sets[-1].restoration == pytest.approx(1, abs=1e-4)
        steps = restore.by_steps(tried, 3)
        assert [r.restoration for r in steps if r.kind == "first steps"][-1] == pytest.approx(1, abs=1e-4)
        assert any(0 < r.restoration < 1 for r in steps) or any(r.restoration < 0 for r in steps)


def test_parts_and_heads_add_up_to_what_changed(tmp_path: Path) -> None:
    family, found = changed("sd1", "mid_block.attentions.0.transformer_blocks.0.attn2", tmp_path)
    with checkpoint.erased(family.pipe, found):
        tried = restorer("sd1", family)
        roles = {r.where for r in restore.by_part(tried)}
        assert roles == {"cross.q", "cross.k", "cross.v", "cross.out"}
        (attention,) = restore.attentions(tried.touched(), [s for s in _attentions(family) if "cross" in s.label])
        per_head = restore.by_head(tried, [attention])
        assert len(per_head) == attention.module.heads and all(r.restoration != 0 for r in per_head)
        both = {r.where: r.restoration for r in mechanism.swapped(tried) if r.kind == "cross attention"}
        assert set(both) == {"probabilities", "values", "both"}


def _attentions(family: Family) -> list[Any]:
    from esd.interventions import resolve
    from esd.interventions.sites import is_attention

    return resolve(family, "all", is_attention)


def test_the_judges_count_decides_which_layers_are_needed(tmp_path: Path) -> None:
    family, found = changed("sd1", "up_blocks", tmp_path)
    with checkpoint.erased(family.pipe, found):
        tried = restorer("sd1", family, shows=lambda images: np.ones(len(images), bool))
        fewest, sets = restore.minimal(tried, [r for r in restore.by_layer(tried) if r.kind == "layer"])
    assert len(fewest) == 1, "any layer is enough for a judge that sees it everywhere"
    assert {"rate", "k", "low", "high"} <= set(sets[-1].row())


def test_a_model_that_draws_as_its_base_is_refused(tmp_path: Path) -> None:
    family, found = changed("sd1", "mid_block", tmp_path, size=0.0)
    with checkpoint.erased(family.pipe, found), pytest.raises(UserError, match="draw the same"):
        restorer("sd1", family)


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    seed = torch.Generator().manual_seed(0)
    told = torch.arange(80) % 2 == 0
    noise = torch.randn(80, 12, generator=seed)
    signal = noise + 4 * told[:, None]
    half = torch.arange(80) < 40
    split = [(x[half], told[half], x[~half], told[~half]) for x in (signal, noise)]
    right = [leak.probe((x, y), (x_test, y_test)) for x, y, x_test, y_test in split]
    assert right[0] == 40 and 8 <= right[1] <= 32


@pytest.mark.parametrize("name", ["sd1", "flux-dev"])
def test_probes_look_at_every_layer_of_both_models(name: str, tmp_path: Path) -> None:
    family, found = changed(name, LAST[name], tmp_path)
    asked = [leak.Asked("a cat" if i % 2 else "a dog", bool(i % 2), i > 3) for i in range(8)]
    with checkpoint.erased(family.pipe, found):
        models = {"base": checkpoint.base_view(family.pipe), "erased": family.denoiser}
        shown = [
            leak.from_text(family, asked, seed=0, num_steps=2),
            leak.from_pictures(family, models["base"], asked, seed=0, num_steps=2, guidance_scale=GUIDANCE[name]),
        ]
        sites = layers(family)
        seen = [leak.probes(family, models, sites, "name", inputs) for inputs in shown]
    for several in seen:
        assert [(p.model, p.layer, p.n) for p in several] == [(m, s.label, 4) for m in models for s in sites]


@pytest.mark.parametrize("name", ["sd1", "flux-dev"])
def test_the_whole_analysis_leaves_tables_and_figures_and_is_not_done_twice(name: str, tmp_path: Path) -> None:
    family, found = changed(name, LAST[name], tmp_path)
    subject = Subject(family, found, num_steps=2, guidance_scale=GUIDANCE[name])
    settings = vars(ErasureConfig(["a cat"], ["a dog"], pictures=2, windows=2, inputs=8))
    erasure.analyse(subject, Results(tmp_path / "out"), **settings)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "attention.png",
        "where.png",
        "weights.png",
        "layers.png",
        "steps.png",
        "parts.png",
        "leak.png",
        "pictures.png",
    } <= written
    rows = {file: table(tmp_path / "out" / file) for file in written if file.endswith(".csv")}
    assert {row["layer"] for row in rows["parts.csv"]} == {blocks_label(family, LAST[name])}
    assert {row["source"] for row in rows["probes.csv"]} == {"name", "image"}
    assert family.select(rows["selection.csv"][0]["selection"]).names, "the suggestion can be trained"
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "kept").iterdir()}
    erasure.analyse(subject, Results(tmp_path / "out"), **settings)
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "kept").iterdir()}


@pytest.mark.parametrize("name", ["sd1", "flux-dev", "sd3.5"])
def test_attention_to_the_text_is_all_there_and_changes_with_its_keys(name: str, tmp_path: Path) -> None:
    place = {"sd1": "up_blocks.1.attentions.1.transformer_blocks.0.attn2"}.get(name, "transformer_blocks.0.attn")
    family, found = changed(name, f"{place}.to_k", tmp_path, size=3.0)
    how = {"num_steps": 2, "guidance_scale": GUIDANCE[name]}
    with checkpoint.erased(family.pipe, found):
        seen = gaze.gaze(family, checkpoint.base_view(family.pipe), PROMPTS, SEEDS, **how)
        same = gaze.gaze(family, family.denoiser, PROMPTS, SEEDS, **how)
    assert torch.equal(same.base, same.erased) and not torch.allclose(seen.base, seen.erased, atol=1e-5)
    rows = gaze.masses(family, seen, "cat")
    assert [row["tokens"] for row in rows] == [*gaze.GROUPS] * 2
    if name == "sd1":
        assert all(sum(row["base"] for row in rows[i : i + 3]) == pytest.approx(1, abs=1e-4) for i in (0, 3))


def blocks_label(family: Family, path: str) -> str:
    return next(site.label for site in blocks(family) if site.path == path)


def test_what_it_cannot_ask_is_refused(tmp_path: Path) -> None:
    family, found = changed("sd1", "mid_block", tmp_path)
    settings = vars(ErasureConfig())
    with pytest.raises(UserError, match="checkpoint=null"):
        erasure.analyse(Subject(family), Results(tmp_path / "out"), **settings)
    with pytest.raises(UserError, match=r"give erasure\.target"):
        erasure.analyse(Subject(family, found), Results(tmp_path / "out"), **settings)
