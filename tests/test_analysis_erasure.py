"""Where an erasure sits: changes put in by hand are found where they are, and nowhere else."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esd import checkpoint
from esd.analysis import Results, Subject, erasure, estimates
from esd.analysis.erasure import fewest, gaze, leak, locate, mechanism, restore, slices
from esd.analysis.erasure.asked import question
from esd.analyze import analyze
from esd.config.analyses import ErasureConfig
from esd.config.analyze import AnalysisConfig, AnalyzeConfig
from esd.errors import UserError
from esd.evaluation.vocabulary import Vocabulary
from esd.families import Family
from esd.interventions import blocks, layers, resolve, sample
from esd.interventions.sites import is_attention
from tests.families import GUIDANCE, make, shared
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
    return family, saved(family, found, tmp_path)


def saved(family: Family, found: dict[str, Tensor], tmp_path: Path, *concepts: str) -> checkpoint.Erased:
    """A checkpoint that adds these to the weights."""
    file = tmp_path / checkpoint.FILE_NAME
    told = {
        "concepts": list(concepts or ["cat"]), "selection": "all", "base": family.base_name, "revision": None,
        "parameters": 1,
        "fingerprint": checkpoint.fingerprint({key: family.denoiser.get_parameter(key) for key in found}),
    }  # fmt: skip
    checkpoint.save(file, found, told)
    return checkpoint.load(file)


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
    assert all(min(d.each) > 1e-3 and len(d.each) == len(PROMPTS) for d in seen)


def test_what_parts_say_otherwise_is_told_over_the_prompts() -> None:
    part = locate.Part(resolve(shared("sd1"), "mid.cross")[0], "mid", 1.0)

    def over(*steps: list[float]) -> list[locate.Difference]:
        return [locate.Difference(part, i, 0.0, each, 0.0) for i, each in enumerate(steps)]

    target, retained = over([0.2, 0.4, 0.9], [0.4, 0.8, 0.3]), over([0.1, 0.2, 0.1], [0.2, 0.4, 0.3])
    assert [d.relative for d in target] == pytest.approx([0.5, 0.5])
    label, each = part.site.label, ([0.3, 0.6, 0.6], [0.15, 0.3, 0.2])
    assert astuple(locate.means(target)[label]) == pytest.approx(astuple(estimates.mean(each[0])))
    found = locate.selectivity(target, retained)[label]
    assert astuple(found) == pytest.approx(astuple(estimates.quotient(*each)))
    (row,) = erasure.told_parts([part], target, over([0.0] * 3))
    assert row["target_low"] < row["target"] < row["target_high"] and row["n"] == 3
    assert row["selectivity"] is row["selectivity_low"] is None, "nothing to be held against"


def test_a_restoration_is_told_over_the_pictures(tmp_path: Path) -> None:
    family, found = changed("sd1", "mid_block", tmp_path)
    with checkpoint.erased(family.pipe, found):
        tried = restorer("sd1", family)
    half = tried.score("", "", (tried.y_base + tried.y_erased) / 2)
    assert (half.restoration, half.restoration_low, half.restoration_high) == pytest.approx((0.5,) * 3, abs=1e-5)
    one = tried.score("", "", torch.stack([tried.y_base[0], tried.y_erased[1]])).row()
    expected = estimates.mean([1.0, 0.0]).row("restoration")
    assert {key: one[key] for key in expected} == pytest.approx(expected)


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
        few, sets = fewest.minimal(tried, [restore.Restored("layer", site.label, 1.0, None, 2)])
        assert few == [site] and sets[-1].restoration == pytest.approx(1, abs=1e-4)
        steps = restore.by_steps(tried, 3)
        assert [r.restoration for r in steps if r.kind == "first steps"][-1] == pytest.approx(1, abs=1e-4)
        assert any(0 < r.restoration < 1 for r in steps) or any(r.restoration < 0 for r in steps)


def test_windows_of_layers_hold_what_is_in_them(tmp_path: Path) -> None:
    family, found = changed("sd1", "up_blocks", tmp_path)
    with checkpoint.erased(family.pipe, found):
        tried = restorer("sd1", family)
        sites = [site.label for site in tried.touched()]
        alone = {r.where: r.restoration for r in restore.by_layer(tried) if r.kind == "layer"}
        every = {r.where: r.restoration for r in restore.by_window(tried, most=99)}
        some = [r.where for r in restore.by_window(tried, most=3)]
    count = len(sites)
    assert len(every) == count * (count + 1) // 2 and len(some) == 6
    assert {label: every[f"{label} to {label}"] for label in sites} == pytest.approx(alone)
    assert every[f"{sites[0]} to {sites[-1]}"] == pytest.approx(1, abs=1e-4)
    assert f"{sites[0]} to {sites[-1]}" in some


@pytest.mark.parametrize("windows", [1, 3, 4, 50])
def test_steps_are_cut_into_windows_that_hold_each_step_once(windows: int) -> None:
    held = [step for low, high in restore.cut(4, windows) for step in range(low, high)]
    assert held == [0, 1, 2, 3] and len(restore.cut(4, windows)) == min(windows, 4)


def test_contributions_of_the_base_in_all_layers_and_steps_are_the_base(tmp_path: Path) -> None:
    family, found = changed("flux-dev", LAST["flux-dev"], tmp_path)
    with checkpoint.erased(family.pipe, found):
        patched = restore.by_contribution(restorer("flux-dev", family), 1)
    assert [(r.kind, r.where) for r in patched] == [
        ("contribution", "single.0"), ("contributions of layers", "single.0 to single.0"),
        ("contributions in steps", "1 to 3"),
    ]  # fmt: skip
    assert all(r.restoration == pytest.approx(1, abs=1e-3) for r in patched)


def test_the_fewest_layers_are_held_against_chance_in_other_pictures(tmp_path: Path) -> None:
    family, found = changed("sd1", "up_blocks", tmp_path)
    with checkpoint.erased(family.pipe, found):
        tried = restorer("sd1", family)
        chosen = tried.touched()[:2]
        told = fewest.held_out(fewest.elsewhere(tried, [10, 11, 12, 13]), chosen)
        every = fewest.held_out(fewest.elsewhere(tried, [10, 11]), tried.touched())
    assert [r.kind.removeprefix("other seeds, ") for r in told] == ["model", "model", "chosen", *["by chance"] * 3]
    assert {r.n for r in told} == {4}, "whole rounds of the prompts"
    sets = [frozenset(r.where.split(" + ")) for r in told[2:]]
    assert len(set(sets)) == 4 and {len(labels) for labels in sets} == {2}
    assert [fewest.shared(told[2], r) for r in told[2:]] == [2, *(len(sets[0] & other) for other in sets[1:])]
    assert [r.kind for r in every][2:] == ["other seeds, chosen"], "there is no other set of all layers"


@pytest.mark.parametrize("name", ["sd1", "flux-dev", "sd3.5", "klein-base"])
def test_slices_of_heads_and_of_what_they_make_share_each_weight_out(name: str) -> None:
    family = make(name)
    live = dict(family.denoiser.named_parameters())
    for site in _attentions(family):
        seen = {key: torch.zeros_like(value) for key, value in live.items()}
        for one in slices.slices(family.denoiser, site):
            for part in [one.of_head(head) for head in range(one.heads)] or [one]:
                seen[one.name][part.index] += 1
        assert all(value.max() <= 1 for value in seen.values()), "nothing belongs to two"
        whole = {key for key, value in seen.items() if value.min() == 1}
        assert {key for key in whole if "to_" in key} == {
            key for key in live if key.startswith(f"{site.path}.") and "to_" in key
        } - {f"{site.path}.to_qkv_mlp_proj.weight", f"{site.path}.to_out.weight"}  # fmt: skip


@pytest.mark.parametrize(("name", "place"), [
    ("flux-dev", "single_transformer_blocks.0"), ("klein-base", "single_transformer_blocks.0"),
    ("sd1", "up_blocks.1.attentions.1.transformer_blocks.0.attn2"), ("sd3.5", "transformer_blocks.0.attn"),
])  # fmt: skip
def test_one_head_of_the_output_is_what_that_head_writes(name: str, place: str) -> None:
    """The input of the output projection: where one head's values are cut off, the columns of that head see nothing."""
    family = make(name)
    sites = [site for site in _attentions(family) if site.path.startswith(place)]
    own = slices.slices(family.denoiser, sites[0])
    live = dict(family.denoiser.named_parameters())
    cut = [one.of_head(1) for one in own if one.makes == "values" and one.heads and one.dim == 0]
    (out,) = [one.of_head(1) for one in own if one.dim == 1 and "add" not in one.name]
    with torch.no_grad():
        for one in cut:
            live[one.name][one.index] = 0
    came: list[Tensor] = []
    module = family.denoiser.get_submodule(out.name.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda _, args: came.append(args[0]))
    sample(family, PROMPTS[:1], SEEDS[:1], num_steps=1, guidance_scale=GUIDANCE[name])
    hook.remove()
    inside = came[0][..., out.index[1]]
    if name == "sd1":
        assert not inside.any()
    assert came[0].any() and not inside.any()


def test_parts_and_heads_add_up_to_what_changed(tmp_path: Path) -> None:
    place = "mid_block.attentions.0.transformer_blocks.0.attn2"
    family, found = changed("sd1", place, tmp_path)
    with checkpoint.erased(family.pipe, found):
        tried = restorer("sd1", family)
        roles = {r.where for r in restore.by_part(tried)}
        assert roles == {"cross.q", "cross.k", "cross.v", "cross.out"}
        inside = restore.attentions(family, tried.touched())
        assert len(inside) == 2
        heads = restore.by_head(tried, inside)
        assert len(heads) == 4 and all("cross" in r.where and r.restoration != 0 for r in heads), "only what changed"


ATTENTIONS = [
    ("sd1", "mid_block.attentions.0.transformer_blocks.0.attn2"), ("flux-dev", "single_transformer_blocks.0.attn"),
    ("klein-base", "single_transformer_blocks.0.attn"), ("sd3.5", "transformer_blocks.0.attn"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "place"), ATTENTIONS)
def test_a_head_that_changed_is_brought_back_by_its_weights_and_by_what_it_adds(
    name: str, place: str, tmp_path: Path
) -> None:
    family = make(name)
    (site,) = [site for site in _attentions(family) if site.path == place]
    live = {key: value.detach().clone() for key, value in family.denoiser.named_parameters()}
    own = [one.of_head(1) for one in slices.slices(family.denoiser, site) if one.heads]
    seed = torch.Generator().manual_seed(0)
    other = {key: value + torch.randn(value.shape, generator=seed) for key, value in live.items()}
    found = saved(family, {key: v - live[key] for key, v in slices.mixed(live, other, own).items()}, tmp_path)
    with checkpoint.erased(family.pipe, found):
        by = {(r.kind, r.where[-1]): r.restoration for r in restore.by_head(restorer(name, family), [site])}
    assert by["head", "1"] == pytest.approx(1, abs=1e-4) and by["head", "0"] == 0, "it has nothing of head 0"
    assert by["contribution of a head", "1"] == pytest.approx(1, abs=1e-3)
    assert abs(by["contribution of a head", "0"]) < 0.9


@pytest.mark.parametrize(("name", "place"), ATTENTIONS)
@pytest.mark.parametrize("only", ["probabilities", "values"])
def test_the_mechanism_tells_queries_and_keys_from_values(
    name: str, place: str, only: slices.Makes, tmp_path: Path
) -> None:
    """Single blocks too, where one weight holds queries, keys, values and a feed-forward."""
    family = make(name)
    (site,) = [site for site in _attentions(family) if site.path == place]
    live = {key: value.detach().clone() for key, value in family.denoiser.named_parameters()}
    own = [one for one in slices.slices(family.denoiser, site) if one.makes == only]
    seed = torch.Generator().manual_seed(0)
    other = {key: value + torch.randn(value.shape, generator=seed) for key, value in live.items()}
    found = saved(family, {key: v - live[key] for key, v in slices.mixed(live, other, own).items()}, tmp_path)
    with checkpoint.erased(family.pipe, found):
        by = {r.where: r.restoration for r in mechanism.swapped(restorer(name, family))}
    other_kind = ({*mechanism.HOLD} - {only}).pop()
    assert by[mechanism.HOLD[only]] == pytest.approx(1, abs=1e-4) and "all" not in by
    assert abs(by.get(mechanism.HOLD[other_kind], 0.0)) < 1e-4


def test_what_is_outside_of_attention_is_told(tmp_path: Path) -> None:
    family, found = changed("klein-base", "single_transformer_blocks.1", tmp_path)
    with checkpoint.erased(family.pipe, found):
        by = {(r.kind, r.where): r.restoration for r in mechanism.swapped(restorer("klein-base", family))}
    assert 0 < abs(by["outside attention", "all"]) < 1 and 0 < abs(by["joint attention", "both"]) < 1


def _attentions(family: Family) -> list[Any]:
    return resolve(family, "all", is_attention)


def test_the_judges_count_decides_which_layers_are_needed(tmp_path: Path) -> None:
    family, found = changed("sd1", "up_blocks", tmp_path)
    with checkpoint.erased(family.pipe, found):
        tried = restorer("sd1", family, shows=lambda images: np.ones(len(images), bool))
        few, sets = fewest.minimal(tried, [r for r in restore.by_layer(tried) if r.kind == "layer"])
    assert len(few) == 1, "any layer is enough for a judge that sees it everywhere"
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


def test_a_shuffled_model_knows_nothing_and_is_as_it_was_afterwards() -> None:
    family = make("sd1")
    before = {key: value.detach().clone() for key, value in family.denoiser.named_parameters()}
    with leak.shuffled(family.denoiser):
        inside = {key: value.detach().clone() for key, value in family.denoiser.named_parameters()}
    assert all(torch.equal(inside[key].flatten().sort()[0], value.flatten().sort()[0]) for key, value in before.items())
    assert not any(torch.equal(inside[key], value) for key, value in before.items() if value.std() > 0)
    assert all(torch.equal(value, before[key]) for key, value in family.denoiser.named_parameters())


def knowing(tmp_path: Path, *concepts: str) -> Subject:
    """A model with a vocabulary, and a checkpoint without these concepts."""
    family = make("sd1")
    name, value = next(family.denoiser.named_parameters())
    found = saved(family, {name: torch.ones_like(value)}, tmp_path, *concepts)
    return Subject(family, found, Vocabulary.load("checkpoints/emoji-sd"))


def test_several_concepts_are_not_each_others_controls(tmp_path: Path) -> None:
    subject = knowing(tmp_path, "cat", "dog", "mosaic")
    how: dict[str, Any] = {"target": [], "retained": [], "pictures": 12, "inputs": 8}
    first = question(subject, **how)
    second = question(subject, concept="mosaic", **how)
    assert (first.concept, second.concept) == ("cat", "mosaic")
    assert not any(word in prompt for prompt in first.retained for word in ("cat", "dog", "mosaic"))
    assert not any(word in prompt for prompt in second.retained for word in ("cat", "dog", "mosaic"))
    with pytest.raises(UserError, match=r"erasure\.concept=horse: .*cat, dog, mosaic"):
        question(subject, concept="horse", **how)


def test_probes_of_words_are_tested_by_words_that_they_were_not_taught(tmp_path: Path) -> None:
    subject = knowing(tmp_path, "cat")
    about = question(subject, target=[], retained=[], pictures=2, inputs=8)
    assert set(about.probed) == {"synonym", "name"}
    for asked in about.probed.values():
        taught, tested = ({a.prompt for a in asked if a.tested is side} for side in (False, True))
        assert not taught & tested
        named = [["cat" in a.prompt.split() for a in asked if a.concept and a.tested is side] for side in (False, True)]
        assert all(named[0]) != all(named[1]) and any(named[0]) != any(named[1])


@pytest.mark.parametrize("name", ["sd1", "flux-dev"])
def test_the_whole_analysis_leaves_tables_and_figures_and_is_not_done_twice(name: str, tmp_path: Path) -> None:
    family, found = changed(name, LAST[name], tmp_path)
    subject = Subject(family, found, num_steps=2, guidance_scale=GUIDANCE[name])
    settings = vars(ErasureConfig(None, ["a cat"], ["a dog"], pictures=2, windows=2, inputs=8))
    erasure.analyse(subject, Results(tmp_path / "out"), **settings)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "attention.png",
        "where.png",
        "weights.png",
        "layers.png",
        "windows.png",
        "contributions.png",
        "mechanism.png",
        "steps.png",
        "parts.png",
        "leak.png",
        "pictures.png",
    } <= written
    rows = {file: table(tmp_path / "out" / file) for file in written if file.endswith(".csv")}
    assert {row["layer"] for row in rows["parts.csv"]} == {blocks_label(family, LAST[name])}
    assert {row["source"] for row in rows["probes.csv"]} == {"image"}, "no other word is known"
    assert {row["model"] for row in rows["probes.csv"]} == {"base", "erased", "shuffled"}
    assert family.select(rows["selection.csv"][0]["selection"]).names, "the suggestion can be trained"
    assert [row["shared"] for row in rows["selection.csv"]] == ["1", "1"], "the one layer that there is"
    captions = (tmp_path / "out" / "captions.md").read_text(encoding="utf-8")
    assert captions.count("95% intervals over n = 2 prompts") >= 2 and "nan" not in captions
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


def test_what_the_run_cannot_do_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    settings = AnalyzeConfig(analysis=AnalysisConfig("erasure"), run_dir=str(tmp_path / "run"))
    settings.model.path = str(tmp_path / "none")
    with pytest.raises(UserError, match="checkpoint=null"):
        analyze(settings)
    settings.checkpoint, settings.num_steps, settings.erasure.windows = "runs/cat", 2, 50
    with pytest.raises(UserError, match=r"erasure\.windows=50: num_steps=2 .*allowed: 1 to 2"):
        analyze(settings)
    assert not (tmp_path / "run").exists()
