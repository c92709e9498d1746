"""What an erased model is asked: prompts for the concept, for what should be left, and by other words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        retained: prompts that ask for others of its kind, as many.
        probed: source ("name", "synonym") to the prompts of its probe.
    """

    concept: str
    domain: str | None
    target: list[str]
    retained: list[str]
    probed: dict[str, list[Asked]]


def question(
    subject: Subject, *, target: Sequence[str], retained: Sequence[str], pictures: int, inputs: int
) -> Question:
    """The prompts given, or those that follow from the model's vocabulary and the checkpoint.

    Args:
        subject: with a checkpoint.
        target: prompts that ask for the concept; none for those of the vocabulary.
        retained: prompts that should be left alone; none for those of the vocabulary.
        pictures: prompts of each.
        inputs: of a probe that are of the concept; as many others come beside them.

    Raises:
        UserError: there is no checkpoint; or the model ships no vocabulary that knows the concept, and prompts lack.
    """
    if subject.checkpoint is None:
        raise UserError("checkpoint=null: analysis=erasure looks at an erased model; give checkpoint=runs/NAME")
    concepts = list(subject.checkpoint.provenance["concepts"])
    known = subject.vocabulary.targets(concepts) if subject.vocabulary else []
    if known and subject.vocabulary:
        found = _known(subject.vocabulary, known[0], pictures, inputs)
    elif target and retained:
        pairs = [(list(target), True), (list(retained), False)]
        asked = [Asked(texts[i % len(texts)], of, i % 2 == 1) for i in range(inputs) for texts, of in pairs]
        found = Question(concepts[0], None, [], [], {"name": asked})
    else:
        raise UserError(
            f"the model ships no vocabulary that knows {concepts[0]!r}; give erasure.target=[...], prompts that ask "
            "for it, and erasure.retained=[...], prompts that should be left alone"
        )
    return Question(
        found.concept, found.domain, _cycle(target or found.target, pictures),
        _cycle(retained or found.retained, pictures), found.probed,
    )  # fmt: skip


def mentions(prompt: str, concept: str) -> bool:
    """Whether a prompt says the concept's name, in these words."""
    return concept.lower() in prompt.lower()


def _known(vocabulary: Vocabulary, target: Target, pictures: int, inputs: int) -> Question:
    """From what the model knows: phrasings that no training used, and others of the kind, those like it first."""
    template = vocabulary.phrasings["held_out"]["both"][0]
    domain, other = target.domain, OTHER[target.domain]
    beside = vocabulary.names(other)
    near = vocabulary.neighbours(domain, target.name)
    entry = next(entry for entry in vocabulary.entries(domain) if entry.name == target.name)

    def prompt(name: str, i: int) -> str:
        return template.format(**{domain: name, other: beside[i % len(beside)]})

    def asked(words: Sequence[str]) -> list[Asked]:
        """Trained on one half of what stands beside the concept and of the others, tested on the other half."""
        halves = [(beside[0::2], near[0::2]), (beside[1::2], near[1::2])]
        made = []
        for i in range(inputs):
            places, others = halves[i % 2]
            place = places[i // 2 % len(places)]
            for word, of in ((words[i // 2 % len(words)], True), (others[i // 2 % len(others)], False)):
                made.append(Asked(template.format(**{domain: word, other: place}), of, i % 2 == 1))
        return made

    return Question(
        target.name,
        domain,
        [prompt(target.name, i) for i in range(pictures)],
        [prompt(near[i % len(near)], i) for i in range(pictures)],
        {"name": asked([target.name])} | ({"synonym": asked(entry.synonyms)} if entry.synonyms else {}),
    )


def _cycle(texts: Sequence[str], count: int) -> list[str]:
    return [texts[i % len(texts)] for i in range(count)]
