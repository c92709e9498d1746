"""Where did the erasure happen? An erased model beside its base, part by part, step by step.

1. `locate`     what each part says otherwise when it sees what the base's part saw, and how far its weights moved
2. `restore`    which of the base's weights bring the concept back: by layer, window of layers, step, part, head
   `fewest`     and which few layers together, on pictures that they were not chosen by
3. `mechanism`  by other attention, by other values, or outside of attention
4. `gaze`       which words the picture attends to otherwise
5. `leak`       what is still known inside

    python -m esd.analyze analysis=erasure checkpoint=runs/cat run_dir=runs/cat-where
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import torch

from esd import checkpoint
from esd.analysis import estimates
from esd.analysis.begin import analysis
from esd.analysis.results import Results
from esd.analysis.subject import Subject
from esd.evaluation.pixels import images_of
from esd.interventions import layers, token_texts

from . import fewest, gaze, inside_figures, leak, locate, mechanism, restore, restored_figures
from .asked import Question, mentions, question
from .leak import Probe
from .locate import Difference, Part
from .restore import Restored, Restorer


@analysis
def analyse(
    subject: Subject,
    results: Results,
    *,
    concept: str | None,
    target: Sequence[str],
    retained: Sequence[str],
    pictures: int,
    windows: int,
    inputs: int,
) -> None:
    """Leaves tables and figures of all five.

    Args:
        subject: the model, with a checkpoint.
        results: gets tables and figures.
        concept: one of several that were erased; None for the first.
        target: prompts that ask for the concept; none for those of the model's vocabulary.
        retained: prompts that should be left alone; none for those of the vocabulary.
        pictures: of the target, and of the retained prompts.
        windows: into which the steps are cut; none without a step.
        inputs: of each probe that are of the concept.

    Raises:
        UserError: see `asked.question` and `restore.Restorer`.
    """
    about = question(
        subject, concept=concept, target=target, retained=retained, pictures=pictures, inputs=inputs
    )  # fmt: skip
    family, found = subject.family, subject.checkpoint
    assert found is not None  # or `question` had refused
    if len(erased := found.provenance["concepts"]) > 1:
        results.note(f"Of {len(erased)} concepts that were erased this looks at {about.concept}; erasure.concept=... "
                     "looks at another.")  # fmt: skip
    probed = [a.prompt for asked in (*about.probed.values(), about.pictured) for a in asked]
    family.encode([*about.target, *about.retained, "", *probed])
    with checkpoint.erased(family.pipe, found):
        where(subject, results, about)
        brought_back(subject, results, about, windows)
        looked_at(subject, results, about)
        still_known(subject, results, about)


def where(subject: Subject, results: Results, about: Question) -> None:
    """What each part says otherwise: where.csv, parts.csv and their figures."""
    family = subject.family
    base, parts = checkpoint.base_view(family.pipe), locate.parts(family, checkpoint.originals(family.pipe))
    by_label = {part.site.label: part for part in parts}

    def differences(prompts: Sequence[str]) -> Callable[[], list[dict[str, Any]]]:
        return lambda: [
            {"part": d.part.site.label, "step": d.step, "t": d.t, "each": d.each, "rms": d.rms}
            for d in locate.differences(
                family, base, parts, prompts, subject.seeds(len(prompts)), num_steps=subject.num_steps,
                guidance_scale=subject.guidance_scale,
            )
        ]  # fmt: skip

    def again(row: dict[str, Any]) -> Difference:
        return Difference(by_label[row["part"]], row["step"], row["t"], row["each"], row["rms"])

    on_target = [again(row) for row in kept(results, "parts-target", differences(about.target))]
    on_retained = [again(row) for row in kept(results, "parts-retained", differences(about.retained))]
    results.table("where", [
        {"prompts": name, "part": d.part.site.label, "layer": d.part.layer, "step": d.step, "t": d.t,
         **estimates.mean(d.each).row("relative"), "rms": d.rms}
        for name, several in (("target", on_target), ("retained", on_retained)) for d in several
    ])  # fmt: skip
    results.table("parts", told_parts(parts, on_target, on_retained))
    inside_figures.where(results, about.concept, on_target)
    inside_figures.moved(results, about.concept, on_target, on_retained)


def told_parts(
    parts: Sequence[Part], target: Sequence[Difference], retained: Sequence[Difference]
) -> list[dict[str, Any]]:
    """A row for every part whose weights moved."""
    columns = {
        "target": locate.means(target), "retained": locate.means(retained),
        "selectivity": locate.selectivity(target, retained),
    }  # fmt: skip
    rows = []
    for part in parts:
        if part.moved:
            row: dict[str, Any] = {"part": part.site.label, "layer": part.layer, "weights_moved": part.moved}
            for name, found in columns.items():
                one = found.get(part.site.label)
                row |= one.row(name) if one else dict.fromkeys([name, f"{name}_low", f"{name}_high"])
            rows.append(row | {"n": columns["target"][part.site.label].n})
    return rows


def brought_back(subject: Subject, results: Results, about: Question, windows: int) -> None:
    """What brings the concept back: restored.csv, selection.csv and their figures."""
    family, judge = subject.family, subject.judge
    question_of = about.domain if judge and about.domain in judge.questions else None

    def shows(images: np.ndarray) -> np.ndarray:
        assert judge is not None and question_of is not None
        readings = judge(images)
        return np.array([readings.says(i, question_of, about.concept) for i in range(len(images))])

    count = len(about.target)
    restorer = Restorer(
        family, checkpoint.base_view(family.pipe), checkpoint.originals(family.pipe), about.target,
        subject.seeds(count), subject.num_steps, subject.guidance_scale, shows if question_of else None,
    )  # fmt: skip

    @cache
    def other() -> Restorer:
        """Twice as many pictures, for what is asked but once."""
        return fewest.elsewhere(restorer, subject.seeds(3 * count)[count:])

    def stage(name: str, make: Callable[[], list[Restored]]) -> list[Restored]:
        return [Restored(**row) for row in kept(results, name, lambda: [asdict(found) for found in make()])]

    ends = stage("ends", lambda: restore.ends(restorer))
    by_layer = stage("by-layer", lambda: restore.by_layer(restorer))
    tried = stage("sets", lambda: fewest.minimal(restorer, by_layer)[1])
    chosen = [site for site in restorer.touched() if site.label in tried[-1].where.split(" + ")]
    held_out = stage("other-seeds", lambda: fewest.held_out(other(), chosen))
    swapped = stage("mechanism", lambda: mechanism.swapped(other()))
    by_steps = stage("by-steps", lambda: restore.by_steps(restorer, windows))
    by_part = stage("by-part", lambda: restore.by_part(restorer))
    heads = stage("heads", lambda: restore.by_head(restorer, restore.attentions(family, chosen)))
    by_window = stage("by-window", lambda: restore.by_window(restorer))
    patched = stage("contributions", lambda: restore.by_contribution(restorer, windows))
    every = (*ends, *by_layer, *by_window, *by_steps, *by_part, *swapped, *heads, *patched, *tried, *held_out)
    results.table("restored", [r.row() for r in every])
    selection = fewest.suggestion(chosen, subject.checkpoint.provenance["selection"] if subject.checkpoint else "all")
    results.table("selection", [
        {"selection": selection, **r.row(), "shared": fewest.shared(tried[-1], r)} for r in (tried[-1], *held_out[2:])
    ])  # fmt: skip
    restored_figures.layers(results, about.concept, ends, by_layer)
    restored_figures.windows(results, about.concept, ends, by_window, "weights", "windows")
    restored_figures.steps(results, about.concept, ends, by_steps)
    restored_figures.parts(results, about.concept, ends, by_part)
    restored_figures.mechanism(results, held_out[:2], swapped)
    restored_figures.heads(results, about.concept, heads)
    if patched:
        restored_figures.contributions(results, about.concept, ends, patched)
    weights = restorer.inside(chosen)
    shown = {
        "base": restorer.y_base,
        "erased": restorer.y_erased,
        f"{len(chosen)} layers of the base": restorer.grafted(weights),
        "all but these": restorer.grafted({n: w for n, w in restorer.originals.items() if n not in weights}),
    }
    restored_figures.pictures(
        results, about.concept, {name: images_of(family, y) for name, y in shown.items()}, [tried[-1], *held_out],
        len(restorer.touched()), selection,
    )  # fmt: skip


def looked_at(subject: Subject, results: Results, about: Question) -> None:
    """Which words the picture attends to otherwise: attention.csv and its figure."""
    family, pictures = subject.family, [prompt for prompt in about.target if mentions(prompt, about.concept)]
    if not pictures:
        return

    def look() -> np.ndarray:
        seen = gaze.gaze(
            family, checkpoint.base_view(family.pipe), pictures, subject.seeds(len(pictures)),
            num_steps=subject.num_steps, guidance_scale=subject.guidance_scale,
        )  # fmt: skip
        return np.stack([seen.base.numpy(), seen.erased.numpy()])

    base, erased = results.kept("gaze", look)
    seen = gaze.Gaze(pictures, torch.from_numpy(base), torch.from_numpy(erased))
    rows = gaze.masses(family, seen, about.concept)
    results.table("attention", rows)
    inside_figures.attention(results, about.concept, token_texts(family, pictures[0]), seen, rows)


def still_known(subject: Subject, results: Results, about: Question) -> None:
    """What a probe reads off the features of base, erased and shuffled model: probes.csv and its figure."""
    family = subject.family
    base, erased = checkpoint.base_view(family.pipe), family.denoiser

    def probed() -> list[dict[str, Any]]:
        shown = {
            source: leak.from_text(family, asked, seed=subject.seed, num_steps=subject.num_steps)
            for source, asked in about.probed.items()
        }
        if about.pictured:
            shown["image"] = leak.from_pictures(
                family, base, about.pictured, seed=subject.seed, num_steps=subject.num_steps,
                guidance_scale=subject.guidance_scale, batch=subject.batch_size,
            )  # fmt: skip
        sites, found = layers(family), []
        for source, inputs in shown.items():
            found += leak.probes(family, {"base": base, "erased": erased}, sites, source, inputs)
            with leak.shuffled(erased):
                found += leak.probes(family, {"shuffled": erased}, sites, source, inputs)
        return [asdict(one) for one in found]

    probes = [Probe(**row) for row in kept(results, "probes", probed)]
    results.table("probes", [one.row() for one in probes])
    if probes:
        inside_figures.leak(results, about.concept, probes)


def kept(results: Results, name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows that were made once and are read the next time."""
    held = results.kept(name, lambda: np.array([json.dumps(row) for row in make()], dtype=np.str_))
    return [json.loads(str(row)) for row in held]
