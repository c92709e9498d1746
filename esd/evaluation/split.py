"""Which prompts ask for what was erased, and who says whether it is shown: what rates before and after hang on.

A model with a vocabulary says what a concept is; of any other, the labels of the prompts do: a column whose values a
judge answers with, such as "class", one of them the concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esd.evaluation.erasure import known_targets
from esd.evaluation.judges import Judge
from esd.evaluation.table import Row, erasure, same_name
from esd.evaluation.vocabulary import DOMAINS, Target, Vocabulary


@dataclass(frozen=True)
class Split:
    """What was erased, in the words of one judge and of the prompts' labels.

    Attributes:
        judge: that reads it; None where none does.
        targets: what was erased; the domain of each is the judge's question, such as "thing" or "class".
        reason: why no rate can be had; None where there are targets.
    """

    judge: Judge | None
    targets: Sequence[Target]
    reason: str | None

    def asking(self, labels: Sequence[Mapping[str, str]]) -> int:
        """How many of the prompts with these labels ask for what was erased, by its name."""
        return sum("called" not in own and any(target.meant(own) for target in self.targets) for own in labels)

    def rates(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """`esd.evaluation.table.erasure` by the judge, with its threshold in `facts`; None where there is no rate."""
        if self.judge is None or not self.targets:
            return None
        return erasure(rows, self.judge.name, facts[self.judge.name]["threshold"] or 0.0, self.targets)


def split(
    concepts: Sequence[str],
    erase_from: Sequence[str],
    vocabulary: Vocabulary | None,
    judges: Sequence[Judge],
    labels: Mapping[str, Sequence[str]],
) -> Split:
    """The split of some prompts; by their labels where the model has no vocabulary.

    Args:
        concepts: what was erased.
        erase_from: () or what each was erased from.
        vocabulary: of the model, or None.
        judges: that read the pictures; the first that fits is taken.
        labels: of the prompts, each with the values that it has.
    """
    if not concepts:
        return Split(None, [], "the checkpoint does not say what it erased")
    if vocabulary is not None:
        judge = next((judge for judge in judges if set(DOMAINS) <= set(judge.questions)), None)
        return Split(judge, *known_targets(concepts, vocabulary, judge, erase_from))
    lacking = "the model ships no vocabulary.json"
    if erase_from:
        return Split(None, [], f"{lacking} that tells what {concepts[0]!r} and {erase_from[0]!r} have in common")
    read = {question: values for judge in judges for question in judge.questions if (values := labels.get(question))}
    for judge in judges:
        for question in judge.questions:
            values = labels.get(question, ())
            named = [value for value in values if any(same_name(judge, concept, value) for concept in concepts)]
            if named:
                return Split(judge, [Target(question, value) for value in named], None)
    wanted = " or ".join(map(repr, concepts))
    if not read:
        return Split(None, [], f"{lacking}, and no judge reads a label of the prompts, such as a column class")
    seen = ", ".join(f"{question} ({', '.join([*values][:3])}, ...)" for question, values in read.items())
    return Split(None, [], f"{lacking}, and no prompt is labelled {wanted} under what the judges read: {seen}")
