"""What an erased model is asked: prompts for the concept, for what should be left, and by other words."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from esd.analysis.subject import Subject
from esd.errors import UserError
from esd.evaluation.vocabulary import OTHER, Target, Vocabulary

from .leak import Asked


@dataclass(frozen=True)
class Question:
    """Prompts about one erasure.

    Attributes:
        concept: what was erased, as the judge or the checkpoint names it.
        domain: "thing" or "style"; None where the model ships no vocabulary that knows it.
        target: prompts that ask for it.
        retained: prompts that ask for others of its kind that were not erased, as many.
        probed: source to the prompts of a probe that is taught by some words and tested by others: "synonym" is taught
            the name, "name" the synonyms; none where no other word is known.
        pictured: prompts of the pictures of a probe.
    """

    concept: str
    domain: str | None
    target: list[str]
    retained: list[str]
    probed: dict[str, list[Asked]]
    pictured: list[Asked]


def question(
    subject: Subject,
    *,
    concept: str | None = None,
    target: Sequence[str],
    retained: Sequence[str],
    pictures: int,
    inputs: int,
) -> Question:
    """The prompts given, or those that follow from the model's vocabulary and the checkpoint.

    Args:
        subject: with a checkpoint.
        concept: one of those that were erased; None for the first.
        target: prompts that ask for the concept; none for those of the vocabulary.
        retained: prompts that should be left alone; none for those of the vocabulary.
        pictures: prompts of each.
        inputs: of a probe that are of the concept; as many others come beside them.

    Raises:
        UserError: there is no checkpoint; the concept is none that was erased; or prompts lack, and the model ships no
            vocabulary that knows the concept and others of its kind.
    """
    if subject.checkpoint is None:
        raise UserError("checkpoint=null: analysis=erasure looks at an erased model; give checkpoint=runs/NAME")
    concepts = list(subject.checkpoint.provenance["concepts"])
    if concept is not None and concept not in concepts:
        raise UserError(f"erasure.concept={concept}: was not erased; allowed: {', '.join(concepts)}")
    asked = concept or concepts[0]
    known = subject.vocabulary.targets([asked]) if subject.vocabulary else []
    if known and subject.vocabulary:
        erased = {(found.domain, found.name) for found in subject.vocabulary.targets(concepts)}
        found = _known(subject.vocabulary, known[0], erased, pictures, inputs)
    elif target and retained:
        pairs = [(list(target), True), (list(retained), False)]
        shown = [Asked(texts[i % len(texts)], of, i % 2 == 1) for i in range(inputs) for texts, of in pairs]
        found = Question(asked, None, [], [], {}, shown)
    else:
        raise UserError(
            f"the model ships no vocabulary that knows {asked!r}; give erasure.target=[...], prompts that ask "
            "for it, and erasure.retained=[...], prompts that should be left alone"
        )
    if not (retained or found.retained):
        raise UserError(f"every {found.domain} of the vocabulary was erased; give erasure.retained=[...]")
    return replace(
        found, target=_cycle(target or found.target, pictures), retained=_cycle(retained or found.retained, pictures)
    )


def mentions(prompt: str, concept: str) -> bool:
    """Whether a prompt says the concept's name, in these words."""
    return concept.lower() in prompt.lower()


def _known(
    vocabulary: Vocabulary, target: Target, erased: Container[tuple[str, str]], pictures: int, inputs: int
) -> Question:
    """From what the model knows: phrasings that no training used, and others of the kind, those like it first."""
    template = vocabulary.phrasings["held_out"]["both"][0]
    domain, other = target.domain, OTHER[target.domain]
    beside = [name for name in vocabulary.names(other) if (other, name) not in erased] or vocabulary.names(other)
    near = [name for name in vocabulary.neighbours(domain, target.name) if (domain, name) not in erased]
    entry = next(entry for entry in vocabulary.entries(domain) if entry.name == target.name)

    def prompt(name: str, i: int) -> str:
        return template.format(**{domain: name, other: beside[i % len(beside)]})

    def asked(taught: Sequence[str], tested: Sequence[str]) -> list[Asked]:
        """One half of what stands beside the concept and of the others to teach, the other half to test."""
        halves = [(taught, beside[0::2], near[0::2]), (tested, beside[1::2] or beside, near[1::2] or near)]
        made = []
        for i in range(inputs):
            words, places, others = halves[i % 2]
            place = places[i // 2 % len(places)]
            for word, of in ((words[i // 2 % len(words)], True), (others[i // 2 % len(others)], False)):
                made.append(Asked(template.format(**{domain: word, other: place}), of, i % 2 == 1))
        return made

    own, synonyms = [target.name], list(entry.synonyms)
    return Question(
        target.name,
        domain,
        [prompt(target.name, i) for i in range(pictures)],
        [prompt(near[i % len(near)], i) for i in range(pictures)] if near else [],
        {"synonym": asked(own, synonyms), "name": asked(synonyms, own)} if synonyms and near else {},
        asked(own, own) if near else [],
    )


def _cycle(texts: Sequence[str], count: int) -> list[str]:
    return [texts[i % len(texts)] for i in range(count)]
