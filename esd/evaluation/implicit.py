"""Is it gone, or only the word for it? What was erased asked for in other ways, each way with rates of its own.

    named          "a cat in the neon style", as the model was taught to be asked
    paraphrases    the same name, in phrasings that no training used
    synonyms       "a kitty in the neon style"
    hypernyms      "an animal in the neon style": is it still among what comes, and is anything of its kind?
    scenes         "a cat and a rose in the neon style", each half read on its own: is only one of the two gone?

All but paraphrases are phrased as the first is, so that a way differs from it in one thing. Words and phrasings are
the vocabulary's; a style has neither synonyms nor scenes.

Source: kinds, similar words and compositions as ways around an erasure are those of Saha et al. 2025
(arXiv:2508.15124); reading the halves of a scene apart is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from esd.evaluation.erasure import FIRST_SEED, Labelled, spread_evenly
from esd.evaluation.metrics import paired_rate
from esd.evaluation.prompts import PromptRow, fill, say
from esd.evaluation.table import Facts, Row, paired, shows
from esd.evaluation.vocabulary import DOMAINS, OTHER, Entry, Target, Vocabulary

JUDGES = ("emoji-judge", "emoji-halves")  # who reads pictures, and who scenes
BY_NAME = ("named", "paraphrases", "synonyms")  # ways whose prompts are labelled with what they show
WAYS = (*BY_NAME, "hypernyms", "scenes")
SIDES = ("first", "second")  # of a scene, from the left


def rows(vocabulary: Vocabulary, targets: Sequence[Target], n: int) -> list[PromptRow]:
    """n prompts for each way to ask; fewer ways where the vocabulary has no words for one.

    Labels are "way", "concept" (what was erased), what a picture should show, and "called", the word in its place.

    Args:
        vocabulary: of the model.
        targets: what was erased.
        n: prompts for each way, evenly spread over words, phrasings and what stands beside.
    """
    asked: dict[str, Labelled] = {way: [] for way in WAYS}
    erased = {target.name for target in targets}
    for target in targets:
        for way, prompts in _ways(vocabulary, target, erased).items():
            asked[way] += [(prompt, {"way": way, "concept": target.name, **labels}) for prompt, labels in prompts]
    chosen = [pair for prompts in asked.values() for pair in spread_evenly(prompts, n)]
    return [PromptRow(i, prompt, FIRST_SEED + i, labels=labels) for i, (prompt, labels) in enumerate(chosen)]


def _ways(vocabulary: Vocabulary, target: Target, erased: set[str]) -> dict[str, Labelled]:
    """Every prompt of every way to ask for a target, with what it should show."""
    domain, name = target.domain, target.name
    entry = next(entry for entry in vocabulary.entries(domain) if entry.name == name)
    beside = [target.within] if target.within else vocabulary.names(OTHER[domain], but=erased)
    taught, held_out = (vocabulary.phrasings.get(part, {}) for part in ("train", "held_out"))

    def filled(phrasings: Mapping[str, Sequence[str]]) -> list[tuple[str, dict[str, str]]]:
        """(phrasing, labels) of all that names the target, but for pairs that the model never saw."""
        names = ([name], beside) if domain == "thing" else (beside, [name])
        phrased = [*phrasings.get("both", ()), *([] if target.within else phrasings.get(domain, ()))]
        return [
            (phrasing, labels)
            for phrasing in phrased
            for _, labels in fill(phrasing, *names)
            if (labels.get("thing", ""), labels.get("style", "")) not in vocabulary.held_out_pairs
        ]

    def scenes() -> Iterator[tuple[str, dict[str, str]]]:
        for phrasing in taught.get("scene", ()) if domain == "thing" else ():
            for style in beside:
                unseen = {thing for thing, other in vocabulary.held_out_pairs if other == style}
                for other in vocabulary.names("thing", but=erased | unseen) if name not in unseen else ():
                    for pair in ((name, other), (other, name)):
                        labels = {**dict(zip(SIDES, pair, strict=True)), "style": style}
                        yield say(phrasing, labels), labels

    plain = filled(taught)
    return {
        "named": [(say(phrasing, labels), labels) for phrasing, labels in plain],
        "paraphrases": [(say(phrasing, labels), labels) for phrasing, labels in filled(held_out)],
        "synonyms": [
            (say(phrasing, labels | {domain: word}), labels | {"called": word})
            for phrasing, labels in plain
            for word in entry.synonyms
        ],
        "hypernyms": [  # which bring their own article
            (
                say(phrasing.replace("a {thing}", "{thing}"), labels | {domain: kind}),
                {"called": kind} | {key: value for key, value in labels.items() if key != domain},
            )
            for phrasing, labels in plain
            for kind in entry.hypernyms
            if "a {thing}" in phrasing
        ],
        "scenes": list(scenes()),
    }


def rates(table: Sequence[Row], facts: Facts, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """Of each way to ask, how often what was erased is drawn, before and after.

    Args:
        table: rows of images.csv, of `rows`; images that either model lacks are left out for both.
        facts: of `JUDGES`, with their thresholds.
        vocabulary: of the model.

    Returns:
        The ways asked, "hypernyms_kind", anything of the kind that was asked for, and "scenes_other", the other thing
        of a scene in its half. Each as `esd.evaluation.metrics.paired_rate` has it.
    """
    known = {entry.name: (domain, entry) for domain in DOMAINS for entry in vocabulary.entries(domain)}
    hits: dict[str, list[tuple[bool, bool]]] = {}
    for before, after in paired(table):
        for name, judge, question, answers in _looked_for(before, known):
            least = facts[judge]["threshold"] if question in facts[judge]["unsure"] else 0.0
            found = [any(shows(row, f"{judge}.{question}", least, one) for one in answers) for row in (before, after)]
            hits.setdefault(name, []).append((found[0], found[1]))
    return {
        name: paired_rate(sum(one for one, _ in pairs), sum(two for _, two in pairs), len(pairs))
        for name, pairs in hits.items()
    }


def _looked_for(row: Row, known: Mapping[str, tuple[str, Entry]]) -> Iterator[tuple[str, str, str, Collection[str]]]:
    """(rate, judge, question, answers that count) of all that is looked for in a picture."""
    way, concept = row["label.way"], row["label.concept"]
    if way == "scenes":
        own, other = SIDES if row["label.first"] == concept else SIDES[::-1]
        yield "scenes", JUDGES[1], own, [concept]
        yield "scenes_other", JUDGES[1], other, [row[f"label.{other}"]]
        return
    domain, entry = known[concept]
    yield way, JUDGES[0], domain, [concept]
    if way == "hypernyms":
        kind = [name for name, (_, other) in known.items() if other.group == entry.group]
        yield "hypernyms_kind", JUDGES[0], domain, kind
