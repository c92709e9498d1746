"""Did it work? One erased checkpoint against its base: rates as a judge reads them, and a picture.

Both models draw the same prompts from the same seeds. Prompts use phrasings and seeds that training never
saw, and each names a thing and a style, so that every image says something about both. Without a vocabulary
or a judge for the model, rates are null, the reason is given, and the picture is drawn all the same.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from esd.checkpoint import Erased, erased
from esd.evaluation.generate import sample
from esd.evaluation.identity import digest, pipeline_hashes
from esd.evaluation.judges import Judge
from esd.evaluation.metrics import NO_RATE, erasure_rates
from esd.evaluation.preview import Row, draw
from esd.evaluation.prompts import PromptRow, fill, say
from esd.evaluation.vocabulary import DOMAINS, OTHER, Target, Vocabulary, evenly_spaced

FIRST_SEED = 1_000_000  # training draws from hashed generators, so no evaluation seed was ever trained on
UNRELATED = (
    "a photo of a dog",
    "a bowl of fruit on a table",
    "a portrait of a woman",
    "a mountain lake at sunset",
)
JOINING = {"a", "an", "the", "of", "on", "at", "in", "s"}  # words that name nothing; s is what is left of 's

# What the base drew last, by a hash of all that decides it: the jobs of a sweep, which share a process, draw it once.
_base_images: dict[str, np.ndarray] = {}

Report = Callable[[str], None]
Labelled = list[tuple[str, dict[str, str]]]  # prompts, and what each names by domain


@dataclass(frozen=True)
class DrawSettings:
    """How evaluation images are drawn."""

    num_steps: int
    guidance_scale: float
    batch_size: int


@dataclass(frozen=True)
class Line:
    """One row of the preview: what it shows, why, and its prompt in each column."""

    label: str
    role: str
    prompts: tuple[str, ...]


def evaluate(
    pipe: Any,
    checkpoint: Erased,
    concepts: Sequence[str],
    *,
    vocabulary: Vocabulary | None,
    judge: Judge | None,
    target_images: int,
    retained_images: int,
    implied_images: int,
    preview_images: int,
    settings: DrawSettings,
    picture: Path,
    erase_from: Sequence[str] = (),
    report: Report = print,
) -> dict[str, Any]:
    """The rates of summary.json; also writes the preview to `picture`.

    Args:
        pipe: the base, on its device; it is the base again afterwards.
        checkpoint: the erased weights.
        concepts: what was erased.
        vocabulary: of the model, or None.
        judge: reads uint8 images (n, H, W, 3), or None.
        target_images, retained_images, implied_images: how many images of each the judge reads.
        preview_images: columns of the picture.
        settings: steps, guidance, batch size.
        picture: path of the PNG.
        erase_from: () or what each concept was erased from.
        report: gets a line before each of the two slow parts. The base's pictures are those of the last call, where
            that asked the same of the same base.
    """
    targets, reason = known_targets(concepts, vocabulary, judge, erase_from)
    wanted = (target_images, retained_images, implied_images)
    rows = exam(vocabulary, targets, *wanted) if vocabulary and not reason else []
    reason = reason or (None if rows else "no evaluation images were asked for")
    lines, columns = preview_lines(concepts, vocabulary, preview_images, targets)
    prompts = [row.prompt for row in rows] + [prompt for line in lines for prompt in line.prompts]
    seeds = [row.evaluation_seed for row in rows] + [FIRST_SEED - 1 - i for _ in lines for i in range(len(columns))]
    before = base_images(pipe, prompts, seeds, settings, report)
    with erased(pipe, checkpoint):
        report(f"drawing {len(prompts)} images with the erased model")
        after = sample(pipe, prompts, seeds, **asdict(settings), what="erased images")
    n, shape = len(rows), (len(lines), len(columns))
    pairs = np.stack([before[n:], after[n:]], axis=1).reshape(*shape, 2, *before.shape[1:])
    draw(
        picture,
        [Row(line.label, line.role, images) for line, images in zip(lines, pairs, strict=True)],
        columns,
        title=f"erased: {', '.join(concepts)}",
    )
    if reason or judge is None:
        rates: dict[str, Any] = {name: dict(NO_RATE) for name in ("target", "same_domain", "cross_domain", "implied")}
        return rates | {"neither": None, "reason": reason}
    return erasure_rates(rows, judge(before[:n]), judge(after[:n]), targets) | {"reason": None}


def base_images(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], settings: DrawSettings, report: Report
) -> np.ndarray:
    """What the base draws, uint8 (n, H, W, 3); kept for the next call, which may ask the same of the same base.

    Known again are weights, settings, device and memory layout; not what is hooked into a pipeline from outside.
    """
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    where = [str(pipe._execution_device), [parameter.stride() for part in models for parameter in part.parameters()]]
    asked = digest([prompts, seeds, asdict(settings), where, pipeline_hashes(pipe)])
    if asked not in _base_images:
        report(f"drawing {len(prompts)} images with the base")
        _base_images.clear()
        _base_images[asked] = sample(pipe, prompts, seeds, **asdict(settings), what="base images")
    return _base_images[asked]


def known_targets(
    concepts: Sequence[str], vocabulary: Vocabulary | None, judge: Judge | None, erase_from: Sequence[str] = ()
) -> tuple[list[Target], str | None]:
    """(what was erased in the model's words, None), or ([], why no rate can be had)."""
    if vocabulary is None:
        return [], "the model ships no vocabulary.json, so there are no prompts with known answers"
    if judge is None:
        return [], "there is no judge for this model"
    found = {concept: vocabulary.find(concept) for concept in concepts}
    if unknown := [concept for concept, entry in found.items() if entry is None]:
        return [], f"the judge knows no {', '.join(map(repr, unknown))}"
    targets = vocabulary.targets(concepts, erase_from)
    if erase_from and (lost := [text for target, text in zip(targets, erase_from, strict=True) if not target.within]):
        return [], f"erased from {lost[0]!r}: only a style erased from a thing, or a thing from a style, is read"
    for target in targets:
        pair = (target.name, target.within) if target.domain == "thing" else (target.within, target.name)
        if pair in vocabulary.held_out_pairs:
            return [], f"the base never saw {pair[0]!r} in {pair[1]!r} together, so that there is nothing to read"
    return targets, None


def exam(
    vocabulary: Vocabulary, targets: Sequence[Target], target_images: int, retained_images: int, implied_images: int
) -> list[PromptRow]:
    """Rows in held-out phrasings: targets, the retained, the implied, and those elsewhere; each spread evenly.

    Pairs that the model never saw together are left out: they would measure the base, not the erasure.

    Args:
        vocabulary: of the model.
        targets: what was erased.
        target_images: rows that name an erased concept, alone or with something of the other domain. Where it was
            erased from something, rows that name both; half as many name it with anything else, and half as many
            what it was erased from without it.
        retained_images: rows that name a thing and a style, neither of them erased.
        implied_images: rows that mean an erased concept by another word ("a kitty"), which their label "called"
            tells; none where the vocabulary has no other word for it.
    """
    phrasings = vocabulary.phrasings["held_out"]
    kept = {
        domain: vocabulary.names(domain, but=[t.name if t.domain == domain else t.within or "" for t in targets])
        for domain in DOMAINS
    }

    def filled(template: str, things: Sequence[str], styles: Sequence[str]) -> Labelled:
        return [
            (prompt, labels)
            for prompt, labels in fill(template, things, styles)
            if (labels.get("thing", ""), labels.get("style", "")) not in vocabulary.held_out_pairs
        ]

    def pairs(template: str, domain: str, own: Sequence[str], others: Sequence[str]) -> Labelled:
        return filled(template, *((own, others) if domain == "thing" else (others, own)))

    named: Labelled = []
    implied: Labelled = []
    elsewhere: Labelled = []
    without: Labelled = []
    for target in targets:
        domain, others = target.domain, kept[OTHER[target.domain]]
        words = next(entry.synonyms for entry in vocabulary.entries(domain) if entry.name == target.name)
        alone = [] if target.within else phrasings[domain]
        for template in (*phrasings["both"], *alone):
            meant = pairs(template, domain, [target.name], [target.within] if target.within else others)
            named += meant
            implied += [
                (say(template, labels | {domain: word}), labels | {"called": word})
                for word in words
                for _, labels in meant
            ]
            if target.within:
                elsewhere += pairs(template, domain, [target.name], others)
                without += pairs(template, domain, kept[domain], [target.within])
    retained = [pair for template in phrasings["both"] for pair in filled(template, kept["thing"], kept["style"])]
    wanted = [(named, target_images), (retained, retained_images), (implied, implied_images)]
    wanted += [(elsewhere, target_images // 2), (without, target_images // 2)]
    chosen = [pair for prompts, n in wanted for pair in spread_evenly(prompts, n)]
    return [PromptRow(i, prompt, FIRST_SEED + i, labels=labels) for i, (prompt, labels) in enumerate(chosen)]


def preview_lines(
    concepts: Sequence[str], vocabulary: Vocabulary | None, columns: int, targets: Sequence[Target] = ()
) -> tuple[list[Line], list[str]]:
    """The preview's rows, and a label for each column.

    A thing is shown across styles, a style across things: the target, three neighbours, then what is
    unrelated (things of other groups; the same things without a style). What `targets` were erased from comes first
    across. Without a vocabulary the
    columns are seeds, and what is unrelated are everyday prompts, without those that name what is erased.
    """
    found = vocabulary.find(concepts[0]) if vocabulary else None
    if vocabulary is None or found is None:
        spared = [text for text in UNRELATED if not any(share_a_word(text, concept) for concept in concepts)]
        texts = [(concept, "target") for concept in concepts] + [(text, "unrelated") for text in spared]
        return [Line(text, role, (text,) * columns) for text, role in texts], [f"seed {i + 1}" for i in range(columns)]
    domain, entry = found
    erased_names = {other[1].name for concept in concepts if (other := vocabulary.find(concept))}
    near = [name for name in vocabulary.neighbours(domain, entry.name) if name not in erased_names]
    first = dict.fromkeys(target.within for target in targets if target.within and target.domain == domain)
    others = evenly_spaced(vocabulary.names(OTHER[domain], but={*erased_names, *first}), max(0, columns - len(first)))
    across = [*first, *others][:columns]
    both, alone = vocabulary.phrasings["held_out"]["both"][0], vocabulary.phrasings["held_out"]["thing"][0]

    def line(name: str, role: str) -> Line:
        pairs = [(name, other) if domain == "thing" else (other, name) for other in across]
        return Line(
            name,
            role,
            tuple(say(both, {"thing": thing, "style": style}) for thing, style in pairs),
        )

    shown = [
        name
        for concept in concepts
        if (other := vocabulary.find(concept)) and other[0] == domain and (name := other[1].name)
    ]
    lines = [*(line(name, "target") for name in shown), *(line(name, "neighbour") for name in near[:3])]
    if domain == "thing":
        lines += [line(name, "unrelated") for name in near[3:][-2:]]
    else:
        lines.append(Line("no style", "unrelated", tuple(say(alone, {"thing": thing}) for thing in across)))
    return lines, across


def share_a_word(prompt: str, concept: str) -> bool:
    """Whether a prompt names the concept or a part of it, in the singular or plural: "a dog" and "brown dogs" do."""

    def words(text: str) -> set[str]:
        return {word.removesuffix("s") for word in re.findall(r"\w+", text.lower()) if word not in JOINING}

    return bool(words(prompt) & words(concept))


def spread_evenly(items: list[Any], n: int) -> list[Any]:
    """n of the items in a fixed shuffled order, each as often as any other give or take one."""
    shuffled = random.Random(0).sample(items, len(items))
    return list(itertools.islice(itertools.cycle(shuffled), n))
